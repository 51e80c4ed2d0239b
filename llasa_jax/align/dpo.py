"""Direct preference optimisation (arXiv 2305.18290), IPO (arXiv 2310.12036) and their variants.

Reference: TRL's `DPOTrainer`, whose losses and gradients these are.

A batch's rows hold pairs: the segments 1 and 2 are the better and the worse speech of one text, 3
and 4 those of the next. Letters: B rows, T tokens, P pairs of a row, of which T // 2 have room.
"""

import jax
import jax.numpy as jnp

from llasa_jax.align.settings import DpoSettings
from llasa_jax.model.loss import Rows, chunked_log_probs


class DpoLoss:
    """DPO as a loss of `TrainStep`.

    Beside what every batch has, it takes `reference`, float32: at one target of every segment the
    log-probability of the segment's targets in the reference model, nats, and 0 elsewhere. So the
    reference need not be in memory.
    """

    arrays = {"reference": jnp.float32}
    temperature = 1.0

    def __init__(self, settings: DpoSettings):
        self.settings = settings

    def totals(self, batch: Rows) -> tuple[jax.Array, jax.Array]:
        """How many pairs there are, and how many targets the better speeches have; at least 1."""
        better = batch["loss_mask"] & (batch["segment_ids"] % 2 == 1)
        pairs = (jnp.max(batch["segment_ids"], axis=-1) + 1) // 2
        return jnp.maximum(pairs.sum(), 1).astype(jnp.float32), jnp.maximum(
            better.sum(dtype=jnp.float32), 1.0
        )

    def shares(self, rows: Rows, totals, features, tables, **sizes):
        """See `SupervisedLoss.shares`. `accuracy` is the share of the pairs whose better speech has
        the higher reward.
        """
        settings, (pairs, better_targets) = self.settings, totals
        targets_BT, mask_BT, segments_BT = (
            rows[name] for name in ("targets", "loss_mask", "segment_ids")
        )
        log_probs_BT = chunked_log_probs(features, tables, targets_BT, mask_BT, **sizes)
        log_probs, reference, length = (
            _of_pairs(x, segments_BT)
            for x in (log_probs_BT, rows["reference"], mask_BT.astype(jnp.float32))
        )
        real_BP = (length > 0).all(axis=-1)
        ratios = log_probs - reference
        if settings.form == "ipo" or settings.length_normalized:
            ratios = ratios / jnp.maximum(length, 1.0)
        margin_BP = ratios[..., 0] - ratios[..., 1]
        if settings.form == "ipo":
            losses_BP = (margin_BP - 1 / (2 * settings.beta)) ** 2
        else:
            losses_BP = -(1 - settings.label_smoothing) * jax.nn.log_sigmoid(
                settings.beta * margin_BP
            ) - settings.label_smoothing * jax.nn.log_sigmoid(-settings.beta * margin_BP)

        def mean(x_BP):
            return jnp.sum(jnp.where(real_BP, x_BP, 0.0)) / pairs

        loss = mean(losses_BP)
        supervised = -jnp.sum(log_probs[..., 0]) / better_targets
        if settings.supervised:
            loss += settings.supervised * supervised
        return loss, {
            "accuracy": mean((margin_BP > 0).astype(jnp.float32)),
            "reward_better": mean(settings.beta * ratios[..., 0]),
            "reward_worse": mean(settings.beta * ratios[..., 1]),
            "reward_margin": mean(settings.beta * margin_BP),
            "nats_better": supervised,
        }


def _of_pairs(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The sums over the segments of each row, [B, P, 2]: the better and the worse of each pair."""
    pairs = x_BT.shape[1] // 2

    def sums(x_T, segments_T):
        return jax.ops.segment_sum(x_T, segments_T, num_segments=2 * pairs + 1)

    return jax.vmap(sums)(x_BT, segments_BT)[:, 1:].reshape(-1, pairs, 2)
