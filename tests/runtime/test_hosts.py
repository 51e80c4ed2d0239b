"""Two processes that finetune together, and one of which fails, differs or dies: both end soon, and
both say why.
"""

import os
import signal
import time

import numpy as np
import pytest
from host_processes import ended, start, until
from tiny_run import make_clips, make_model

from llasa_jax.data.builder import write_dataset
from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("hosts") / "model")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "records"
    rows = [
        {"id": clip.id, "text": clip.text, "codes": clip.codes}
        | {"speaker": clip.speaker, "description": "", "language": ""}
        for clip in make_clips()
    ]
    write_dataset(folder, {"train": iter(rows)}, {"codec": "tiny", "fingerprint": "unknown"})
    return folder


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_host_that_is_killed_in_training_is_named(model, records, tmp_path, killed):
    own = [f"--model.path={model}", f"--data.path={records}", f"--out={tmp_path / 'run'}"]
    processes = start(tmp_path, own, own)
    until(tmp_path, "step 3/", processes)
    processes[killed].kill()
    status, last = ended(tmp_path, processes, time.monotonic())
    assert status[killed] == -signal.SIGKILL
    assert status[1 - killed] == 1
    assert f"llasa-jax: error: host {killed} of 2" in last[1 - killed]
    assert "vanished" in last[1 - killed]


@pytest.mark.parametrize("alone", [0, 1])
def test_mesh_hosts_is_missing_on_one_host(model, records, tmp_path, alone):
    own = [f"--model.path={model}", f"--data.path={records}", f"--out={tmp_path / 'run'}"]
    changes = [own, own]
    changes[alone] = [*own, "--mesh.hosts=false"]
    processes = start(tmp_path, *changes)
    since = until(tmp_path, "llasa-jax: error", processes)
    status, last = ended(tmp_path, processes, since)
    assert status == [2, 2]
    assert all(f"mesh.hosts is not set on host {alone}," in line for line in last)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("--data.path=/nope", marks=pytest.mark.soak),
        "--optimizer.learning_rate=0.5",
        "--x=1",
    ],
)
def test_a_host_that_differs_or_cannot_begin(model, records, tmp_path, other):
    """Settings that differ, and settings with which a host does not even join the others."""
    own = [f"--model.path={model}", f"--data.path={records}", f"--out={tmp_path / 'run'}"]
    processes = start(tmp_path, own, [*own, other])
    since = until(tmp_path, "llasa-jax: error", processes)
    status, last = ended(tmp_path, processes, since)
    assert status == [2, 2]
    named = {"--x=1": "unknown setting x"}.get(other, other[2:].partition("=")[0])
    for line in last:
        assert line.startswith("llasa-jax: error")
        assert named in line
    if "learning_rate" in other:
        assert all("5e-06 on host 0" in line or "1e-05 on host 0" in line for line in last)
        assert all("0.5 on host 1" in line for line in last)


def test_other_data_under_the_same_path(model, records, tmp_path):
    """Each host has a disk of its own, and on one of them lies another dataset."""
    rows = [
        {"id": f"clip{i}", "text": "x", "codes": np.arange(5), "speaker": ""}
        | {"description": "", "language": ""}
        for i in range(12)
    ]
    write_dataset(tmp_path / "b", {"train": iter(rows)}, {"codec": "x", "fingerprint": "unknown"})
    for number, source in enumerate((records, tmp_path / "b")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "data").symlink_to(source)
    # The same relative path, seen from two folders
    own = [f"--model.path={model}", "--data.path=data", f"--out={tmp_path / 'run'}"]
    processes = start(tmp_path, own, own, where=(tmp_path / "0", tmp_path / "1"))
    since = until(tmp_path, "llasa-jax: error", processes)
    status, last = ended(tmp_path, processes, since)
    assert status == [2, 2]
    assert all("the content of data is" in line for line in last)


def test_each_host_has_a_disk_of_its_own(model, records, tmp_path):
    """The same `out`, but not the same folder: found before anything is written there."""
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
    own = [f"--model.path={model}", f"--data.path={records}", "--out=run"]
    processes = start(tmp_path, own, own, where=(tmp_path / "0", tmp_path / "1"))
    since = until(tmp_path, "llasa-jax: error", processes)
    status, last = ended(tmp_path, processes, since)
    assert status == [2, 2]
    for line in last:
        assert '"the files of host 0" on host 0, "the files of host 1" on host 1' in line
        assert "out must be one folder that all hosts share" in line
    assert not [path for number in "01" for path in (tmp_path / number / "run").iterdir()]


def test_a_signal_before_the_first_step_ends_both(model, records, tmp_path):
    own = [f"--model.path={model}", f"--data.path={records}", f"--out={tmp_path / 'run'}"]
    processes = start(tmp_path, own, own)
    until(tmp_path, "an epoch:", processes)
    processes[1].send_signal(signal.SIGINT)
    status, last = ended(tmp_path, processes, time.monotonic())
    assert status == [128 + signal.SIGINT] * 2
    assert "stopped by SIGINT" in last[0]


def test_no_cluster_is_a_sentence(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "JAX_COORD", "OMPI"))]:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="nothing says which hosts take part"):
        hosts.find_hosts()
