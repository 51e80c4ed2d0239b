"""How many steps an epoch takes: clips, tokens and packed rows, counted before training."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from llasa_jax.data.batching.draws import Source, StreamShare, drawn, draws_per_epoch
from llasa_jax.data.batching.packing import WINDOW, pack_rows
from llasa_jax.data.batching.rows import BatchShape
from llasa_jax.errors import UserError

SAMPLE = 20_000  # draws to look at
MEASURING_THREADS = 8


@dataclass(frozen=True)
class Fit:
    """The size of an epoch in rows of `length` tokens. `exact` is false where it was extrapolated
    from a sample.

    `clips` are kept, `too_long` dropped (or cut); `tokens` are those of the kept clips, `rows` how
    many rows they fill, `shares` the share of each source in the tokens.
    """

    length: int
    clips: int
    too_long: int
    tokens: int
    rows: int
    shares: tuple[float, ...]
    exact: bool

    def steps(self, epochs: float, shape: BatchShape) -> int:
        """How many steps `epochs` take."""
        return max(1, ceil(epochs * self.rows / (shape.accumulation * shape.rows)))

    def __str__(self):
        fill = self.tokens / (self.rows * self.length)
        numbers = (
            f"{self.clips} clips, {self.tokens} tokens in {self.rows} rows of {self.length},"
            f" {fill:.1%} full"
        )
        return f"{'' if self.exact else 'about '}{numbers}; {self.too_long} too long"


def measure(
    sources: Sequence[Source],
    length: int,
    *,
    seed: int,
    pack: bool = True,
    too_long: Literal["drop", "cut"] = "drop",
    streams: int = 1,
    sample: int = SAMPLE,
) -> Fit:
    """Counts the clips, tokens and rows of `length` tokens of the first epoch, from its first
    `sample` draws, packed by `streams` as `plan` does. Raises UserError if no clip can be read or
    none fits.
    """
    draws = draws_per_epoch(sources)
    count = min(draws, sample)
    order = drawn(sources, seed)

    def look(draw: int) -> tuple[int, int]:
        source, record = order[draw] or (0, None)
        return source, 0 if record is None else sources[source].prompter.length(record)

    # In threads, since the length of an audio clip is read from its file.
    with ThreadPoolExecutor(MEASURING_THREADS) as pool:
        source, tokens = np.array(list(pool.map(look, range(count)))).T
    if not tokens.any():
        raise UserError("none of the clips can be read; look at data.path and its audio")
    fits = (tokens > 0) & (tokens <= length)
    if not fits.any() and too_long == "drop":
        raise UserError(
            f"none of the clips fits rows of {length} tokens (the shortest has"
            f" {tokens[tokens > 0].min()});"
            " raise data.max_length"
        )
    kept = np.minimum(tokens, length) * (fits | (too_long == "cut"))
    clips = int((kept > 0).sum())
    rows = clips
    if pack:
        rows = sum(
            len(pack_rows(window, length))
            for stream in range(streams)
            for window in _windows(kept[_draws_of(stream, streams, seed, count)])
        )
    scale = draws / count
    shares = np.bincount(source, kept, len(sources)) / kept.sum()
    return Fit(
        length=length,
        clips=round(clips * scale),
        too_long=round(int((tokens > length).sum()) * scale),
        tokens=round(int(kept.sum()) * scale),
        rows=round(rows * scale),
        shares=tuple(shares.tolist()),
        exact=count == draws,
    )


def _draws_of(stream: int, streams: int, seed: int, count: int) -> list[int]:
    """Which of the first `count` draws are a stream's, in order."""
    if streams == 1:
        return list(range(count))
    share = StreamShare(stream, streams, seed)
    draws = (share[at][1] for at in range(-(-count // streams)))
    return [draw for draw in draws if draw < count]


def _windows(lengths: np.ndarray) -> list[list[int]]:
    """The lengths that are not 0, by `WINDOW`."""
    used = lengths[lengths > 0].tolist()
    return [used[at : at + WINDOW] for at in range(0, len(used), WINDOW)]
