"""How fast training runs, by the clock and as a share of what the devices could do."""

import time
from collections import deque
from contextlib import contextmanager

import jax

from llasa_jax.model.config import AdapterConfig, ModelConfig
from llasa_jax.model.flops import model_flops_per_token
from llasa_jax.runtime.hardware import device_of_kind
from llasa_jax.speech.vocab import CODES_PER_SECOND

WINDOW = 50


class Throughput:
    """Rates over the last steps. Compiling is no part of them, nor is what happens in `pause`."""

    def __init__(
        self, config: ModelConfig, devices: list[jax.Device], adapters: AdapterConfig | None = None
    ):
        self._config, self._adapters = config, adapters
        device = device_of_kind(devices[0].device_kind)
        self._peak = device and device.flops * len(devices)
        self._ends = deque(maxlen=WINDOW + 1)
        self._paused = self._waited = 0.0

    @contextmanager
    def pause(self):
        """Around whatever is no training step."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    @contextmanager
    def waiting(self, computing: jax.Array | None):
        """Around getting a batch. The time counts as waiting if `computing`, a result of the step
        before, is there before the batch.
        """
        began = time.monotonic()
        yield
        if computing is not None and computing.is_ready():
            self._waited += time.monotonic() - began

    def step_ended(self, tokens: float, codes: float, context: float) -> dict[str, float]:
        """The rates after a step over `tokens` (without padding), of which `codes` are speech to
        learn; empty after the first.

        `speech_hours_per_hour` is hours of speech learned in an hour, `data_wait` the share of the
        time, and `mfu` the share of the peak.
        """
        flops = tokens * model_flops_per_token(self._config, context, self._adapters)
        self._ends.append((time.monotonic() - self._paused, self._waited, tokens, codes, flops))
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
