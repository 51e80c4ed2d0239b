"""Ctrl-C and SIGTERM, which training answers with a checkpoint."""

import os
import signal
import threading

SIGNALS = signal.SIGINT, signal.SIGTERM


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a number to look at between steps; a second signal acts at once. A context, of the main thread.

    While it is `at_once`, for there is nothing to save, the first signal ends the process, whatever it is doing: a KeyboardInterrupt
    would wait for a compilation, and is swallowed by some imports and callbacks.
    """

    def __init__(self, at_once: bool = False):
        self.received, self.at_once = 0, at_once

    def listen(self) -> None:
        """Again, after others have put handlers of their own, as `jax.distributed` does."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.received:
            signal.default_int_handler(number, frame)
        self.received = number

    def _watch(self, numbers: int) -> None:
        """Reads what Python writes at a signal, even while its handlers wait for the main thread."""
        while number := os.read(numbers, 1):
            if self.at_once and number[0] in SIGNALS:
                name = signal.Signals(number[0]).name
                # Not print: the main thread may hold the lock of stderr.
                os.write(2, f"llasa-jax: stopped by {name} with nothing new to save; the same command goes on\n".encode())
                os._exit(128 + number[0])
        os.close(numbers)

    def __enter__(self):
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        numbers, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(numbers,), daemon=True, name="llasa-jax signals").start()
        self.listen()
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            # None stands for a handler that is not Python's, such as that of JAX's runtime on several hosts.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._told)
