"""Ctrl-C and SIGTERM, which training answers with a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Callable

SIGNALS = signal.SIGINT, signal.SIGTERM
# seconds in which two signals are one: some launchers send what the terminal has sent already
SAME = 1.0


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a number to look at between steps; a second one is a
    KeyboardInterrupt. A context, of the main thread.

    `at_once`: there is nothing to save, so a signal need not wait for that look. Only
    `CommandSignal` makes anything of it.
    """

    def __init__(self):
        self.received, self.at_once = 0, False

    def listen(self) -> None:
        """Again, after others have put handlers of their own, as `jax.distributed` does."""
        for number in SIGNALS:
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
    """The command line's, which can end the process, whatever that is doing: the first signal while
    it is `at_once`, later a second one.

    A KeyboardInterrupt would wait for a compilation, and is swallowed by some imports and
    callbacks.
    """

    def __init__(self):
        super().__init__()
        self.at_once = True
        # Called before the process ends at a signal, with its number: tells the other hosts.
        self.before_end: Callable[[int], None] = lambda number: None

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
        numbers, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        threading.Thread(
            target=self._watch, args=(numbers,), daemon=True, name="llasa-jax signals"
        ).start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._told)
