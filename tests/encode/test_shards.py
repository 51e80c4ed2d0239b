"""A dataset in shards: the same bytes as TFDS's own writer, whoever makes the shards, and however
often they die.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from counting_codec import CountingCodec
from places import SPEECH

from llasa_jax.data.builder import file_count, open_dataset, record_order, write_dataset
from llasa_jax.data.shards import plan_shards, seal_dataset, write_shard
from llasa_jax.encode.append import append
from llasa_jax.encode.filters import Filters
from llasa_jax.encode.offline import Job, encode_here, make_part, seal
from llasa_jax.encode.processes import _cores_of, all_devices, encode_on
from llasa_jax.encode.sources import ManifestAudio
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio, write_audio

METADATA = {"codec": "c", "fingerprint": "f", "hop": 320, "sample_rate": 16000}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Sixteen clips, one of which is bad."""
    folder = tmp_path_factory.mktemp("in")
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    rows = rows[::2][:15] + [{"audio": "none.wav", "text": "x", "id": "none"}]
    for row in rows:
        row["audio"] = str(SPEECH / row["audio"])
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "m.jsonl"


def a_job(manifest, out, codec=None, **options):
    source = functools.partial(ManifestAudio, manifest, 0.2, 1)
    options = {"max_bad_share": 0.1, "workers": 1, "clips_a_file": 3} | options
    return Job(source, out, codec or CountingCodec(), **options)


def bytes_of(folder):
    files = [*folder.iterdir(), folder.with_name(f"{folder.name}.bad.jsonl")]
    return {path.name.replace(folder.name, "."): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def wanted(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("wanted") / "out"
    summary = encode_here(a_job(manifest, out))
    assert (summary.encoded, summary.bad, sum(summary.splits.values())) == (15, 1, 15)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.bad.jsonl"]
    assert len(list(out.glob("*-train.array_record-*"))) >= 3
    return bytes_of(out)


def test_shards_are_what_tfds_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("llasa_jax.data.builder.FEW", 40)
    rng = np.random.default_rng(0)
    ids = [f"é\\{number}" for number in range(200)]
    texts = {"text": "Hé", "speaker": "s", "description": "", "language": "fr"}
    codes = [rng.integers(0, 65536, 1 + number % 9).astype(np.uint16) for number in range(200)]
    records = [{"id": one, "codes": its, **texts} for one, its in zip(ids, codes, strict=True)]
    splits = ["test" if number % 10 == 3 else "train" for number in range(200)]
    whole = {
        split: [record for record, its in zip(records, splits, strict=True) if its == split]
        for split in ("test", "train")
    }
    write_dataset(tmp_path / "tfds", whole, METADATA, "m", lambda: {"x": 1})
    shards = plan_shards(ids, splits)
    assert [shard.count for shard in shards] == [1, 4, 4, 4, 4]
    random.Random(0).shuffle(made := list(shards))
    found = {
        shard.name: write_shard(tmp_path, shard, (records[i] for i in shard.members), "m", [])
        for shard in made
    }
    pairs = [(shard, found[shard.name]) for shard in shards]
    seal_dataset(tmp_path / "ours", tmp_path, pairs, METADATA, "m", {"x": 1})
    files = {path.name: path.read_bytes() for path in (tmp_path / "tfds").iterdir()}
    assert len(files) == 9
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == files
    # A shard whose clips are all bad is an empty file.
    empty = write_shard(tmp_path, shards[1], [], "m", [])
    pairs[1] = shards[1], empty
    seal_dataset(tmp_path / "less", tmp_path, pairs, METADATA, "m", {})
    less = open_dataset(tmp_path / "less", "train")
    assert len(less) == 180 - 45
    assert less[0]["id"] == ids[shards[2].members[0]]


def test_the_order_is_that_of_tfds():
    from tensorflow_datasets.core.hashing import Hasher

    ids = [f"a\\b{number}é" for number in range(500)]
    hasher = Hasher("train")
    expected = sorted(range(500), key=lambda at: hasher.hash_key(ids[at]))
    assert record_order(ids, "train").tolist() == expected


def test_how_many_files():
    counts = [file_count(records) for records in (1, 1999, 13_100, 64_000, 600_000, 60_000_000)]
    assert counts == [1, 1, 13, 64, 75, 512]


def test_parts_and_seal(tmp_path, manifest, wanted):
    for part in (2, 0):
        make_part(a_job(manifest, tmp_path / "out"), part, 3)
    with pytest.raises(UserError, match=r"of 5 shards are not there, .*--shard"):
        seal(a_job(manifest, tmp_path / "out"))
    make_part(a_job(manifest, tmp_path / "out"), 1, 3)
    again = CountingCodec()
    make_part(a_job(manifest, tmp_path / "out", again), 1, 3)
    assert again.seen == []
    with pytest.raises(UserError, match="made of other"):
        seal(a_job(manifest, tmp_path / "out", CountingCodec(fingerprint="f2")))
    summary = seal(a_job(manifest, tmp_path / "out"))
    assert (summary.encoded, summary.resumed, summary.bad) == (0, 15, 1)
    assert bytes_of(tmp_path / "out") == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.bad.jsonl"]


@pytest.mark.slow
def test_two_processes(tmp_path, manifest, wanted):
    job = a_job(manifest, tmp_path / "out")
    encode_on(job, all_devices("cpu", 2))
    assert bytes_of(tmp_path / "out") == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.bad.jsonl"]
    assert encode_on(job, ["cpu"]).resumed == 15  # done already


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone has it")
def test_a_process_has_its_share_of_the_cores_from_its_start():
    """Not only once its libraries have made a thread for each core of the machine."""
    cores, shares = os.sched_getaffinity(0), []
    program = "import os; print(*os.sched_getaffinity(0))"
    for number in range(2):
        with _cores_of("cpu", number, 2):
            said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        shares.append(set(map(int, said.stdout.split())))
    assert shares[0] | shares[1] == cores
    assert len(cores) == 1 or shares[0].isdisjoint(shares[1])
    assert os.sched_getaffinity(0) == cores
    with _cores_of("cuda:0", 0, 2):
        assert os.sched_getaffinity(0) == cores


@pytest.mark.slow
def test_errors_come_from_the_processes(tmp_path, manifest):
    with pytest.raises(UserError, match="no such codec folder"):
        encode_on(a_job(manifest, tmp_path / "out", str(tmp_path / "none")), ["cpu"])


def test_bad_parts():
    done = subprocess.run(
        [sys.executable, "-m", "llasa_jax.cli", "encode", "--shard", "3/3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "'3/3' is no part; write 0/8" in done.stderr


@pytest.mark.slow
@pytest.mark.soak
def test_killed_at_random_moments(tmp_path, manifest, wanted):
    """All processes of an encoding are killed at a random moment, twice."""
    program = """
import functools, sys
from counting_codec import SlowCodec
from llasa_jax.encode.append import append
from llasa_jax.encode.filters import Filters
from llasa_jax.encode.offline import Job
from llasa_jax.encode.processes import encode_on
from llasa_jax.encode.sources import ManifestAudio
encode_on(Job(functools.partial(ManifestAudio, sys.argv[1], 0.2, 1), sys.argv[2],
    SlowCodec(0.2), max_bad_share=0.1, workers=1, clips_a_file=3), ["cpu", "cpu"])
"""
    out = tmp_path / "sets/out"
    arguments = [sys.executable, "-c", program, str(manifest), str(out)]
    rng, killed = random.Random(0), 0
    while not out.exists():
        with subprocess.Popen(arguments, start_new_session=True) as process:
            if killed < 2:
                time.sleep(rng.uniform(2.5, 5))
            else:
                process.wait()
            killed += process.poll() is None
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert killed >= 1
    assert bytes_of(out) == wanted


def test_append(tmp_path, manifest):
    rows = manifest.read_text().splitlines()[:15]
    (tmp_path / "some.jsonl").write_text("\n".join(rows[:9]))
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    encode_here(a_job(tmp_path / "some.jsonl", tmp_path / "out"))
    encode_here(a_job(tmp_path / "all.jsonl", tmp_path / "all"))
    codec = CountingCodec()
    append(a_job(tmp_path / "all.jsonl", tmp_path / "out", codec))
    assert len(codec.seen) == 6
    files = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    seals = [json.loads(each.pop("seal.json")) for each in (files, found)]
    assert found == files
    assert seals[0]["records"] == seals[1]["records"]
    assert seals[0]["summary"]["splits"] == seals[1]["summary"]["splits"]
    assert append(a_job(tmp_path / "all.jsonl", tmp_path / "out", codec)) is None
    assert len(codec.seen) == 6
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"some.jsonl", "all.jsonl", "out", "all"}
    (tmp_path / "more.jsonl").write_text(rows[0].replace('"id": "', '"id": "new_'))
    other = a_job(tmp_path / "more.jsonl", tmp_path / "out", CountingCodec(fingerprint="f2"))
    with pytest.raises(UserError, match="another codec"):
        append(other)


def test_filters(tmp_path):
    rng = np.random.default_rng(0)
    speech = (0.3 * rng.standard_normal(32000)).clip(-0.9, 0.9).astype(np.float32)
    waves = {
        "good": speech,
        "short": speech[:8000],
        "silent": np.concatenate([speech[:6000], np.zeros(26000, np.float32)]),
        "clipped": np.clip(speech * 20, -1, 1),
        "foreign": speech,
    }
    rows = []
    for name, wave in waves.items():
        write_audio(tmp_path / f"{name}.wav", wave)
        language = "de" if name == "foreign" else "en"
        rows.append({"audio": f"{name}.wav", "text": "x", "language": language})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = Filters(min_seconds=1, max_silence=0.5, max_clipped=0.1, languages=("en", "fr"))
    job = functools.partial(a_job, tmp_path / "m.jsonl", max_bad_share=0.0)
    assert encode_here(job(tmp_path / "all")).bad == 0
    summary = encode_here(job(tmp_path / "out", filters=filters))
    assert (summary.encoded, summary.bad) == (1, 4)
    lines = (tmp_path / "out.bad.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    assert "0.50 s long (min_seconds is 1)" in reasons["short"]
    assert "81% silent (max_silence is 0.5)" in reasons["silent"]
    assert "clipped (max_clipped is 0.1)" in reasons["clipped"]
    assert "of the language 'de' (languages is en,fr)" in reasons["foreign"]
    with pytest.raises(UserError, match=r"max_silence is 2.0"):
        job(tmp_path / "out", filters=Filters(max_silence=2.0))


@pytest.mark.slow
def test_dnsmos_tells_noise_from_speech():
    pytest.importorskip("speechmos", reason="pip install 'llasa-jax[evaluate]'")
    from llasa_jax.encode.filters import dnsmos

    speech = read_audio(SPEECH / "ada_01.flac")
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32) * 0.1
    filters = Filters(min_dnsmos=(dnsmos(speech) + dnsmos(noise)) / 2)
    filters.check_wave(speech, "speech")
    with pytest.raises(UserError, match="noise: filtered, a DNSMOS of 1"):
        filters.check_wave(noise, "noise")
