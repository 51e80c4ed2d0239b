"""What a run says of itself: each step's numbers, how fast it runs, and a warning about a first
loss that cannot be right.

Numbers are read one step late, so that the devices never wait for the host.
"""

import math
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress

import jax
import numpy as np
import optax

from llasa_jax.encode.online import OnlineBatches
from llasa_jax.errors import UserError, printable
from llasa_jax.model.config import AdapterConfig, ModelConfig
from llasa_jax.model.flops import model_flops_per_token
from llasa_jax.runtime.hardware import device_of_kind
from llasa_jax.speech.vocab import CODES_PER_SECOND
from llasa_jax.train.metrics import Metrics

WINDOW = 50  # steps that a rate is an average of
# The alarm: nats a token, and how many steps it listens to.
EARLY_STEPS = 20
LOWEST, HIGHEST = 2.0, 11.0
CHANCE_MARGIN = 0.5


class Throughput:
    """Rates over the last steps, without compilation and without what happens in `pause`. `waited`
    counts seconds spent waiting for data.
    """

    def __init__(
        self, config: ModelConfig, devices: list[jax.Device], adapters: AdapterConfig | None = None
    ):
        self._config, self._adapters = config, adapters
        device = device_of_kind(devices[0].device_kind)
        self._peak = device and device.flops * len(devices)
        # Of the last steps: when they ended, waited for data so far; tokens, codes, FLOPs.
        self._ends: deque[tuple[float, float, float, float, float]] = deque(maxlen=WINDOW + 1)
        self._paused = self.waited = 0.0

    @contextmanager
    def pause(self):
        """Around work that is not a training step."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    @contextmanager
    def waiting(self, computing: jax.Array | None):
        """Around getting a batch. The time counts as waiting if `computing`, a result of the step
        before, is ready before the batch is.
        """
        began = time.monotonic()
        yield
        if computing is not None and computing.is_ready():  # type: ignore[attr-defined]
            self.waited += time.monotonic() - began

    def step_ended(self, tokens: float, codes: float, context: float) -> dict[str, float]:
        """The rates after a step over `tokens` (without padding), of which `codes` are speech to
        learn; empty after the first step.

        `speech_hours_per_hour` is hours of speech learned in an hour, `data_wait` the share of the
        time spent waiting for data, `mfu` the share of the devices' peak FLOPs.
        """
        flops = tokens * model_flops_per_token(self._config, context, self._adapters)
        self._ends.append((time.monotonic() - self._paused, self.waited, tokens, codes, flops))
        seconds = self._ends[-1][0] - self._ends[0][0]
        if not seconds:
            return {}
        tokens, codes, flops = (sum(end[i] for end in list(self._ends)[1:]) for i in (2, 3, 4))
        rates = {
            "tokens_per_second": tokens / seconds,
            "speech_hours_per_hour": codes / CODES_PER_SECOND / seconds,
            "data_wait": (self._ends[-1][1] - self._ends[0][1]) / seconds,
        }
        return rates | ({"mfu": flops / seconds / self._peak} if self._peak else {})

    def remaining(self, steps: int) -> str:
        """The time that `steps` more steps take, as h:mm:ss."""
        seconds = self._ends[-1][0] - self._ends[0][0]
        if not seconds:
            return "?"
        seconds *= steps / (len(self._ends) - 1)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


class LossAlarm:
    """Warns at most once, of a loss in a run's first steps that says that the data is wrong: people
    have trained for weeks on codes that were noise.

    Finetuning on speech starts at about 5 to 7 nats a token, as users of LLaSA_training report. A
    model that starts at chance, ln(vocabulary), is a new one: only a loss worse than chance is
    wrong then. Batches that are mostly text are ignored.
    """

    def __init__(self, vocab_size: int):
        self._chance = math.log(vocab_size)
        self._highest = HIGHEST
        self._spoken = False

    def listen(self, step: int, loss: float, code_share: float) -> str | None:
        """A warning if the loss (nats a token) of `step` is out of range; `code_share` is the share
        of speech among its targets.
        """
        if step == 1 and abs(loss - self._chance) < CHANCE_MARGIN:
            self._highest = self._chance + CHANCE_MARGIN
        early = step <= EARLY_STEPS + 1
        if self._spoken or not early or code_share < 0.5 or LOWEST <= loss <= self._highest:
            return None
        self._spoken = True
        cause = (
            "the codes may be constant or noise (a codec whose weights did not all load)"
            if loss < LOWEST
            else "the codes may be noise or come from another codec, may lack the vocabulary's"
            " offset, or the tokenizer may not be the model's own"
        )
        return (
            f"the loss is {loss:.2f} nats a token at step {step}, where finetuning on speech starts"
            f" at about 5 to 7; {cause}: look at the data before training on"
        )


class Progress:
    """Takes each step's numbers while the devices still compute them, and writes those of the step
    before: metrics, terminal, alarm (None for a loss that is not in nats a token). `rate` gives the
    learning rate of a step, from 0.
    """

    def __init__(
        self,
        metrics: Metrics,
        throughput: Throughput,
        alarm: LossAlarm | None,
        rate: Callable[[int], float],
        every: int,
        steps: int,
        online: OnlineBatches | None = None,
    ):
        self._metrics, self._throughput, self._alarm = metrics, throughput, alarm
        self._rate, self._every, self._steps, self._online = rate, every, steps, online
        self._pending: tuple[int, dict, int] | None = None

    @property
    def computing(self) -> jax.Array | None:
        """A result of the step that the devices may still be computing."""
        return self._pending and self._pending[1]["loss"]

    def add(self, step: int, numbers: dict[str, jax.Array], slots: int) -> None:
        """Takes the numbers of `step`, over `slots` tokens with padding, to write them later."""
        self.settle()
        self._pending = (step, numbers, slots)

    def settle(self) -> None:
        """Waits for the last step, and writes its numbers. UserError if they are not finite:
        nothing may be saved after such a step.
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
        share = numbers["codes"] / max(numbers["targets"], 1)
        warning = self._alarm and self._alarm.listen(step, numbers["loss"], share)
        if warning and jax.process_index() == 0:
            warnings.warn(warning, stacklevel=2)
        rates = self._throughput.step_ended(
            numbers["fill"] * slots, numbers["codes"], numbers.pop("context")
        )
        numbers |= {"learning_rate": self._rate(step - 1)} | rates
        if self._online:
            numbers |= self._online.numbers()
            if advice := self._online.advice(rates.get("data_wait", 0.0)):
                say(advice)
        self._metrics.write(step, numbers)
        if step % self._every == 0 or step in (1, self._steps):
            say(self._line(step, numbers, rates))

    def _line(self, step: int, numbers: dict[str, float], rates: dict[str, float]) -> str:
        right = f"  accuracy {numbers['accuracy']:.1%}" if "accuracy" in numbers else ""
        line = (
            f"step {step}/{self._steps}  loss {numbers['loss']:.4f}{right}  lr"
            f" {numbers['learning_rate']:.2e}"
        )
        if rates:
            mfu = f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
            line += (
                f"  {rates['tokens_per_second']:,.0f} tokens/s "
                f" {rates['speech_hours_per_hour']:,.1f} h of speech/h{mfu}  waiting"
                f" {rates['data_wait']:.0%}  {self._throughput.remaining(self._steps - step)} left"
            )
        return line


def on_host(schedule: optax.Schedule) -> Callable[[int], float]:
    """The schedule, computed on the CPU. On the devices its few operations would queue behind the
    step just started, and reading the result would wait for that step.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names other platforms alone
        host = jax.local_devices()[0]
    compiled = jax.jit(schedule)

    def rate(step: int) -> float:
        return float(jax.device_get(compiled(jax.device_put(np.int32(step), host))))

    return rate


def say(line: str) -> None:
    """Prints a line, once for all hosts. Where nobody reads any more (`train | head -1`) or the
    disk behind the standard output is full, training stops as at SIGTERM, which saves first.
    """
    if jax.process_index():
        return
    try:
        # File names and texts of others must not steer the terminal.
        print(printable(line), flush=True)
    except OSError as error:
        # What comes later, Python's own flush at the end included, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        with suppress(OSError):
            print(
                f"llasa-jax: the standard output cannot be written ({error.strerror}); stopping",
                file=sys.stderr,
                flush=True,
            )
        signal.raise_signal(signal.SIGTERM)
