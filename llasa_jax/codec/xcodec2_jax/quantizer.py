"""Finite scalar quantization (Mentzer et al., 2023): a code is a number of Z digits.

Reference: transformers' `Xcodec2FiniteScalarQuantization`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def quantize(x: jax.Array, levels: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Projected values [..., Z] to codes, int32 [...], and values for a decoder, float32 [..., Z].

    The values, in -1 .. 1, carry straight-through gradients: those of the bounded, unrounded
    numbers.
    """
    # Bounded twice, as the checkpoint was trained.
    bounded = _bound(_bound(x.astype(jnp.float32), levels), levels)
    rounded = bounded + lax.stop_gradient(jnp.round(bounded) - bounded)
    half = np.array(levels) // 2
    digits = jnp.round(bounded).astype(jnp.int32) + half
    return (digits * _basis(levels)).sum(-1).astype(jnp.int32), rounded / half.astype(np.float32)


def values_of(codes: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Codes [...] to the values that a decoder gets, float32 [..., Z]."""
    half = np.array(levels) // 2
    digits = codes[..., None] // _basis(levels) % np.array(levels)
    return (digits - half) / half.astype(np.float32)


def _bound(x: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    half_range = (np.array(levels) - 1) * (1 + 1e-3) / 2
    offset = np.where(np.array(levels) % 2 == 0, 0.5, 0.0)
    shift = np.arctanh(offset / half_range)
    return jnp.tanh(x + shift.astype(np.float32)) * half_range.astype(np.float32) - offset.astype(
        np.float32
    )


def _basis(levels: tuple[int, ...]) -> np.ndarray:
    return np.cumprod([1, *levels[:-1]])
