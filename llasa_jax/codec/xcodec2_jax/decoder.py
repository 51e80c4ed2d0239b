"""XCodec2's decoder: residual convolutions, a transformer, and a head that makes the wave.

Reference: transformers' `Xcodec2Model.decode`. The letters are those of `layers.py`.
"""

from functools import cache, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llasa_jax.codec.interface import HOP
from llasa_jax.codec.xcodec2_jax.layers import (
    Span,
    attend,
    conv,
    group_norm,
    layer_norm,
    linear,
    rms_norm,
    silu,
    zero_outside,
)
from llasa_jax.codec.xcodec2_jax.quantizer import values_of

_OVERLAP = 4  # frames that one frame's spectrum reaches over


def decode(params: dict, codes_BT: jax.Array, frames_B: jax.Array, config) -> jax.Array:
    """Codes, int32 [B, T] of `frames_B` each, to waves, float32 [B, T * 320].

    What lies after a clip's end means nothing. `config` is an `Xcodec2Config`.
    """
    return decode_values(
        params, values_of(codes_BT, tuple(config.quantization_levels)), frames_B, config
    )


def decode_values(params: dict, values_BTZ: jax.Array, frames_B: jax.Array, config) -> jax.Array:
    """As `decode`, from the quantizer's values, through which gradients flow."""
    frames_B = jnp.asarray(frames_B)
    span = Span(jnp.zeros_like(frames_B), frames_B)
    p = params["acoustic_decoder"]
    x_BTD = linear(
        linear(values_BTZ.astype(p["fc"]["weight"].dtype), params["quantizer"]["project_out"]),
        p["fc"],
    )
    x_BTD = conv(zero_outside(x_BTD, span), p["embed"], padding=3)

    def block(x, weights):
        return _residual_block(x, weights, span), None

    x_BTD = lax.scan(block, x_BTD, p["prior_net"])[0]
    layer = jax.checkpoint(lambda x, weights: (_transformer_layer(x, weights, span, config), None))
    x_BTD = lax.scan(layer, x_BTD, p["layers"])[0]
    x_BTD = lax.scan(block, x_BTD, p["post_net"])[0]
    return _wave(linear(layer_norm(x_BTD, p["norm"], 1e-6), p["head"]["linear"]), span)


def _residual_block(x_BTD: jax.Array, p: dict, span: Span) -> jax.Array:
    y_BTD = conv(
        zero_outside(silu(group_norm(x_BTD, p["norm1"], span)), span), p["conv1"], padding=1
    )
    return x_BTD + conv(
        zero_outside(silu(group_norm(y_BTD, p["norm2"], span)), span), p["conv2"], padding=1
    )


def _transformer_layer(x_BTD: jax.Array, p: dict, span: Span, config) -> jax.Array:
    """A LLaMA-like layer without positions.

    The reference turns a head's queries and keys by one angle, the head's number, at all times
    alike (`position_ids` there count heads). That leaves every product as it is, so it is left out.
    """
    B, T, _ = x_BTD.shape
    attention = p["self_attn"]
    y_BTD = rms_norm(x_BTD, p["input_layernorm"], config.rms_norm_eps)
    q, k, v = (
        linear(y_BTD, attention[f"{name}_proj"]).reshape(B, T, -1, config.head_dim)
        for name in "qkv"
    )
    x_BTD = x_BTD + linear(attend(q, k, v, span).reshape(B, T, -1), attention["o_proj"])
    y_BTD = rms_norm(x_BTD, p["post_attention_layernorm"], config.rms_norm_eps)
    return x_BTD + linear(silu(linear(y_BTD, p["mlp"]["fc1"])), p["mlp"]["fc2"])


def _wave(spectrum_BTF: jax.Array, span: Span) -> jax.Array:
    """Logarithms of magnitudes, then phases, [B, T, 2 x 641], to waves [B, T * 320].

    Vocos' inverse transform with "same" padding (Siuzdak, 2023). The inverse Fourier transform is a
    product with a matrix that holds the window too.
    """
    B, T, _ = spectrum_BTF.shape
    matrix, window = inverse_transform()
    magnitude, phase = jnp.split(spectrum_BTF.astype(jnp.float32), 2, axis=-1)
    magnitude = jnp.minimum(jnp.exp(magnitude), 100.0)
    parts = jnp.concatenate([magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)], -1)
    pieces_BTS = zero_outside(jnp.einsum("BTF,FS->BTS", parts, matrix), span)
    envelope_BTS = span.mask(T)[..., None] * jnp.square(window)

    def overlap_add(x_BTS):
        quarters = x_BTS.reshape(B, T, _OVERLAP, HOP)
        whole = reduce(
            jnp.add,
            (
                jnp.pad(quarters[:, :, i], ((0, 0), (i, _OVERLAP - 1 - i), (0, 0)))
                for i in range(_OVERLAP)
            ),
        ).reshape(B, -1)
        start = (_OVERLAP - 1) * HOP // 2
        return whole[:, start : start + T * HOP]

    return overlap_add(pieces_BTS) / jnp.maximum(overlap_add(envelope_BTS), 1e-11)


@cache
def inverse_transform() -> tuple[np.ndarray, np.ndarray]:
    """From real, then imaginary parts to samples under the window, [2 x 641, 1280]; the window.

    Made in float64.
    """
    size = _OVERLAP * HOP
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)  # Hann's, periodic
    angle = 2 * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size
    weight = np.full((size // 2 + 1, 1), 2.0)
    weight[[0, -1]] = 1.0
    matrix = np.concatenate([weight * np.cos(angle), -weight * np.sin(angle)]) / size * window
    return matrix.astype(np.float32), window.astype(np.float32)
