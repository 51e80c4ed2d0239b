"""Log-mel features (Kaldi's filter banks) as in transformers' `SeamlessM4TFeatureExtractor`."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llasa_jax.codec.interface import HOP
from llasa_jax.codec.xcodec2_jax.layers import Span
from llasa_jax.speech.audio import SAMPLE_RATE

MELS = 80
_SHIFT = HOP // 2  # samples from one mel frame to the next; two of them make one code's features
_LENGTH = 400
_FFT = 512
_FLOOR = 1.192092955078125e-07
_EMPHASIS = 0.97


@cache
def _matrices() -> tuple[np.ndarray, np.ndarray]:
    """The windowed Fourier transform, [400, 2 x 257], and the mel filters, [257, M].

    Made in float64.
    """
    from transformers.audio_utils import mel_filter_bank

    bins = _FFT // 2 + 1
    filters = mel_filter_bank(
        bins,
        MELS,
        20,
        SAMPLE_RATE // 2,
        SAMPLE_RATE,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    window = np.hanning(_LENGTH) ** 0.85  # Povey's
    angle = 2 * np.pi * np.outer(np.arange(_LENGTH), np.arange(bins)) / _FFT
    transform = window[:, None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return transform.astype(np.float32), filters.astype(np.float32)


def log_mel(waves_BS: jax.Array, span: Span) -> jax.Array:
    """Waves [B, T * 320], zeros after a clip's end, to normalised features [B, T, 2 x 80], float32.

    Each mel band of each clip has mean 0 and variance 1 over the span's frames. The transform is a
    product with a matrix: a TPU's own has fewer digits.
    """
    transform, filters = _matrices()
    B, S = waves_BS.shape
    T = S // HOP
    # A mel frame is five pieces of 80 samples and starts two pieces after the one before.
    pieces = jnp.pad(waves_BS.astype(jnp.float32), ((0, 0), (_SHIFT, _SHIFT))).reshape(
        B, -1, _LENGTH // 5
    )
    x = jnp.concatenate([pieces[:, i : i + 4 * T - 1 : 2] for i in range(5)], -1) * 2.0**15
    x = x - x.mean(-1, keepdims=True)
    x = jnp.concatenate([x[..., :1] * (1 - _EMPHASIS), x[..., 1:] - _EMPHASIS * x[..., :-1]], -1)
    spectrum = jnp.einsum("BTS,SF->BTF", x, transform, precision="highest")
    real, imaginary = jnp.split(spectrum, 2, axis=-1)
    power = jnp.square(real) + jnp.square(imaginary)
    mel_BTM = jnp.log(
        jnp.maximum(jnp.einsum("BTF,FM->BTM", power, filters, precision="highest"), _FLOOR)
    )
    own = span.at_rate(2).mask(2 * T)[..., None]
    count = own.sum(1, keepdims=True)
    mel_BTM = mel_BTM - jnp.where(own, mel_BTM, 0).sum(1, keepdims=True) / count
    variance = jnp.where(own, jnp.square(mel_BTM), 0).sum(1, keepdims=True) / (count - 1)
    return jnp.where(own, mel_BTM * lax.rsqrt(variance + 1e-7), 0).reshape(B, T, 2 * MELS)
