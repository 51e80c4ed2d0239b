"""How many steps an epoch takes: clips, tokens and packed rows, counted before training."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from llasa_jax.data.batching.draws import Source, drawn, draws_per_epoch
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
    sample: int = SAMPLE,
) -> Fit:
    """Counts the clips, tokens and rows of `length` tokens of the first epoch, from its first
    `sample` draws. Raises UserError if no clip can be read or none fits.
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
    source, tokens = source[tokens > 0], tokens[tokens > 0]
    if not len(tokens):
        raise UserError("none of the clips can be read; look at data.path and its audio")
    fits = tokens <= length
    if not fits.any() and too_long == "drop":
        raise UserError(
            f"none of the clips fits rows of {length} tokens (the shortest has {tokens.min()});"
            " raise data.max_length"
        )
    kept = np.minimum(tokens, length) * (fits | (too_long == "cut"))
    used = kept[kept > 0].tolist()
    rows = (
        sum(len(pack_rows(used[i : i + WINDOW], length)) for i in range(0, len(used), WINDOW))
        if pack
        else len(used)
    )
    scale = draws / count
    shares = np.bincount(source, kept, len(sources)) / kept.sum()
    return Fit(
        length=length,
        clips=round(len(used) * scale),
        too_long=round(int((~fits).sum()) * scale),
        tokens=round(int(kept.sum()) * scale),
        rows=round(rows * scale),
        shares=tuple(shares.tolist()),
        exact=count == draws,
    )
