"""Continuous batching: a row that has ended is started again with the next text at once."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.generate.decode import Generated, Request, Rows
from llasa_jax.generate.steps import STEPS

Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """A piece of text that one row speaks: its request, its text, the codes of its prompt, and the
    wave of the voice that is cloned, float32 16 kHz, if one is.
    """

    request: Request
    text: str
    context: np.ndarray
    reference: np.ndarray | None = None


# What a text becomes: it yields pieces, is sent what a row says of each, and returns its result.
Job = Generator[Piece, Generated, Result]


@dataclass
class _Speaking:
    """A job with its present piece, and the count of its codes that `hear` has had."""

    key: Any
    job: Job
    piece: Piece
    hear: Callable[[np.ndarray], None] | None
    count: int = 0


class Batch:
    """Jobs over `rows`, which may be added and dropped at any time, each under a key of its own. A
    row that has ended goes on with the next piece that waits.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self._waiting: deque[_Speaking] = deque()
        self._running: dict[int, _Speaking] = {}  # by row
        rows.stop(range(rows.count))

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def add(self, key: Any, job: Job, hear: Callable[[np.ndarray], None] | None = None) -> None:
        """Takes a job. `hear` gets its codes, uint16, as they are drawn. Raises what the job raises
        before its first piece.
        """
        self._waiting.append(_Speaking(key, job, next(job), hear))

    def drop(self, key: Any) -> None:
        """Ends a job, whose row is free at once."""
        self._waiting = deque(one for one in self._waiting if one.key is not key)
        for row in [row for row, one in self._running.items() if one.key is key]:
            self._running.pop(row).job.close()
            self.rows.stop([row])

    def step(self, count: int = STEPS, leave: int = 1) -> Iterator[tuple[Any, Any]]:
        """Draws up to `count` tokens in each row, until `leave` rows end. Gives (key, result) of
        the jobs that are done; where one of them fails, the UserError is its result.
        """
        for row in range(self.rows.count):
            while self._waiting and row not in self._running:
                one = self._waiting.popleft()
                try:
                    self.rows.start([row], one.piece.request)
                    self._running[row] = one
                except UserError as error:
                    yield one.key, error
        if not self._running:
            return
        self.rows.advance(count, leave)
        for row, one in list(self._running.items()):
            if one.hear:
                codes = self.rows.result(row).codes
                one.hear(codes[one.count :])
                one.count = len(codes)
            if self.rows.ended[row]:
                del self._running[row]
                try:
                    one.piece, one.count = one.job.send(self.rows.result(row)), 0
                    self._waiting.append(one)
                except StopIteration as done:
                    yield one.key, done.value
                except UserError as error:
                    yield one.key, error


def run_continuous(rows: Rows, jobs: Iterable[tuple[Any, Job]]) -> Iterator[tuple[Any, Any]]:
    """Runs (key, job) pairs over `rows` and gives (key, result) as they end. A job is taken from
    `jobs` only when a row is free. Raises what a job raises.
    """
    batch, left = Batch(rows), iter(jobs)
    while True:
        while len(batch) < rows.count and (job := next(left, None)):
            batch.add(*job)
        if not len(batch):
            return
        # With many rows, one ends at almost every step: wait for some of them.
        for key, result in batch.step(leave=max(1, rows.count // 16)):
            if isinstance(result, UserError):
                raise result
            yield key, result


def run_each(
    answer: Callable[[Piece], Generated], jobs: Iterable[tuple[Any, Job]]
) -> Iterator[tuple[Any, Any]]:
    """Runs jobs one after another, each piece by `answer`."""
    for key, job in jobs:
        piece = next(job)
        while True:
            try:
                piece = job.send(answer(piece))
            except StopIteration as done:
                yield key, done.value
                break
