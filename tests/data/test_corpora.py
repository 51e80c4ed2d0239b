"""Miniature corpora in the layouts in which the real ones are published; the programs in data/,
run by path, print manifests of them that can be read, audio and all.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from counting_codec import CountingCodec
from places import SPEECH

from llasa_jax.data import corpora
from llasa_jax.data.manifest import file_key, read_manifest
from llasa_jax.encode.offline import encode
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import audio_samples, read_audio

ALIKE = "a|It was in 1998.|It was in nineteen ninety-eight.\nb|Yes.|Yes.\n"
PROGRAMS = Path(__file__).parents[2] / "data"
WAVE, RATE = soundfile.read(SPEECH / "ada_01.flac", dtype="float32")


def put(folder, files):
    """Writes files: audio where the name ends so, else text."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in corpora.AUDIO_SUFFIXES:
            soundfile.write(path, WAVE, RATE)
        else:
            path.write_text(content, encoding="utf-8")
    return folder


def run(program, folder, *, fails=False):
    """The lines that a program prints, and what it says on stderr."""
    done = subprocess.run(
        [sys.executable, PROGRAMS / f"{program}.py", folder], capture_output=True, check=False
    )
    said = done.stderr.decode()
    assert "Traceback" not in said
    assert done.returncode == (2 if fails else 0), said
    return [json.loads(line) for line in done.stdout.decode().split("\n") if line], said.strip()


def check(program, folder, expected):
    """Runs a program and compares its lines, whose audio is given relative to `folder`; then reads
    the manifest as `encode` does.
    """
    lines, said = run(program, folder)
    assert lines == [{**line, "audio": str(folder / line["audio"])} for line in expected]
    manifest = folder / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    for clip in read_manifest(manifest):
        assert len(read_audio(clip.audio)) == audio_samples(clip.audio) > 0
        assert file_key(clip.audio)[1] > 0
    return said


def refused(program, folder, words):
    lines, said = run(program, folder, fails=True)
    assert not lines
    assert words in said
    assert said.count("\n") == 0


def test_beside(tmp_path):
    files = {"a/1.wav": "", "a/1.txt": " Hello.\n", "b/1.FLAC": "", "b/1.txt": "Bye.", "2.wav": ""}
    folder = put(tmp_path / "mine", files | {"notes.txt": "of no recording"})
    (folder / "b/1.FLAC").write_bytes((SPEECH / "ada_01.flac").read_bytes())
    expected = [
        {"audio": "a/1.wav", "text": "Hello.", "id": "a/1"},
        {"audio": "b/1.FLAC", "text": "Bye.", "id": "b/1"},
    ]
    said = check("beside", folder, expected)
    assert "2.wav: it has no text" in said


def test_ljspeech(tmp_path):
    folder = put(
        tmp_path / "LJSpeech-1.1",
        {
            "README": "",
            "metadata.csv": (
                "LJ001-0001|Printing, in the only sense|Printing, in the only sense\n"
                'LJ001-0002|"In 1455," he said|"In fourteen fifty-five," he said\n'
                "LJ001-0003|Its wav is missing|Its wav is missing\n"
            ),
            "wavs/LJ001-0001.wav": "",
            "wavs/LJ001-0002.wav": "",
        },
    )
    said = check(
        "ljspeech",
        folder,
        [
            {
                "audio": "wavs/LJ001-0001.wav",
                "text": "Printing, in the only sense",
                "id": "LJ001-0001",
                "language": "en",
            },
            {
                "audio": "wavs/LJ001-0002.wav",
                "text": '"In fourteen fifty-five," he said',
                "id": "LJ001-0002",
                "language": "en",
            },
        ],
    )
    assert "2 clips; 1 are left out, the first because" in said
    assert "LJ001-0003.wav: no such audio file" in said
    refused("ljspeech", tmp_path / "nowhere", "no such folder")
    refused("ljspeech", tmp_path, "no such manifest")
    (folder / "metadata.csv").write_text("LJ001-0001|Printing, in the only sense|linda\n")
    refused("ljspeech", folder, "it is not clear what they are")


@pytest.mark.parametrize("part", ["", "train-clean-100"])
def test_libritts(tmp_path, part):
    one, two = (
        "train-clean-100/103/1241/103_1241_000000_000001",
        "dev-other/116/288045/116_288045_0",
    )
    folder = put(
        tmp_path / "LibriTTS",
        {
            "SPEAKERS.txt": ";ID |SEX |SUBSET",
            **{f"{clip}.wav": "" for clip in (one, two)},
            f"{one}.original.txt": "Matthew Cuthbert, No. 2",
            f"{one}.normalized.txt": "Matthew Cuthbert, number two",
            f"{two}.normalized.txt": "As I approached\n",
            "train-clean-100/103/1241/103_1241.trans.tsv": "103_1241_000000_000001\tMatthew",
            "train-clean-100/103/1241/103_1241.book.tsv": "",
        },
    )
    expected = [
        {
            "id": "116_288045_0",
            "audio": f"{two}.wav",
            "text": "As I approached",
            "speaker": "116",
            "language": "en",
            "split": "validation",
        },
        {
            "id": "103_1241_000000_000001",
            "audio": f"{one}.wav",
            "text": "Matthew Cuthbert, number two",
            "speaker": "103",
            "language": "en",
            "split": "train",
        },
    ]
    if part:
        expected = [{**expected[1], "audio": f"{one}.wav".removeprefix(f"{part}/")}]
    check("libritts", folder / part, expected)
    refused("libritts", tmp_path, "not LibriTTS; give the folder that holds train-clean-100")


def test_vctk(tmp_path):
    info = (
        "ID  AGE  GENDER  ACCENTS  REGION COMMENTS \n"
        "p225  23  F    English    Southern  England\n"
        "p280  25  F  French  France  (mic2 files unavailable)\n"
        "s5  24  M  American\n"
    )
    audio = "wav48_silence_trimmed"
    folder = put(
        tmp_path / "VCTK-Corpus-0.92",
        {
            "speaker-info.txt": info,
            "txt/p225/p225_001.txt": "Please call Stella.\n",
            "txt/p280/p280_001.txt": "Please call Stella.",
            "txt/s5/s5_001.txt": "Ask her to bring these things.",
            "txt/p225/p225_002.txt": "Neither microphone has it.",
            f"{audio}/log.txt": "",
            **{f"{audio}/p225/p225_001_mic{n}.flac": "" for n in (1, 2)},
            f"{audio}/p280/p280_001_mic1.flac": "",
            f"{audio}/s5/s5_001_mic1.flac": "",
            f"{audio}/p315/p315_001_mic1.flac": "",  # whose texts were lost
        },
    )
    said = check(
        "vctk",
        folder,
        [
            {
                "id": f"{speaker}_001",
                "audio": f"{audio}/{speaker}/{speaker}_001_mic1.flac",
                "text": text,
                "speaker": speaker,
                "description": description,
                "language": "en",
            }
            for speaker, text, description in (
                (
                    "p225",
                    "Please call Stella.",
                    "female, 23 years, English accent, Southern England",
                ),
                ("p280", "Please call Stella.", "female, 25 years, French accent, France"),
                ("s5", "Ask her to bring these things.", "male, 24 years, American accent"),
            )
        ],
    )
    assert "1 are left out" in said
    old = put(
        tmp_path / "VCTK-Corpus",
        {
            "speaker-info.txt": "ID  AGE  GENDER  ACCENTS  REGION \n226  22  M  English  Surrey\n",
            "txt/p226/p226_001.txt": "Please call Stella.",
            "wav48/p226/p226_001.wav": "",
        },
    )
    lines, _ = run("vctk", old)
    assert [(line["audio"], line["description"]) for line in lines] == [
        (str(old / "wav48/p226/p226_001.wav"), "male, 22 years, English accent, Surrey")
    ]
    refused("vctk", tmp_path, "not VCTK")


def test_common_voice(tmp_path):
    names = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tlocale\tsegment"

    def rows(*clips):
        lines = [
            f"{who}\tcommon_voice_de_{n}.mp3\ts{n}\t{text}\t\t2\tde\t" for who, n, text in clips
        ]
        return "\n".join([names, *lines]) + "\n"

    ada, ben, cleo = "a" * 128, "b" * 128, "c" * 128
    in_train, in_test = (ada, 1, 'Er sagte: "Nein".'), (ben, 2, '"Ja!')
    again, other, silent = (ben, 3, "Ja!"), (cleo, 4, "Vielleicht\u2028so."), (cleo, 5, " ")
    folder = put(
        tmp_path / "cv-corpus-17.0-2024-03-15/de",
        {
            "validated.tsv": rows(in_train, in_test, again, other, silent),
            "train.tsv": rows(in_train),
            "test.tsv": rows(in_test),
            "dev.tsv": rows(),
            "invalidated.tsv": rows((cleo, 6, "Falsch")),
            **{f"clips/common_voice_de_{n}.mp3": "" for n in range(1, 7)},
        },
    )
    check(
        "common_voice",
        folder,
        [
            {
                "id": f"common_voice_de_{n}",
                "audio": f"clips/common_voice_de_{n}.mp3",
                "text": text,
                "speaker": who,
                "language": "de",
                "split": split,
            }
            for (who, n, text), split in (
                (in_train, "train"),
                (in_test, "test"),
                (again, "test"),
                (other, "train"),
            )
        ],
    )
    (folder / "train.tsv").write_text(names + "\na\tb\n")
    refused("common_voice", folder, "train.tsv, line 2: 2 fields instead of 8; copy the file again")
    (folder / "validated.tsv").write_text("path\tsentence\n")
    (folder / "train.tsv").unlink()
    refused("common_voice", folder, "validated.tsv: no column 'client_id'")


def webdataset(path, members):
    """A tar as WebDataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_emilia(tmp_path):
    mp3 = {}
    for clip in ("ada_01", "ben_01"):
        wave, rate = soundfile.read(SPEECH / f"{clip}.flac")
        file = io.BytesIO()
        soundfile.write(file, wave, rate, format="MP3")
        mp3[clip] = file.getvalue()
    about = {
        "id": "EN_B00000_S00000_W000000",
        "wav": "EN_B00000/EN_B00000_S00000/mp3/EN_B00000_S00000_W000000.mp3",
        "text": " You can help my mother.",
        "duration": 6.264,
        "speaker": "EN_B00000_S00000",
        "language": "en",
        "dnsmos": 3.2927,
    }
    first, second = about["id"], "EN_B00000_S00000_W000001"
    webdataset(
        tmp_path / "Emilia/EN/EN-B000000.tar",
        [
            (f"{first}.json", json.dumps(about).encode()),
            (f"{first}.mp3", mp3["ada_01"]),
            (f"{second}.mp3", mp3["ben_01"]),
            (f"{second}.json", json.dumps({**about, "id": second}).encode()),
        ],
    )
    lines, _ = run("emilia", tmp_path / "Emilia")
    assert [{key: line[key] for key in line if key != "audio"} for line in lines] == [
        {
            "id": clip,
            "text": "You can help my mother.",
            "speaker": "EN_B00000_S00000",
            "language": "en",
        }
        for clip in (first, second)
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    for clip, content in zip(read_manifest(manifest), mp3.values(), strict=True):
        np.testing.assert_array_equal(read_audio(clip.audio), read_audio(content))
        assert audio_samples(clip.audio) == audio_samples(content)
        assert file_key(clip.audio)[1] == len(content)
    summary = encode(manifest, tmp_path / "out", CountingCodec())
    assert (summary.encoded, summary.bad) == (2, 0)

    tar = tmp_path / "Emilia/EN/EN-B000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{tar}:.*: truncated, the tar has"):
        read_audio(lines[1]["audio"])
    _, said = run("emilia", tmp_path / "Emilia", fails=True)
    assert f"{tar}: damaged, or not an uncompressed tar" in said
    webdataset(tar, [(f"{first}.mp3", mp3["ada_01"])])
    refused("emilia", tmp_path / "Emilia", f"{first} has no audio or no .json beside it")
    webdataset(tar, [(f"{first}.json", b"{" * 9), (f"{first}.mp3", mp3["ada_01"])])
    refused("emilia", tmp_path / "Emilia", f"{tar}, {first}.json: is damaged, not valid JSON")
    tar.unlink()
    refused("emilia", tmp_path / "Emilia", "no .tar files")


def test_aishell3(tmp_path):
    folder = put(
        tmp_path / "AISHELL-3",
        {
            "spk-info.txt": "SSB0005\tB\tfemale\tnorth\n",
            "train/content.txt": "SSB00050001.wav\t广 guang3 州 zhou1 女 nv3 大 da4\n",
            "train/label_train-set.txt": "SSB00050001|guang3 zhou1|广州%女大$",
            "train/wav/SSB0005/SSB00050001.wav": "",
            "test/content.txt": "SSB00050353.wav\t花 hua1 儿 er5\n\n",
            "test/wav/SSB0005/SSB00050353.wav": "",
        },
    )
    check(
        "aishell3",
        folder,
        [
            {
                "id": clip,
                "audio": f"{split}/wav/SSB0005/{clip}.wav",
                "text": text,
                "speaker": "SSB0005",
                "language": "zh",
                "split": split,
            }
            for clip, text, split in (
                ("SSB00050001", "广州女大", "train"),
                ("SSB00050353", "花儿", "test"),
            )
        ],
    )
    refused("aishell3", tmp_path, "not AISHELL-3")
    (folder / "train/content.txt").write_text("SSB00050001 guang3\n")
    refused("aishell3", folder, "content.txt, line 1: not ID.wav, a tab and the text")


def test_coqui(tmp_path):
    rows = {
        "train": ["wavs/a.wav|One | two.|ada|calm", "wavs/b.wav|Three.|ben|calm"],
        "eval": ["wavs/c.wav|Four.|ben|calm"],
    }
    names = "audio_file|text|speaker_name|emotion_name"
    folder = put(
        tmp_path,
        {
            **{f"metadata_{part}.csv": "\n".join([names, *rows[part]]) for part in rows},
            **{f"wavs/{clip}.wav": "" for clip in "abc"},
        },
    )
    said = check(
        "coqui",
        folder,
        [
            {"audio": f"wavs/{clip}.wav", "text": text, "id": clip, "speaker": who, "split": split}
            for clip, text, who, split in (
                ("a", "One | two.", "ada", "train"),
                ("b", "Three.", "ben", "train"),
                ("c", "Four.", "ben", "validation"),
            )
        ],
    )
    assert "'emotion_name' are not used" in said
    for part in rows:
        (tmp_path / f"metadata_{part}.csv").unlink()
    refused("coqui", folder, "no metadata.csv or metadata_train.csv")
    (tmp_path / "metadata.csv").write_text(ALIKE)
    lines, _ = run("coqui", folder)
    assert [line["text"] for line in lines] == ["It was in nineteen ninety-eight.", "Yes."]
    (tmp_path / "metadata.csv").write_text("a|ada|Yes.\n")
    refused("coqui", folder, "it is not clear what they are")


@pytest.mark.parametrize("place", ["", "wav/", "wavs/"])
def test_piper(tmp_path, place):
    folder = put(
        tmp_path,
        {
            "metadata.csv": 'a|ada|One.\nb.wav|ben|"He said ""two"" | three."\n',
            **{f"{place}{clip}.wav": "" for clip in "ab"},
        },
    )
    check(
        "piper",
        folder,
        [
            {"id": "a", "audio": f"{place}a.wav", "text": "One.", "speaker": "ada"},
            {
                "id": "b",
                "audio": f"{place}b.wav",
                "text": 'He said "two" | three.',
                "speaker": "ben",
            },
        ],
    )
    (folder / "metadata.csv").write_text("a|One.\nb|Two.\n")
    lines, _ = run("piper", folder)
    assert [(line["id"], line["text"], "speaker" in line) for line in lines] == [
        ("a", "One.", False),
        ("b", "Two.", False),
    ]
    (folder / "metadata.csv").write_text(ALIKE)
    refused("piper", folder, "the second field is the text, not a speaker")
    (folder / "metadata.csv").write_text("a|1|2|3\n")
    refused("piper", folder, "line 1: 4 fields; Piper has")


def test_names_that_are_not_utf8_are_left_out(tmp_path):
    folder = put(tmp_path, {"train-clean-100/1/2/1_2_3.wav": "", "x": ""})
    latin1 = os.fsdecode(os.fsencode(folder) + b"/train-clean-100/1/2/caf\xe9")
    for path in (f"{latin1}", str(folder / "train-clean-100/1/2/1_2_3")):
        Path(f"{path}.normalized.txt").write_text("Text.")
    lines, said = run("libritts", folder)
    assert [line["id"] for line in lines] == ["1_2_3"]
    assert "caf\\udce9.wav: the name is not UTF-8" in said


def test_every_program_has_a_reader_and_a_test():
    programs = {path.stem for path in PROGRAMS.glob("*.py")}
    assert programs == {
        name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in programs
    }
    assert all(callable(getattr(corpora, name)) for name in programs)
    assert not (PROGRAMS / "__init__.py").exists()
