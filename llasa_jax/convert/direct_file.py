"""Large files written past the page cache.

A conversion writes once what nobody reads soon, often more than the machine's memory. Through the
page cache that pushes out what is needed, and where memory is a virtual machine's the fresh pages
alone were measured to take two to five times as long as a disk's write.
"""

import contextlib
import errno
import os
import threading
from pathlib import Path

import numpy as np

ALIGNMENT = 4096  # of memory, offsets and lengths: that of every disk at hand
BUFFER_BYTES = 4 << 20

_own = threading.local()


class DirectFile:
    """A new file of `size` bytes, to be written at any place, by several threads at once. OSError
    where the disk is full.

    Aligned parts go straight to the disk where the system and its file system can (`O_DIRECT`), the
    rest through the page cache.
    """

    def __init__(self, path: Path, size: int):
        self._file, self._direct = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), None
        try:
            if size and hasattr(os, "posix_fallocate"):
                # Room for all, so that no writer waits for another to lengthen the file.
                os.posix_fallocate(self._file, 0, size)
        except OSError:
            self.close()
            raise
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # not every file system has it
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)

    def write(self, offset: int, data: bytes | np.ndarray) -> None:
        """Writes all of `data`, in its own order, from `offset` on."""
        flat = (
            np.frombuffer(data, np.uint8)
            if isinstance(data, bytes)
            else np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        )
        head = min(-offset % ALIGNMENT, len(flat))
        middle = len(flat) - (len(flat) - head) % ALIGNMENT
        _write(self._file, offset, flat[:head])
        for start in range(head, middle, BUFFER_BYTES):
            self._write_aligned(offset + start, flat[start : min(start + BUFFER_BYTES, middle)])
        _write(self._file, offset + middle, flat[middle:])

    def _write_aligned(self, offset: int, part: np.ndarray) -> None:
        if self._direct is not None:
            buffer = _aligned_buffer()[: len(part)]
            buffer[:] = part
            try:
                _write(self._direct, offset, buffer)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # this file system wants another alignment
                    raise
        _write(self._file, offset, part)

    def close(self) -> None:
        for file in (self._file, self._direct):
            if file is not None:
                os.close(file)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _write(file: int, offset: int, data: np.ndarray) -> None:
    rest = data.data
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _aligned_buffer() -> np.ndarray:
    """This thread's own."""
    if not hasattr(_own, "buffer"):
        memory = np.empty(BUFFER_BYTES + ALIGNMENT, np.uint8)
        _own.buffer = memory[-memory.ctypes.data % ALIGNMENT :][:BUFFER_BYTES]
    return _own.buffer
