"""Where a run's time goes: to training, and to all else, over every time it was started."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What is not training, in the order in which it is printed. `wait`: the devices have no data.
# `redone`: steps that an earlier start had done, but not saved.
OTHERS = {
    "start": "starting",
    "compile": "compiling",
    "wait": "waiting for data",
    "save": "saving",
    "validate": "validating",
    "evaluate": "evaluating",
    "samples": "speaking samples",
    "redone": "steps done again",
}


class Goodput:
    """Seconds since `began` (of `time.monotonic`), by what they went to.

    `waited` tells those spent waiting for data so far. `before` are the `numbers` of the run's
    earlier starts, up to the checkpoint that this one goes on from; `redo` is the last step that
    they had done. Time between starts, and what a killed one spent after its last checkpoint, is
    not known.
    """

    def __init__(self, began: float, before: dict[str, float] | None = None, redo: int = 0):
        self._began, self._before, self._redo = began, before or {}, redo
        self._seconds = dict.fromkeys(OTHERS, 0.0)
        self._redoing = False
        self.waited: Callable[[], float] = lambda: 0.0

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Around work of this kind."""
        began, others = time.monotonic(), self._lost()
        try:
            yield
        finally:
            # Without what was counted inside
            self._seconds[what] += time.monotonic() - began - (self._lost() - others)

    def started(self) -> None:
        """All until now that was nothing else was the start."""
        self._seconds["start"] += self._training()

    def step(self, step: int) -> None:
        """A step begins."""
        if self._redoing and step > self._redo:
            self._seconds["redone"] += self._training()
        self._redoing = step <= self._redo

    def numbers(self) -> dict[str, float]:
        """For the metrics: seconds of each kind over all starts, and the share of training."""
        now = self._seconds | {"wait": self.waited(), "train": self._training()}
        if self._redoing:
            now["redone"], now["train"] = now["train"], 0.0
        total = {
            f"seconds_{name}": seconds + self._before.get(f"seconds_{name}", 0.0)
            for name, seconds in now.items()
        }
        return {"goodput": total["seconds_train"] / max(sum(total.values()), 1e-9)} | total

    def __str__(self) -> str:
        numbers = self.numbers()
        share = numbers.pop("goodput")
        parts = [
            f"{words} {_clock(numbers[f'seconds_{name}'])}"
            for name, words in OTHERS.items()
            if numbers[f"seconds_{name}"] >= 0.5
        ]
        return f"{_clock(sum(numbers.values()))} in all, {share:.1%} of it training" + (
            f"; {', '.join(parts)}" if parts else ""
        )

    def _lost(self) -> float:
        return sum(self._seconds.values()) + self.waited()

    def _training(self) -> float:
        return max(0.0, time.monotonic() - self._began - self._lost())


def _clock(seconds: float) -> str:
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
