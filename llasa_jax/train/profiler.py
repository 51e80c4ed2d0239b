"""Traces of some steps, for XProf and TensorBoard."""

from pathlib import Path

import jax

from llasa_jax.train.settings import traced_steps

FOLDER = "profile"


class Profiler:
    """Traces the steps `first` to `last - 1` of "first:last" into `run/profile`; "" traces none. A
    context manager, which ends a trace. UserError if `steps` goes past the run's `last_step`, where
    that is known.
    """

    def __init__(self, run: Path, steps: str, last_step: int = 0):
        traced = traced_steps(steps, last_step)
        self._folder, self.tracing = Path(run) / FOLDER, False
        self._first, self._last = traced.start, traced.stop

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
