"""Signals that end training, which answers them with a checkpoint; and work that no signal can
interrupt, which is left behind.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

# Ctrl-C, kill, a closed terminal, and what Slurm sends before a job's time is over.
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# Seconds in which two signals count as one: some launchers repeat what the terminal sent already.
SAME = 1.0
# The name of threads that run a codec or a compiled program.
UNINTERRUPTIBLE = "llasa-jax uninterruptible"

T = TypeVar("T")


class StopSignal:
    """Turns a signal into a number to look at between steps; a second one is a KeyboardInterrupt. A
    context, of the main thread.

    `began` is when it was made, of `time.monotonic`. `at_once`: there is nothing to save, so a
    signal need not wait for that look. `before_end` is called with the signal's number before the
    process ends at one: it tells the other hosts. Only `CommandSignal` acts on the two.
    """

    def __init__(self):
        self.received, self.at_once = 0, False
        self.began = time.monotonic()
        self.before_end: Callable[[int], None] = lambda number: None

    def listen(self) -> None:
        """Installs the handlers, again where others have replaced them, as `jax.distributed` does.
        A hang-up that is ignored (`nohup`) stays ignored.
        """
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.received:
            signal.default_int_handler(number, frame)
        self.received = number

    def __enter__(self):
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            # None stands for a handler that is not Python's, such as that of JAX's runtime on
            # several hosts.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class CommandSignal(StopSignal):
    """The command line's, which can end the process whatever it is doing: at the first signal while
    it is `at_once`, later at a second one.

    A KeyboardInterrupt would wait for a compilation, and is swallowed by some imports and
    callbacks.
    """

    def __init__(self):
        super().__init__()
        self.at_once = True

    def _note(self, number, frame):
        self.received = self.received or number

    def _watch(self, numbers: int) -> None:
        """Reads what Python writes at a signal, also while the main thread is busy in C."""
        noted = float("inf")
        while number := os.read(numbers, 1):
            if number[0] not in SIGNALS:
                continue
            if self.at_once:
                self._end(number[0], "with nothing new to save")
            if time.monotonic() - noted > SAME:
                self._end(number[0], "again, without saving")
            noted = min(noted, time.monotonic())
        os.close(numbers)

    def _end(self, number: int, how: str) -> None:
        # Not print: the main thread may hold the lock of stderr.
        name = signal.Signals(number).name
        os.write(2, f"llasa-jax: stopped by {name} {how}; the same command goes on\n".encode())
        self.before_end(number)
        os._exit(128 + number)

    def __enter__(self):
        numbers, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(
            target=self._watch, args=(numbers,), daemon=True, name="llasa-jax signals"
        ).start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)


def unless(stopped: Callable[[], int], work: Callable[[], T]) -> T | None:
    """What `work()` returns, or None as soon as `stopped()`. Its thread is left running then, and
    the process must end with `leave`.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def run():
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 raised again below
            failure.append(error)

    thread = threading.Thread(target=run, name=UNINTERRUPTIBLE, daemon=True)
    thread.start()
    while thread.is_alive() and not stopped():
        thread.join(0.1)
    if failure:
        raise failure[0]
    return result[0] if result else None


def end_with_parent() -> None:
    """Lets this process, which multiprocessing started, end as soon as its parent has, even if that
    was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def leave(status: int) -> int:
    """`status`, unless a thread is still inside a codec or the like: then the process ends here,
    with that status.

    PyTorch cannot be interrupted, and Python's own end would abort the process for a daemon thread
    that comes back from it.
    """
    threads = [thread for thread in threading.enumerate() if thread.name == UNINTERRUPTIBLE]
    for thread in threads:
        thread.join(1.0)
    if any(thread.is_alive() for thread in threads):
        atexit._run_exitfuncs()  # JAX takes leave of the other hosts
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
