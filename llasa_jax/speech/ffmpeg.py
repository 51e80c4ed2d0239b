"""FFmpeg's decoders, through PyAV (the extra `audio`), for what libsndfile cannot read: m4a, aac,
webm, wma, video, GSM, and MP3s whose length no header counts.
"""

from typing import BinaryIO

import numpy as np

from llasa_jax.errors import UserError

# No playlists, image lists or network streams: a file must not make FFmpeg open another.
_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,gsm,matroska,webm,mov,mp4,m4a,3gp,3g2,"
    "mj2,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
)
# Containers whose header knows the length; that of the others is FFmpeg's guess.
_KNOW_LENGTH = ("mov", "matroska", "asf", "flv", "avi", "wav", "wv", "tta", "ape", "caf")
_TAGS = (b"ID3", b"TAG", b"APETAGEX")  # between the parts of concatenated MP3s, and behind them
_SLACK = 0.25  # seconds that a header may round up or count priming samples for


def decode(file: BinaryIO, name: str, why: str, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decodes the first audio stream: float32 (samples,), the mean of its channels, and its rate.

    `why` says, in errors, why libsndfile cannot read the file. Raises `UserError` where PyAV is
    not installed, and for a file that is not audio, is damaged or truncated, or is longer than
    `max_seconds`.
    """
    try:
        import av
    except ImportError:
        raise UserError(
            f"{name}: not audio that libsndfile can read ({why}); convert it to WAV or FLAC, or run"
            " pip install 'llasa-jax[audio]' to read m4a, aac, webm, wma and all MP3s."
        ) from None
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        with av.open(file, options=options, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise UserError(f"{name}: holds no audio; take the clip out of the manifest.")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise UserError(f"{name}: FFmpeg has no decoder for it; convert it to WAV or FLAC.")
            pieces, rate = _frames(av, container, stream, name, max_seconds)
            promised = _promised_seconds(container, stream)
            if stream.codec_context.name.startswith("gsm") and pieces and promised:
                # the last block is padded
                pieces = [np.concatenate(pieces)[: round(promised * rate)]]
    except av.FFmpegError as error:
        raise UserError(
            f"{name}: not audio that libsndfile ({why}) or FFmpeg ({error.strerror or error}) can"
            " read, or cut short; copy it again, or convert it to WAV or FLAC."
        ) from error
    wave = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if promised - len(wave) / rate > _SLACK:
        raise UserError(
            f"{name}: truncated, only {len(wave) / rate:.2f} of the {promised:.2f} seconds that its"
            " header promises can be read; copy the file again."
        )
    return wave, rate


def _frames(av, container, stream, name: str, max_seconds: float) -> tuple[list, int]:
    """The decoded pieces and their rate. UserError unless every packet but the last decodes."""
    resampler = av.AudioResampler(format="fltp")  # only the numbers' format, not rate or channels
    pieces: list[np.ndarray] = []
    bad: Exception | None = None
    rate, samples = stream.rate, 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError as error:
            if bytes(packet).startswith(_TAGS):
                continue
            if bad is not None:
                raise _damaged(name, error) from error
            bad = error  # a lone pad byte, or half a packet, may end a file
            continue
        if bad is not None and frames:
            raise _damaged(name, bad) from bad
        for frame in frames:
            if pieces and frame.sample_rate != rate:
                raise UserError(
                    f"{name}: changes its sample rate from {rate} to {frame.sample_rate} Hz;"
                    " convert it to WAV or FLAC."
                )
            rate = frame.sample_rate
            samples += frame.samples
            if samples > max_seconds * rate:
                raise too_long(name, max_seconds)
            pieces += [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]
    return pieces, rate


def _promised_seconds(container, stream) -> float:
    """How long the header says that the audio is; 0 where it does not say."""
    if not container.format.name.startswith(_KNOW_LENGTH):
        return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration:
        return container.duration / 1e6  # microseconds
    return 0.0


def _damaged(name: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{name}: damaged ({reason}); copy the file again.")


def too_long(name: str, max_seconds: float) -> UserError:
    return UserError(
        f"{name}: longer than {max_seconds / 60:g} minutes; cut it into sentences first."
    )
