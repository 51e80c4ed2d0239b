"""Signals: noted between steps, acted on at once where nothing is to save, and what is left alone
for them.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llasa_jax.runtime.signals import SAME, UNINTERRUPTIBLE, StopSignal, unless

# Minutes in C, without the interpreter's lock, as a compilation is: Python's own handlers would
# wait for its end.
BUSY = (
    "import hashlib, sys\ndef busy(*_):\n    print('busy', flush=True)\n   "
    " hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)\n"
)


def ended(program, number):
    """Status, stderr and the seconds that it took to end a process, which is sent a signal once it
    is busy, and then again and again.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BUSY + program], **pipes) as child:
        try:
            assert child.stdout.readline() == "busy\n"
            began = time.monotonic()
            while child.poll() is None and time.monotonic() < began + 60:
                child.send_signal(number)
                time.sleep(0.3)
            return child.poll(), child.stderr.read(), time.monotonic() - began
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_once_does_not_wait_for_what_runs(number):
    status, said, _ = ended(
        "from llasa_jax.runtime.signals import CommandSignal\nwith CommandSignal(): busy()",
        number,
    )
    assert status == 128 + number
    assert f"stopped by {number.name} with nothing new to save" in said


def test_later_a_second_signal_ends_it_too():
    program = (
        "from llasa_jax.runtime.signals import CommandSignal\nwith CommandSignal() as stop:\n  "
        "  stop.at_once = False\n    busy()"
    )
    status, said, seconds = ended(program, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert seconds > SAME  # those before count as one
    assert "stopped by SIGTERM again, without saving" in said


def test_train_is_at_once_from_the_start():
    program = (
        "from llasa_jax import cli\nfrom llasa_jax.train import parsing\nparsing.parse_settings ="
        " busy\nsys.exit(cli.main(['train']))"
    )
    assert ended(program, signal.SIGINT)[0] == 128 + signal.SIGINT


def test_a_signal_is_noted_and_a_second_one_acts():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.listen()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_work_goes_on_unless_stopped():
    assert unless(lambda: 0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        unless(lambda: 0, lambda: 1 / 0)
    end, began = threading.Event(), time.monotonic()
    assert unless(lambda: 15, lambda: end.wait(600)) is None
    assert time.monotonic() - began < 300
    assert UNINTERRUPTIBLE in {thread.name for thread in threading.enumerate()}
    end.set()
