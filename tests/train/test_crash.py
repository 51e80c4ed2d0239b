"""Real processes, killed and starved: the same command goes on, and learns what it would have
learned.
"""

import shutil
import signal
import subprocess
import sys

import pytest
from places import FIXTURES, environment
from tiny_run import losses, make_model

from llasa_jax.convert.model_folder import saved_steps

PROGRAM = FIXTURES / "tiny_run.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def start(*arguments, before=()):
    command = [*before, sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.soak
def test_killed_again_and_again_it_loses_nothing(model, tmp_path):
    never_killed, killed = tmp_path / "never_killed", tmp_path / "killed"
    reference = start(model, never_killed)
    moments = (
        # the second checkpoint is whole, and the first half removed
        ("os.rmdir", ""),
        # the third is being written
        ("os.mkdir", str(killed / "checkpoints" / "6.orbax-checkpoint-tmp" / "optimizer")),
    )
    for event, word in moments:
        child = start(model, killed, event, word)
        said, complained = child.communicate()
        assert child.returncode == -signal.SIGKILL, said + complained
        assert saved_steps(killed) == [2, 4]
    child = start(model, killed)
    said, complained = child.communicate()
    assert child.returncode == 0, complained
    assert "going on after step 4" in said
    _, complained = reference.communicate()
    assert reference.returncode == 0, complained
    assert len(losses(killed)) == 6
    assert losses(killed) == losses(never_killed)
    assert saved_steps(killed) == [6]


def test_a_damaged_model_ends_in_its_sentence_alone(model, tmp_path):
    """No thread of Orbax's prints a traceback as Python ends."""
    damaged = shutil.copytree(model, tmp_path / "damaged")
    layout = damaged / "params" / "_METADATA"
    layout.write_bytes(layout.read_bytes()[:100])
    child = start(damaged, tmp_path / "run")
    _, complained = child.communicate()
    assert child.returncode == 1
    assert complained.startswith("UserError: ")
    assert "layout is damaged" in complained
    assert complained.count("\n") == 1


def test_a_full_disk_is_told_and_costs_no_checkpoint(model, tmp_path):
    """On a small disk of the process's own, in namespaces that end with it."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody have a mount namespace")
    # Weights of 8.6 MB thrice: one checkpoint fits, a second beside it does not.
    script = (
        f'mount -t tmpfs -o size=36m tmpfs {tmp_path} && "$@"; status=$?; ls'
        f" {tmp_path}/run/checkpoints; exit $status"
    )
    child = start(model, tmp_path / "run", before=[*alone, "bash", "-c", script, "bash"])
    said, complained = child.communicate()
    assert child.returncode == 1, said + complained
    (sentence,) = (line for line in complained.splitlines() if line.startswith("UserError"))
    assert "the disk is full" in sentence
    assert "goes on after step 2, the last whole checkpoint" in sentence
    assert "2" in said.splitlines()
