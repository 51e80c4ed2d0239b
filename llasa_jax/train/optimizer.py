"""AdamW and others of optax, with warm-up and decay as the recipes of HF's Trainer and DeepSpeed
compute them.
"""

from math import ceil

import jax
import jax.numpy as jnp
import optax

from llasa_jax.train.offload import streamed
from llasa_jax.train.settings import OptimizerSettings

# Upstream's DeepSpeed config (ds_config_zero2.json): where the warm-up starts and the cosine ends,
# as shares of the peak.
WARMUP_MIN_RATIO, COS_MIN_RATIO = 0.03, 0.1


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0. "cosine" is HF's `get_cosine_schedule_with_warmup`,
    "deepspeed" `WarmupCosineLR`.
    """
    warmup = ceil(settings.warmup_ratio * steps)
    peak = settings.learning_rate
    if settings.schedule == "constant":
        return optax.schedules.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup)
    if settings.schedule == "deepspeed":
        return lambda step: peak * _warmup_cosine_lr(step, max(2, warmup), steps)
    return optax.schedules.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1)
    )


def _warmup_cosine_lr(step, warmup: int, steps: int):
    """The share of the peak at `step`. DeepSpeed's `lr_schedules.WarmupCosineLR`; its cosine is one
    step ahead of HF's.
    """
    warming = WARMUP_MIN_RATIO + (1 - WARMUP_MIN_RATIO) * jnp.log(step + 1) / jnp.log(warmup)
    progress = jnp.minimum(1.0, (step - warmup + 1) / max(1, steps - warmup))
    cooling = COS_MIN_RATIO + (1 - COS_MIN_RATIO) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jnp.where(step < warmup, warming, cooling)


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then the update of optax's optimizer of that name. Weight decay
    touches norms only with `decay_norms`.

    All have AdamW's form: the step and the decay both times the learning rate, so that the same
    settings hold. With `offload`, `update` needs `shardings`, see `offload.streamed`.
    """

    def decays(params):
        return jax.tree.map_with_path(
            lambda path, _: settings.decay_norms or "norm" not in path[-1].key, params
        )

    scale = _kept_in(jnp.dtype(settings.state_dtype), SCALES[settings.name](settings))
    return optax.chain(
        *([optax.clip_by_global_norm(settings.clip)] if settings.clip else []),
        optax.chain(
            streamed(scale) if settings.offload else scale,
            optax.add_decayed_weights(settings.weight_decay, decays),
            optax.scale_by_learning_rate(learning_rate_schedule(settings, steps)),
        ),
    )


# What each optimizer makes of a gradient, before weight decay and learning rate.
SCALES = {
    "adamw": lambda settings: optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
    "adafactor": lambda settings: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
    "adagrad": lambda settings: optax.scale_by_rss(0.0, settings.eps),
    "lion": lambda settings: optax.scale_by_lion(settings.beta1, settings.beta2),
    "sgd": lambda settings: optax.trace(settings.beta1),
}


def _kept_in(dtype, scale: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same arithmetic, in float32, with all of the state kept in `dtype`: optax's own
    `mu_dtype` leaves out second moments.
    """

    def cast(tree, to):
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def update(grads, state, params=None):
        updates, state = scale.update(cast(grads, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(scale.init(params), dtype), update)
