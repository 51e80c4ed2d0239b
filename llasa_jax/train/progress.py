"""What a run tells of itself: each step's numbers, read one step late so that the devices never
wait for the host.
"""

import warnings

import jax
import numpy as np
import optax

from llasa_jax.encode.online import OnlineBatches
from llasa_jax.errors import UserError
from llasa_jax.train.alarm import LossAlarm
from llasa_jax.train.metrics import Metrics
from llasa_jax.train.throughput import Throughput


class Progress:
    """Takes each step's numbers as they lie on the devices, and settles those of the step before:
    metrics, terminal, alarm.
    """

    def __init__(
        self,
        metrics: Metrics,
        throughput: Throughput,
        alarm: LossAlarm,
        schedule: optax.Schedule,
        every: int,
        steps: int,
        online: OnlineBatches | None = None,
    ):
        self._metrics, self._throughput, self._alarm, self._schedule = (
            metrics,
            throughput,
            alarm,
            schedule,
        )
        self._every, self._steps, self._online = every, steps, online
        self._pending: tuple[int, dict, int] | None = None

    @property
    def computing(self) -> jax.Array | None:
        """A result of the step that the devices may still be at."""
        return self._pending and self._pending[1]["loss"]

    def add(self, step: int, numbers: dict[str, jax.Array], slots: int) -> None:
        """Notes the numbers of `step`, over `slots` tokens with padding, to settle them later."""
        self.settle()
        self._pending = (step, numbers, slots)

    def settle(self) -> None:
        """Waits for the last step, and tells its numbers. UserError if they are not finite: nothing
        may be saved after such a step.
        """
        if self._pending is None:
            return
        step, numbers, slots = self._pending
        self._pending = None
        numbers = {name: float(value) for name, value in jax.device_get(numbers).items()}
        for name in ("loss", "grad_norm"):
            if not np.isfinite(numbers[name]):
                raise UserError(
                    f"the {name} became {numbers[name]} at step {step}; lower"
                    " optimizer.learning_rate or look at the data, and go on from the last"
                    " checkpoint"
                )
        warning = self._alarm.listen(
            step, numbers["loss"], numbers["codes"] / max(numbers["targets"], 1)
        )
        if warning and jax.process_index() == 0:
            warnings.warn(warning, stacklevel=2)
        rates = self._throughput.step_ended(
            numbers["fill"] * slots, numbers["codes"], numbers.pop("context")
        )
        numbers |= {"learning_rate": float(self._schedule(step - 1))} | rates
        if self._online:
            numbers |= self._online.numbers()
            if advice := self._online.advice(rates.get("data_wait", 0.0)):
                say(advice)
        self._metrics.write(step, numbers)
        if step % self._every == 0 or step in (1, self._steps):
            line = (
                f"step {step}/{self._steps}  loss {numbers['loss']:.4f}  accuracy"
                f" {numbers['accuracy']:.1%}"
            )
            line += f"  lr {numbers['learning_rate']:.2e}"
            if rates:
                mfu = f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
                line += (
                    f"  {rates['tokens_per_second']:,.0f} tokens/s "
                    f" {rates['speech_hours_per_hour']:,.1f} h of speech/h{mfu}  waiting"
                    f" {rates['data_wait']:.0%}  {self._throughput.remaining(self._steps - step)}"
                    " left"
                )
            say(line)


def say(line: str) -> None:
    """Prints a line, once for all hosts."""
    if jax.process_index() == 0:
        print(line, flush=True)
