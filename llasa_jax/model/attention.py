"""Attention over packed rows, by platform, and over a cache of keys and values.

A row holds many clips, told apart by segment ids: a token sees what is not later and of its own
segment. Every implementation here knows segments. cuDNN's flash attention, as JAX offers it, does
not (a clip would see its neighbours), so it is not among them.

Letters: B rows, T queries, S keys, N heads, K key-value heads, H head width.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from llasa_jax.model.sharding import HEADS, ROWS

QUERY_BLOCK = 512
OF_PLATFORM = {"tpu": "splash", "gpu": "triton"}


def choose_attention(name: str, mesh: Mesh | AbstractMesh, *, interpret: bool = False):
    """The function of `model.attention` on this mesh: "auto" is splash on TPUs, triton on GPUs and
    xla elsewhere.

    It takes q [B, T, N, H], k and v [B, T, K, H], segment ids [B, T], and gives [B, T, N, H]. A
    kernel runs on each device's own rows and heads. Where a kernel cannot take a shape, a warning
    says so and XLA computes the same. `interpret` runs kernels on any platform.
    """
    if name == "auto":
        name = OF_PLATFORM.get(mesh.devices.flat[0].platform, "xla")
    if name == "xla":
        return xla_attention
    kernel = {"splash": splash_attention, "triton": triton_attention}[name]

    def attention(q, k, v, segment_ids):
        if q.shape[1] % 128:
            shape = f"rows of {q.shape[1]} tokens (a multiple of 128 would do)"
            warnings.warn(
                f"{name} attention cannot take {shape}; XLA computes attention instead, which needs"
                " more memory",
                stacklevel=2,
            )
            return xla_attention(q, k, v, segment_ids)
        return jax.shard_map(
            partial(kernel, interpret=interpret),
            mesh=mesh,
            in_specs=(HEADS, HEADS, HEADS, ROWS),
            out_specs=HEADS,
            check_vma=False,
        )(q, k, v, segment_ids)

    return attention


def xla_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Plain XLA, a block of queries at a time, so that no layer's [T, T] scores are ever whole.
    Runs everywhere.
    """
    B, T, N, H = q_BTNH.shape
    block = QUERY_BLOCK if T % QUERY_BLOCK == 0 else T

    # Without this the backward pass would keep the scores of all blocks, [T, T] after all.
    @jax.checkpoint
    def attend_block(block_of):
        q, segments, positions = block_of
        mask = (segments[:, :, None] == segment_ids_BT[:, None, :]) & (
            jnp.arange(T) <= positions[:, None]
        )
        return attend(q, k_BTKH, v_BTKH, mask[:, None])

    if block == T:
        return attend_block((q_BTNH, segment_ids_BT, jnp.arange(T)))
    blocks = T // block
    q = jnp.moveaxis(q_BTNH.reshape(B, blocks, block, N, H), 1, 0)
    segments = jnp.moveaxis(segment_ids_BT.reshape(B, blocks, block), 1, 0)
    out = jax.lax.map(attend_block, (q, segments, jnp.arange(T).reshape(blocks, block)))
    return jnp.moveaxis(out, 0, 1).reshape(B, T, N, H)


def splash_attention(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, *, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas kernel for TPUs. T must be a multiple of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    # The kernel works in blocks that divide T.
    block = next(size for size in (512, 256, 128) if T % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * N),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The kernel does not scale.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(
        q, k, v, segment_ids_BT
    )
    return jnp.swapaxes(out, 1, 2).astype(q_BTNH.dtype)


def triton_attention(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, *, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas kernel for NVIDIA GPUs. T must be a multiple of 128."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    group = q_BTNH.shape[2] // k_BTKH.shape[2]
    # This kernel knows no grouped queries: each key-value head is given to all of its heads.
    k, v = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH))
    return mha(
        q_BTNH,
        k,
        v,
        segment_ids_BT,
        sm_scale=q_BTNH.shape[-1] ** -0.5,
        causal=True,
        interpret=interpret,
    )


def cache_mask(positions_BT: jax.Array, cache_length: int) -> jax.Array:
    """Slot s of a cache holds position s, so a query sees the slots up to its own position. Bool
    [B, 1, T, S].
    """
    return (jnp.arange(cache_length) <= positions_BT[:, :, None])[:, None]


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention scaled by 1/sqrt(H), softmax in float32. Returns [B, T, N, H]."""
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, implementation="xla")
