"""From the rows of an evaluation to its results: means with intervals, and comparisons."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from llasa_jax.evaluate.statistics import difference_of, mean_of

CEILING = "ceiling"  # the codec's resynthesis of the recordings, as if it were a checkpoint
WORDS = ("checkpoint", "id", "item", "transcript", "clip")  # of a row, which are no numbers
# Better and worse of what comes from no scorer.
OURS = {"stopped": True, "pace_off": False}


def summarise(
    rows: Sequence[dict],
    checkpoints: Sequence[str],
    higher_is_better: Mapping[str, bool],
    settings: dict,
) -> dict:
    """The results, as JSON can hold them: None for what is not known.

    `checkpoints`: for each, the ceiling first, `numbers` by name with mean, 95% interval and how
    many clips have it. `comparisons`: each checkpoint with the one before it, and the last with the
    first, over the clips of both. Adds `pace_off` to the rows: how many doublings their pace is off
    the median pace of the recordings, where there are recordings.
    """
    _add_pace_off(rows)
    found = [name for name in (CEILING, *checkpoints) if any(r["checkpoint"] == name for r in rows)]
    # The scorers' first, in their order.
    names = list(dict.fromkeys([*higher_is_better, *OURS, *(n for row in rows for n in row)]))
    names = [name for name in names if name not in WORDS and any(name in row for row in rows)]
    tables = {name: _table(rows, name, names) for name in found}
    directed = {**higher_is_better, **OURS}
    pairs = list(pairwise(checkpoints))
    if len(checkpoints) > 2:
        pairs.append((checkpoints[0], checkpoints[-1]))
    return {
        "settings": settings,
        "higher_is_better": {name: directed[name] for name in names if name in directed},
        "checkpoints": [
            {
                "checkpoint": name,
                "numbers": {
                    number: _plain(mean_of(column)._asdict())
                    for number, column in tables[name][1].items()
                },
            }
            for name in found
        ],
        "comparisons": [
            {"number": number, "from": before, "to": after} | _plain(compared._asdict())
            for before, after in pairs
            for number in names
            if number in directed
            and (compared := _compare(tables[before], tables[after], number)).clips
        ],
    }


Table = tuple[list[str], dict[str, np.ndarray]]  # ids, and numbers by name, float (clips,) each


def column(rows: Sequence[dict], number: str) -> np.ndarray:
    """A number of all rows, NaN where a row has none."""
    return np.array(
        [np.nan if row.get(number) is None else row[number] for row in rows], np.float64
    )


def _table(rows: Sequence[dict], checkpoint: str, numbers: Sequence[str]) -> Table:
    own = [row for row in rows if row["checkpoint"] == checkpoint]
    return [row["id"] for row in own], {number: column(own, number) for number in numbers}


def _compare(before: Table, after: Table, number: str):
    old = dict(zip(before[0], before[1][number], strict=True))
    both = [
        (old[name], new)
        for name, new in zip(after[0], after[1][number], strict=True)
        if name in old
    ]
    pairs = np.array(both, np.float64).reshape(-1, 2)
    return difference_of(pairs[:, 0], pairs[:, 1])


def _add_pace_off(rows: Sequence[dict]) -> None:
    paces = column([row for row in rows if row["checkpoint"] == CEILING], "pace")
    if len(paces := paces[paces > 0]):
        usual = float(np.median(paces))
        for row in rows:
            pace = row.get("pace")
            row["pace_off"] = abs(float(np.log2(pace / usual))) if pace else None


def _plain(numbers: dict) -> dict:
    return {
        name: None if isinstance(value, float) and np.isnan(value) else value
        for name, value in numbers.items()
    }
