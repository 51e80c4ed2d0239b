"""AdamW with warm-up and decay, as the recipes of HF's Trainer and DeepSpeed compute it, on optax."""

from math import ceil

import jax
import jax.numpy as jnp
import optax

from llasa_jax.settings import OptimizerSettings

# Upstream's DeepSpeed config (ds_config_zero2.json): where the warm-up starts and the cosine ends, as shares of the peak.
WARMUP_MIN_RATIO, COS_MIN_RATIO = 0.03, 0.1


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0. "cosine" is HF's `get_cosine_schedule_with_warmup`, "deepspeed" `WarmupCosineLR`."""
    warmup = ceil(settings.warmup_ratio * steps)
    peak = settings.learning_rate
    if settings.schedule == "constant":
        return optax.schedules.warmup_constant_schedule(0.0, peak, warmup)
    if settings.schedule == "deepspeed":
        return lambda step: peak * _warmup_cosine_lr(step, max(2, warmup), steps)
    return optax.schedules.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1))


def _warmup_cosine_lr(step, warmup: int, steps: int):
    """The share of the peak at `step`. DeepSpeed's `lr_schedules.WarmupCosineLR`; its cosine is one step ahead of HF's."""
    warming = WARMUP_MIN_RATIO + (1 - WARMUP_MIN_RATIO) * jnp.log(step + 1) / jnp.log(warmup)
    progress = jnp.minimum(1.0, (step - warmup + 1) / max(1, steps - warmup))
    cooling = COS_MIN_RATIO + (1 - COS_MIN_RATIO) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jnp.where(step < warmup, warming, cooling)


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then `torch.optim.AdamW`'s update or Adafactor's. Weight decay touches norms only with `decay_norms`."""

    def decays(params):
        return jax.tree.map_with_path(lambda path, _: settings.decay_norms or "norm" not in path[-1].key, params)

    schedule = learning_rate_schedule(settings, steps)
    if settings.name == "adafactor":
        # In AdamW's form, steps and decay both times the learning rate, so that the same settings hold.
        scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        optimizer = optax.chain(scale, optax.add_decayed_weights(settings.weight_decay, decays), optax.scale_by_learning_rate(schedule))
    else:
        optimizer = optax.adamw(
            schedule, b1=settings.beta1, b2=settings.beta2, eps=settings.eps, weight_decay=settings.weight_decay, mask=decays
        )
    return optax.chain(optax.clip_by_global_norm(settings.clip), optimizer) if settings.clip else optimizer
