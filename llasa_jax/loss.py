"""Cross-entropy over the whole vocabulary without ever holding the logits of a whole row.

One row of 2,048 tokens over 193,800 classes is 1.6 GB of float32 logits. Here a scan takes `chunk` tokens of every row at a time,
and the backward pass computes each chunk's logits anew.
"""

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, *, vocab_size: int, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The sum of -log p(target) in nats, and how many targets are the likeliest token, over the tokens in `mask`.

    `table` may be padded beyond `vocab_size`: its padding takes no part. Both results are float32 scalars; divide by the mask's
    sum for means. `chunk` must divide T.
    """
    table_VD = table_VD.astype(hidden_BTD.dtype)

    @jax.checkpoint
    def chunk_sums(hidden_BCD, targets_BC, mask_BC):
        logits_BCV, of_target_BC = _logits(hidden_BCD, table_VD, targets_BC, vocab_size)
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - of_target_BC
        hit_BC = of_target_BC >= jnp.max(logits_BCV, axis=-1)
        return jnp.sum(jnp.where(mask_BC, nll_BC, 0.0)), jnp.sum(mask_BC & hit_BC, dtype=jnp.float32)

    def step(sums, chunk_of_rows):
        return jax.tree.map(jnp.add, sums, chunk_sums(*chunk_of_rows)), None

    zeros = (jnp.float32(0), jnp.float32(0))
    sums, _ = jax.lax.scan(step, zeros, tuple(_chunks(x, chunk) for x in (hidden_BTD, targets_BT, mask_BT)))
    return sums


def chunked_ranks(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, vocab_size: int, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Token by token: -log p(target) in nats, float32 [B, T], and how many tokens are likelier than the target, int32 [B, T].

    For validation, in chunks as above: a target is among the ten likeliest where fewer than ten are likelier.
    """
    table_VD = table_VD.astype(hidden_BTD.dtype)

    def step(_, chunk_of_rows):
        logits_BCV, of_target_BC = _logits(chunk_of_rows[0], table_VD, chunk_of_rows[1], vocab_size)
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - of_target_BC
        return None, (nll_BC, jnp.sum(logits_BCV > of_target_BC[..., None], axis=-1, dtype=jnp.int32))

    _, of_chunks = jax.lax.scan(step, None, (_chunks(hidden_BTD, chunk), _chunks(targets_BT, chunk)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(targets_BT.shape), of_chunks)


def _logits(hidden_BCD, table_VD, targets_BC, vocab_size):
    """The logits [B, C, V] with the table's padding at -inf, and those of the targets [B, C]."""
    logits_BCV = jnp.einsum("BCD,VD->BCV", hidden_BCD, table_VD, preferred_element_type=jnp.float32)
    logits_BCV = jnp.where(jnp.arange(table_VD.shape[0]) >= vocab_size, -jnp.inf, logits_BCV)
    return logits_BCV, jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]


def _chunks(x, chunk):
    """[B, T, ...] as [T / chunk, B, chunk, ...], to scan over."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
