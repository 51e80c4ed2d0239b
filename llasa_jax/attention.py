"""Attention over packed rows, and over a cache of keys and values.

Letters: B rows, T queries, S keys, N heads, K key-value heads, H head width.
"""

import jax
import jax.numpy as jnp


def packed_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Which key each query may see: same segment, not later. Bool [B, 1, T, T].

    Segment 0 is padding (and, with `prompt.mask: upstream`, the prompt's turn ends): nothing else sees it.
    """
    T = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return (same & jnp.tri(T, dtype=bool))[:, None]


def cache_mask(positions_BT: jax.Array, cache_length: int) -> jax.Array:
    """Slot s of a cache holds position s, so a query sees the slots up to its own position. Bool [B, 1, T, S]."""
    return (jnp.arange(cache_length) <= positions_BT[:, :, None])[:, None]


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention scaled by 1/sqrt(H), softmax in float32. Returns [B, T, N, H]."""
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, implementation="xla")
