"""Audio files in and out: whatever libsndfile or FFmpeg reads becomes the codec's 16 kHz mono
float32, or a `UserError`.
"""

import contextlib
import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import soundfile
import soxr

from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.storage import is_remote
from llasa_jax.speech import ffmpeg, headers

SAMPLE_RATE = 16000  # Hz, the only rate XCodec2 knows
SILENCE_PEAK = 1e-4  # -80 dBFS, three steps of 16-bit audio: dither and DC, never speech
MAX_SECONDS = 3600.0  # a file of a few kilobytes may claim, or even hold, days of audio
RATES = (4000, 768_000)  # Hz; beyond them the header is wrong, and resampling fills the memory
# The formats whose lengths libsndfile or `headers` checks; the others are left to FFmpeg.
_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST")
_BLOCK = 1 << 16  # samples, over all channels, that are decoded at a time
_MALFORMED = 3  # libsndfile's SF_ERR_MALFORMED_FILE


def read_audio(audio: str | os.PathLike | bytes, name: str = "") -> np.ndarray:
    """Reads one audio file of any rate and channels: a path, also of a `tar_member`, or the file's
    bytes, which errors call `name`.

    libsndfile reads WAV, FLAC, Ogg, MP3, AIFF, AU, CAF and NIST SPHERE; FFmpeg (the extra `audio`)
    reads what libsndfile cannot read or would read wrongly.

    Returns the wave, float32 of shape (samples,), mono (the mean of the channels), 16 kHz
    (resampled by soxr). Raises `UserError` for a file that is missing, empty, not audio, truncated,
    damaged or longer than `MAX_SECONDS`, and for audio with no samples, with NaN or infinite
    samples, or silent (peak below `SILENCE_PEAK`); OSError where the disk fails.
    """
    name = name or str(audio)
    with _opened(audio, name) as (file, size):
        wave, rate = _decode(file, size, name)
    return as_codec_wave(wave, rate, name)


def audio_samples(audio: str | os.PathLike | bytes, name: str = "") -> int:
    """How many samples `read_audio` will return: from the file's header where it is known to be
    right, else by decoding the file.

    Raises `UserError` for a file that is missing, empty or not audio, or whose header shows that it
    is truncated; OSError where the disk fails.
    """
    name = name or str(audio)
    with _opened(audio, name) as (file, size):
        sound, frames, _ = _libsndfile(file, size, name)
        if sound is not None and frames is not None:
            rate = sound.samplerate
        else:
            wave, rate = _decode(file, size, name)
            frames = len(wave)
    _check_rate(rate, name)
    return resampled_length(frames, rate)


def as_codec_wave(wave: np.ndarray, rate: int, name: str) -> np.ndarray:
    """A wave of float32 (samples, channels) or (samples,) at `rate` Hz as `read_audio` returns it,
    with its errors on what is in it.
    """
    _check_rate(rate, name)
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


def resampled_length(samples: int, rate: int) -> int:
    """How many samples at 16 kHz soxr makes of `samples` at `rate` Hz."""
    return (2 * samples * SAMPLE_RATE + rate) // (2 * rate)


def write_audio(path: str | os.PathLike, wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Writes a mono float wave of shape (samples,) in [-1, 1], in the format of the path's suffix
    (`.wav`, `.flac`, ...).

    16-bit where the format has it; samples beyond full scale are clipped. Makes the folder if need
    be. Raises `UserError` for a suffix that libsndfile cannot write and for NaN or infinite
    samples; OSError where the disk fails.
    """
    path = Path(path)
    wave = np.asarray(wave, np.float32)
    if not np.isfinite(wave).all():
        raise UserError(
            f"{path}: not written, the wave has NaN or infinite samples; check the codes it was"
            " decoded from."
        )
    kind, whole = path.suffix[1:].upper(), io.BytesIO()
    subtype = "PCM_16" if kind in {"WAV", "FLAC"} else None
    try:
        soundfile.write(whole, np.clip(wave, -1, 1), sample_rate, subtype=subtype, format=kind)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be written ({_reason(error)}); name it .wav or .flac."
        ) from error
    # libsndfile itself would say of a full disk "System error".
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole.getvalue())


def _check_rate(rate: int, name: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(
            f"{name}: its header claims {rate} samples a second, outside {RATES[0]} to {RATES[1]};"
            " export it again from its source."
        )


class TarMember(NamedTuple):
    """Where a file lies in an uncompressed tar: `size` bytes from `offset` on."""

    tar: str
    offset: int
    size: int


def tar_member(path: str | os.PathLike) -> TarMember | None:
    """The place that a path such as `EN-B000000.tar:1536:50144` names (offset and size in bytes);
    None for the path of a plain file.
    """
    found = re.fullmatch(r"(.*\.tar):(\d{1,18}):(\d{1,18})", os.fspath(path), re.DOTALL)
    return TarMember(found[1], int(found[2]), int(found[3])) if found else None


@contextlib.contextmanager
def _opened(audio: str | os.PathLike | bytes, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size in bytes. UserError if there is no such file, or nothing in it."""
    if not isinstance(audio, bytes) and is_remote(audio):
        audio = _from_bucket(audio, name)
    member = None if isinstance(audio, bytes) else tar_member(audio)
    if isinstance(audio, bytes):
        size = len(audio)
    else:
        size = _file_size(member.tar if member else audio, name)
    if member:
        if size < member.offset + member.size:
            raise _truncated(name, f"the tar has {size} bytes")
        with open(member.tar, "rb") as tar:
            tar.seek(member.offset)
            audio = tar.read(member.size)
        size = len(audio)
    if size == 0:
        raise UserError(
            f"{name}: the file is empty (0 bytes); copy it again, or take the clip out of the"
            " manifest."
        )
    with io.BytesIO(audio) if isinstance(audio, bytes) else open(audio, "rb") as raw:
        file = _Input(raw)
        try:
            yield cast(BinaryIO, file), size
        finally:
            if file.error is not None:
                raise file.error


def _from_bucket(path: str | os.PathLike, name: str) -> bytes:
    member = tar_member(path)
    try:
        if member:
            return storage.read_bytes(member.tar, member.offset, member.offset + member.size)
        return storage.read_bytes(path)
    except FileNotFoundError:
        raise _missing(name) from None


def _missing(name: str) -> UserError:
    return UserError(
        f"{name}: no such audio file; correct the path, or take the clip out of the manifest."
    )


def _file_size(path: str | os.PathLike, name: str) -> int:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        status = None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):  # to read a FIFO may wait for ever
        raise _missing(name)
    return status.st_size


class _Input:
    """A binary file that keeps an I/O error for later: libsndfile's callbacks cannot raise, so that
    a disk's fault would look like the end of the file.
    """

    def __init__(self, raw: io.BytesIO | io.BufferedReader):
        self.error: OSError | None = None
        self.tell, self.seekable = raw.tell, raw.seekable
        self._raw = raw

    def read(self, count: int = -1) -> bytes:
        try:
            return self._raw.read(count)
        except OSError as error:
            self.error = error
            return b""

    def readinto(self, buffer) -> int:
        try:
            return self._raw.readinto(buffer)
        except OSError as error:
            self.error = error
            return 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            # a chunk of unknown length is skipped by 2**63 bytes, which BytesIO would do
            return self._raw.seek(offset, whence) if offset < 2**62 else -1
        except (OSError, ValueError):  # to before the file's start
            return -1


class _Sound(soundfile.SoundFile):
    """A file that is read from front to end, without soundfile's seek after each read, which fails
    where the header does not know the length.
    """

    def seekable(self) -> bool:
        return False


def _libsndfile(file: BinaryIO, size: int, name: str) -> tuple[_Sound | None, int | None, str]:
    """libsndfile's view of a file, the number of samples it will give (None: only decoding tells),
    and "". Or None twice, and why libsndfile must not decode it. UserError where it is truncated.
    """
    if missing := headers.missing_bytes(file, size):
        raise _truncated(name, f"its header promises {missing} more bytes of audio")
    begun, ended = headers.ogg_streams(file, size)
    if begun > ended:
        raise _truncated(name, "its last Ogg page does not end the stream")
    promised, held = headers.mp3_frames(file, size)
    if promised and held is not None and held < promised - 1:  # some encoders count the header too
        raise _truncated(name, f"{held} of its {promised} frames are there")
    in_flac = headers.flac_samples(file, size)
    file.seek(0)
    try:
        sound = _Sound(file)
    except soundfile.LibsndfileError as error:
        if error.code == _MALFORMED:  # FFmpeg would read the rest of it and say nothing
            raise _damaged(name, error) from error
        return None, None, _reason(error) or "it does not know the codec"
    except TypeError:  # `.raw`, which soundfile wants described
        return None, None, "it has no header"
    why, frames = "", sound.frames
    if sound.format not in _FORMATS:
        raise UserError(
            f"{name}: the format {sound.format} has no length to check; convert it to WAV or FLAC."
        )
    if sound.format == "MP3":
        if promised is None or promised != held or sound.subtype != "MPEG_LAYER_III":
            why = "no header of the MP3 counts its frames"
    elif sound.subtype == "GSM610" or sound.subtype.startswith("MPEG"):
        why = f"it misreads {sound.subtype} in {sound.format}"
    elif begun > 1:
        why = f"it reads one of the {begun} Ogg streams"
    elif frames >= (2**62 if sound.format == "FLAC" else headers.STREAMED):
        frames = None  # written to a pipe
    elif sound.format == "FLAC" and in_flac > frames:
        why = "its header counts fewer samples than there are"
    if why:
        sound.close()
        return None, None, why
    if frames is not None and frames > MAX_SECONDS * sound.samplerate:
        raise UserError(
            f"{name}: its header claims {frames} samples at {sound.samplerate} Hz, more than"
            f" {MAX_SECONDS / 60:g} minutes; cut it into sentences, or copy it again."
        )
    return sound, frames, ""


def _decode(file: BinaryIO, size: int, name: str) -> tuple[np.ndarray, int]:
    """The mono wave, float32 (samples,), and its rate."""
    sound, promised, why = _libsndfile(file, size, name)
    if sound is None:
        file.seek(0)
        return ffmpeg.decode(file, name, why, MAX_SECONDS)
    # Memory grows with what is there, not with what the header claims.
    blocks, samples, rate = [], 0, sound.samplerate
    with sound:
        count = max(1, _BLOCK // sound.channels)
        try:
            while len(block := sound.read(count, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
                samples += len(block)
                if samples > MAX_SECONDS * rate:
                    raise ffmpeg.too_long(name, MAX_SECONDS)
        except soundfile.SoundFileError as error:
            raise _damaged(name, error) from error
    if promised is not None and samples < promised:
        raise _truncated(name, f"only {samples} of its {promised} samples can be read")
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def _truncated(name: str, reason: str) -> UserError:
    return UserError(f"{name}: truncated, {reason}; copy the file again.")


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: truncated or damaged ({_reason(error)}); copy the file again.")


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")
