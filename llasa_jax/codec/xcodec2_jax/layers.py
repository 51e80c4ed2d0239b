"""Layers that XCodec2's encoder and decoder share, as functions of arrays and parameters.

One alphabet names every dimension:
B clips, S samples, T frames (or steps at another rate), C channels in, O channels out, W taps of a
kernel, L layers, D model width, N heads, H head width, F MLP width, R relative distances,
M mel bands, G groups of a norm, Z digits of a code.

Parameters are nested dicts with transformers' names. Weights are [O, C] as in PyTorch; kernels are
[W, C, O], the only order for which XLA has a fast convolution inside a loop on a CPU. Clips are
padded on the right to a common length; a `Span` says which steps are a clip's own. Where PyTorch
sees the end of a clip, these functions see it too, so that a clip's result depends neither on its
neighbours nor on the padding.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Queries of one head that attend at a time: memory grows with the length, not with its square, and
# a processor's cache holds them.
QUERY_BLOCK = 256


class Span(NamedTuple):
    """The steps of each clip that are its own: first <= step < stop. Both int32 [B]."""

    first_B: jax.Array
    stop_B: jax.Array

    def mask(self, length: int) -> jax.Array:
        """bool [B, length]."""
        step = jnp.arange(length)
        return (step >= self.first_B[:, None]) & (step < self.stop_B[:, None])

    def at_rate(self, steps: int) -> "Span":
        """The same span where each of its steps has become `steps`."""
        return Span(self.first_B * steps, self.stop_B * steps)


def zero_outside(x_BTC: jax.Array, span: Span) -> jax.Array:
    """Zeros outside the span: what a PyTorch convolution pads with."""
    return jnp.where(span.mask(x_BTC.shape[1])[..., None], x_BTC, jnp.zeros((), x_BTC.dtype))


def linear(x: jax.Array, p: dict) -> jax.Array:
    """[..., C] to [..., O]."""
    y = jnp.einsum("...C,OC->...O", x, p["weight"])
    return y + p["bias"] if "bias" in p else y


def conv(
    x_BTC: jax.Array, p: dict, stride: int = 1, dilation: int = 1, padding: int = 0
) -> jax.Array:
    """PyTorch's Conv1d, with time before channels: [B, T, C] to [B, T', O]. `stride` divides the
    kernel's width.
    """
    y = lax.platform_dependent(
        x_BTC,
        p["weight"],
        tpu=partial(_conv_as_product, stride=stride, dilation=dilation, padding=padding),
        default=partial(_conv, stride=stride, dilation=dilation, padding=padding),
    )
    return y + p["bias"] if "bias" in p else y


def _conv(
    x_BTC: jax.Array, kernel_WCO: jax.Array, stride: int, dilation: int, padding: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x_BTC,
        kernel_WCO,
        (stride,),
        [(padding, padding)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


def _conv_as_product(
    x_BTC: jax.Array, kernel_WCO: jax.Array, stride: int, dilation: int, padding: int
) -> jax.Array:
    """As `_conv`, by one product with what the taps see, which compiles for a TPU in a third of the
    time.
    """
    x_BTC = jnp.pad(x_BTC, ((0, 0), (padding, padding), (0, 0)))
    B, T, C = x_BTC.shape
    W = len(kernel_WCO)
    length = (T - dilation * (W - 1) - 1) // stride + 1
    # A frame of `stride` steps is what one tap sees, of a kernel that is narrower by `stride`.
    frames = length + W // stride - 1 if stride > 1 else T
    x_BTC = x_BTC[:, : frames * stride].reshape(B, frames, stride * C)
    seen = [x_BTC[:, i : i + length] for i in range(0, W // stride * dilation, dilation)]
    return _product(seen, kernel_WCO)


def _product(seen: list[jax.Array], kernel_WCO: jax.Array) -> jax.Array:
    """What the taps see, one after the other, times the kernel."""
    return jnp.concatenate(seen, -1) @ kernel_WCO.reshape(-1, kernel_WCO.shape[-1])


def conv_dilated(
    x_BTC: jax.Array, p: dict, number: jax.Array, dilations: tuple[int, ...]
) -> jax.Array:
    """A `conv` of the same length with the dilation `dilations[number]`, known when it runs."""

    def branches(x_BTC, p, number):
        W = p["weight"].shape[0]
        dilated = [
            partial(conv, dilation=dilation, padding=W // 2 * dilation) for dilation in dilations
        ]
        return lax.switch(number, dilated, x_BTC, p)

    args = x_BTC, p, number
    product = partial(_dilated_as_product, dilations=dilations)
    return lax.platform_dependent(*args, tpu=product, default=branches)


def _dilated_as_product(
    x_BTC: jax.Array, p: dict, number: jax.Array, dilations: tuple[int, ...]
) -> jax.Array:
    W, T = p["weight"].shape[0], x_BTC.shape[1]
    most = W // 2 * max(dilations)
    x_BTC = jnp.pad(x_BTC, ((0, 0), (most, most), (0, 0)))
    steps = (jnp.arange(W) - W // 2) * jnp.array(dilations)[number] + most
    seen = [lax.dynamic_slice_in_dim(x_BTC, steps[i], T, axis=1) for i in range(W)]
    return _product(seen, p["weight"]) + p["bias"]


def silu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


def layer_norm(x: jax.Array, p: dict, eps: float) -> jax.Array:
    """Over the last dimension, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * p["weight"] + p["bias"]).astype(x.dtype)


def rms_norm(x: jax.Array, p: dict, eps: float) -> jax.Array:
    """Over the last dimension, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return p["weight"] * y.astype(x.dtype)


def group_norm(
    x_BTC: jax.Array, p: dict, span: Span, groups: int = 32, eps: float = 1e-6
) -> jax.Array:
    """Over a group's channels and the span's steps, computed in float32."""
    B, T, C = x_BTC.shape
    y = x_BTC.astype(jnp.float32).reshape(B, T, groups, C // groups)
    own = span.mask(T)[:, :, None, None]
    count = own.sum(1, keepdims=True) * (C // groups)
    y = y - jnp.where(own, y, 0).sum((1, 3), keepdims=True) / count
    variance = jnp.where(own, jnp.square(y), 0).sum((1, 3), keepdims=True) / count
    y = (y * lax.rsqrt(variance + eps)).reshape(B, T, C)
    return (y * p["weight"] + p["bias"]).astype(x_BTC.dtype)


def attend(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    span: Span,
    distances_RH: jax.Array | None = None,
    left: int = 0,
) -> jax.Array:
    """Softmax attention of all steps to the span's steps, [B, T, N, H]; softmax in float32.

    `distances_RH` are Wav2Vec2-BERT's relative keys: entry `left + d` is added to the keys that lie
    d steps after the query, d cut to -left .. R - 1 - left. Heads attend one after the other, in
    blocks of up to `QUERY_BLOCK` queries.
    """
    B, T, N, H = q_BTNH.shape
    own_BT, scale = span.mask(T), H**-0.5
    blocks = -(-T // QUERY_BLOCK)
    size = -(-T // blocks)
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, blocks * size - T), (0, 0), (0, 0)))
    q_NBTH, k_NBTH, v_NBTH = (jnp.moveaxis(x, 2, 0) for x in (q_BTNH, k_BTNH, v_BTNH))

    def head(qkv):
        q_BTH, k_BTH, v_BTH = qkv

        @jax.checkpoint
        def block(start):
            q_BQH = lax.dynamic_slice_in_dim(q_BTH, start, size, axis=1)
            logits_BQT = jnp.einsum("BQH,BTH->BQT", q_BQH, k_BTH).astype(jnp.float32)
            if distances_RH is not None:
                logits_BQT += _relative_logits(q_BQH, distances_RH, left, start, T).astype(
                    jnp.float32
                )
            logits_BQT = jnp.where(own_BT[:, None], logits_BQT * scale, jnp.finfo(jnp.float32).min)
            return jnp.einsum("BQT,BTH->BQH", jax.nn.softmax(logits_BQT).astype(v_BTH.dtype), v_BTH)

        return lax.map(block, jnp.arange(blocks) * size)

    y_NYBQH = lax.map(head, (q_NBTH, k_NBTH, v_NBTH))  # Y blocks
    return y_NYBQH.transpose(2, 1, 3, 0, 4).reshape(B, blocks * size, N, H)[:, :T]


def _relative_logits(
    q_BQH: jax.Array, distances_RH: jax.Array, left: int, start, keys: int
) -> jax.Array:
    """Products of queries start .. start + Q - 1 with relative keys, [B, Q, keys].

    Products with the R distances are laid out by distance, the outer two repeated; row i of the
    result is that layout moved left by i, which is a reshape to rows shorter by one.
    """
    B, Q, _ = q_BQH.shape
    R = distances_RH.shape[0]
    near_BQR = jnp.einsum("BQH,RH->BQR", q_BQH, distances_RH)
    width = keys + Q + R
    # Column c holds distance c - (Q - 1 + left) - start: distance -left is at start + Q - 1.
    before = jnp.arange(width) < start + Q - 1
    wide = jnp.where(before, near_BQR[..., :1], near_BQR[..., -1:])
    wide = lax.dynamic_update_slice_in_dim(wide, near_BQR, start + Q - 1, axis=2)
    wide = lax.optimization_barrier(wide)
    shorter = wide.reshape(B, Q * width)[:, : Q * (width - 1)].reshape(B, Q, width - 1)
    return shorter[..., Q - 1 + left : Q - 1 + left + keys]
