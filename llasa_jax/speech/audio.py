"""Audio files in and out: whatever libsndfile reads becomes the codec's 16 kHz mono float32, or a
`UserError`.
"""

import io
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from llasa_jax.errors import UserError

SAMPLE_RATE = 16000  # Hz, the only rate XCodec2 knows
SILENCE_PEAK = 1e-4  # -80 dBFS, three steps of 16-bit audio: dither and DC, never speech
# a program that writes WAV to a pipe cannot know the length and claims 2 GiB or more
_STREAMED_WAV = 0x7FFF0000


def read_audio(audio: str | os.PathLike | bytes, name: str = "") -> np.ndarray:
    """Reads one audio file of any rate, channels and format that libsndfile knows: a path, or the
    file's bytes, which errors call `name`.

    Returns the wave, float32 of shape (samples,), mono (the mean of the channels), 16 kHz
    (resampled by soxr). Raises `UserError` for a file that is missing, empty, not audio, truncated
    or damaged, and for audio with no samples, with NaN or infinite samples, or silent (peak below
    `SILENCE_PEAK`).
    """
    name = name or str(audio)
    size = _size(audio, name)
    with _open(audio, name) as file:
        rate, claimed = file.samplerate, file.frames
        with io.BytesIO(audio) if isinstance(audio, bytes) else Path(audio).open("rb") as raw:
            missing = _missing_wav_bytes(raw, size)
        if missing:
            raise UserError(
                f"{name}: truncated, its header promises {missing} more bytes of audio; copy the"
                " file again."
            )
        try:
            wave = file.read(dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise UserError(
                f"{name}: truncated or damaged ({_reason(error)}); copy the file again."
            ) from error
    if len(wave) < claimed < _STREAMED_WAV:
        raise UserError(
            f"{name}: truncated, only {len(wave)} of its {claimed} samples can be read; copy the"
            " file again."
        )
    return as_codec_wave(wave, rate, name)


def as_codec_wave(wave: np.ndarray, rate: int, name: str) -> np.ndarray:
    """A wave of float32 (samples, channels) or (samples,) at `rate` Hz as `read_audio` returns it,
    with its errors on what is in it.
    """
    if wave.ndim == 2:
        wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise UserError(f"{name}: has NaN or infinite samples; export it again from its source.")
    if rate != SAMPLE_RATE:
        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    if len(wave) == 0:
        raise UserError(
            f"{name}: has no samples; record it again, or take the clip out of the manifest."
        )
    peak = float(np.abs(wave).max())
    if peak < SILENCE_PEAK:
        raise UserError(
            f"{name}: silent (peak {peak:.1e}, below {SILENCE_PEAK}); record it again, or take the"
            " clip out of the manifest."
        )
    return wave


def audio_samples(audio: str | os.PathLike | bytes, name: str = "") -> int:
    """How many samples `read_audio` will return, from the file's header alone; decoded only where
    the header does not know.

    Raises `UserError` for a file that is missing, empty or not audio.
    """
    name = name or str(audio)
    _size(audio, name)
    with _open(audio, name) as file:
        rate, claimed = file.samplerate, file.frames
    if claimed >= _STREAMED_WAV:
        return len(read_audio(audio, name))
    return resampled_length(claimed, rate)


def resampled_length(samples: int, rate: int) -> int:
    """How many samples at 16 kHz soxr makes of `samples` at `rate` Hz."""
    return (2 * samples * SAMPLE_RATE + rate) // (2 * rate)


def write_audio(path: str | os.PathLike, wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Writes a mono float wave of shape (samples,) in [-1, 1], in the format of the path's suffix
    (`.wav`, `.flac`, ...).

    16-bit where the format has it; samples beyond full scale are clipped. Makes the folder if need
    be. Raises `UserError` for a suffix that libsndfile cannot write and for NaN or infinite
    samples.
    """
    path = Path(path)
    wave = np.asarray(wave, np.float32)
    if not np.isfinite(wave).all():
        raise UserError(
            f"{path}: not written, the wave has NaN or infinite samples; check the codes it was"
            " decoded from."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    subtype = "PCM_16" if path.suffix.lower() in {".wav", ".flac"} else None
    try:
        soundfile.write(path, np.clip(wave, -1, 1), sample_rate, subtype=subtype)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be written ({_reason(error)}); name it .wav or .flac, in a folder you"
            " may write to."
        ) from error


def _size(audio: str | os.PathLike | bytes, name: str) -> int:
    """The file's bytes. UserError if there is no such file, or nothing in it."""
    if not isinstance(audio, bytes) and not Path(audio).is_file():
        raise UserError(
            f"{name}: no such audio file; correct the path, or take the clip out of the manifest."
        )
    size = len(audio) if isinstance(audio, bytes) else Path(audio).stat().st_size
    if size == 0:
        raise UserError(
            f"{name}: the file is empty (0 bytes); copy it again, or take the clip out of the"
            " manifest."
        )
    return size


def _open(audio: str | os.PathLike | bytes, name: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(io.BytesIO(audio) if isinstance(audio, bytes) else Path(audio))
    except (
        soundfile.SoundFileError,
        TypeError,
    ) as error:  # TypeError: `.raw`, which soundfile wants described
        raise UserError(
            f"{name}: not audio that libsndfile can read ({_reason(error)}); convert it to WAV or"
            " FLAC."
        ) from error


def _missing_wav_bytes(file: BinaryIO, size: int) -> int:
    """How many bytes of a RIFF WAV's data chunk are not in the file; libsndfile reads on as though
    nothing were missing.
    """
    riff, _, form = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
    if riff != b"RIFF" or form != b"WAVE":
        return 0
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", header)
        if name == b"data":
            return 0 if length >= _STREAMED_WAV else max(0, file.tell() + length - size)
        file.seek(length + length % 2, os.SEEK_CUR)  # chunks lie on even bytes
    return 0


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")
