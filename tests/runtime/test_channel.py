"""Hosts that compare before they begin, and end together: processes that only open the channel."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

HOST = """
import json, os, sys, time
from llasa_jax.errors import UserError
from llasa_jax.runtime import channel
from llasa_jax.runtime.channel import Channel
port, host, count, facts, then, timeout, before = json.loads(sys.argv[1])
exec(before)
c = Channel(("localhost", port), host, count, timeout)
try:
    c.join()
    c.agree(facts, "give all hosts the same")
    print("agreed", flush=True)
    exec(then)
    c.agree({"end": 1}, "never")
    c.finish()
except UserError as error:
    print(f"llasa-jax: error: {error}", file=sys.stderr, flush=True)
    c.fail(str(error), 2)
    os._exit(2)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(port, host, count=2, facts=None, then="", timeout=20.0, before=""):
    arguments = json.dumps([port, host, count, facts or {}, then, timeout, before])
    return subprocess.Popen(
        [sys.executable, "-c", HOST, arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ends(*processes, within=15.0):
    """Status and stderr of every process. All must end in time."""
    deadline = time.monotonic() + within
    try:
        return [
            (process.returncode, error)
            for process in processes
            for error in [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1]]
        ]
    finally:
        for process in processes:
            process.kill()


def once_open(port: int) -> socket.socket:
    """A connection to a host 0 that is starting."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("localhost", port), 1)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("count", [2, 5])
def test_hosts_that_are_equal_go_through(count):
    port = free_port()
    hosts = [start(port, i, count, {"lr": 1e-3, "names": ["a"]}) for i in reversed(range(count))]
    assert ends(*hosts) == [(0, "")] * count


def test_what_differs_is_named_with_the_value_of_every_host():
    port = free_port()
    rates = [1e-3, 1e-3, 1e-4]
    hosts = [start(port, i, 3, {"seed": 0, "optimizer.learning_rate": rates[i]}) for i in range(3)]
    for status, error in ends(*hosts):
        assert status == 2
        assert "optimizer.learning_rate is 0.001 on host 0, 1, 0.0001 on host 2" in error
        assert "seed" not in error
        assert error.rstrip().endswith("give all hosts the same")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_hosts_error_is_the_last_word_of_all(failing):
    """Whatever the main threads of the others are in: here, a sleep of a minute."""
    port = free_port()
    fails = "raise UserError('the disk is full')"
    hosts = [start(port, i, 3, then=fails if i == failing else "time.sleep(60)") for i in range(3)]
    for number, (status, error) in enumerate(ends(*hosts)):
        assert status == 2
        said = error.splitlines()[-1]
        if number == failing:
            assert said == "llasa-jax: error: the disk is full"
        else:
            assert f"error: host {failing} of 3 (" in said
            assert said.endswith("): the disk is full")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_is_named(killed):
    port = free_port()
    kill = "os.kill(os.getpid(), 9)"
    hosts = [start(port, i, 3, then=kill if i == killed else "time.sleep(60)") for i in range(3)]
    for number, (status, error) in enumerate(ends(*hosts)):
        assert status == (-signal.SIGKILL if number == killed else 1)
        if number != killed:
            assert f"error: host {killed} of 3 (" in error
            assert "vanished" in error


def test_all_hosts_fail_at_once():
    port = free_port()
    fails = "raise UserError('no data')"
    for status, error in ends(*(start(port, i, 3, then=fails) for i in range(3))):
        assert status == 2
        assert "no data" in error


def test_a_silent_host_is_lost():
    """One whose machine lost its power or network: its connection stays open, nothing comes."""
    port = free_port()
    silent = start(port, 1, then="import signal; os.kill(os.getpid(), signal.SIGSTOP)")
    host = start(port, 0, then="time.sleep(60)", before="channel.BEAT, channel.LOST = 0.1, 1.5")
    try:
        ((status, error),) = ends(host, within=30)
    finally:
        silent.kill()
    assert status == 1
    assert "host 1 of 2" in error
    assert "vanished (nothing was heard of it for" in error


def test_a_host_that_never_comes():
    waits = {"timeout": 1.0, "before": "channel.STARTING, channel.LINGER = 0.3, 1"}
    ((status, error),) = ends(start(free_port(), 0, **waits))
    assert status == 2
    assert "host 0 of 2 is waiting for host 1" in error
    assert "host 0 of 2 has waited 1 s for host 1; start the same command on all hosts" in error
    ((status, error),) = ends(start(free_port(), 1, **waits))
    assert status == 2
    assert "host 0 at localhost, port" in error
    assert "cannot be reached" in error


def test_a_host_that_comes_late_hears_of_the_failure():
    port = free_port()
    first = start(port, 0, 3, then="time.sleep(60)", timeout=1.0)  # does not wait for host 2
    second = start(port, 1, 3, then="time.sleep(60)")
    once_open(port).close()
    time.sleep(2)
    late = start(port, 2, 3, then="time.sleep(60)")
    for status, error in ends(first, second, late):
        assert status == 2
        assert "has waited" in error


def test_two_processes_that_are_both_host_0():
    port = free_port()
    first = start(port, 0, then="time.sleep(60)")
    once_open(port).close()
    second = start(port, 0, then="time.sleep(60)")
    (status, error), (other, other_error) = ends(first, second, within=40)
    assert status == other == 2
    assert "are both host 0; start each process once" in error
    assert "two processes are both started as process 0" in other_error


def test_hosts_of_different_counts():
    port = free_port()
    hosts = start(port, 0, 2, then="time.sleep(60)"), start(port, 1, 3, then="time.sleep(60)")
    for status, error in ends(*hosts, within=40):
        assert status == 2
        assert "was started as one of 3 processes, host 0" in error


def test_a_stranger_on_the_port_does_no_harm():
    port = free_port()
    first = start(port, 0)
    stranger = once_open(port)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert ends(first, start(port, 1)) == [(0, "")] * 2
    stranger.close()
