"""From a manifest to a dataset: whole, resumed after a crash, with bad clips; and what TFDS reads
back.
"""

import dataclasses
import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds
import torch
from counting_codec import CountingCodec
from places import SPEECH

from llasa_jax.codec import load_codec
from llasa_jax.data.builder import (
    dataset_fingerprint,
    open_dataset,
    read_metadata,
    write_dataset,
)
from llasa_jax.data.manifest import Clip, assign_splits, read_manifest
from llasa_jax.data.seal import remove_dataset
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.encode.offline import encode
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.encode.sources import open_audio
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio, write_audio


@pytest.fixture(scope="module")
def corpus():
    return read_manifest(SPEECH / "manifest.jsonl")


@pytest.fixture
def manifest(tmp_path):
    """Twelve clips of the corpus in a folder of their own, free to be spoilt."""
    lines = (SPEECH / "manifest.jsonl").read_text().splitlines()[::3][:12]
    (tmp_path / "in").mkdir()
    for line in lines:
        shutil.copy(SPEECH / json.loads(line)["audio"], tmp_path / "in")
    (tmp_path / "in/m.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "in/m.jsonl"


def read_all(folder):
    splits = tfds.builder_from_directory(folder).info.splits
    return {
        split: {
            r["id"]: r
            for r in (open_dataset(folder, split)[i] for i in range(splits[split].num_examples))
        }
        for split in splits
    }


def test_columns_say_what_a_third_field_is(tmp_path, corpus):
    lines = [f"{clip.id}|{clip.speaker}|{clip.text}" for clip in corpus[:3]]
    (tmp_path / "wavs").mkdir()
    for clip in corpus[:3]:
        write_audio(tmp_path / f"wavs/{clip.id}.wav", read_audio(clip.audio))
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 1: 3 fields, and it is not clear what they are"):
        encode(tmp_path / "metadata.csv", tmp_path / "out", CountingCodec())
    encode(tmp_path / "metadata.csv", tmp_path / "out", CountingCodec(), columns="id,speaker,text")
    found = read_all(tmp_path / "out")["train"]
    assert {(clip, r["speaker"], r["text"]) for clip, r in found.items()} == {
        (clip.id, clip.speaker, clip.text) for clip in corpus[:3]
    }
    online = OnlineSettings(columns="id,speaker,text")
    source = open_audio(str(tmp_path / "metadata.csv"), online)
    assert {source.utterance(i).speaker for i in range(3)} == {c.speaker for c in corpus[:3]}


def test_end_to_end_with_a_real_codec(tmp_path, manifest):
    torch.set_num_threads(1)  # on busy cores, OpenMP's waiting threads make a minute of a second
    codec = load_codec(make_tiny_codec(tmp_path / "codec"))
    out = tmp_path / "sets/one"
    summary = encode(manifest, out, tmp_path / "codec", validation_share=0.25, seed=1)
    utterances = {u.id: u for u in read_manifest(manifest)}

    builder = tfds.builder_from_directory(out)  # plain TFDS, none of our code
    found = {}
    for split in builder.info.splits:
        for example in builder.as_data_source(split):
            found[example["id"].decode()] = split, example
    assert found.keys() == utterances.keys()
    frames = 0
    for clip, (split, example) in found.items():
        u = utterances[clip]
        assert example["codes"].dtype == np.uint16
        np.testing.assert_array_equal(example["codes"], codec.encode([read_audio(u.audio)])[0])
        frames += len(example["codes"])
        assert [
            example[key].decode() for key in ("text", "speaker", "language", "description")
        ] == [u.text, u.speaker, "en", ""]
        np.testing.assert_equal(read_all(out)[split][clip]["codes"], example["codes"])
    assert summary.hours == pytest.approx(frames / 50 / 3600)
    assert (summary.encoded, summary.resumed, summary.bad) == (12, 0, 0)
    assert summary.splits == {split: len(records) for split, records in read_all(out).items()}
    assert set(summary.splits) == {"train", "validation"}
    assert read_metadata(out) == {
        "codec": codec.name,
        "fingerprint": codec.fingerprint,
        "hop": 320,
        "sample_rate": 16000,
    }
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "one"
    ]  # no partial, bad or building left


def test_ctrl_c_then_resume_encodes_nothing_twice(tmp_path, manifest, capsys):
    first = CountingCodec(limit=5)
    with pytest.raises(KeyboardInterrupt):
        encode(manifest, tmp_path / "out", first, batch_seconds=0.1)
    assert not (tmp_path / "out").exists()
    second = CountingCodec()
    summary = encode(manifest, tmp_path / "out", second, batch_seconds=0.1)
    assert (summary.encoded, summary.resumed) == (7, 5)
    assert len(first.seen) == 5
    assert len(set(first.seen) | set(second.seen)) == 12
    assert not set(first.seen) & set(second.seen)
    assert "5 of 12 clips" in capsys.readouterr().out
    assert not (tmp_path / "out.partial").exists()
    encode(manifest, tmp_path / "straight", CountingCodec())
    np.testing.assert_equal(read_all(tmp_path / "out"), read_all(tmp_path / "straight"))


def test_kill_then_resume(tmp_path, manifest):
    script = f"""
import os, signal, sys
from counting_codec import CountingCodec
from llasa_jax.encode.offline import encode
class Killed(CountingCodec):
    def encode(self, waves):
        if len(self.seen) >= 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(waves)
encode({str(manifest)!r}, {str(tmp_path / "out")!r}, Killed(), batch_seconds=0.1)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    codec = CountingCodec()
    assert encode(manifest, tmp_path / "out", codec).resumed == 4
    assert len(codec.seen) == 8


def test_a_crash_while_the_dataset_is_built_loses_nothing(tmp_path, manifest, monkeypatch):
    def crash(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("llasa_jax.encode.shards.write_shard", crash)
        with pytest.raises(OSError, match="disk full"):
            encode(manifest, tmp_path / "out", CountingCodec())
    codec = CountingCodec()
    assert encode(manifest, tmp_path / "out", codec).resumed == 12
    assert codec.seen == []


def test_journal_of_another_codec_or_of_changed_audio_is_ignored(tmp_path, manifest):
    def interrupted(**rest):
        with pytest.raises(KeyboardInterrupt):
            encode(manifest, tmp_path / "out", CountingCodec(**rest), batch_seconds=0.1)

    interrupted(limit=6)
    interrupted(limit=6, fingerprint="f2")
    with closing(sqlite3.connect(tmp_path / "out.partial/journal.sqlite")) as journal:
        done = [row[0] for row in journal.execute("SELECT audio FROM codes WHERE codec = 'f2'")]
    assert len(done) == 6
    os.utime(done[0], ns=(1, 1))
    assert encode(manifest, tmp_path / "out", CountingCodec(fingerprint="f2")).resumed == 5


def test_two_runs_to_one_folder(tmp_path, manifest):
    class Nested(CountingCodec):
        def encode(self, waves):
            with pytest.raises(UserError, match="in use"):
                encode(manifest, tmp_path / "out", CountingCodec())
            return super().encode(waves)

    encode(manifest, tmp_path / "out", Nested())


def test_bad_clips_are_listed_and_passed_over(tmp_path, manifest):
    utterances = read_manifest(manifest)
    utterances[2].audio.write_bytes(b"")
    utterances[7].audio.unlink()
    summary = encode(manifest, tmp_path / "out", CountingCodec(), max_bad_share=0.2)
    assert (summary.encoded, summary.bad) == (10, 2)
    bad = {
        row["id"]: row
        for row in map(json.loads, (tmp_path / "out.bad.jsonl").read_text().splitlines())
    }
    assert bad.keys() == {utterances[2].id, utterances[7].id}
    assert "0 bytes" in bad[utterances[2].id]["reason"]
    assert "no such audio file" in bad[utterances[7].id]["reason"]
    assert len(open_dataset(tmp_path / "out", "train")) == 10


def test_too_many_bad_clips_stop_the_run_and_can_be_mended(tmp_path, manifest):
    utterances = read_manifest(manifest)
    whole = utterances[2].audio.read_bytes()
    utterances[2].audio.write_bytes(whole[:-500])
    with pytest.raises(UserError, match=r"1 of 12 clips are bad .*truncated") as caught:
        encode(manifest, tmp_path / "out", CountingCodec())
    assert str(tmp_path / "out.bad.jsonl") in str(caught.value)
    assert not (tmp_path / "out").exists()
    utterances[2].audio.write_bytes(whole)
    codec = CountingCodec()
    assert encode(manifest, tmp_path / "out", codec).resumed == 11
    assert len(codec.seen) == 1
    assert not (tmp_path / "out.bad.jsonl").exists()


def test_damaged_codes_in_the_journal_are_made_anew(tmp_path, manifest, monkeypatch, capsys):
    encode(manifest, tmp_path / "wanted", CountingCodec())
    with monkeypatch.context() as patch:
        patch.setattr("llasa_jax.encode.shards.write_shard", raise_disk_error)
        with pytest.raises(OSError, match="disk"):
            encode(manifest, tmp_path / "out", CountingCodec())
    with closing(sqlite3.connect(tmp_path / "out.partial/journal.sqlite")) as journal, journal:
        rows = journal.execute("SELECT id, codes FROM codes ORDER BY id LIMIT 3").fetchall()
        for clip, codes in rows:
            damaged = bytes([codes[0] ^ 16]) + codes[1:]
            journal.execute("UPDATE codes SET codes = ? WHERE id = ?", (damaged, clip))
    codec = CountingCodec()
    assert encode(manifest, tmp_path / "out", codec).resumed == 9
    assert len(codec.seen) == 3
    assert "codes of 3 clips" in capsys.readouterr().out
    np.testing.assert_equal(read_all(tmp_path / "out"), read_all(tmp_path / "wanted"))


def raise_disk_error(*_):
    raise OSError("disk")


def test_the_same_command_again(tmp_path, manifest, capsys):
    utterances = read_manifest(manifest)
    utterances[2].audio.write_bytes(b"")
    options = {"max_bad_share": 0.2, "validation_share": 0.3}
    first = encode(manifest, tmp_path / "out", CountingCodec(), **options)
    listed = (tmp_path / "out.bad.jsonl").read_text()
    # What a kill between the dataset's rename and the clean-up leaves
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/journal.sqlite").touch()
    codec = CountingCodec()
    again = encode(manifest, tmp_path / "out", codec, **options)
    assert (first.encoded, first.resumed) == (11, 0)
    assert again == dataclasses.replace(first, encoded=0, resumed=11)
    assert "done already" in capsys.readouterr().out
    assert codec.seen == []
    assert (tmp_path / "out.bad.jsonl").read_text() == listed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.bad.jsonl"]
    for changed in ({"codec": CountingCodec(fingerprint="f2")}, {"seed": 5}):
        with pytest.raises(UserError, match="already exists, a dataset that was made of other"):
            encode(**{"manifest": manifest, "out": tmp_path / "out", "codec": codec} | changed)


def test_killed_between_the_rename_and_the_clean_up(tmp_path, manifest):
    program = """
import os, signal, sys
from counting_codec import CountingCodec
from llasa_jax.encode import offline
offline.remove_journals = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
offline.encode(*sys.argv[1:], CountingCodec())
"""
    arguments = [sys.executable, "-c", program, str(manifest), str(tmp_path / "out")]
    assert subprocess.run(arguments, capture_output=True).returncode == -9
    assert (tmp_path / "out.partial/journal.sqlite").is_file()
    codec = CountingCodec()
    encode(manifest, tmp_path / "out", codec)
    assert codec.seen == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_one_bad_clip_never_ends_all(tmp_path, manifest):
    """A header that claims 256 GB, samples at 1 Hz, a NUL in a path, a FIFO, and a long clip."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    flac = bytearray((manifest.parent / rows[0]["audio"]).read_bytes())
    # STREAMINFO's 36 bits of samples end 26 bytes after the marker
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4
    (manifest.parent / "bomb.flac").write_bytes(flac)
    soundfile.write(manifest.parent / "slow.wav", np.ones(3000) / 2, 1)
    soundfile.write(manifest.parent / "long.wav", np.tile([0.5, -0.5], 16_000 * 61), 16_000)
    os.mkfifo(manifest.parent / "pipe.wav")
    names = ("bomb.flac", "slow.wav", "long.wav", "pipe.wav", "nul\0.wav")
    rows += [{"audio": name, "text": "x", "id": name.split(".")[0]} for name in names]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = encode(manifest, tmp_path / "out", CountingCodec(), max_bad_share=0.5)
    assert (summary.encoded, summary.bad) == (12, 5)
    reasons = {
        row["id"]: row["reason"]
        for row in map(json.loads, (tmp_path / "out.bad.jsonl").read_text().splitlines())
    }
    assert set(reasons) == {"bomb", "slow", "long", "pipe", "nul\0"}
    assert "claims 1 samples a second" in reasons["slow"]
    assert "122 s long" in reasons["long"]
    assert "raise max_clip_seconds (it is 120)" in reasons["long"]
    longer = encode(
        manifest, tmp_path / "longer", CountingCodec(), max_bad_share=0.5, max_clip_seconds=200
    )
    assert (longer.encoded, longer.bad) == (13, 4)


def test_a_codec_out_of_memory_names_the_clip(tmp_path, manifest):
    class Small(CountingCodec):
        def encode(self, waves):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate"
                " memory: you tried to allocate 64800000000 bytes."
            )

    with pytest.raises(UserError, match=r"out of memory on cpu, .*flac is the longest .*lower"):
        encode(manifest, tmp_path / "out", Small())


def test_a_script_without_a_main_guard_may_encode(tmp_path, manifest):
    script = tmp_path / "script.py"
    script.write_text(
        "from counting_codec import CountingCodec\n"
        "from llasa_jax.encode.offline import encode\n"
        f"print(encode({str(manifest)!r}, {str(tmp_path / 'out')!r}, CountingCodec()).encoded)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "12"


def test_foreign_files_beside_the_journal_stay(tmp_path, manifest):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("x")
    encode(manifest, tmp_path / "out", CountingCodec())
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["mine.txt"]


def test_nothing_good_is_an_error_whatever_the_share(tmp_path, manifest):
    for utterance in read_manifest(manifest):
        utterance.audio.write_bytes(b"")
    with pytest.raises(UserError, match="12 of 12"):
        encode(manifest, tmp_path / "out", CountingCodec(), max_bad_share=1.0)


def test_an_existing_folder_is_refused_before_any_work(tmp_path, manifest):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    codec = CountingCodec()
    for out in (tmp_path / "out", tmp_path / "out/precious"):
        with pytest.raises(UserError, match="already exists"):
            encode(manifest, out, codec)
    assert codec.seen == []
    assert (tmp_path / "out/precious").read_text() == "x"
    (tmp_path / "empty").mkdir()
    encode(manifest, tmp_path / "empty", codec)
    assert len(open_dataset(tmp_path / "empty", "train")) == 12


@pytest.mark.parametrize(
    "setting",
    [{"validation_share": 1.0}, {"max_bad_share": -0.1}, {"batch_seconds": 0}, {"workers": 0}],
)
def test_bad_settings(tmp_path, manifest, setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} {next(iter(setting.values()))} "):
        encode(manifest, tmp_path / "out", CountingCodec(), **setting)


def test_splits_follow_the_id_alone():
    utterances = [Clip(Path("a"), "t", f"clip{i}") for i in range(2000)]
    splits = assign_splits(utterances, 0.1, seed=3)
    assert 150 < list(splits.values()).count("validation") < 250
    assert assign_splits(utterances[::-1], 0.1, seed=3) == splits
    assert assign_splits(utterances[:1000], 0.1, seed=3).items() <= splits.items()
    assert assign_splits(utterances, 0.1, seed=4) != splits
    assert set(assign_splits(utterances, 0.0, seed=3).values()) == {"train"}
    assert list(assign_splits(utterances[:5], 1e-6, seed=3).values()).count("validation") == 1
    own = [Clip(Path("a"), "t", "x", split="test"), Clip(Path("a"), "t", "y", split="validation")]
    assert assign_splits(own, 0.5, seed=0) == {"x": "test", "y": "validation"}


def example(clip, codes=(1, 0, 65535, 0)):
    return {
        "id": clip,
        "text": "Hé, «ça»\n",
        "codes": np.array(codes, np.uint16),
        "speaker": "",
        "description": "",
        "language": "fr",
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset") / "d"
    write_dataset(
        folder,
        {"train": (example(str(i), [i]) for i in range(50)), "test": iter([example("a")])},
        {"codec": "c"},
    )
    return folder


def test_records(dataset):
    records = open_dataset(dataset, "train")
    assert sorted(int(records[i]["id"]) for i in range(len(records))) == list(range(50))
    assert all(int(r["id"]) == r["codes"][0] for r in records)
    (record,) = open_dataset(dataset, "test")
    expected = example("a")
    np.testing.assert_array_equal(record.pop("codes"), expected.pop("codes"))
    assert record == expected
    again = pickle.loads(pickle.dumps(records))
    np.testing.assert_equal(again[49], records[49])
    for index in (50, -1):
        with pytest.raises(IndexError):
            records[index]


def test_order_on_disk_depends_on_the_ids_only(dataset, tmp_path):
    write_dataset(
        tmp_path / "d", {"train": (example(str(i), [i]) for i in reversed(range(50)))}, {}
    )
    assert [r["id"] for r in open_dataset(tmp_path / "d", "train")] == [
        r["id"] for r in open_dataset(dataset, "train")
    ]


def test_large_splits_are_many_small_files(dataset, tmp_path, monkeypatch):
    """ArrayRecord's reads grow slower with the records of a file; the order is that of one file."""
    monkeypatch.setattr("llasa_jax.data.builder.RECORDS_A_FILE", 12)
    write_dataset(tmp_path / "d", {"train": (example(str(i), [i]) for i in range(50))}, {})
    assert len(list((tmp_path / "d").glob("*array_record*"))) == 4
    assert [r["id"] for r in open_dataset(tmp_path / "d", "train")] == [
        r["id"] for r in open_dataset(dataset, "train")
    ]


def test_a_dataset_that_is_none_has_no_such_split_or_lost_a_file(dataset, tmp_path):
    with pytest.raises(UserError, match="no dataset of codes"):
        open_dataset(tmp_path / "none", "train")
    with pytest.raises(UserError, match="'dev'; it has test, train"):
        open_dataset(dataset, "dev")
    shutil.copytree(dataset, tmp_path / "d")
    (shard,) = (tmp_path / "d").glob("*-test.*")
    shard.unlink()
    assert len(open_dataset(tmp_path / "d", "train")) == 50
    with pytest.raises(UserError, match=shard.name):
        open_dataset(tmp_path / "d", "test")
    (tmp_path / "d/metadata.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_metadata(tmp_path / "d")


def test_damaged_files_and_an_empty_split(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    (shard,) = (tmp_path / "d").glob("*-train.*")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(
        UserError,
        match=(
            r"split 'train': record 3 cannot be read, its file is damaged.*; copy the folder again"
        ),
    ):
        open_dataset(tmp_path / "d", "train")[3]
    info = json.loads((tmp_path / "d/dataset_info.json").read_text())
    for split in info["splits"]:
        split |= {"shardLengths": ["0"], "numBytes": "0"} if split["name"] == "test" else {}
    (tmp_path / "d/dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="the split 'test' is empty"):
        open_dataset(tmp_path / "d", "test")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": " \n"}, "'b' has no text"),
        ({"codes": np.zeros(0, np.uint16)}, "'b' has no codes"),
        ({"codes": np.array([3, 65_536])}, "'b' has codes from 3 to 65536, outside 0..65535"),
        ({"codes": np.array([-1, 3])}, "'b' has codes from -1 to 3, outside"),
        (
            {"codes": np.array([128_264, 193_799])},
            r"'b' has codes from 128264 to 193799, which look like token ids: subtract",
        ),
        ({"codes": np.ones((1, 3), int)}, r"'b' has codes of shape \(1, 3\)"),
        ({"codes": np.array([1.0])}, "'b' has codes of .* type float64"),
        ({"id": "a"}, "share an id"),
    ],
)
def test_records_that_nothing_can_be_learned_from(tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        write_dataset(
            tmp_path / "d", {"train": iter([example("a"), {**example("b"), **fields}])}, {}
        )
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_made_is_left(tmp_path):
    def fails():
        yield example("a")
        raise RuntimeError("broken source")

    with pytest.raises(RuntimeError, match="broken source"):
        write_dataset(tmp_path / "d", {"train": fails()}, {})
    with pytest.raises(UserError, match="no examples"):
        write_dataset(tmp_path / "d", {"train": iter([])}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_taken_for_the_dataset(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d.building/llasa_speech/1.0.0")
    write_dataset(tmp_path / "d", {"train": iter([example("new")])}, {})
    assert [r["id"] for r in open_dataset(tmp_path / "d", "train")] == ["new"]


def test_a_fingerprint_tells_datasets_apart_whatever_their_order(dataset, tmp_path):
    def fingerprint(name, rows, test="a"):
        splits = {"train": rows, "test": [example(test)]}
        write_dataset(tmp_path / name, splits, {"codec": name})
        return dataset_fingerprint(tmp_path / name)

    rows = [example(str(i), [i]) for i in range(50)]
    own = dataset_fingerprint(dataset)
    assert fingerprint("same", rows[::-1]) == own
    others = [
        fingerprint("codes", [*rows[:49], example("49", [48])]),
        fingerprint("text", [*rows[:49], {**rows[49], "text": "else"}]),
        fingerprint("field", [*rows[:49], {**rows[49], "language": "", "description": "fr"}]),
        fingerprint("fewer", rows[:49]),
        fingerprint("split", rows, test="b"),
    ]
    assert len({own, *others}) == 6
    shutil.copytree(dataset, tmp_path / "unsealed")
    (tmp_path / "unsealed/seal.json").unlink()
    assert dataset_fingerprint(tmp_path / "unsealed") == own
    for damage in ("{", "[]", "\xff"):
        (tmp_path / "unsealed/seal.json").write_bytes(damage.encode("latin-1"))
        with pytest.raises(UserError, match=r"seal.json: .*copy the whole folder again"):
            dataset_fingerprint(tmp_path / "unsealed")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_damaged_descriptions_are_sentences(dataset, tmp_path, name, damage):
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / name).write_bytes(damage)
    if (name, damage) == ("metadata.json", b"{}"):
        return  # it may name no codec
    with pytest.raises(UserError, match=r"copy the whole folder again|a TFDS dataset named None"):
        open_dataset(tmp_path / "d", "train")


def test_only_a_datasets_own_files_are_deleted(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d/notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"is not deleted, for it holds notes.txt"):
        remove_dataset(tmp_path / "d")
    assert len(open_dataset(tmp_path / "d", "train")) == 50
    (tmp_path / "d/notes.txt").unlink()
    remove_dataset(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UserError, match=r"is not a name in UTF-8") as caught:
        write_dataset(out, {"train": [example("a")]}, {})
    str(caught.value).encode()
    assert list(tmp_path.iterdir()) == []


def test_examples_are_streamed(tmp_path):
    alive = 0
    most = 0

    class Codes(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def stream():
        nonlocal alive, most
        for i in range(300):
            codes = np.arange(10, dtype=np.uint16).view(Codes)
            alive += 1
            most = max(most, alive)
            yield {**example(str(i)), "codes": codes}

    write_dataset(tmp_path / "d", {"train": stream()}, {})
    assert len(open_dataset(tmp_path / "d", "train")) == 300
    assert most < 20


def test_tensorflow_is_never_imported(tmp_path, manifest):
    (tmp_path / "stub/tensorflow").mkdir(parents=True)
    (tmp_path / "stub/tensorflow/__init__.py").write_text(
        "raise SystemExit('something imported TensorFlow')"
    )
    script = f"""
import sys
from counting_codec import CountingCodec
from llasa_jax.data.builder import open_dataset
from llasa_jax.encode.offline import encode
encode({str(manifest)!r}, {str(tmp_path / "out")!r}, CountingCodec())
print(len(list(open_dataset({str(tmp_path / "out")!r}, "train"))))
assert "tensorflow" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}:{os.environ['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "12"
    assert (
        subprocess.run(
            [sys.executable, "-c", "import tensorflow"], env=environment, capture_output=True
        ).returncode
        == 1
    )
