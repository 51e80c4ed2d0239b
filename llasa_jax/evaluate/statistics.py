"""How sure a mean over clips is, and whether two checkpoints differ: bootstrap and permutation."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean over clips with its 95% interval; the bounds are NaN where there are fewer than two
    clips.
    """

    mean: float
    low: float
    high: float
    clips: int


class Difference(NamedTuple):
    """The mean difference of two checkpoints over the same clips, its 95% interval, and how
    probable one as large is by chance (p).
    """

    mean: float
    low: float
    high: float
    p: float
    clips: int


def mean_of(values: np.ndarray) -> Mean:
    """The mean of the values that are not NaN, float (clips,), with a percentile bootstrap."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return Mean(float(values[0]) if len(values) else np.nan, np.nan, np.nan, len(values))
    from scipy import stats  # takes nearly a second, and training starts without it

    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Mean(float(values.mean()), float(found.low), float(found.high), len(values))


def difference_of(before: np.ndarray, after: np.ndarray) -> Difference:
    """`after` minus `before`, numbers of the same clips in one order, float (clips,). Clips with a
    NaN are left out. p is two-sided, by flipping the signs of the clips' differences.
    """
    change = (after - before)[~np.isnan(after - before)]
    mean, low, high, clips = mean_of(change)
    p = 1.0
    if clips >= 2 and change.any():
        from scipy import stats

        p = float(
            stats.permutation_test(
                (change,),
                np.mean,
                permutation_type="samples",
                n_resamples=RESAMPLES,
                rng=np.random.default_rng(0),
            ).pvalue
        )
    return Difference(mean, low, high, p, clips)
