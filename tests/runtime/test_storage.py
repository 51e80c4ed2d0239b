"""Buckets, by gcp-storage-emulator: paths, errors, folders that appear whole, claims."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from buckets import faults

from llasa_jax.errors import UserError
from llasa_jax.runtime import bucket_files, claims, files, storage, writing
from llasa_jax.runtime.bucket_files import Mirror
from llasa_jax.runtime.claims import Claim
from llasa_jax.runtime.copies import keep_copies_in, local_copy
from llasa_jax.runtime.storage import as_path


def test_a_path_in_a_bucket_has_pathlibs_methods(bucket):
    path = as_path(bucket) / "folder" / "name.txt"
    assert not path.exists()
    writing.write_whole(path, "text")
    assert path.is_file()
    assert path.parent.is_dir()
    assert str(path) == f"{bucket}/folder/name.txt"
    assert [each.name for each in path.parent.iterdir()] == ["name.txt"]
    assert files.read_text(path, "the text") == "text"
    with pytest.raises(UserError, match=r"nothing.json: the settings is missing; copy it"):
        files.read_json(path.parent / "nothing.json", "the settings")
    with pytest.raises(UserError, match=r"the text is larger than 3 bytes"):
        files.read_text(path, "the text", limit=3)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: storage.check_reachable("gs://no-such/x", "the model"), "there is no bucket"),
        (lambda: storage.check_reachable("gs://bucket/none", "the model"), "model is not there"),
        (lambda: storage.check_writable("gs://no-such/x"), "there is no bucket gs://no-such"),
        (lambda: storage.check_writable("gs://read-only/x"), "gs://read-only: access denied"),
        (lambda: storage.check_writable("hf://org/name"), "can only be read"),
        (lambda: storage.as_path("s9://x/y"), ""),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_sentence(bucket, act, words):
    if not words:
        assert str(act()) == "s9:/x/y"  # no scheme of ours: a local path
        return
    with pytest.raises(UserError, match=words):
        act()


def test_a_store_that_is_down_is_one_sentence(bucket):
    faults({"down": True})
    code = (
        "from llasa_jax.runtime import storage\n"
        "from gcsfs import retry\n"
        "import asyncio\n"
        "real, asyncio.sleep = asyncio.sleep, lambda *_: real(0)\n"
        f"storage.check_writable('{bucket}')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: gs://bucket cannot be reached (" in result.stderr.splitlines()[-1]


def test_only_one_of_two_creates_a_file(bucket):
    path = f"{bucket}/name"
    assert storage.create(path, b"first")
    assert not storage.create(path, b"second")
    assert storage.read_bytes(path) == b"first"


def test_a_new_folder_appears_whole(bucket):
    folder = as_path(bucket) / "model"

    def write(end):
        with writing.new_folder(folder, last="model.json") as partial:
            (partial / "model.json").write_text("{}")
            (partial / "params").mkdir()
            (partial / "params" / "x").write_bytes(b"12")
            end(partial)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(stop)
    assert storage.entries(folder) == {}
    # What a process that was killed as it put files up has left: a claim and some of the files.
    storage.write_bytes(f"{folder}/params/old", b"1")
    dead = {"process": f"{claims._machine()} 999999999 1", "host": "here"}
    storage.create(f"{folder}/.claims/00000001", json.dumps(dead).encode())
    write(lambda _: None)
    assert sorted(storage.entries(folder)) == ["model.json", "params/x"]
    with pytest.raises(UserError, match="already exists and is not empty"):
        write(lambda _: None)


def test_somebody_elses_files_are_no_rubbish(bucket):
    storage.write_bytes(f"{bucket}/a/notes.txt", b"mine")
    with (
        pytest.raises(UserError, match="already exists and is not empty"),
        writing.new_folder(as_path(f"{bucket}/a"), last="model.json"),
    ):
        pass
    assert storage.read_bytes(f"{bucket}/a/notes.txt") == b"mine"


def test_the_last_file_of_a_folder_is_put_up_last(bucket, tmp_path, monkeypatch):
    for name in ("a", "model.json", "z"):
        (tmp_path / name).write_text(name)
    put, system = [], storage.file_system(bucket)
    monkeypatch.setattr(system, "put_file", lambda source, there: put.append(there))
    bucket_files.upload(tmp_path, bucket, "model.json")
    assert put[-1] == f"{bucket}/model.json"
    assert len(put) == 3


def test_a_local_copy_is_made_once_and_again_when_the_bucket_changes(bucket, tmp_path):
    storage.write_bytes(f"{bucket}/data/a.txt", b"one")
    storage.write_bytes(f"{bucket}/data/below/b.txt", b"two")
    first = local_copy(f"{bucket}/data")
    assert (first / "below" / "b.txt").read_bytes() == b"two"
    before = (first / "a.txt").stat().st_mtime_ns
    assert local_copy(f"{bucket}/data") == first
    assert (first / "a.txt").stat().st_mtime_ns == before
    storage.write_bytes(f"{bucket}/data/a.txt", b"new")
    again = local_copy(f"{bucket}/data")
    assert (again / "a.txt").read_bytes() == b"new"
    keep_copies_in(str(tmp_path / "elsewhere"))
    single = local_copy(f"{bucket}/data/a.txt")
    assert single.is_relative_to(tmp_path / "elsewhere")
    assert (single.name, single.read_bytes()) == ("a.txt", b"new")
    with pytest.raises(UserError, match="is not there"):
        local_copy(f"{bucket}/nothing")
    assert local_copy(tmp_path) == tmp_path


def test_a_copy_that_differs_is_refused_and_leaves_nothing(bucket, tmp_path, monkeypatch):
    storage.write_bytes(f"{bucket}/data/a.txt", b"one")
    system = storage.file_system(bucket)
    monkeypatch.setattr(system, "get_file", lambda _, copy: Path(copy).write_bytes(b"onf"))
    with pytest.raises(UserError, match="a.txt differs from it in size or MD5"):
        local_copy(f"{bucket}/data")
    assert not [path for path in (tmp_path / "copies").iterdir() if path.is_dir()]


def test_a_disk_without_room_for_a_copy(bucket, monkeypatch):
    storage.write_bytes(f"{bucket}/data/a.txt", b"one")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2))
    with pytest.raises(UserError, match="free and .* are needed"):
        local_copy(f"{bucket}/data")


def test_files_that_grow_are_put_up_as_they_grow(bucket, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("1\n")
    with Mirror(tmp_path, f"{bucket}/run") as mirror:
        mirror.sync()
        assert storage.read_bytes(f"{bucket}/run/metrics.jsonl") == b"1\n"
        (tmp_path / "metrics.jsonl").write_text("1\n2\n")
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / "a.wav").write_bytes(b"RIFF")
    assert sorted(storage.entries(f"{bucket}/run")) == ["metrics.jsonl", "samples/a.wav"]
    assert storage.read_bytes(f"{bucket}/run/metrics.jsonl") == b"1\n2\n"
    (tmp_path / "metrics.jsonl").unlink()
    Mirror(tmp_path, f"{bucket}/run").fetch(["metrics.jsonl", "bad.jsonl"])
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n"


# Claims


def test_two_processes_cannot_hold_one_folder(bucket):
    with Claim(bucket, "training") as ours:
        with pytest.raises(UserError, match=r"another process \(on .*\) is training in gs://"):
            Claim(bucket, "training").__enter__()
        ours.check()
    assert storage.entries(bucket) == {}
    with Claim(bucket, "training"):
        pass


def test_the_claim_of_a_killed_process_is_taken_over_at_once(bucket):
    code = (
        "import os\nfrom llasa_jax.runtime.claims import Claim\n"
        f"Claim('{bucket}', 'training').__enter__()\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert list(storage.entries(bucket)) == [".claims/00000001"]
    started = time.monotonic()
    with Claim(bucket, "training"):
        assert time.monotonic() - started < claims.LEASE / 2
    assert storage.entries(bucket) == {}


def test_another_machines_claim_is_held_as_long_as_it_changes(bucket, monkeypatch, capsys):
    monkeypatch.setattr(claims, "LEASE", 0.6)
    monkeypatch.setattr(claims, "POLL", 0.1)
    monkeypatch.setattr(claims, "BEAT", 0.1)
    monkeypatch.setattr(claims, "_is_alive", lambda _: None)  # as of another machine's
    with Claim(bucket, "training"), pytest.raises(UserError, match="another process"):
        Claim(bucket, "training").__enter__()
    storage.create(f"{bucket}/.claims/00000001", json.dumps({"time": time.time()}).encode())
    with Claim(bucket, "training"):
        assert ".claims/00000002" in storage.entries(bucket)
    assert "waiting to see whether" in capsys.readouterr().out


def test_a_holder_that_was_taken_over_stops(bucket, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    with Claim(bucket, "training") as ours:
        storage.create(f"{bucket}/.claims/00000002", b'{"id": "another"}')
        deadline = time.monotonic() + 20
        while not ours._lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match="another process has taken over"):
            ours.check()
    assert ".claims/00000002" in storage.entries(bucket)
