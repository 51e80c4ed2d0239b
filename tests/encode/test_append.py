"""Appending, killed at its file operations: the old dataset is never lost, and the same command
makes what an uninterrupted one makes.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from killed import small_job
from places import FIXTURES, SPEECH

from llasa_jax.data.builder import dataset_fingerprint, open_dataset, split_sizes
from llasa_jax.encode.append import SomeAudio, append
from llasa_jax.encode.offline import encode_here
from llasa_jax.encode.sources import ManifestAudio


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """Of ten clips, and of four more, one of which is bad."""
    folder = tmp_path_factory.mktemp("in")
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    rows = rows[::3][:13] + [{"audio": "none.wav", "text": "x", "id": "none"}]
    for row in rows:
        row["audio"] = str(SPEECH / row["audio"])
    for name, some in (("some", rows[:10]), ("all", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def old(manifests, tmp_path_factory):
    """A dataset of the first ten."""
    out = tmp_path_factory.mktemp("old") / "out"
    encode_here(small_job(manifests / "some.jsonl", out))
    return out


@pytest.fixture(scope="module")
def encoded(manifests, old, tmp_path_factory):
    """The same, when appending has encoded the new clips."""
    folder = tmp_path_factory.mktemp("encoded")
    shutil.copytree(old.parent, folder, dirs_exist_ok=True)
    new = small_job(manifests / "all.jsonl", folder / "out.new")
    audio = ManifestAudio(manifests / "all.jsonl", 0.2, 1)
    encode_here(dataclasses.replace(new, source=lambda: SomeAudio(audio, [*range(10, 14)])))
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("begun", "points"),
    [
        ("encoded", range(20, 120, 25)),
        pytest.param("encoded", range(150), marks=[pytest.mark.slow, pytest.mark.soak]),
        pytest.param("old", range(0, 160, 8), marks=[pytest.mark.slow, pytest.mark.soak]),
    ],
)
def test_killed_at_any_file_operation(begun, points, manifests, old, tmp_path, request, capsys):
    source, folder = manifests / "all.jsonl", request.getfixturevalue(begun)
    folder = folder.parent if begun == "old" else folder
    outs = [tmp_path / f"{calls}" / "out" for calls in (*points, 10_000)]
    program = [sys.executable, FIXTURES / "killed.py", "append", source, folder, *outs]
    done = subprocess.run([*map(str, program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("status ")]
    assert ends.count("9") >= min(10, len(points) - 1)
    assert ends[-1] == "0"
    wanted = bytes_of(outs[-1])
    assert sum(split_sizes(outs[-1]).values()) == sum(split_sizes(old).values()) + 3
    places = set()
    for out in outs:
        whole = out if out.is_dir() else out.with_name("out.replaced")
        places.add(whole.name)
        if bytes_of(whole) != wanted:
            assert dataset_fingerprint(whole) == dataset_fingerprint(old)
            assert len(open_dataset(whole, "train")) == split_sizes(old)["train"]
        append(small_job(source, out))
        assert bytes_of(out) == wanted
        assert {path.name for path in out.parent.iterdir()} <= {"out", "out.new.bad.jsonl"}
    capsys.readouterr()
    append(small_job(source, out))
    assert "all.jsonl's clips but 1 bad ones" in capsys.readouterr().out
    assert bytes_of(out) == wanted
    # Every operation has been a kill's, so that between the two renames too.
    assert len(points) < 150 or places == {"out", "out.replaced"}
