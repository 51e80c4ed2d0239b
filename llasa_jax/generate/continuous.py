"""Continuous batching: a row that has ended is started again with the next text at once."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from llasa_jax.generate.decode import Generated, Request, Rows

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


def run_continuous(rows: Rows, jobs: Iterable[tuple[Any, Job]]) -> Iterator[tuple[Any, Any]]:
    """Runs (key, job) pairs over `rows` and gives (key, result) as they end. A job is taken from
    `jobs` only when a row is free.
    """
    left, running = iter(jobs), {}
    waiting: deque = deque()  # jobs with a piece to say
    rows.stop(range(rows.count))
    while True:
        for row in range(rows.count):
            if row in running:
                continue
            if not waiting and (job := next(left, None)):
                waiting.append((*job, next(job[1])))
            if waiting:
                running[row] = waiting.popleft()
                rows.start([row], running[row][2].request)
        if not running:
            return
        # With many rows, one ends at almost every step: wait for some of them.
        rows.advance(leave=max(1, rows.count // 16))
        for row in [row for row in running if rows.ended[row]]:
            key, job, _ = running.pop(row)
            try:
                waiting.append((key, job, job.send(rows.result(row))))
            except StopIteration as done:
                yield key, done.value


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
