"""Search for the best speech of a text: best of several, and beams of partial sequences, as in the
Llasa paper (arXiv 2502.04128, section 3.4).

Both draw several rows from one prompt, which is read once. A scorer is any callable

    scorer(waves, texts, references) -> {metric: float array, one number per wave}

with an attribute `higher_is_better`, a dict of the same metrics; the first of them counts. The
waves and references are lists of float32 (samples,), 16 kHz; a reference is the voice to clone, or
None. `process` scorers judge speech while it grows (in the paper a speaker verifier), `outcome`
scorers the finished ones (a recogniser). Of several, the first decides, and the next where it finds
no difference; at last whether the model stopped by itself, and the likelihood.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.errors import UserError
from llasa_jax.generate.continuous import Piece
from llasa_jax.generate.decode import Generated, Rows
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.settings import SearchSettings

Scorer = Callable[[list[np.ndarray], list[str], list[np.ndarray | None]], dict[str, np.ndarray]]


@dataclass
class Search:
    """A search with scorers; without any, likelihood and a natural stop decide."""

    settings: SearchSettings = field(default_factory=SearchSettings)
    outcome: Sequence[Scorer] = ()
    process: Sequence[Scorer] = ()

    @property
    def rows(self) -> int:
        """How many rows it draws at once. A beam is one batch."""
        settings = self.settings
        return settings.samples if settings.kind == "beam" else min(settings.rows, settings.samples)

    def check(self, sampling: SamplingSettings) -> None:
        """UserError where all samples would be the same."""
        if sampling.temperature == 0 and self.settings.samples > 1:
            raise UserError(
                "a search draws several different speeches, and at temperature 0 all are the same;"
                " give a temperature above 0, such as 0.8"
            )

    def run(self, rows: Rows, codec: Codec, piece: Piece) -> Generated:
        """The best speech of `piece` that is found."""
        started = time.monotonic()

        def late() -> bool:
            limit = self.settings.search_seconds
            return bool(limit) and time.monotonic() - started > limit

        found = (self._beam if self.settings.kind == "beam" else self._best_of)(
            rows, codec, piece, late
        )
        return found[best(self.outcome, found, codec, piece)[0]]

    def _best_of(self, rows: Rows, codec: Codec, piece: Piece, late) -> list[Generated]:
        found: list[Generated] = []
        while len(found) < self.settings.samples and not (found and late()):
            count = min(rows.count, self.settings.samples - len(found))
            _start(rows, piece, count, first=len(found))
            while not rows.ended.all():
                rows.advance(leave=rows.count)
            found += map(rows.result, range(count))
        return found

    def _beam(self, rows: Rows, codec: Codec, piece: Piece, late) -> list[Generated]:
        """Finished sequences leave the batch, and the best of the growing ones take their rows."""
        found: list[Generated] = []
        _start(rows, piece, rows.count)
        while True:
            drawn = 0
            while drawn < self.settings.every and not rows.ended.all():
                before = drawn
                drawn += min(self.settings.every - drawn, 64)
                rows.advance(drawn - before, leave=rows.count)
            at = range(rows.count)
            found += [rows.result(row) for row in at if rows.ended[row]]
            growing = [row for row in at if not rows.ended[row]]
            if not growing or len(found) >= rows.count:
                return found
            partial_speech = [rows.result(row) for row in growing]
            if late():
                return found or partial_speech
            order = best(self.process, partial_speech, codec, piece)
            kept = [growing[i] for i in order[: self.settings.beams]]
            rows.copy([kept[row % len(kept)] for row in at])


def best(
    scorers: Sequence[Scorer], found: Sequence[Generated], codec: Codec, piece: Piece
) -> list[int]:
    """The places of `found`, best first."""
    columns = [
        np.array([result.stopped for result in found], float),
        np.array([result.logprob for result in found]),
    ]
    if scorers:
        waves = list(map(partial(_wave, codec, piece.context), found))
        texts, references = [piece.text] * len(found), [piece.reference] * len(found)
        spoken = np.array([len(result.codes) > 0 for result in found], float)
        columns = [spoken, *(_column(s, waves, texts, references) for s in scorers), *columns]
    return sorted(range(len(found)), key=lambda i: tuple(column[i] for column in columns))[::-1]


def _column(scorer: Any, waves, texts, references) -> np.ndarray:
    """The scorer's first metric, higher is better; not a number is the worst."""
    metric, rises = next(iter(scorer.higher_is_better.items()))
    values = np.asarray(scorer(waves, texts, references)[metric], float)
    return np.where(np.isnan(values), -np.inf, values if rises else -values)


def _wave(codec: Codec, context: np.ndarray, result: Generated) -> np.ndarray:
    if not len(result.codes):
        return np.zeros(codec.hop, np.float32)
    return codec.decode(np.concatenate([context, result.codes]))[len(context) * codec.hop :]


def _start(rows: Rows, piece: Piece, count: int, first: int = 0) -> None:
    """`count` rows go on from one prompt, each with random numbers of its own."""
    rows.stop(range(rows.count))
    numbers = np.random.default_rng(piece.request.number).integers(2**31, size=first + count)
    rows.start(range(count), piece.request, numbers[first:].tolist())
