"""Files written past the page cache hold what was written, wherever that lies and whatever the file
system can.
"""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llasa_jax.convert.direct_file import BUFFER_BYTES, DirectFile

SIZE = 2 * BUFFER_BYTES + 12_345


@pytest.mark.parametrize(
    "direct", ["as it is", "no such flag", "cannot be opened", "another alignment"]
)
def test_pieces_at_any_place(tmp_path, monkeypatch, direct):
    really_open, really_pwrite, flag, direct_files = os.open, os.pwrite, os.O_DIRECT, set()

    def open_(path, flags, mode=0o777):
        if direct == "cannot be opened" and flags & flag:
            raise OSError(errno.EINVAL, "no direct files here")
        file = really_open(path, flags, mode)
        if flags & flag:
            direct_files.add(file)
        return file

    def pwrite(file, data, offset):
        if direct == "another alignment" and file in direct_files:
            raise OSError(errno.EINVAL, "not so")
        return really_pwrite(file, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    if direct == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT")
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    places = [0, 8, 4096, 5001, 5003, 12_288, BUFFER_BYTES + 4096, SIZE]
    pieces = list(zip(places, places[1:], strict=False))
    with DirectFile(tmp_path / "x", SIZE) as file, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: file.write(piece[0], data[slice(*piece)]), reversed(pieces)))
    assert (tmp_path / "x").read_bytes() == data.tobytes()


def test_arrays_in_another_order(tmp_path):
    rows = np.arange(6000, dtype=np.float32).reshape(100, 60)
    with DirectFile(tmp_path / "x", 6000 * 4 + 4) as file:
        file.write(0, b"abcd")
        file.write(4, rows[:, ::-1].T)
    assert (tmp_path / "x").read_bytes() == b"abcd" + np.ascontiguousarray(
        rows[:, ::-1].T
    ).tobytes()


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        DirectFile(tmp_path / "x", 10)
