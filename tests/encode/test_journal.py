"""The journal: what it gives is what was put, or nothing; its errors are sentences."""

import contextlib
import errno
import os
import resource
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from llasa_jax.encode.journal import JOURNAL, LAYOUT, Journal, remove_journal
from llasa_jax.errors import UserError


class Clips:
    """Three clips whose audio never changes; the last lies under a name in Latin-1."""

    ids = ("a", "b", "caf\udce9")

    def utterance(self, index):
        return SimpleNamespace(id=self.ids[index])

    def key(self, index):
        return f"/audio/{self.ids[index]}.wav", 100 + index, 7


CODES = [np.random.default_rng(i).integers(0, 65_536, 20 + i).astype(np.uint16) for i in range(3)]


@pytest.fixture
def folder(tmp_path):
    with Journal(tmp_path / "j", Clips(), "f1") as journal:
        journal.put(enumerate(CODES))
    return tmp_path / "j"


def test_codes_come_back(folder):
    with Journal(folder, Clips(), "f1") as journal:
        for index, codes in enumerate(CODES):
            found = journal.get(index)
            assert found.dtype == np.uint16
            np.testing.assert_array_equal(found, codes)
        assert journal.other_codec() is None
    with Journal(folder, Clips(), "f2") as journal:
        assert [journal.get(index) for index in range(3)] == [None] * 3
        assert journal.other_codec() == "f1"
    remove_journal(folder)
    assert not folder.exists()


def test_every_flipped_bit_of_a_row_is_found(folder):
    """In the database's file itself, at 200 places of the table's page: never other codes."""
    path = folder / JOURNAL
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=DELETE")
    whole = path.read_bytes()
    first = whole.index(CODES[0].astype("<u2").tobytes())
    page = first // 4096 * 4096
    rng = np.random.default_rng(0)
    outcomes = {"lost": 0, "same": 0, "error": 0}
    places = [*range(first, first + 20), *rng.integers(page, page + 4096, 200)]
    for place in map(int, places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        for suffix in ("-wal", "-shm"):
            (folder / f"{JOURNAL}{suffix}").unlink(missing_ok=True)
        path.write_bytes(damaged)
        try:
            with Journal(folder, Clips(), "f1") as journal:
                found = [journal.get(index) for index in range(3)]
        except UserError as error:
            assert "move it away" in str(error)  # noqa: PT017 either this or the codes
            outcomes["error"] += 1
            continue
        for codes, wanted in zip(found, CODES, strict=True):
            if codes is not None:
                np.testing.assert_array_equal(codes, wanted)
        outcomes["lost" if any(codes is None for codes in found) else "same"] += 1
    assert outcomes["lost"] > 20
    assert sum(outcomes.values()) == 220


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" * 300])
def test_what_is_no_journal_is_a_sentence(tmp_path, content):
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, or not a journal of codes .*move it away"):
        Journal(tmp_path, Clips(), "f1")


def test_another_layout_is_refused(folder):
    with closing(sqlite3.connect(folder / JOURNAL)) as database:
        database.execute(f"PRAGMA user_version={LAYOUT + 1}")
    with pytest.raises(UserError, match=f"layout {LAYOUT + 1}, not {LAYOUT}"):
        Journal(folder, Clips(), "f1")


def test_only_another_process_is_called_in_use(folder, tmp_path):
    with (
        Journal(folder, Clips(), "f1"),
        pytest.raises(UserError, match=r"in use .*; wait for the other run"),
    ):
        Journal(folder, Clips(), "f1")


def test_too_many_open_files_are_called_that(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        os.close(taken.pop())  # one is left, and SQLite needs more
        with pytest.raises(UserError) as caught:
            Journal(folder, Clips(), "f1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)
    assert "too many open files; raise the limit" in str(caught.value)
    assert "in use" not in str(caught.value)


def test_a_full_disk_is_called_that(folder, monkeypatch):
    with Journal(folder, Clips(), "f1") as journal:
        # SQLite's own limit of pages gives the error that a full disk gives.
        journal._database.execute("PRAGMA max_page_count=3")
        with pytest.raises(UserError, match=r"the disk of .* is full; make room"):
            journal.put([(0, np.zeros(2**20, np.uint16))])
        np.testing.assert_array_equal(journal.get(0), CODES[0])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "permission denied"),
        (errno.ENOSPC, "is full; make room"),
        (errno.EROFS, "read-only file system"),
    ],
)
def test_a_folder_that_cannot_be_made_says_why(tmp_path, monkeypatch, number, words):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=words):
        Journal(tmp_path / "new", Clips(), "f1")


def test_hosts_journals_become_one(tmp_path, folder):
    with Journal(folder, Clips(), "f1", "journal.1.sqlite") as other:
        other.put([(1, CODES[0])])
    with Journal(folder, Clips(), "f1") as journal:
        journal.absorb(folder / "journal.1.sqlite")
        np.testing.assert_array_equal(journal.get(1), CODES[0])
        np.testing.assert_array_equal(journal.get(0), CODES[0])
    assert not list(folder.glob("journal.1*"))
