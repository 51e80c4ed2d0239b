"""From codes to sound: pieces joined without clicks, silence at the end, loudness."""

from collections.abc import Sequence

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.errors import UserError

CROSSFADE = 320  # samples over which one piece becomes the next: a code, 20 ms
FRAME = 160  # samples of a frame of silence, 10 ms
SILENCE = 10 ** (-50 / 20)  # a frame is silent below -50 dB of the loudest frame


def decode_pieces(codec: Codec, prompt_codes: np.ndarray, pieces: Sequence[np.ndarray]):
    """The wave of `pieces` of codes, float32 (320 samples a code), without the prompt's.

    Each piece is decoded after the one before it, so that its first codes sound as they do in
    context. That repeats the end of the piece before, and the two are faded into each other there.
    """
    wave, before = np.empty(0, np.float32), prompt_codes
    for piece in pieces:
        whole = codec.decode(np.concatenate([before, piece]))
        new = whole[len(before) * codec.hop :]
        fade = min(CROSSFADE, len(wave))
        if fade:
            start = len(before) * codec.hop
            rise = np.linspace(0, 1, fade, dtype=np.float32)
            wave[-fade:] = wave[-fade:] * (1 - rise) + whole[start - fade : start] * rise
        wave, before = np.concatenate([wave, new]), piece
    return wave


def trim_tail(wave: np.ndarray, seconds: float, rate: int) -> np.ndarray:
    """`wave` with at most so much silence at its end. A wave that is silent throughout is left."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    power = np.sqrt(np.mean(np.square(frames), axis=1))
    loud = np.flatnonzero(power > SILENCE * power.max(initial=0))
    if not len(loud):
        return wave
    return wave[: (loud[-1] + 1) * FRAME + round(seconds * rate)]


def set_loudness(wave: np.ndarray, loudness: float, rate: int) -> np.ndarray:
    """`wave` at a loudness in LUFS (ITU-R BS.1770), or as near to it as full scale allows. Speech
    shorter than 0.4 s, the standard's block, and silence are left. UserError without the extra
    `loudness`.
    """
    try:
        import pyloudnorm
    except ImportError:
        raise UserError(
            'loudness needs pyloudnorm; install it with `pip install "llasa-jax[loudness]"`, or'
            " leave loudness at 0"
        ) from None
    if len(wave) < 0.4 * rate or not wave.any():
        return wave
    measured = pyloudnorm.Meter(rate).integrated_loudness(wave)
    if not np.isfinite(measured):
        return wave
    gain = min(10 ** ((loudness - measured) / 20), 1 / np.abs(wave).max())
    return (wave * gain).astype(np.float32)
