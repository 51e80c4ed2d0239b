"""XCodec2's encoder: Wav2Vec2-BERT on log-mel features, convolutions on the wave, their codes.

Reference: transformers' `Xcodec2Model.encode`. The letters are those of `layers.py`.
"""

import math
from functools import cache, partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llasa_jax.codec.interface import HOP
from llasa_jax.codec.xcodec2_jax.features import log_mel
from llasa_jax.codec.xcodec2_jax.layers import (
    Span,
    attend,
    conv,
    conv_dilated,
    layer_norm,
    linear,
    silu,
    zero_outside,
)
from llasa_jax.codec.xcodec2_jax.quantizer import quantize

# Frames of one clip that the acoustic encoder takes at a time: its arrays are as long as the wave.
WINDOW = 512
_DILATIONS = (1, 3, 9)
_CACHED = 1 << 17  # values of an activation's piece on a CPU
_REACH = 6  # steps that an activation hears to each side: three at either change of rate


def encode(
    params: dict, waves_BS: jax.Array, frames_B: jax.Array, config
) -> tuple[jax.Array, jax.Array]:
    """Waves [B, T * 320] of `frames_B` frames each to codes, int32 [B, T], and the quantizer's
    values, float32 [B, T, Z], through which gradients flow.

    What lies after a clip's end in `waves_BS` is not looked at; codes after it mean nothing.
    `config` is an `Xcodec2Config`.
    """
    frames_B = jnp.asarray(frames_B)
    span = Span(jnp.zeros_like(frames_B), frames_B)
    waves_BS = jnp.where(span.at_rate(HOP).mask(waves_BS.shape[1]), waves_BS, 0)
    dtype = params["fc_encoder"]["weight"].dtype
    semantic_BTD = semantic_encoder(
        params["semantic_encoder"], log_mel(waves_BS, span), span, config.semantic_model_config
    )
    semantic_BTD = semantic_adapter(params["semantic_adapter"], semantic_BTD, span)
    acoustic_BTD = acoustic_encoder(
        params["acoustic_encoder"],
        waves_BS.astype(dtype),
        frames_B,
        tuple(config.downsampling_ratios),
    )
    fused_BTD = linear(jnp.concatenate([semantic_BTD, acoustic_BTD], -1), params["fc_encoder"])
    return quantize(
        linear(fused_BTD, params["quantizer"]["project_in"]), tuple(config.quantization_levels)
    )


# --- semantic: Wav2Vec2-BERT and an adapter ---


def semantic_encoder(p: dict, features_BTC: jax.Array, span: Span, config) -> jax.Array:
    """Features [B, T, 160] to the last layer's states [B, T, D], by a `Wav2Vec2BertConfig`."""
    projection = p["feature_projection"]
    x_BTD = layer_norm(features_BTC, projection["layer_norm"], config.layer_norm_eps)
    x_BTD = linear(x_BTD.astype(projection["projection"]["weight"].dtype), projection["projection"])
    layer = jax.checkpoint(lambda x, weights: (_conformer_layer(x, weights, span, config), None))
    return lax.scan(layer, x_BTD, p["encoder"]["layers"])[0]


def _conformer_layer(x_BTD: jax.Array, p: dict, span: Span, config) -> jax.Array:
    eps = config.layer_norm_eps
    x_BTD = x_BTD + 0.5 * _feed_forward(layer_norm(x_BTD, p["ffn1_layer_norm"], eps), p["ffn1"])
    x_BTD = x_BTD + _self_attention(
        layer_norm(x_BTD, p["self_attn_layer_norm"], eps), p["self_attn"], span, config
    )
    x_BTD = x_BTD + _convolution(x_BTD, p["conv_module"], eps)
    x_BTD = x_BTD + 0.5 * _feed_forward(layer_norm(x_BTD, p["ffn2_layer_norm"], eps), p["ffn2"])
    return layer_norm(x_BTD, p["final_layer_norm"], eps)


def _feed_forward(x_BTD: jax.Array, p: dict) -> jax.Array:
    return linear(silu(linear(x_BTD, p["intermediate_dense"])), p["output_dense"])


def _self_attention(x_BTD: jax.Array, p: dict, span: Span, config) -> jax.Array:
    B, T, D = x_BTD.shape
    N = config.num_attention_heads
    q, k, v = (linear(x_BTD, p[f"linear_{name}"]).reshape(B, T, N, D // N) for name in "qkv")
    y_BTNH = attend(
        q, k, v, span, p["distance_embedding"]["weight"], config.left_max_position_embeddings
    )
    return linear(y_BTNH.reshape(B, T, D), p["linear_out"])


def _convolution(x_BTD: jax.Array, p: dict, eps: float) -> jax.Array:
    """Gated, depthwise and causal: no step sees the padding after the clip."""
    T, D = x_BTD.shape[1:]
    y = linear(layer_norm(x_BTD, p["layer_norm"], eps), p["pointwise_conv1"])
    y = y[..., :D] * jax.nn.sigmoid(y[..., D:])
    taps_WD = p["depthwise_conv"]["weight"][:, 0]
    W = len(taps_WD)
    # XLA would pad again for each of the slices that are summed.
    y = lax.optimization_barrier(jnp.pad(y, ((0, 0), (W - 1, 0), (0, 0))))
    y = sum(y[:, i : i + T] * taps_WD[i] for i in range(W))
    return linear(silu(layer_norm(y, p["depthwise_layer_norm"], eps)), p["pointwise_conv2"])


def semantic_adapter(p: dict, x_BTD: jax.Array, span: Span) -> jax.Array:
    def same(x, weights):
        return conv(zero_outside(x, span), weights, padding=1)

    x_BTD = jax.nn.relu(same(x_BTD, p["conv1"]))
    y_BTD = same(jax.nn.relu(same(x_BTD, p["conv2"])), p["conv3"])
    return same(x_BTD + y_BTD, p["conv4"])


# --- acoustic: convolutions with anti-aliased activations ---


def acoustic_encoder(
    p: dict, waves_BS: jax.Array, frames_B: jax.Array, ratios: tuple[int, ...]
) -> jax.Array:
    """Waves [B, T * 320] to [B, T, D].

    Clips go one after the other, and long ones in windows that overlap by all that a frame hears,
    so that memory stays bounded.
    """
    B, T = waves_BS.shape[0], waves_BS.shape[1] // HOP
    core, context = (T, 0) if T <= WINDOW else (WINDOW, context_frames(ratios))
    windows, length = -(-T // core), core + 2 * context
    waves_BS = jnp.pad(waves_BS, ((0, 0), (context * HOP, (windows * core - T + context) * HOP)))

    @jax.checkpoint
    def window(row, number):
        wave_S = lax.dynamic_slice(waves_BS, (row, number * core * HOP), (1, length * HOP))
        first = jnp.clip(context - number * core, 0, length - 1)
        stop = jnp.clip(frames_B[row] + context - number * core, 1, length)
        return _acoustic_window(p, wave_S, Span(first[None], stop[None]), ratios)[
            0, context : context + core
        ]

    rows, numbers = (index.reshape(-1) for index in np.indices((B, windows)))
    frames_BTD = lax.map(
        lambda index: window(*index), (rows, numbers), batch_size=max(1, WINDOW // T)
    )
    return frames_BTD.reshape(B, windows * core, -1)[:, :T]


def context_frames(ratios: tuple[int, ...]) -> int:
    """How many frames to each side the acoustic encoder's output depends on."""
    samples, step = 3, 1
    for ratio in ratios:
        samples += step * (
            sum(2 * _REACH + 3 * dilation for dilation in _DILATIONS) + _REACH + 2 * ratio
        )
        step *= ratio
    return math.ceil((samples + step * (_REACH + 1)) / step)


def _acoustic_window(
    p: dict, waves_BS: jax.Array, span: Span, ratios: tuple[int, ...]
) -> jax.Array:
    """Waves [B, T * 320] to [B, T, D]; the span is in frames."""
    step = math.prod(ratios)
    x_BTC = conv(waves_BS[..., None], p["conv1"], padding=3)
    for i, ratio in enumerate(ratios):
        block, here = p["block"][str(i)], span.at_rate(step)
        x_BTC = _residual_units(x_BTC, [block[f"res_unit{j}"] for j in (1, 2, 3)], here)
        x_BTC = zero_outside(_activation(x_BTC, block["snake1"]["act"], here), here)
        x_BTC = conv(x_BTC, block["conv1"], stride=ratio, padding=math.ceil(ratio / 2))
        step //= ratio
    x_BTC = zero_outside(_activation(x_BTC, p["snake1"]["act"], span), span)
    return conv(x_BTC, p["conv2"], padding=1)


def _residual_units(x_BTC: jax.Array, units: list[dict], span: Span) -> jax.Array:
    """Units that differ in their dilation alone; scanned, since one program compiles faster."""

    def unit(x_BTC, numbered):
        number, p = numbered
        y_BTC = zero_outside(_activation(x_BTC, p["snake1"]["act"], span), span)
        y_BTC = conv_dilated(y_BTC, p["conv1"], number, _DILATIONS)
        return x_BTC + linear(_activation(y_BTC, p["snake2"]["act"], span), p["conv2"]), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *units)
    return lax.scan(unit, x_BTC, (jnp.arange(len(units)), stacked))[0]


def _activation(x_BTC: jax.Array, p: dict, span: Span) -> jax.Array:
    """Twice the rate, SnakeBeta, half the rate."""
    return lax.platform_dependent(x_BTC, p, span, cpu=_activate_in_pieces, default=_activate)


def _activate_in_pieces(x_BTC: jax.Array, p: dict, span: Span) -> jax.Array:
    """As `_activate`, for a processor: a piece's arrays stay in its cache."""
    B, T, C = x_BTC.shape
    wanted = max(1, _CACHED // (B * C))
    core = next(steps for steps in range(min(T, wanted), 0, -1) if T % steps == 0)
    length = core + 2 * _REACH
    if length > T or core < wanted // 4:
        return _activate(x_BTC, p, span)

    def piece(start):
        first = jnp.clip(start - _REACH, 0, T - length)
        own = Span(
            jnp.clip(span.first_B - first, 0, length - 1),
            jnp.clip(span.stop_B - first, 1, length),
        )
        y_BTC = _activate(lax.dynamic_slice_in_dim(x_BTC, first, length, axis=1), p, own)
        return lax.dynamic_slice_in_dim(y_BTC, start - first, core, axis=1)

    pieces = lax.map(piece, jnp.arange(0, T, core))
    return jnp.moveaxis(pieces, 0, 1).reshape(B, T, C)


def _activate(x_BTC: jax.Array, p: dict, span: Span) -> jax.Array:
    """Both changes of rate are a 12-tap filter, which sees a clip's ends repeated."""
    T, taps = x_BTC.shape[1], kaiser_taps()
    x_BTC = x_BTC.astype(jnp.float32)
    # What several others read is made in a loop of two, since XLA would compute it again for each
    # of them, even after a barrier.
    twice = partial(lax.map, xs=jnp.arange(2))
    ends_2B = jnp.stack([span.first_B, span.stop_B - 1])
    ends = twice(lambda end: _pick(x_BTC, ends_2B[end]))
    x_BTC = jnp.pad(x_BTC, ((0, 0), (_REACH, _REACH), (0, 0)))
    x_BTC = lax.optimization_barrier(_hold(x_BTC, _later(span, _REACH), ends))
    ends = twice(lambda phase: _phase(phase, _pick(x_BTC, ends_2B[phase] + _REACH, 3), p))
    even, odd = twice(lambda phase: _hold(_phase(phase, x_BTC, p), _later(span, 3), ends))
    y_BTC = sum(taps[i] * even[:, (i + 1) // 2 : (i + 1) // 2 + T] for i in range(1, 12, 2))
    y_BTC += sum(taps[i] * odd[:, i // 2 : i // 2 + T] for i in range(0, 12, 2))
    return y_BTC.astype(p["alpha"].dtype)


def _later(span: Span, steps: int) -> Span:
    return Span(span.first_B + steps, span.stop_B + steps)


def _phase(phase, x_BTC: jax.Array, p: dict) -> jax.Array:
    """SnakeBeta at twice the rate: steps 2t (phase 0) or 2t + 1, of all t but the outer three."""
    T, taps = x_BTC.shape[1] - 6, 2 * np.array(kaiser_taps(), np.float32)
    # By how many steps back x lies: 3, 2, ... -3.
    of_phase = jnp.array([[*taps[11::-2], 0], [0, *taps[10::-2]]])[phase]
    return _snake_beta(reduce(jnp.add, (of_phase[i] * x_BTC[:, i : i + T] for i in range(7))), p)


def _snake_beta(x: jax.Array, p: dict) -> jax.Array:
    """x + sin(a x)^2 / b, per channel (Ziyin et al., 2020); the parameters are logarithms."""
    alpha, beta = jnp.exp(p["alpha"].astype(jnp.float32)), jnp.exp(p["beta"].astype(jnp.float32))
    return x + (1 / (beta + 1e-9)) * _sine_squared(x * alpha)


def _sine_squared(x: jax.Array) -> jax.Array:
    """sin(x)^2 in float32, to 3e-7 for |x| below 8,000.

    XLA's sine takes twenty times as long on a CPU. The square repeats after pi, so x is reduced to
    -pi / 2 .. pi / 2, with pi in three parts (Cody and Waite, 1980), and Taylor's series does.
    """
    turns = jnp.round(x * np.float32(1 / math.pi))
    for part in (3.140625, 9.67502593994140625e-4, 1.509957990978376e-7):
        x = x - turns * np.float32(part)
    square = x * x
    series = jnp.float32(0)
    for power in (13, 11, 9, 7, 5, 3):
        sign = -1 if power % 4 == 3 else 1
        series = series * square + np.float32(sign / math.factorial(power))
    return jnp.square(x + x * square * series)


def _hold(x_BTC: jax.Array, span: Span, ends_2B1C: jax.Array) -> jax.Array:
    """The first of `ends_2B1C` before the span and the second after it."""
    step = jnp.arange(x_BTC.shape[1])[None, :, None]
    x_BTC = jnp.where(step < span.first_B[:, None, None], ends_2B1C[0], x_BTC)
    return jnp.where(step >= span.stop_B[:, None, None], ends_2B1C[1], x_BTC)


def _pick(x_BTC: jax.Array, step_B: jax.Array, around: int = 0) -> jax.Array:
    """One step of each clip and `around` steps to each side, [B, 1 + 2 around, C]."""
    steps = step_B[:, None] + jnp.arange(-around, around + 1)
    return jnp.take_along_axis(x_BTC, steps[..., None], axis=1)


@cache
def kaiser_taps() -> tuple[float, ...]:
    """The low-pass filter of both changes of rate, in float32: a sinc under a Kaiser window.

    Cutoff 0.25, half width 0.3, as in alias-free-torch.
    """
    size, cutoff, half_width = 12, 0.25, 0.3
    attenuation = 2.285 * (size // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula for an attenuation above 50 dB
    taps = np.kaiser(size, beta) * np.sinc(2 * cutoff * (np.arange(size) - size / 2 + 0.5))
    return tuple(float(tap) for tap in (taps / taps.sum()).astype(np.float32))
