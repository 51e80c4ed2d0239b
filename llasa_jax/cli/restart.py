"""Starting a command again after it has failed: `train --resume-loop N`."""

import signal
import subprocess
import sys
import time

from llasa_jax.runtime.signals import SIGNALS

FIRST_WAIT, LONGEST_WAIT = 10.0, 300.0  # seconds
SOUND = 600.0  # seconds after which a run counts as one that has begun well
USERS_FAULT = 2  # the status of what another start would not change


def run_again(command: list[str], times: int, wait: float = FIRST_WAIT) -> int:
    """Runs the command, and again up to `times` times where it fails; returns the last status.

    It waits `wait` seconds before the second start, twice as long before each further one, at most
    `LONGEST_WAIT`; after a run of `SOUND` seconds it is `wait` again. A signal goes to the command,
    and ends the loop. So does status 2 at the first start: those settings would not work again.
    """
    received: list[int] = []
    process: subprocess.Popen | None = None

    def note(number, frame):
        received.append(number)
        if process and process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    next_wait = wait
    try:
        for start in range(times + 1):
            began = time.monotonic()
            process = subprocess.Popen(command)
            if received:  # between two starts
                process.send_signal(received[-1])
            status = process.wait()
            status = 128 - status if status < 0 else status
            left = times - start
            if not status or received or not left or (not start and status == USERS_FAULT):
                return status
            if time.monotonic() - began > SOUND:
                next_wait = wait
            print(
                f"llasa-jax: training ended with status {status}; starting again in"
                f" {next_wait:g} s ({left} starts left)",
                file=sys.stderr,
                flush=True,
            )
            deadline = time.monotonic() + next_wait
            while time.monotonic() < deadline and not received:
                time.sleep(0.1)
            if received:
                return 128 + received[0]
            next_wait = min(2 * next_wait, LONGEST_WAIT)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    raise AssertionError("the last start returns")
