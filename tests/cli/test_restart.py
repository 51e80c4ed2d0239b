"""`train --resume-loop`: what is started again, how often, and what ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llasa_jax.cli import new_parser
from llasa_jax.cli.restart import run_again

# Counts its starts in a file, and ends with the status that is due.
COUNT = """
import sys, time
path, *statuses = sys.argv[1:]
with open(path, "a") as file:
    file.write("x")
status = statuses[min(len(open(path).read()), len(statuses)) - 1]
time.sleep(60 if status == "stay" else 0)
sys.exit(int(status))
"""
LOOP = """
import sys
from llasa_jax.cli.restart import run_again
sys.exit(run_again(sys.argv[1:], 5, 0.05))
"""


@pytest.mark.parametrize(
    ("statuses", "times", "starts"),
    [
        ("0", 3, 1),
        ("1 143 0", 3, 3),
        ("1", 2, 3),
        ("2 0", 3, 1),  # these settings would not work again
        ("1 2 0", 3, 3),  # they did: another host may be late
    ],
)
def test_what_fails_is_started_again(tmp_path, capfd, statuses, times, starts):
    command = [sys.executable, "-c", COUNT, str(tmp_path / "starts"), *statuses.split()]
    status = run_again(command, times, wait=0.05)
    assert len((tmp_path / "starts").read_text()) == starts
    assert status == int(statuses.split()[min(starts, len(statuses.split())) - 1])
    assert capfd.readouterr().err.count("starting again in 0.05 s") == (starts > 1)


def test_killed_by_a_signal_is_a_failure(tmp_path):
    killed = f"import os; open({str(tmp_path / 'n')!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    assert run_again([sys.executable, "-c", killed], 1, wait=0.05) == 128 + signal.SIGKILL
    assert (tmp_path / "n").read_text() == "xx"


def test_a_signal_goes_to_the_command_and_ends_the_loop(tmp_path):
    command = [sys.executable, "-c", COUNT, str(tmp_path / "starts"), "stay"]
    loop = subprocess.Popen([sys.executable, "-c", LOOP, *command])
    deadline = time.monotonic() + 60
    while not (tmp_path / "starts").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(loop.pid, signal.SIGTERM)
    assert loop.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / "starts").read_text() == "x"


def test_the_settings_are_left_as_they_are():
    arguments = ["train", "--resume-loop=3", "--config", "a.yaml", "--train.rows=4"]
    args, settings = new_parser().parse_known_args(arguments)
    assert args.resume_loop == 3
    assert settings == ["--config", "a.yaml", "--train.rows=4"]
