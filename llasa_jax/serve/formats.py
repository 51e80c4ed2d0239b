"""Waves as files, whole or as they come: the formats that OpenAI's clients ask for."""

import io
from typing import Literal

import numpy as np
import soundfile
import soxr

from llasa_jax.speech.audio import SAMPLE_RATE

Format = Literal["mp3", "opus", "flac", "wav", "pcm"]
MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
PCM_RATE = 24_000  # Hz: OpenAI's pcm has no header, so its clients expect this
_KINDS = {
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
}
_UNKNOWN = b"\xff\xff\xff\xff"  # a length in the header of a WAV that is still being written


def whole(wave: np.ndarray, format: Format) -> bytes:
    """A whole wave, float32 (samples,) 16 kHz, as a file, mono, 16 bits a sample."""
    if format == "pcm":
        parts = Parts(format)
        return parts.feed(wave) + parts.end()
    file = io.BytesIO()
    kind, subtype = _KINDS[format]
    soundfile.write(file, np.clip(wave, -1, 1), SAMPLE_RATE, subtype=subtype, format=kind)
    return file.getvalue()


class Parts:
    """A file by parts: what `feed` and at last `end` return, one after another, is the file. Its
    header does not know its length: that of a WAV says 4 GiB, that of a FLAC unknown.
    """

    def __init__(self, format: Format):
        self._format, self._file, self._sent = format, io.BytesIO(), 0
        if format == "pcm":
            self._resample = soxr.ResampleStream(SAMPLE_RATE, PCM_RATE, 1, dtype="float32")
        elif format == "wav":
            soundfile.write(self._file, np.empty(0), SAMPLE_RATE, "PCM_16", format="WAV")
            header = self._file.getbuffer()
            header[4:8] = header[40:44] = _UNKNOWN
            del header
        else:
            kind, subtype = _KINDS[format]
            self._sound = soundfile.SoundFile(self._file, "w", SAMPLE_RATE, 1, subtype, format=kind)

    def feed(self, wave: np.ndarray) -> bytes:
        """The bytes that come with `wave`, float32 (samples,) 16 kHz; there may be none yet."""
        wave = np.clip(wave, -1, 1)
        if self._format == "pcm":
            return _pcm(self._resample.resample_chunk(wave))
        if self._format == "wav":
            return self._new() + _pcm(wave)
        self._sound.write(wave)
        return self._new()

    def end(self) -> bytes:
        """The bytes that are left."""
        if self._format == "pcm":
            return _pcm(self._resample.resample_chunk(np.empty(0, np.float32), last=True))
        if self._format != "wav":
            self._sound.close()
        return self._new()

    def _new(self) -> bytes:
        # What is written over earlier bytes at the end, a header's length, comes too late.
        whole = self._file.getbuffer()
        new, self._sent = bytes(whole[self._sent :]), len(whole)
        return new


def _pcm(wave: np.ndarray) -> bytes:
    return np.round(np.clip(wave, -1, 1) * 32_767).astype("<i2").tobytes()
