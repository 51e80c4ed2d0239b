"""The loss that the settings name."""

from llasa_jax.align.dpo import DpoLoss
from llasa_jax.align.settings import AlignSettings
from llasa_jax.model.loss import Loss, SupervisedLoss


def loss_of(settings: AlignSettings) -> Loss:
    """The loss to give to a `TrainStep`."""
    return DpoLoss(settings.dpo) if settings.loss == "dpo" else SupervisedLoss()
