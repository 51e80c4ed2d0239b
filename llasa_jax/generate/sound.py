"""From codes to sound: pieces joined without clicks, silence at the end, loudness."""

from collections.abc import Iterator, Sequence

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.codec.streaming import Stream
from llasa_jax.errors import UserError

CROSSFADE = 320  # samples over which one piece becomes the next: a code, 20 ms
FRAME = 160  # samples of a frame of silence, 10 ms
# Of a stream, in codes: first audio comes after two chunks, 0.48 s of speech.
CHUNK, CONTEXT = 12, 100
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


class SoundStream:
    """The wave of codes while they come, for any codec: by chunks of a quarter of a second, each as
    soon as the codes of the next quarter are there, so that a listener who begins with the first
    chunk waits for no later one where codes come as fast as they sound.

    At its end is at most `tail_seconds` of silence, below -50 dB of the loudest frame until then.
    """

    def __init__(self, codec: Codec, prompt_codes: np.ndarray, tail_seconds: float):
        self._stream = Stream(codec.decode, CHUNK, CONTEXT, CHUNK, prompt_codes)
        self._tail = round(tail_seconds * codec.sample_rate)
        self._loudest, self._quiet = 0.0, 0  # and how much silence was given last, in samples
        self._held: list[np.ndarray] = []  # silence that is given if sound comes after it

    def feed(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """The waves, float32 (samples,), that come with these codes."""
        for wave in self._stream.feed(codes):
            yield from self._trimmed(wave)

    def end(self) -> Iterator[np.ndarray]:
        """What is left when no more codes come."""
        for wave in self._stream.end():
            yield from self._trimmed(wave)

    def _trimmed(self, wave: np.ndarray) -> Iterator[np.ndarray]:
        power = np.sqrt(np.mean(np.square(wave.reshape(-1, FRAME)), axis=1))
        self._loudest = max(self._loudest, float(power.max()))
        loud = np.flatnonzero(power > SILENCE * self._loudest)
        if len(loud):
            sound = (loud[-1] + 1) * FRAME
            yield np.concatenate([*self._held, wave[:sound]])
            self._held, self._quiet, wave = [], 0, wave[sound:]
        allowed = max(0, self._tail - self._quiet)
        if len(wave[:allowed]):
            self._quiet += len(wave[:allowed])
            yield wave[:allowed]
        if len(wave) > allowed:
            self._held.append(wave[allowed:])


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
