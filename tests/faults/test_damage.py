"""Every kind of file, damaged at random places: each outcome is one sentence, or the same result.

Cases are seeded and run in this one process. A case changes one file of a whole folder, reads the
folder as the commands do, and puts the file back. A `UserError` or an `OSError` is a sentence, for
the command line prints nothing else of either; any other exception would be a traceback.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from places import SPEECH
from reference import hf_llama
from tiny_run import make_clips, make_model, settings_for

from llasa_jax.convert.model_folder import load_params, load_tokenizer, open_model, saved_steps
from llasa_jax.convert.peft_adapter import open_adapter
from llasa_jax.data.builder import open_dataset, read_metadata, split_sizes, write_dataset
from llasa_jax.data.conversations import Conversations
from llasa_jax.data.manifest import read_manifest
from llasa_jax.data.records import record_of
from llasa_jax.encode.journal import JOURNAL, Journal
from llasa_jax.encode.sources import ManifestAudio
from llasa_jax.errors import UserError
from llasa_jax.model.sharding import make_mesh
from llasa_jax.speech.audio import audio_samples, read_audio
from llasa_jax.train.loop import train
from llasa_jax.train.parsing import parse_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # a damaged file may also be warned of


def flip(data: bytes, rng) -> bytes:
    """One bit."""
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]


def zero(data: bytes, rng) -> bytes:
    """A run of zeros, as an unwritten block of a disk."""
    at = int(rng.integers(len(data)))
    length = min(int(rng.integers(1, 512)), len(data) - at)
    return data[:at] + bytes(length) + data[at + length :]


def cut(data: bytes, rng) -> bytes:
    """The beginning alone, as after a full disk."""
    return data[: int(rng.integers(len(data)))]


def scramble(data: bytes, rng) -> bytes:
    """A run of random bytes."""
    at = int(rng.integers(len(data)))
    run = rng.bytes(min(64, len(data) - at))
    return data[:at] + run + data[at + len(run) :]


def swap_words(data: bytes, rng) -> bytes:
    """A text file whose value has another type: a number for a string, a list for a number."""
    words = [b"1", b'"1"', b"[1]", b"null", b"true", b"-1", b"1e999", b"{}"]
    at = data.find(b":", int(rng.integers(len(data))))
    end = min((i for i in (data.find(c, at) for c in (b",", b"\n", b"}")) if i > at), default=at)
    word = words[int(rng.integers(len(words)))]
    return data[: at + 1] + b" " + word + data[end:] if at >= 0 else flip(data, rng)


BYTES = (flip, zero, cut, scramble)
TEXT = (*BYTES, swap_words)


def outcomes(files, read, kinds, cases: int, seed: int, *, exact: bool = True) -> Counter:
    """Damages a random one of `files` in each case and counts what `read()` then does: "sentence",
    "same", or a description of what must not be.

    With `exact`, whatever is read must equal what the whole files give; without, it may be any
    value, for the format has nothing by which damage could be seen.
    """
    files, rng, counts = sorted(files), np.random.default_rng(seed), Counter()
    assert files
    whole = read()
    for case in range(cases):
        path = files[int(rng.integers(len(files)))]
        kind = kinds[int(rng.integers(len(kinds)))]
        data = path.read_bytes()
        if not data:
            continue
        path.write_bytes(kind(data, rng))
        try:
            found = read()
            same = not exact or jax.tree.all(jax.tree.map(np.array_equal, found, whole))
            counts["same" if same else f"SILENT: case {case}, {kind.__name__} of {path}"] += 1
        except (UserError, OSError) as error:
            one_line = str(error).strip() and "\n" not in str(error).strip()
            counts["sentence" if one_line else f"NO SENTENCE: {error!r} for {path}"] += 1
        except Exception as error:  # noqa: BLE001 a traceback is what the test looks for
            counts[f"TRACEBACK: case {case}, {kind.__name__} of {path.name}: {error!r:.200}"] += 1
        finally:
            path.write_bytes(data)
    return counts


def check(counts: Counter, most_same: float = 1.0) -> None:
    """No silent outcome and no traceback. At least `1 - most_same` of the cases was noticed, so
    that a reader which looks at nothing fails.
    """
    wrong = [outcome for outcome in counts if outcome not in ("same", "sentence")]
    print(f"{counts.total()} cases: {counts['sentence']} sentences, {counts['same']} the same")
    assert not wrong, "\n".join(wrong)
    assert counts["same"] <= most_same * counts.total()


def files_of(folder: Path, pattern: str = "**/*") -> list[Path]:
    return [path for path in folder.glob(pattern) if path.is_file()]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("damage") / "model")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("damage") / "run"
    settings = settings_for(model, out, train={"steps": 2, "save_every": 1})
    train(settings, [make_clips()])
    return out


def test_weights_of_a_model(model, mesh):
    def read():
        return load_params(model, mesh, np.float32)

    # Orbax writes some files that nothing reads again.
    check(outcomes(files_of(model / "params"), read, BYTES, 60, 1), 0.7)


def test_description_and_tokenizer_of_a_model(model):
    def describe():
        return repr(open_model(model).config)

    check(outcomes([model / "model.json"], describe, TEXT, 60, 2))

    def tokenize():
        return load_tokenizer(model)("Hello there.").input_ids

    # A tokenizer's files come from Hugging Face and have no checksum: a flip may rename a token.
    check(outcomes(files_of(model / "hf"), tokenize, TEXT, 12, 2, exact=False))


def test_weights_of_a_run(run, mesh):
    latest = run / "checkpoints" / str(saved_steps(run)[-1])

    def read():
        return load_params(run, mesh, np.float32)

    files = files_of(latest / "params") + files_of(latest / "about")
    check(outcomes(files, read, BYTES, 60, 3), 0.7)


@pytest.mark.soak
def test_a_run_that_goes_on(model, run, tmp_path):
    """Whatever is damaged in the newest checkpoint, training goes on from a whole one and ends with
    the same weights, or says why it does not.
    """
    clips = make_clips()

    def goes_on(folder):
        settings = settings_for(model, folder, train={"steps": 2, "save_every": 1})
        train(settings, [clips])
        return load_params(folder, make_mesh(1, 1, 1, devices=jax.devices()[:1]), np.float32)

    whole, rng = goes_on(run), np.random.default_rng(4)
    counts = Counter()
    for case in range(8):
        folder = tmp_path / f"run{case}"
        shutil.copytree(run, folder)
        paths = sorted(files_of(folder / "checkpoints/2"))
        path = paths[int(rng.integers(len(paths)))]
        kind = BYTES[case % len(BYTES)]
        path.write_bytes(kind(path.read_bytes() or b"\0", rng))
        try:
            same = jax.tree.all(jax.tree.map(np.array_equal, goes_on(folder), whole))
            counts["same" if same else f"SILENT: {kind.__name__} of {path}"] += 1
        except (UserError, OSError):
            counts["sentence"] += 1
        shutil.rmtree(folder)
    check(counts)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("damage") / "dataset"
    rows = [record_of(clip, clip.codes) for clip in make_clips(30)]
    metadata = {"codec": "tiny", "fingerprint": "f", "hop": "320", "sample_rate": "16000"}
    write_dataset(out, {"train": rows[:20], "validation": rows[20:]}, metadata)
    return out


def test_datasets(dataset):
    def read():
        records = {
            split: {str(i): record for i, record in enumerate(open_dataset(dataset, split))}
            for split in split_sizes(dataset)
        }
        return records | {"metadata": {"fingerprint": read_metadata(dataset)["fingerprint"]}}

    records = [path for path in files_of(dataset) if ".array_record" in path.name]
    check(outcomes(records, read, BYTES, 60, 5))
    texts = [path for path in files_of(dataset) if path.suffix == ".json"]
    # What the metadata says has no second owner to compare it with.
    check(outcomes(texts, read, TEXT, 60, 6, exact=False))


def test_the_journal(tmp_path):
    lines = (SPEECH / "manifest.jsonl").read_text().splitlines()[:8]
    for line in lines:
        shutil.copy(SPEECH / json.loads(line)["audio"], tmp_path)
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    source = ManifestAudio(tmp_path / "m.jsonl")
    codes = [np.arange(100, dtype=np.uint16) + i for i in range(8)]
    with Journal(tmp_path / "j", source, "f") as journal:
        journal.put(list(enumerate(codes)))
    counts, rng, path = Counter(), np.random.default_rng(7), tmp_path / "j" / JOURNAL
    whole = path.read_bytes()
    for case in range(80):
        kind = BYTES[int(rng.integers(len(BYTES)))]
        path.write_bytes(kind(whole, rng))
        try:
            with Journal(tmp_path / "j", source, "f") as journal:
                found = [journal.get(i) for i in range(8)]
            # A lost clip is encoded again; a wrong code would go into the dataset.
            right = all(c is None or np.array_equal(c, codes[i]) for i, c in enumerate(found))
            counts["same" if right else f"SILENT: case {case}, {kind.__name__}"] += 1
        except (UserError, OSError):
            counts["sentence"] += 1
        except Exception as error:  # noqa: BLE001 a traceback is what the test looks for
            counts[f"TRACEBACK: case {case}, {kind.__name__}: {error!r:.200}"] += 1
        for rest in path.parent.iterdir():
            rest.unlink()
    check(counts)


def test_hugging_face_checkpoints(tmp_path, mesh):
    folder = tmp_path / "hf"
    hf_llama().save_pretrained(folder)
    config = open_model(folder).config
    weights = folder / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8

    def read():
        return load_params(folder, mesh, np.float32)

    def in_header(kind):
        def damage(data, rng):
            return kind(data[:header], rng) + (b"" if kind is cut else data[header:])

        damage.__name__ = kind.__name__
        return damage

    # The format has no checksum: a changed byte of a weight, or of a tensor's name, dtype or shape
    # that still makes a whole file, is another checkpoint. `verify` compares it with its source.
    kinds = tuple(map(in_header, BYTES))
    check(outcomes([weights], read, kinds, 50, 8, exact=False))
    texts = [path for path in files_of(folder) if path.suffix == ".json"]

    def describe():
        return {"layers": open_model(folder).config.num_hidden_layers}

    assert describe() == {"layers": config.num_hidden_layers}
    check(outcomes(texts, describe, TEXT, 40, 9, exact=False))


def test_adapters(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    hf = hf_llama(vocab=open_model(model).config.vocab_size)
    adapter = get_peft_model(hf, LoraConfig(r=4, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "peft")

    def read():
        return open_adapter(tmp_path / "peft", model).config.rank

    files = [path for path in files_of(tmp_path / "peft") if path.name != "README.md"]
    check(outcomes(files, read, TEXT, 50, 10, exact=False))


RECIPE = """\
out: run
model:
  path: model
  dtype: bfloat16
data:
  sources:
    - path: a
      weight: 0.5
    - path: b
      prompt: {task: asr}
optimizer:
  learning_rate: 1.0e-4
  clip: 1.0
lora: {rank: 8, targets: [q, v]}
train: {steps: 10, rows: 8}
"""


def test_recipes(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)

    def read():
        return parse_settings([f"--config={path}"]).train.rows

    check(outcomes([path], read, TEXT, 80, 11, exact=False))


def test_manifests_and_conversations(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join((SPEECH / "manifest.jsonl").read_text().splitlines()[:6]) + "\n")
    table = tmp_path / "metadata.csv"
    table.write_text("one|The first.\ntwo|The second line.\nthree|A third one.\n")
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    chat.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))

    def read():
        read_manifest(manifest)
        read_manifest(table)
        for conversation in Conversations(chat):
            assert conversation.messages
        return 0

    check(outcomes([manifest, table, chat], read, TEXT, 90, 12, exact=False))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.au"])
def test_audio(name, tmp_path):
    wave, rate = soundfile.read(SPEECH / "ada_02.flac")
    soundfile.write(tmp_path / name, wave[: rate * 2], rate)

    def read():
        # A longer clip than planned would not fit its place in the batch.
        found, planned = read_audio(tmp_path / name), audio_samples(tmp_path / name)
        assert np.isfinite(found).all()
        if len(found) != planned:
            raise UserError("the length is not the one that the header says")  # as the encoder does
        return 0

    check(outcomes([tmp_path / name], read, BYTES, 25, 13, exact=False))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{\x00}\x00", b"[" * 100_000, b"{}", b"null", b"1" * 6000, b'{"a": NaN}', b"\0"],
)
def test_small_files_of_the_wrong_kind(content, tmp_path, model):
    """Each small JSON file, replaced whole."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)

    def read():
        open_model(folder)
        load_tokenizer(folder)

    for path in (folder / "model.json", folder / "hf/tokenizer.json"):
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError):
            read()
        path.write_bytes(whole)
