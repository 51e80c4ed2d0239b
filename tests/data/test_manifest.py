"""Manifests become utterances, or one sentence with a line number."""

import json
from pathlib import Path

import pytest
from places import SPEECH

from llasa_jax.data.manifest import Clip, read_manifest
from llasa_jax.errors import UserError


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jsonl(tmp_path):
    row = {
        "audio": "sub/a.wav",
        "text": " Hé! ",
        "id": "x",
        "speaker": "ada",
        "description": "calm",
        "language": "fr",
        "split": "test",
    }
    path = write(
        tmp_path / "m.jsonl",
        {"audio": "sub/b.flac", "text": "B."},
        "",
        row,
        {"audio": "/abs/c.wav", "text": "C"},
    )
    assert read_manifest(path) == [
        Clip(tmp_path / "sub/b.flac", "B.", "b"),
        Clip(tmp_path / "sub/a.wav", " Hé! ", "x", "ada", "calm", "fr", "test"),
        Clip(Path("/abs/c.wav"), "C", "c"),
    ]


def test_byte_order_mark_and_line_ends(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(
        b'\xef\xbb\xbf{"audio": "a.wav", "text": "A"}\r\n{"audio": "b.wav", "text": "B"}'
    )
    assert [u.id for u in read_manifest(tmp_path / "m.jsonl")] == ["a", "b"]


def test_shared_stems_fall_back_to_the_path(tmp_path):
    path = write(
        tmp_path / "m.jsonl",
        *({"audio": audio, "text": "t"} for audio in ("x/1.wav", "y/1.wav", "y/2.wav")),
    )
    assert [u.id for u in read_manifest(path)] == ["x/1", "y/1", "2"]


def test_explicit_id_wins_over_a_default(tmp_path):
    path = write(
        tmp_path / "m.jsonl",
        {"audio": "x/1.wav", "text": "t"},
        {"audio": "2.wav", "text": "t", "id": "1"},
    )
    assert [u.id for u in read_manifest(path)] == ["x/1", "1"]


def test_duplicate_ids(tmp_path):
    row = {"audio": "a.wav", "text": "t"}
    refused(
        write(tmp_path / "m.jsonl", {**row, "id": "k"}, row, {**row, "id": "k"}),
        "line 3",
        "'k'",
        "line 1",
    )
    refused(write(tmp_path / "m.jsonl", row, row), "line 2", "'a'")


def test_ljspeech(tmp_path):
    path = write(
        tmp_path / "metadata.csv", 'LJ1|He said "5|He said "five', "LJ2|Plain|", "LJ3|Two fields"
    )
    assert read_manifest(path) == [
        Clip(tmp_path / "wavs/LJ1.wav", 'He said "five', "LJ1"),
        Clip(tmp_path / "wavs/LJ2.wav", "Plain", "LJ2"),
        Clip(tmp_path / "wavs/LJ3.wav", "Two fields", "LJ3"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"audio": ', ["not JSON"]),
        ("[1]", ["not a JSON object"]),
        ('{"audio": "a.wav"}', ["no 'text'"]),
        ('{"text": "t"}', ["no 'audio'"]),
        ('{"audio": "a.wav", "text": " \\n"}', ["'text' is empty"]),
        ('{"audio": "", "text": "t"}', ["'audio' is empty"]),
        ('{"audio": "a.wav", "text": 5}', ["'text' is 5, not a string"]),
        ('{"audio": "a.wav", "text": "t", "speaker": null}', ["'speaker' is null"]),
        (
            '{"audio": "a.wav", "text": "t", "speeker": "x"}',
            ["'speeker'", "did you mean 'speaker'"],
        ),
        ('{"audio": "a.wav", "text": "t", "zzz": "x"}', ["'zzz'", "the keys are audio, text"]),
        ('{"audio": "a.wav", "text": "t", "split": "my split"}', ["'my split'"]),
        ('{"audio": "a.wav", "text": "t", "split": "all"}', ["'all'"]),
        ('{"audio": "a.wav", "text": "\\ud83d"}', ["surrogate"]),
    ],
)
def test_bad_line(tmp_path, line, words):
    refused(write(tmp_path / "m.jsonl", {"audio": "good.wav", "text": "t"}, line), "line 2", *words)


@pytest.mark.parametrize(
    ("line", "words"), [("no bar", "no '|'"), ("|t", "id before"), ("a|", "'text' is empty")]
)
def test_bad_ljspeech_line(tmp_path, line, words):
    refused(write(tmp_path / "metadata.csv", "a1|t", line), "line 2", words)


def test_missing_empty_and_not_utf8(tmp_path):
    refused(tmp_path / "none.jsonl", "no such manifest")
    refused(write(tmp_path / "m.jsonl", "", " "), "empty")
    (tmp_path / "m.jsonl").write_bytes('{"audio": "a.wav", "text": "é"}'.encode("latin-1"))
    refused(tmp_path / "m.jsonl", "line 1", "UTF-8")


def test_the_corpus_of_this_repository():
    utterances = read_manifest(SPEECH / "manifest.jsonl")
    assert len(utterances) == 40
    assert {u.speaker for u in utterances} == {"ada", "ben"}
    assert all(u.audio.is_file() and u.language == "en" for u in utterances)
