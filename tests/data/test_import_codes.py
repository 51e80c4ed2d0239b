"""Folders of .npy codes with transcripts, and Hugging Face datasets, become the same dataset that
`encode` makes.
"""

import dataclasses
import io
import json
import os
import sys

import numpy as np
import pytest
import soundfile

from llasa_jax.cli import main
from llasa_jax.data.builder import open_dataset, read_metadata
from llasa_jax.data.import_codes import import_codes
from llasa_jax.encode.hf_dataset import import_hf_dataset
from llasa_jax.encode.hf_table import open_hf_audio
from llasa_jax.encode.tables import parse_columns
from llasa_jax.errors import UserError

CODES = {
    f"clip{i}": np.random.default_rng(i).integers(0, 65_536, 30 + i).astype(np.int32)
    for i in range(20)
}


def records(folder, split):
    dataset = open_dataset(folder, split)
    return {r["id"]: r for r in (dataset[i] for i in range(len(dataset)))}


@pytest.fixture
def folder(tmp_path):
    """Codes as XCodec2's script leaves them: int32, in the corpus's own folders, some with the
    audio's suffix.
    """
    for i, (name, codes) in enumerate(CODES.items()):
        path = tmp_path / "codes" / f"part{i % 3}" / (f"{name}.wav.npy" if i % 2 else f"{name}.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, codes)
    return tmp_path / "codes"


@pytest.fixture
def transcripts(tmp_path):
    path = tmp_path / "metadata.txt"
    path.write_text("".join(f"{name}|What {name} says.\n" for name in CODES))
    return path


def test_pipe_lines(tmp_path, folder, transcripts):
    result = import_codes(
        folder, transcripts, tmp_path / "out", codec_name="HKUSTAudio/xcodec2", validation_share=0.2
    )
    train, validation = records(tmp_path / "out", "train"), records(tmp_path / "out", "validation")
    assert result.splits == {"train": len(train), "validation": len(validation)}
    assert not train.keys() & validation.keys()
    both = train | validation
    assert both.keys() == CODES.keys()
    for name, record in both.items():
        assert record["text"] == f"What {name} says."
        np.testing.assert_array_equal(record["codes"], CODES[name])
    assert read_metadata(tmp_path / "out") == {
        "codec": "HKUSTAudio/xcodec2",
        "fingerprint": "unknown",
        "hop": 320,
        "sample_rate": 16000,
    }


def test_jsonl_with_paths_and_fields(tmp_path, folder):
    np.save(folder / "part1" / "clip0.npy", [1, 2, 3])  # now there are two of that name
    path = tmp_path / "texts.jsonl"
    rows = [
        {"id": "part1/clip0", "text": "one", "speaker": "ada"},
        {"id": "part0/clip0", "text": "two", "language": "en", "split": "test"},
        {"audio": "wavs/clip1.flac", "text": "three"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_codes(folder, path, tmp_path / "out", max_bad_share=1)
    train = records(tmp_path / "out", "train")
    assert train["part1/clip0"]["codes"].tolist() == [1, 2, 3]
    assert train["part1/clip0"]["speaker"] == "ada"
    np.testing.assert_array_equal(train["clip1"]["codes"], CODES["clip1"])
    assert records(tmp_path / "out", "test")["part0/clip0"]["language"] == "en"
    path.write_text(json.dumps({"id": "clip0", "text": "which?"}) + "\n")
    with pytest.raises(UserError, match="'clip0' may be part0/clip0.npy or part1/clip0.npy"):
        import_codes(folder, path, tmp_path / "new")


def test_token_ids_are_no_codes(tmp_path, folder, transcripts):
    for path in folder.rglob("*.npy"):
        np.save(path, np.load(path) + 128_264)
    with pytest.raises(
        UserError, match=r"20 of 20 rows .* look like token ids: subtract the id of <\|s_0\|>"
    ):
        import_codes(folder, transcripts, tmp_path / "out")
    import_codes(folder, transcripts, tmp_path / "out", code_offset=128_264)
    for name, record in records(tmp_path / "out", "train").items():
        np.testing.assert_array_equal(record["codes"], CODES[name])


def test_bad_files_are_listed(tmp_path, folder, transcripts):
    spoil = {
        name: next(folder.rglob(f"{name}.*npy"))
        for name in ("clip0", "clip1", "clip2", "clip3", "clip4", "clip5", "clip6")
    }
    np.save(spoil["clip0"], np.array([{"run": "me"}], object))
    spoil["clip1"].write_bytes(b"no array")
    np.save(spoil["clip2"], np.zeros(0, np.int32))
    np.save(spoil["clip3"], np.array([1, 65_536]))
    np.save(spoil["clip4"], np.ones((2, 5), np.int32))
    np.save(spoil["clip5"], np.array([1.5, 2.0]))
    spoil["clip6"].unlink()
    np.save(folder / "extra.npy", [1])
    np.save(next(folder.rglob("clip7.*npy")), CODES["clip7"].reshape(1, 1, -1))  # as a batch of one
    with pytest.raises(UserError, match="8 of 21 rows"):
        import_codes(folder, transcripts, tmp_path / "out")
    result = import_codes(folder, transcripts, tmp_path / "out", max_bad_share=0.5)
    assert (result.splits, result.bad) == ({"train": 13}, 8)
    reasons = {
        row["id"]: row["reason"]
        for row in map(json.loads, (tmp_path / "out.bad.jsonl").read_text().splitlines())
    }
    for name, words in {
        "clip0": "cannot be read",
        "clip1": "cannot be read",
        "clip2": "no codes",
        "clip3": "from 1 to 65536, outside 0..65535",
        "clip4": "shape (2, 5)",
        "clip5": "float64",
        "clip6": "no .npy file of that name",
        "extra.npy": "no transcript",
    }.items():
        assert words in reasons[name]
    np.testing.assert_array_equal(
        records(tmp_path / "out", "train")["clip7"]["codes"], CODES["clip7"]
    )


def test_files_that_lie_or_hang_are_listed(tmp_path, folder, transcripts):
    """Headers that claim terabytes, a FIFO, a folder, and a name in Latin-1."""
    for name, shape in (("clip0", (2**40,)), ("clip1", (2**70,)), ("clip2", (2**20, 2**20))):
        path = next(folder.rglob(f"{name}.*npy"))
        header = {"descr": "<i4", "fortran_order": False, "shape": shape}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    for name in ("clip3", "clip4"):
        path = next(folder.rglob(f"{name}.*npy"))
        path.unlink()
        os.mkfifo(path) if name == "clip3" else path.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.npy", "wb") as file:
        np.save(file, [1, 2])
    result = import_codes(folder, transcripts, tmp_path / "out", max_bad_share=0.5)
    assert (result.splits, result.bad) == ({"train": 15}, 6)
    reasons = {
        row["id"]: row["reason"]
        for row in map(json.loads, (tmp_path / "out.bad.jsonl").read_text().splitlines())
    }
    assert "claims 4398046511104 bytes" in reasons["clip0"]
    assert all("cannot be read" in reasons[f"clip{i}"] for i in range(5))
    assert "not a regular file" in reasons["clip3"]
    assert reasons["caf\udce9.npy"] == "no transcript"


def test_the_same_command_again(tmp_path, folder, transcripts, capsys):
    arguments = ["import-codes", str(folder), str(transcripts), str(tmp_path / "out")]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "done already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    np.save(next(folder.rglob("clip7.*npy")), [1, 2, 3])
    assert main(arguments) == 2
    assert "made of other input or with other settings" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes", "metadata.txt", "out"]


def test_a_full_disk_that_a_library_tells_in_words(tmp_path, folder, transcripts, monkeypatch):
    def fill(*_, **__):
        raise RuntimeError("Failed to finalize: write() failed: No space left on device; at byte 1")

    monkeypatch.setattr("llasa_jax.data.builder.LlasaSpeech.download_and_prepare", fill)
    with pytest.raises(UserError, match="is full, and nothing was left under"):
        import_codes(folder, transcripts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands_say_what_is_wrong(tmp_path, folder, transcripts, capsys):
    assert (
        main(
            [
                "import-codes",
                str(folder),
                str(transcripts),
                str(tmp_path / "out"),
                "--validation-share",
                "0.1",
            ]
        )
        == 0
    )
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([str(tmp_path / "empty"), str(transcripts), str(tmp_path / "new")], "no .npy files"),
        (
            [str(folder), str(tmp_path / "nowhere.txt"), str(tmp_path / "new")],
            "no such file of transcripts",
        ),
        ([str(folder), str(transcripts), str(tmp_path / "out")], "already exists"),
    ):
        assert main(["import-codes", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_column_maps():
    assert parse_columns("codes=audio_codes, text=sentence") == {
        "codes": "audio_codes",
        "text": "sentence",
    }
    for wrong in (
        "codes",
        "codes=a",
        "text=a",
        "codes=a,audio=b,text=c",
        "codes=a,text=b,mood=c",
        "codes=a,text=b,text=c",
    ):
        with pytest.raises(UserError, match="--columns"):
            parse_columns(wrong)


def test_without_datasets_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'llasa-jax\[datasets\]'"):
        import_hf_dataset("some/name", tmp_path / "out", {"codes": "a", "text": "b"}, "codec")


@pytest.fixture
def hf():
    return pytest.importorskip("datasets", reason="the package `datasets` is not installed")


def test_hf_columns_of_codes(tmp_path, hf):
    columns = {
        "vq": [[c.tolist()] for c in CODES.values()],
        "sentence": [f"Says {name}." for name in CODES],
        "voice": list(range(20)),
    }
    table = hf.Dataset.from_dict(columns)
    hf.DatasetDict({"train": table, "dev": table.select(range(3))}).save_to_disk(tmp_path / "saved")
    mapping = {"codes": "vq", "text": "sentence", "speaker": "voice"}
    assert import_hf_dataset(tmp_path / "saved", tmp_path / "out", mapping, "unused").splits == {
        "train": 20,
        "validation": 3,
    }
    train = records(tmp_path / "out", "train")
    for i, (name, codes) in enumerate(CODES.items()):
        record = train[f"train_{i:08d}"]
        assert (record["text"], record["speaker"]) == (f"Says {name}.", str(i))
        np.testing.assert_array_equal(record["codes"], codes)

    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files/train.parquet")
    result = import_hf_dataset(
        tmp_path / "files", tmp_path / "held", mapping, "unused", validation_share=0.3
    )
    assert sum(result.splits.values()) == 20
    assert result.splits["validation"] > 0
    with pytest.raises(
        UserError, match="no column 'audio_codes' for codes in 'train'; it has vq, sentence, voice"
    ):
        import_hf_dataset(
            tmp_path / "saved",
            tmp_path / "new",
            {"codes": "audio_codes", "text": "sentence"},
            "unused",
        )
    with pytest.raises(UserError, match="cannot be loaded"):
        import_hf_dataset(tmp_path / "nowhere", tmp_path / "new", mapping, "unused")


class Levels:
    """A codec whose codes are the sound's own levels."""

    name, fingerprint, sample_rate, hop = "levels", "f1", 16000, 320

    def encode(self, waves):
        return [
            (np.resize(wave, len(wave) // 320 + 1) * 30000 + 32768).astype(np.uint16)
            for wave in waves
        ]


def test_hf_columns_of_audio_are_encoded(tmp_path, hf):
    waves = [np.sin(np.arange(3200 + 320 * i) * 0.1).astype(np.float32) * 0.5 for i in range(4)]

    def as_file(wave):
        file = io.BytesIO()
        soundfile.write(file, wave, 16000, format="wav", subtype="FLOAT")
        return file.getvalue()

    table = hf.Dataset.from_dict(
        {
            "sound": [{"bytes": as_file(w), "path": "x.wav"} for w in waves],
            "text": list("abcd"),
            "key": list("wxyz"),
        }
    )
    table.cast_column("sound", hf.Audio()).save_to_disk(tmp_path / "saved")
    summary = import_hf_dataset(
        tmp_path / "saved",
        tmp_path / "out",
        {"audio": "sound", "text": "text", "id": "key"},
        Levels(),
    )
    assert summary.splits == {"train": 4}
    found = records(tmp_path / "out", "train")
    for key, text, codes in zip("wxyz", "abcd", Levels().encode(waves), strict=True):
        assert found[key]["text"] == text
        np.testing.assert_array_equal(found[key]["codes"], codes)
    assert read_metadata(tmp_path / "out")["fingerprint"] == "f1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]


TONES = [np.sin(np.arange(3200 + 320 * i) * 0.1).astype(np.float32) * 0.5 for i in range(4)]


@pytest.fixture
def sounds(tmp_path):
    """Four files beside the dataset, and their bytes."""
    (tmp_path / "saved/wavs").mkdir(parents=True)
    for i, tone in enumerate(TONES):
        soundfile.write(tmp_path / f"saved/wavs/{i}.wav", tone, 16000, subtype="FLOAT")
    return [(tmp_path / f"saved/wavs/{i}.wav").read_bytes() for i in range(4)]


@pytest.mark.parametrize("form", ["paths", "bytes", "samples", "integers", "structs"])
def test_hf_audio_in_every_form(tmp_path, hf, sounds, form):
    values = {
        "paths": ["wavs/0.wav", *(str(tmp_path / f"saved/wavs/{i}.wav") for i in (1, 2, 3))],
        "bytes": sounds,
        "samples": [tone.tolist() for tone in TONES],
        "integers": [(tone * 2**15).astype(np.int16).tolist() for tone in TONES],
        "structs": [{"bytes": sound, "path": "x.wav"} for sound in sounds],
    }[form]
    table = hf.Dataset.from_dict({"sound": values, "text": list("abcd"), "hz": [16000] * 4})
    table.save_to_disk(tmp_path / "saved")
    columns = {"audio": "sound", "text": "text"}
    if form == "samples":
        with pytest.raises(UserError, match=r"without a usable sample rate .*as rate=COLUMN"):
            import_hf_dataset(tmp_path / "saved", tmp_path / "out", columns, Levels(), workers=1)
    if form in ("samples", "integers"):
        columns["rate"] = "hz"
    import_hf_dataset(tmp_path / "saved", tmp_path / "out", columns, Levels(), workers=1)
    found = records(tmp_path / "out", "train")
    rounding = 2 if form == "integers" else 0
    for i, codes in enumerate(Levels().encode(TONES)):
        made = found[f"train_{i:08d}"]["codes"].astype(int)
        np.testing.assert_allclose(made, codes.astype(int), rtol=0, atol=rounding)
    # No copy of the corpus, and nothing else, was left beside it.
    assert {path.name for path in tmp_path.iterdir()} - {"out.bad.jsonl"} == {"out", "saved"}


def saved(hf, folder, **columns):
    features = hf.Features({name: feature for name, (_, feature) in columns.items()})
    values = {name: value for name, (value, _) in columns.items()}
    hf.Dataset.from_dict(values, features=features).save_to_disk(folder)


def test_hf_speakers_and_texts_of_every_kind(tmp_path, hf, sounds):
    text, binary = hf.Value("string"), hf.Value("binary")
    record = {"text": text, "of": {"who": text}}
    saved(
        hf,
        tmp_path / "saved",
        sound=(sounds, binary),
        text=(list("abcd"), text),
        label=([0, 2, 1, None], hf.ClassLabel(names=["ada", "ben", "cleo"])),
        number=([1.0, 2.5, float("nan"), None], hf.Value("float64")),
        json=([{"text": t, "of": {"who": t * 2}} for t in "abcd"], record),
        packed=([json.dumps({"text": t}) for t in "abcd"], text),
    )

    def speakers(name, **columns):
        mapping = {"audio": "sound", "text": "text"} | columns
        import_hf_dataset(tmp_path / "saved", tmp_path / name, mapping, Levels(), workers=1)
        found = records(tmp_path / name, "train")
        rows = [found[f"train_{i:08d}"] for i in range(4)]
        return [(row["speaker"], row["text"]) for row in rows]

    assert speakers("labels", speaker="label") == [
        *zip(["ada", "cleo", "ben", ""], "abcd", strict=True)
    ]
    assert speakers("numbers", speaker="number") == [
        *zip(["1", "2.5", "", ""], "abcd", strict=True)
    ]
    assert speakers("fields", text="json.text", speaker="json.of.who") == [
        (t * 2, t) for t in "abcd"
    ]
    assert speakers("packed", text="packed.text") == [("", t) for t in "abcd"]
    for column, words in {
        "json": r"the column 'json' holds records, with json.text, json.of, and not texts",
        "json.words": "the column 'json' has no field 'words', it has text, of",
    }.items():
        with pytest.raises(UserError, match=words):
            speakers("refused", text=column)


def test_hf_rows_without_text_or_with_anothers_id_are_listed(tmp_path, hf, sounds):
    text = hf.Value("string")
    saved(
        hf,
        tmp_path / "saved",
        sound=(sounds, hf.Value("binary")),
        text=(["a", None, "c", "d"], text),
        key=(["w", "x", "y", "w"], text),
        codes=([[1, 2]] * 4, hf.List(hf.Value("int32"))),
    )
    for audio in ({"audio": "sound"}, {"codes": "codes"}):
        out = tmp_path / f"out_{next(iter(audio))}"
        columns = {**audio, "text": "text", "id": "key"}
        import_hf_dataset(tmp_path / "saved", out, columns, Levels(), max_bad_share=0.5, workers=1)
        assert records(out, "train").keys() == {"w", "y"}
        lines = (tmp_path / f"{out.name}.bad.jsonl").read_text().splitlines()
        reasons = {row["id"]: row["reason"] for row in map(json.loads, lines)}
        assert any("no text" in reason for reason in reasons.values())
        assert len(reasons) == 2
    assert "saved" not in reasons
    first = (tmp_path / "out_audio.bad.jsonl").read_text()
    assert "train row 3 has 'w', as train row 0 has" in first


def test_hf_audio_again_is_done_already(tmp_path, hf, sounds, capsys):
    saved(
        hf,
        tmp_path / "saved",
        sound=(sounds, hf.Value("binary")),
        text=(list("abcd"), hf.Value("string")),
    )
    columns = {"audio": "sound", "text": "text"}
    first = import_hf_dataset(tmp_path / "saved", tmp_path / "out", columns, Levels(), workers=1)
    again = import_hf_dataset(tmp_path / "saved", tmp_path / "out", columns, Levels(), workers=1)
    assert again == dataclasses.replace(first, encoded=0, resumed=4)
    assert "done already" in capsys.readouterr().out


def test_hf_paths_count_as_files(tmp_path, hf, sounds):
    """Codes in a journal count for the same file, not for the same table."""
    paths = [str(tmp_path / f"saved/wavs/{i}.wav") for i in range(4)]
    hf.Dataset.from_dict({"sound": paths, "text": list("abcd")}).save_to_disk(tmp_path / "saved")
    columns = {"audio": "sound", "text": "text"}
    source = open_hf_audio(tmp_path / "saved", columns)
    before = [source.key(i) for i in range(4)]
    os.utime(paths[2], ns=(1, 1))
    after = [open_hf_audio(tmp_path / "saved", columns).key(i) for i in range(4)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, True]
    assert before[1][0] == paths[1]
