"""AdamW with warm-up and decay, as the recipes of HF's Trainer and DeepSpeed compute it, on optax."""

import jax
import optax

from llasa_jax.settings import OptimizerSettings


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0. "cosine" is HF's `get_cosine_schedule_with_warmup`."""
    warmup = round(settings.warmup_ratio * steps)
    peak = settings.learning_rate
    if settings.schedule == "constant":
        return optax.schedules.warmup_constant_schedule(0.0, peak, warmup)
    return optax.schedules.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1))


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then `torch.optim.AdamW`'s update. Weight decay touches matrices and tables, not norms."""

    def decays(params):
        return jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].key, params)

    adamw = optax.adamw(
        learning_rate_schedule(settings, steps),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw) if settings.clip else adamw
