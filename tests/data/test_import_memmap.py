"""Upstream's memmap files come in row by row; rows are put together here as its
get_memmap_from_token.py does.
"""

import json

import numpy as np
import pytest

from llasa_jax.cli import main
from llasa_jax.data.builder import read_metadata
from llasa_jax.data.import_memmap import _open, _utterances, import_memmap
from llasa_jax.data.records import open_utterances
from llasa_jax.demo.tiny_llama import make_tiny_tokenizer
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.vocab import SpeechVocab

LENGTH = 96
TEXTS = [
    "the quick brown fox",
    "  said nothing, else.",
    "Ünï 日本 \U0001f600",
    "jumps over\nthe lazy dog",
]


def a_row(tokenizer, text, codes, text_ids=None):
    """One of upstream's rows: cut at LENGTH, or filled up with <|eot_id|>."""

    def at(name):
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    text_ids = tokenizer.encode(text, add_special_tokens=False) if text_ids is None else text_ids
    row = [at("TEXT_UNDERSTANDING_START"), *text_ids, at("TEXT_UNDERSTANDING_END")]
    row += [
        at("SPEECH_GENERATION_START"),
        *(at(f"s_{code}") for code in codes),
        at("SPEECH_GENERATION_END"),
    ]
    return (row + [at("eot_id")] * LENGTH)[:LENGTH]


def write(folder, split, rows):
    folder.mkdir(exist_ok=True)
    rows = np.array(rows, np.int32)
    rows.tofile(folder / f"{split}_input_ids.memmap")
    np.save(folder / f"{split}_input_ids_shape.npy", rows.shape)


@pytest.fixture
def good(tokenizer):
    rng = np.random.default_rng(0)
    return [(TEXTS[i % 4], rng.integers(0, 65_536, 20 + i)) for i in range(12)]


def test_texts_and_codes_come_back(tmp_path, tokenizer, good, capsys):
    write(tmp_path / "in", "train", [a_row(tokenizer, *clip) for clip in good[:9]])
    write(tmp_path / "in", "val", [a_row(tokenizer, *clip) for clip in good[9:]])
    result = import_memmap(tmp_path / "in", tmp_path / "out", tokenizer, codec_name="xcodec2")
    assert (result.splits, result.bad, result.excused, result.noted) == (
        {"train": 9, "validation": 3},
        0,
        0,
        0,
    )
    assert result.hours == pytest.approx(sum(len(codes) for _, codes in good) / 50 / 3600)
    assert read_metadata(tmp_path / "out")["codec"] == "xcodec2"
    assert not (tmp_path / "out.bad.jsonl").exists()
    prompter = Prompter(tokenizer)
    for split, clips in (("train", good[:9]), ("val", good[9:])):
        records = {
            u.id: u
            for u in open_utterances(tmp_path / "out", {"val": "validation"}.get(split, split))
        }
        assert sorted(records) == [f"{split}_{i:08d}" for i in range(len(clips))]
        for i, (text, codes) in enumerate(clips):
            utterance = records[f"{split}_{i:08d}"]
            assert utterance.text == text
            np.testing.assert_array_equal(utterance.codes, codes)
            # What we train on holds upstream's very ids.
            tokens = " ".join(map(str, prompter.example(utterance).tokens))
            row = a_row(tokenizer, text, codes)
            speech = row.index(prompter.vocab.speech_start)
            end = row.index(prompter.vocab.speech_end) + 1
            assert " ".join(map(str, row[:speech])) in tokens
            assert " ".join(map(str, row[speech:end])) in tokens


def test_cut_rows_are_left_out_and_counted(tmp_path, tokenizer, good, capsys):
    long = ("the lazy dog", np.arange(200))
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    rows = [
        *(a_row(tokenizer, *clip) for clip in good),
        a_row(tokenizer, *long),
        a_row(tokenizer, "words " * 200, [1]),
    ]
    rows.append(a_row(tokenizer, "", [1, 2], text_ids=spelled))
    write(tmp_path / "in", "train", rows)
    result = import_memmap(tmp_path / "in", tmp_path / "out", tokenizer)
    assert (result.splits, result.bad, result.excused, result.noted) == ({"train": 13}, 0, 2, 1)
    notes = [json.loads(line) for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    assert [(note["id"], note.get("kept", False)) for note in notes] == [
        ("train_00000012", False),
        ("train_00000013", False),
        ("train_00000014", True),
    ]
    assert "cut" in notes[0]["reason"]
    assert "other ids" in notes[2]["reason"]
    assert "2 cut" in capsys.readouterr().out

    kept = import_memmap(tmp_path / "in", tmp_path / "kept", tokenizer, keep_cut=True)
    assert (kept.splits, kept.excused) == ({"train": 14}, 1)
    (cut,) = [u for u in open_utterances(tmp_path / "kept", "train") if u.id == "train_00000012"]
    np.testing.assert_array_equal(cut.codes, np.arange(len(cut.codes)))
    assert len(cut.codes) == LENGTH - 3 - len(tokenizer.encode(long[0], add_special_tokens=False))


def test_rows_that_are_none_of_upstreams(tmp_path, tokenizer, good):
    vocab = SpeechVocab.of(tokenizer)
    rows = [a_row(tokenizer, *clip) for clip in good]
    rows[0][0] = 5
    rows[1][rows[1].index(vocab.speech_end) - 1] = 7
    rows[2][rows[2].index(vocab.speech_end) + 1] = vocab.speech_end
    rows[3] = a_row(tokenizer, "the fox", [])
    write(tmp_path / "in", "train", rows)
    with pytest.raises(UserError, match="4 of 12 rows of the split 'train' are bad"):
        import_memmap(tmp_path / "in", tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    assert import_memmap(
        tmp_path / "in", tmp_path / "out", tokenizer, max_bad_share=0.5
    ).splits == {"train": 8}
    reasons = [
        json.loads(line)["reason"] for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()
    ]
    for reason, words in zip(
        reasons, ("the id 5", "no speech tokens", "2 times", "no codes"), strict=True
    ):
        assert words in reason


def test_files_larger_than_memory_are_read_by_row(tmp_path, tokenizer):
    rows, length = 5_000_000, 2048  # 41 GB, sparse
    path = tmp_path / "train_input_ids.memmap"
    np.array(a_row(tokenizer, TEXTS[0], [1, 2, 3]), np.int32).tofile(path)
    with path.open("r+b") as file:
        file.truncate(rows * length * 4)
    np.save(tmp_path / "train_input_ids_shape.npy", (rows, length))
    first = next(
        _utterances("train", _open(path), tokenizer, SpeechVocab.of(tokenizer), keep_cut=False)
    )
    assert (first["text"], first["codes"].tolist()) == (TEXTS[0], [1, 2, 3])


def test_files_that_do_not_fit_their_shape(tmp_path, tokenizer, good):
    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            import_memmap(tmp_path / "in", tmp_path / "out", tokenizer)
        assert "\n" not in str(caught.value)

    (tmp_path / "in").mkdir()
    refused("no {split}_input_ids.memmap")
    write(tmp_path / "in", "train", [a_row(tokenizer, *clip) for clip in good])
    shape = tmp_path / "in/train_input_ids_shape.npy"
    np.save(shape, (13, LENGTH))
    refused("13 rows of 96 int32 ids")
    np.save(shape, (12, LENGTH, 1))
    refused("not two positive numbers")
    np.save(shape, np.array([12, {"a": 1}], object))
    refused("cannot be read")
    shape.unlink()
    refused("cannot be read")


def test_another_tokenizer_is_noticed(tmp_path, tokenizer, good):
    write(tmp_path / "in", "train", [a_row(tokenizer, *clip) for clip in good])
    other = make_tiny_tokenizer(
        ["entirely other words, and many more of them than there were before"]
    )
    with pytest.raises(UserError, match="give --tokenizer the one"):
        import_memmap(tmp_path / "in", tmp_path / "out", other)


def test_command_with_a_plain_tokenizer(tmp_path, tokenizer, good, capsys):
    """Upstream's files are made with plain Llama's tokenizer, to which the script adds the speech
    tokens.
    """
    make_tiny_tokenizer(extend=False).save_pretrained(tmp_path / "plain")
    write(tmp_path / "in", "train", [a_row(tokenizer, *clip) for clip in good])
    status = main(
        [
            "import-memmap",
            str(tmp_path / "in"),
            str(tmp_path / "out"),
            "--tokenizer",
            str(tmp_path / "plain"),
        ]
    )
    assert status == 0, capsys.readouterr().err
    assert {u.text for u in open_utterances(tmp_path / "out", "train")} == set(TEXTS)
    assert read_metadata(tmp_path / "out")["codec"] == "unknown"
    assert (
        main(
            [
                "import-memmap",
                str(tmp_path / "in"),
                str(tmp_path / "new"),
                "--tokenizer",
                str(tmp_path / "none"),
            ]
        )
        == 2
    )
    assert "no tokenizer" in capsys.readouterr().err
