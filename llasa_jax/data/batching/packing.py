"""Which clips share a row, from their lengths alone."""

import bisect
from collections.abc import Sequence

import numpy as np

WINDOW = 1024  # clips that are packed together


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which of `lengths` go together into rows of `capacity`, as lists of indices: the longest
    first, each where it fits most tightly (best-fit decreasing).

    The rows are returned shuffled, seeded by the lengths in the order of the draws: otherwise rows
    of many short clips would always come last.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for clip in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[clip], 0))
        free, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(clip)
        bisect.insort(room, (free - lengths[clip], row))
    return [rows[i] for i in np.random.default_rng([*lengths]).permutation(len(rows))]
