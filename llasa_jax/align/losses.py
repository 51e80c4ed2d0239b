"""The loss that the settings name."""

from llasa_jax.align.dpo import DpoLoss
from llasa_jax.align.grpo import GrpoLoss
from llasa_jax.align.settings import AlignSettings
from llasa_jax.model.loss import Loss, SupervisedLoss


def loss_of(settings: AlignSettings) -> Loss:
    """The loss to give to a `TrainStep`."""
    if settings.loss == "dpo":
        return DpoLoss(settings.dpo)
    return GrpoLoss(settings.grpo) if settings.loss == "grpo" else SupervisedLoss()
