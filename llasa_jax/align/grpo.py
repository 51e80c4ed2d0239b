"""Group relative policy optimisation (GRPO, arXiv 2402.03300), and the variants of Dr. GRPO (arXiv
2503.20783) and DAPO (arXiv 2503.14476).

Reference: TRL's `GRPOTrainer`, whose losses, gradients and advantages these are.

A segment of a row is one speech. Letters: B rows, T tokens, S segments of a row, G groups (texts),
K speeches of a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llasa_jax.align.settings import GrpoSettings
from llasa_jax.model.loss import Rows, at_temperature, chunked_log_probs


def advantages(rewards_GK: np.ndarray, scale: bool = True) -> np.ndarray:
    """How much better each speech is than the mean of its group, float64 [G, K]; with `scale` in
    standard deviations of the group.
    """
    found = rewards_GK - rewards_GK.mean(axis=1, keepdims=True)
    return found / (rewards_GK.std(axis=1, ddof=1, keepdims=True) + 1e-4) if scale else found


def needs_old(settings: GrpoSettings) -> bool:
    """Whether speeches are trained on that other weights have drawn."""
    return settings.updates > 1 or settings.ahead


class GrpoLoss:
    """GRPO as a loss of `TrainStep`.

    Beside what every batch has, it takes numbers for each target, float32: `advantage`, that of its
    speech; `old`, its log-probability, nats, when the speech was drawn, if that was not by the same
    weights (see `needs_old`); and `reference`, that in the reference model, if `kl` is not 0. All
    are log-probabilities at the temperature at which speeches are drawn.
    """

    def __init__(self, settings: GrpoSettings):
        self.settings, self.temperature = settings, settings.temperature
        names = ["advantage"]
        names += ["old"] if needs_old(settings) else []
        names += ["reference"] if settings.kl else []
        self.arrays: dict[str, Any] = dict.fromkeys(names, jnp.float32)

    def totals(self, batch: Rows) -> tuple[jax.Array, jax.Array]:
        """How many speeches and how many targets there are, at least 1."""
        speeches = jnp.max(batch["segment_ids"], axis=-1).sum()
        return tuple(  # type: ignore[return-value]
            jnp.maximum(count.astype(jnp.float32), 1.0)
            for count in (speeches, batch["loss_mask"].sum())
        )

    def shares(self, rows: Rows, totals, features, tables, **sizes):
        """See `SupervisedLoss.shares`. `nats` is the mean of -log p, `clipped` the share of the
        targets whose gradient is cut off, `kl` the mean estimate of the divergence from the
        reference, nats a target.
        """
        settings, mask_BT, (speeches, targets) = self.settings, rows["loss_mask"], totals
        features = at_temperature(features, self.temperature)
        log_probs_BT = chunked_log_probs(features, tables, rows["targets"], mask_BT, **sizes)
        # Otherwise the speeches are the model's own: the ratio is 1, and has a gradient.
        old_BT = rows["old"] if "old" in self.arrays else jax.lax.stop_gradient(log_probs_BT)
        ratio_BT, advantage_BT = jnp.exp(log_probs_BT - old_BT), rows["advantage"]
        low, high = 1 - settings.epsilon_low, 1 + settings.epsilon_high
        losses_BT = -jnp.minimum(
            ratio_BT * advantage_BT, jnp.clip(ratio_BT, low, high) * advantage_BT
        )
        if settings.normalize == "speeches":
            weights_BT = 1 / (_lengths(mask_BT, rows["segment_ids"]) * speeches)
        elif settings.normalize == "tokens":
            weights_BT = 1 / targets
        else:
            weights_BT = 1 / (mask_BT.shape[1] * speeches)

        def mean(x_BT):
            return jnp.sum(jnp.where(mask_BT, x_BT, 0.0)) / targets

        clipped_BT = ((ratio_BT < low) & (advantage_BT < 0)) | (
            (ratio_BT > high) & (advantage_BT > 0)
        )
        numbers = {"nats": mean(-log_probs_BT), "clipped": mean(clipped_BT.astype(jnp.float32))}
        if settings.kl:
            # An estimate without bias that is never negative (k3, joschu.net/blog/kl-approx).
            behind_BT = rows["reference"] - log_probs_BT
            kl_BT = jnp.exp(behind_BT) - behind_BT - 1
            losses_BT += settings.kl * kl_BT
            numbers["kl"] = mean(kl_BT)
        return jnp.sum(jnp.where(mask_BT, losses_BT * weights_BT, 0.0)), numbers


def _lengths(mask_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """How many targets the segment of each token has, float32 [B, T], at least 1."""

    def lengths(mask_T, segments_T):
        counts_S = jax.ops.segment_sum(
            mask_T.astype(jnp.float32), segments_T, num_segments=len(mask_T) + 1
        )
        return counts_S[segments_T]

    return jnp.maximum(jax.vmap(lengths)(mask_BT, segments_BT), 1.0)
