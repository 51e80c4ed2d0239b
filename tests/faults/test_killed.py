"""Every import, killed at many of its file operations: the same command, given again, ends well,
leaves nothing behind, and given once more says that it is done.
"""

import subprocess
import sys

import numpy as np
import pytest
from killed import importer
from places import FIXTURES
from reference import hf_llama

from llasa_jax.data.builder import open_dataset
from llasa_jax.data.seal import SEAL
from llasa_jax.errors import UserError
from llasa_jax.speech.vocab import SpeechVocab

pytestmark = pytest.mark.slow
CODES = [np.random.default_rng(i).integers(0, 65_536, 30 + i).astype(np.int32) for i in range(6)]


@pytest.fixture
def codes(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    for i, clip in enumerate(CODES):
        np.save(tmp_path / f"in/clip{i}.npy", clip)
    np.save(tmp_path / "in/extra.npy", [1])
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"clip{i}|What clip {i} says.\n" for i in range(6)))
    return texts


@pytest.fixture
def memmap(tmp_path, tokenizer):
    """Rows as upstream's get_memmap_from_token.py writes them."""
    vocab = SpeechVocab.of(tokenizer)
    rows = np.full((6, 96), tokenizer.convert_tokens_to_ids("<|eot_id|>"), np.int32)
    for row, clip in zip(rows, CODES, strict=True):
        text = tokenizer.encode("what it says", add_special_tokens=False)
        names = ("TEXT_UNDERSTANDING_START", "TEXT_UNDERSTANDING_END", "SPEECH_GENERATION_START")
        start, end, speech = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
        ids = [start, *text, end, speech, *vocab.ids_of(clip), vocab.speech_end]
        row[: len(ids)] = ids
    (tmp_path / "in").mkdir()
    rows.tofile(tmp_path / "in/train_input_ids.memmap")
    np.save(tmp_path / "in/train_input_ids_shape.npy", rows.shape)
    return "-"


@pytest.fixture
def table(tmp_path):
    import datasets

    rows = {"codes": CODES, "text": [f"what {i} says" for i in range(5)] + [""]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "in")
    return "codes=codes,text=text"


@pytest.fixture
def model(tmp_path, tokenizer):
    hf_llama(vocab=len(tokenizer)).save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    return "-"


def content(out):
    """The records of a dataset, the bytes of a model's folder."""
    if (out / SEAL).is_file():
        return sorted(map(repr, open_dataset(out, "train")))
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return {
        name: (out / name).read_bytes()
        for name in names
        # What names the process that wrote it, or when
        if "ocdbt" not in name and "METADATA" not in name
    }


@pytest.mark.parametrize(
    "kind",
    [
        "codes",
        pytest.param("memmap", marks=pytest.mark.soak),
        pytest.param("table", marks=pytest.mark.soak),
        "model",
    ],
)
def test_killed_at_any_moment_the_same_command_ends_well(kind, tmp_path, request, capsys):
    source, beside = tmp_path / "in", request.getfixturevalue(kind)
    outs = [tmp_path / f"{calls}" / "d" for calls in (0, *range(2, 30, 7), 10_000)]
    program = [sys.executable, FIXTURES / "killed.py", kind, source, beside, *outs]
    done = subprocess.run([*map(str, program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("status ")]
    assert killed[0] == "9"
    assert killed.count("9") >= 3
    assert killed[-1] == "0"
    run, wanted = importer(kind), content(outs[-1])
    assert wanted
    for out in outs:
        run(source, beside, out)
        assert content(out) == wanted
        assert {path.name for path in out.parent.iterdir()} <= {"d", "d.bad.jsonl"}
        capsys.readouterr()
        run(source, beside, out)
        assert "done already" in capsys.readouterr().out


def test_a_model_that_is_there_may_be_that_of_other_input(tmp_path, model, tokenizer):
    run = importer("model")
    run(tmp_path / "in", "-", tmp_path / "out")
    hf_llama(vocab=len(tokenizer), initializer_range=0.5).save_pretrained(tmp_path / "in")
    with pytest.raises(UserError, match="already exists"):
        run(tmp_path / "in", "-", tmp_path / "out")
