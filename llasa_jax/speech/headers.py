"""What the headers of audio files promise, where libsndfile does not check it: bytes that a file
lacks, the frames of an MP3, the pages of an Ogg file, the samples of a FLAC.

Every function takes a seekable binary file of `size` bytes and leaves its position anywhere.
"""

import os
import re
import struct
from typing import BinaryIO

# a program that writes WAV or AU to a pipe cannot know the length and claims 2 GiB or more
STREAMED = 0x7FFF0000

# MPEG audio layer III (ISO/IEC 11172-3 and 13818-3, 2.4.2.3), by the version's two bits
_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_MP3_KBITS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # version 1
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # versions 2 and 2.5
}


def missing_bytes(file: BinaryIO, size: int) -> int:
    """How many bytes of audio a WAV, RF64, W64, AIFF, AU or NIST SPHERE file lacks of what its
    header promises; 0 where the header does not know the length, and for other formats.

    libsndfile reads such a file as though nothing were missing.
    """
    file.seek(0)
    start = file.read(1024)
    if start[:4] in (b"RIFF", b"RF64") and start[8:12] == b"WAVE":
        end = _end_of_chunk(file, "<", b"data")
    elif start[:4] == b"FORM" and start[8:12] in (b"AIFF", b"AIFC"):
        end = _end_of_chunk(file, ">", b"SSND")
    elif start[:4] == b".snd" and len(start) >= 12:
        offset, length = struct.unpack_from(">II", start, 4)
        end = offset + length if length < STREAMED else 0
    elif start[:4] == b"riff" and len(start) >= 24:  # W64: a GUID, then the size of the whole file
        (end,) = struct.unpack_from("<Q", start, 16)
        end = end if end < 2**62 else 0
    elif start[:7] == b"NIST_1A":
        end = _end_of_sphere(start)
    else:
        end = 0
    return max(0, end - size)


def _end_of_chunk(file: BinaryIO, order: str, wanted: bytes) -> int:
    """Where the chunk `wanted` of a RIFF (order "<") or IFF (">") file ends by its own size."""
    file.seek(12)
    long_size = 0
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack(f"{order}4sI", header)
        if name == wanted:
            if length == 0xFFFFFFFF and 0 < long_size < 2**62:
                length = long_size
            elif length >= STREAMED:
                return 0
            return file.tell() + length
        if name == b"ds64" and len(sizes := file.read(16)) == 16:  # RF64: sizes in 64 bits
            (long_size,) = struct.unpack_from("<Q", sizes, 8)
            file.seek(-16, os.SEEK_CUR)
        file.seek(length + length % 2, os.SEEK_CUR)  # chunks lie on even bytes
    return 0


def _end_of_sphere(start: bytes) -> int:
    fields = dict(re.findall(rb"^(\w+) -(?:i|s\d+) (\d+)\s*$", start, re.MULTILINE))
    count, width, channels = (
        int(fields.get(key, 0)) for key in (b"sample_count", b"sample_n_bytes", b"channel_count")
    )
    # compressed audio ("pcm,embedded-shorten-v2.00") is shorter than its samples
    if b"embedded" in start or not start[8:16].strip().isdigit():
        return 0
    return int(start[8:16]) + count * width * channels


def mp3_frames(file: BinaryIO, size: int) -> tuple[int | None, int | None]:
    """How many frames the Xing or Info header of an MP3 counts (None without one), and how many
    the file holds beside that header (None where something else stands between frames).
    """
    at = _after_id3(file)
    promised, held, first = None, 0, True
    while at + 4 <= size:
        file.seek(at)
        header = file.read(4)
        length = _mp3_frame_length(header)
        if length is None:
            # tags and zeros may follow the last frame
            known = header[:3] in (b"TAG", b"APE", b"LYR") or header == b"\0\0\0\0"
            return promised, held if known else None
        if at + length > size:
            break
        if first:
            promised = _xing_count(header + file.read(length - 4))
        held += not first or promised is None  # the Xing frame itself holds no audio
        first = False
        at += length
    return promised, held


def _after_id3(file: BinaryIO) -> int:
    at = 0
    while True:
        file.seek(at)
        tag = file.read(10)
        if tag[:3] != b"ID3" or len(tag) < 10:
            return at
        at += 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(tag[6:10]))


def _mp3_frame_length(header: bytes) -> int | None:
    """A layer III frame's bytes, its header included; None if this is no such header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version, kbits, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version not in _MP3_RATES or kbits in (0, 15) or rate == 3:
        return None
    bits_per_hertz = 1000 * _MP3_KBITS[version == 3][kbits - 1] / _MP3_RATES[version][rate]
    return int((144 if version == 3 else 72) * bits_per_hertz) + (header[2] >> 1 & 1)


def _xing_count(frame: bytes) -> int | None:
    mono, version1 = frame[3] >> 6 == 3, frame[1] >> 3 & 3 == 3
    at = 4 + ((17 if mono else 32) if version1 else (9 if mono else 17))  # behind the side info
    if frame[at : at + 4] not in (b"Xing", b"Info") or len(frame) < at + 12:
        return None
    flags, count = struct.unpack_from(">II", frame, at + 4)
    return count if flags & 1 else None


def ogg_streams(file: BinaryIO, size: int) -> tuple[int, int]:
    """How many logical streams an Ogg file begins and how many it ends (RFC 3533)."""
    at = begun = ended = 0
    while at + 27 <= size:
        file.seek(at)
        page = file.read(27)
        sizes = file.read(page[26])
        at += 27 + len(sizes) + sum(sizes)
        if page[:4] != b"OggS" or at > size:
            break
        begun += page[5] >> 1 & 1
        ended += page[5] >> 2 & 1
    return begun, ended


def flac_samples(file: BinaryIO, size: int) -> int:
    """How many samples a FLAC file (RFC 9639) has by its last frame, whose header says where it
    stands; 0 where none is found. What STREAMINFO claims may be less.
    """
    file.seek(0)
    start = file.read(26)
    if start[:4] != b"fLaC" or len(start) < 26:
        return 0
    fixed = int.from_bytes(start[10:12], "big")  # samples in every frame but the last
    largest = int.from_bytes(start[15:18], "big") or 1 << 20  # bytes of a frame
    file.seek(max(26, size - largest - (1 << 10)))  # tags may follow
    tail = file.read(largest + (1 << 10))
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        if found := _flac_frame(tail[at : at + 16]):
            number, samples, counts_samples = found
            return number + samples if counts_samples else number * fixed + samples
    return 0


def _flac_frame(header: bytes) -> tuple[int, int, bool] | None:
    """Of a FLAC frame's header: its number or, in a file of varying frames (True), that of its
    first sample; and how many samples it has. None if this is no such header.
    """
    if len(header) < 16 or header[1] & 0xFE != 0xF8 or header[3] & 1:
        return None
    size, rate, ones = header[2] >> 4, header[2] & 15, 0
    while header[4] << ones & 0x80:
        ones += 1
    end = 4 + max(1, ones)  # the number, coded as UTF-8 would be, in up to 7 bytes
    number = header[4] & (0x7F >> ones)
    for byte in header[5:end]:
        number = number << 6 | byte & 0x3F
    if size == 0 or rate == 15 or ones == 1 or ones > 7:
        return None
    if size in (6, 7):
        samples = int.from_bytes(header[end : end + size - 5], "big") + 1
        end += size - 5
    else:
        samples = 192 if size == 1 else (144 if size < 6 else 1) << size
    end += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    return (number, samples, bool(header[1] & 1)) if _crc8(header[:end]) == header[end] else None


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 & 0xFF ^ (7 if crc & 0x80 else 0)
    return crc
