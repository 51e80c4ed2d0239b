"""Manifests become utterances, or one sentence with a line number."""

import json
import os
import random
from pathlib import Path

import pytest
from places import SPEECH

from llasa_jax.data.manifest import Clip, file_key, read_manifest
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
        ('{"audio": "a.wav", "text": null}', ["no 'text'", "has 'audio'"]),
        (
            '{"audio": "a.wav", "text": "t", "speeker": "x"}',
            ["'speeker'", "did you mean 'speaker'"],
        ),
        ('{"audio": "a.wav", "text": "t", "split": "my split"}', ["'my split'"]),
        ('{"audio": "a.wav", "text": "t", "split": "all"}', ["'all'"]),
        ('{"audio": "a.wav", "text": "t", "split": "' + "x" * 100_000 + '"}', ["a split's name"]),
        ('{"audio": "a.wav", "text": "t", "x": ' + "[" * 100_000 + "}", ["nested too deep"]),
        ('{"audio": "a.wav", "text": "t", "x": ' + "1" * 5000 + "}", ["thousands of digits"]),
        ('{"audio": "a.wav", "text": ["t"]}', ["'text' is [", "not a string"]),
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


def test_null_is_left_out_and_other_keys_are_ignored_with_one_warning(tmp_path):
    row = {"audio": "a.wav", "text": "A", "speaker": None, "duration": 2.99, "zzz": [{}]}
    path = write(
        tmp_path / "m.jsonl",
        row,
        {**row, "audio": "b.wav", "zzz": float("nan"), "language": float("nan")},
    )
    with pytest.warns(
        UserWarning, match="'duration', 'zzz' are not used; the keys are audio, text"
    ) as w:
        clips = read_manifest(path)
    assert len(w) == 1
    assert clips == [Clip(tmp_path / "a.wav", "A", "a"), Clip(tmp_path / "b.wav", "A", "b")]


def test_keys_may_be_mapped(tmp_path):
    path = write(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "said": "A"})
    refused(path, "no 'audio'")
    columns = "audio=audio_filepath, text=said"
    assert read_manifest(path, columns) == [Clip(tmp_path / "a.wav", "A", "a")]
    for wrong in ("audio=", "sound=audio", "audio=a,text", "text=a,text=b", "text=a,id=a"):
        with pytest.raises(UserError, match="are no map"):
            read_manifest(path, wrong)
    with pytest.raises(UserError, match="has no keys to map"):
        read_manifest(write(tmp_path / "m.csv", "a|b"), columns)


def test_a_mapped_key_takes_the_place_of_one_that_has_our_name(tmp_path):
    for row in ({"text": "raw", "said": "clean"}, {"said": "clean", "text": "raw"}):
        path = write(tmp_path / "m.jsonl", {"audio": "a.wav"} | row)
        assert read_manifest(path, "text=said") == [Clip(tmp_path / "a.wav", "clean", "a")]
    path = write(tmp_path / "m.jsonl", {"audio": "a.wav", "text": "raw"})
    with pytest.raises(UserError, match="line 1: no 'text'"):
        read_manifest(path, "text=said")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, line_end):
    path = tmp_path / "metadata.csv"
    path.write_bytes(line_end.join(["a|One line", "b|Second line", "c|Third line", ""]).encode())
    assert [(clip.id, clip.text) for clip in read_manifest(path)] == [
        ("a", "One line"),
        ("b", "Second line"),
        ("c", "Third line"),
    ]


SPEAKER_LAST = ["a|Hello there one.|alice", "b|Hello there two.|bob"]
SPEAKER_SECOND = ["a|alice|Hello there one.", "b|bob|Hello there two."]
PIPES = ["a|A pipe | inside the text.", "b|a|b|c|d"]


@pytest.mark.parametrize("lines", [SPEAKER_LAST, SPEAKER_SECOND, PIPES[:1], PIPES])
def test_columns_that_are_not_clear_are_asked_for(tmp_path, lines):
    path = write(tmp_path / "metadata.csv", *lines)
    refused(path, "line ", " fields", "--columns", "id,text,speaker", "id,speaker,text")


def test_named_columns(tmp_path):
    speakers = [
        Clip(tmp_path / "wavs/a.wav", "Hello there one.", "a", "alice"),
        Clip(tmp_path / "wavs/b.wav", "Hello there two.", "b", "bob"),
    ]
    last = write(tmp_path / "last.csv", *SPEAKER_LAST)
    assert read_manifest(last, "id,text,speaker") == speakers
    second = write(tmp_path / "second.csv", *SPEAKER_SECOND)
    assert read_manifest(second, "id, speaker, text") == speakers
    ignored = write(tmp_path / "second.txt", *SPEAKER_SECOND)
    assert [clip.speaker for clip in read_manifest(ignored, "id,-,text")] == ["", ""]
    paths = write(tmp_path / "list.txt", "x/1.wav|t one|5", "x/2.wav|t|t|wo|6")
    assert read_manifest(paths, "audio,text,speaker") == [
        Clip(tmp_path / "x/1.wav", "t one", "1", "5"),
        Clip(tmp_path / "x/2.wav", "t|t|wo", "2", "6"),
    ]
    assert [clip.text for clip in read_manifest(write(tmp_path / "p.csv", *PIPES), "id,text")] == [
        "A pipe | inside the text.",
        "a|b|c|d",
    ]
    lj = write(tmp_path / "lj.csv", "a|In 1998|In nineteen ninety-eight", "b|Plain")
    assert [clip.text for clip in read_manifest(lj, "id,text,normalized")] == [
        "In nineteen ninety-eight",
        "Plain",
    ]
    with pytest.raises(
        UserError, match=r"last.csv, line 1: 3 fields, but the columns are id,text,"
    ):
        read_manifest(last, "id,text,speaker,language")
    for wrong in ("id,words", "id,speaker", "text,speaker", "id,text,text"):
        with pytest.raises(UserError, match="the columns '" + wrong):
            read_manifest(last, wrong)


def test_some_normalized_texts_differ_much(tmp_path):
    lines = [f"LJ{i}|The same text, number {i}.|The same text, number {i}." for i in range(9)]
    path = write(tmp_path / "metadata.csv", *lines, "x|1998.|Nineteen ninety-eight.")
    assert read_manifest(path)[-1].text == "Nineteen ninety-eight."


def test_a_first_line_of_names(tmp_path):
    path = write(tmp_path / "m.csv", "audio_file|text|speaker_name|emotion", "a.wav|A|ada|calm")
    with pytest.warns(UserWarning, match="'emotion' are not used"):
        assert read_manifest(path) == [Clip(tmp_path / "a.wav", "A", "a", "ada")]


def test_utf16_is_named(tmp_path):
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / "m.csv").write_bytes("a|A\nb|B\n".encode(encoding))
        refused(tmp_path / "m.csv", "is UTF-16")


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    clip = read_manifest(write(folder / "m.jsonl", {"audio": "a.wav", "text": "A"}))[0]
    assert clip.audio == folder / "a.wav"
    clip.audio.write_bytes(b"abc")
    key = file_key(clip.audio)
    assert key[0].endswith("/caf\\xe9/a.wav")
    assert key[1] == 3
    assert file_key("a\0b")[1:] == (-1, -1)


@pytest.mark.filterwarnings("ignore:.*are not used")
@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_damage_is_one_sentence(tmp_path, name):
    """Bytes changed, cut out, doubled and put in at random places: clips, or one sentence."""
    choose, path, refusals = random.Random(0), tmp_path / name, 0
    row = {"text": "Hé said", "speaker": "a", "language": None, "duration": 1.5}
    jsonl = "\n".join(json.dumps({"audio": f"x/{i}.wav", **row}) for i in range(5)).encode()
    csv = "\n".join(f"L{i}|Text {i} hé|Text {i} hé" for i in range(5)).encode()
    bits = [
        b"\0",
        b"\xff",
        b"\r",
        b"|",
        b'"',
        b"[",
        b"null",
        b"NaN",
        b"1e999",
        b"\\ud800",
        b"\x1b[2J",
    ]
    for _ in range(300):
        damaged = bytearray(jsonl if name == "m.jsonl" else csv)
        for _ in range(choose.randint(1, 2)):
            at, other = choose.randrange(len(damaged)), choose.randrange(len(damaged))
            kind = choose.randrange(4)
            if kind == 0:
                damaged[at] = choose.randrange(256)
            elif kind == 1:
                del damaged[at : at + 9]
            else:
                damaged[at:at] = damaged[other : other + 20] if kind == 2 else choose.choice(bits)
        path.write_bytes(damaged)
        try:
            clips = read_manifest(path)
        except UserError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            refusals += 1
        else:
            assert all(clip.id and clip.text.strip() for clip in clips)
    assert 50 < refusals < 300


def test_the_corpus_of_this_repository():
    utterances = read_manifest(SPEECH / "manifest.jsonl")
    assert len(utterances) == 40
    assert {u.speaker for u in utterances} == {"ada", "ben"}
    assert all(u.audio.is_file() and u.language == "en" for u in utterances)
