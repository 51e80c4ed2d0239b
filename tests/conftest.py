"""Eight virtual CPU devices for every test, set before anything imports JAX."""

import copy
import gc
import hashlib
import os
import shutil
import uuid
from pathlib import Path

MOST_CACHED = 1 << 30  # bytes of compiled programs, before all are removed

# The tests' programs are tiny and run for a few steps, so compiling them costs more than running
# them: XLA's optimizer off halves that.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests train the same step: compile it once, for all of pytest-xdist's workers, for the
# processes that tests start, and for the next session. JAX's keys tell versions and flags apart.
CACHE = Path(__file__).parents[1] / ".cache/jax"
if "PYTEST_XDIST_WORKER" not in os.environ and CACHE.is_dir():
    size = sum(path.stat().st_size for path in CACHE.iterdir())
    if size > MOST_CACHED:
        shutil.rmtree(CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# What tests start in other processes finds the same package and helpers.
os.environ["PYTHONPATH"] = f"{Path(__file__).parent / 'fixtures'}:{Path(__file__).parents[1]}"

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from buckets import environment, faults, served  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from llasa_jax.demo.tiny_llama import make_tiny_tokenizer  # noqa: E402
from llasa_jax.speech.prompts import Prompter  # noqa: E402

# On busy cores, OpenMP's waiting threads make a minute of a second.
torch.set_num_threads(1)

_tokenizers: dict[tuple, tuple[int, object]] = {}


def _once(cls):
    """`cls.from_pretrained`, once for the same files: 66,000 tokens take two seconds."""
    read = cls.from_pretrained

    def read_once(folder, **options):
        if not Path(folder).is_dir():
            return read(folder, **options)
        files = [path for path in Path(folder).iterdir() if path.suffix in {".json", ".jinja"}]
        digest = hashlib.blake2b(repr(options).encode())
        for path in sorted(files):
            digest.update(path.name.encode() + path.read_bytes())
        key = cls, digest.hexdigest()
        size, tokenizer = _tokenizers.get(key, (-1, None))
        if tokenizer is None or len(tokenizer) != size:  # or a test has added tokens to it
            tokenizer = read(folder, **options)
            _tokenizers[key] = len(tokenizer), tokenizer
        tokenizer = copy.copy(tokenizer)
        tokenizer.name_or_path = str(folder)
        return tokenizer

    cls.from_pretrained = read_once


_once(AutoTokenizer)
# Not the class itself, which others derive from and AutoTokenizer calls.
transformers.PreTrainedTokenizerFast = type(
    "TokenizersBackend", (transformers.PreTrainedTokenizerFast,), {}
)
_once(transformers.PreTrainedTokenizerFast)


@pytest.fixture(scope="session")
def tokenizer():
    """Llama-3-shaped, with the speech tokens. Not to be changed: all tests share it."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def prompter(tokenizer):
    return Prompter(tokenizer)


@pytest.fixture(scope="session")
def gs_store(tmp_path_factory):
    """A store for gs:// paths, here and in the processes that tests start."""
    with served("gs", tmp_path_factory.mktemp("store")) as address:
        found = environment("gs", address)
        os.environ.update(found)
        yield
        for name in found:
            del os.environ[name]


@pytest.fixture
def bucket(gs_store, tmp_path, monkeypatch):
    """A folder of its own in a bucket, and copies of what is read there in `tmp_path`."""
    monkeypatch.setenv("LLASA_JAX_CACHE", str(tmp_path / "copies"))
    yield f"gs://bucket/{uuid.uuid4().hex}"
    faults({})


# Files whose tests train, compile for TPUs, start processes or load many models, the longest first,
# which is the order in which they run. They have more than ten seconds of work each, and `make
# check` leaves them out. Single tests elsewhere are marked where they stand.
SLOW = (
    "test_end_to_end.py",
    "train/test_many_hosts.py",
    "runtime/test_hosts.py",
    "train/test_train.py",
    "train/test_train_step.py",
    "convert/test_peft_adapter.py",
    "encode/test_online.py",
    "faults/test_killed.py",
    "convert/test_open_model.py",
    "encode/test_online_process.py",
    "generate/test_generate.py",
    "generate/test_speaker.py",
    "generate/test_rows.py",
    "generate/test_search.py",
    "codec/test_jax_device.py",
    "evaluate/test_command.py",
    "evaluate/test_training.py",
    "convert/test_model_in_bucket.py",
    "train/test_run_in_bucket.py",
    "encode/test_audio_in_bucket.py",
    "runtime/test_storage_s3.py",
    "evaluate/test_scorers.py",
    "plan/test_plan.py",
    "model/test_quantize.py",
    "model/test_lora.py",
    "model/test_model.py",
    "model/test_sharding.py",
    "codec/test_jax_codec.py",
    "codec/test_jax_parts.py",
    "encode/test_encode.py",
    "train/test_crash.py",
    "train/test_checkpoint.py",
    "train/test_finetune.py",
    "train/test_golden.py",
    "convert/test_convert_programs.py",
    "convert/test_convert_speech.py",
    "convert/test_convert.py",
    "codec/test_codec.py",
    "codec/test_codec_original.py",
    "codec/test_jax_original.py",
    "data/test_import_codes.py",
    "encode/test_audio_tables.py",
    "encode/test_journal.py",
    "faults/test_damage.py",
    "train/test_run_folder.py",
    "runtime/test_channel.py",
    "runtime/test_signals.py",
    "speech/test_audio_files.py",
    "test_upstream.py",
)


def pytest_collection_modifyitems(items):
    root = Path(__file__).parent
    missing = [name for name in SLOW if not (root / name).is_file()]
    assert not missing, f"tests/conftest.py lists slow files that do not exist: {missing}"
    order = {name: number for number, name in enumerate(SLOW)}
    # xdist gives out whole files in this order: a long one at the end would run alone.
    items.sort(key=lambda item: order.get(item.path.relative_to(root).as_posix(), len(SLOW)))
    for item in items:
        if item.path.relative_to(root).as_posix() in order:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Garbage collection took a third of some files' time: 66,000 tokens are as many objects, and
    what is imported is 700,000. Those stay, so no pass walks them, and passes are rarer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
