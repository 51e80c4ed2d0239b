"""Ctrl-C and SIGTERM, which training answers with a checkpoint."""

import signal

from llasa_jax import hosts
from llasa_jax.errors import UserError

FAILED = 1000  # above every signal


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a number to look at between steps; a second signal acts at once."""

    def __init__(self):
        self.received = 0

    def agreed(self, failed: bool = False) -> int:
        """The signal that any host has received, 0 if none: all hosts stop after the same step. All must ask.

        UserError where another host has `failed`, so that nobody waits for it.
        """
        verdict = hosts.largest(FAILED if failed else self.received)
        if verdict == FAILED and not failed:
            raise UserError("another host's data failed, and training stops on all; its own log says why")
        self.received = self.received if failed else verdict
        return self.received

    def _note(self, number, frame):
        if self.received:
            signal.default_int_handler(number, frame)
        self.received = number

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            # None stands for a handler that is not Python's, such as that of JAX's runtime on several hosts.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
