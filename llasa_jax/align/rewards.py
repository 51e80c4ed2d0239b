"""From scores of speech to one number each, the reward."""

from collections.abc import Mapping

import numpy as np

from llasa_jax.align.settings import GrpoSettings, RewardSettings

WORST = 1e-3  # a part of 0 would hide all others in a harmonic mean


def reward_of(
    settings: GrpoSettings, scores: Mapping[str, np.ndarray], stopped: np.ndarray, pace: np.ndarray
) -> np.ndarray:
    """The rewards of speeches, float64 (speeches,), by their `scores`. `stopped` says which the
    model ended by itself; `pace` are their durations, relative to that of reading the text. A score
    that is not a number counts as the worst.
    """
    parts = np.stack([_part(one, np.asarray(scores[one.score])) for one in settings.parts])
    weights = np.array([one.weight for one in settings.parts])
    if settings.combine == "harmonic":
        found = weights.sum() / (weights[:, None] / np.maximum(parts, WORST)).sum(axis=0)
    else:
        found = (weights[:, None] * parts).sum(axis=0) / weights.sum()
    beyond = np.maximum(np.abs(np.log(np.maximum(pace, WORST))) - np.log(settings.free_pace), 0.0)
    return found - settings.unstopped * ~np.asarray(stopped, bool) - settings.pace * beyond


def _part(one: RewardSettings, score: np.ndarray) -> np.ndarray:
    """A score as a part of the reward, the higher the better."""
    shaped = {
        "tanh": lambda: 1 - np.tanh(one.scale * score),
        "exp": lambda: np.exp(-one.scale * score),
        "plain": lambda: one.scale * score,
    }[one.shape]()
    return np.where(np.isfinite(score), np.maximum(shaped, 0.0), 0.0)
