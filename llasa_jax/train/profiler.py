"""Traces of some steps, for XProf and TensorBoard."""

from pathlib import Path

import jax

from llasa_jax.errors import UserError

FOLDER = "profile"


class Profiler:
    """Traces the steps `first` to `last - 1` of "first:last" into `run/profile`; "" traces none. A
    context manager, which ends a trace.
    """

    def __init__(self, run: Path, steps: str):
        self._folder, self.tracing, self._first, self._last = Path(run) / FOLDER, False, 0, 0
        if not steps:
            return
        first, _, last = steps.partition(":")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) < int(last)):
            raise UserError(
                f"profile.steps={steps} names no steps; 10:13 would trace steps 10, 11 and 12"
            )
        self._first, self._last = int(first), int(last)

    def before(self, step: int, state) -> None:
        """Call before each step, with an array of the step before: a trace starts and ends when
        that is computed.
        """
        if self._first <= step < self._last and not self.tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self.tracing = True
        elif step >= self._last:
            self._stop(state)

    def _stop(self, state=None) -> None:
        if self.tracing:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error) -> None:
        self._stop()
