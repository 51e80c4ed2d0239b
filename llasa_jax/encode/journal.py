"""Codes as they are made, kept in one SQLite file that survives a crash at any moment: what offline
encoding resumes from, and the cache of online training.

A row holds a clip's codes, what they were made from (the audio's place, size and time of change,
and the codec) and a checksum of all of it. Every 16-bit number is a legal code, so nothing else
would show a flipped bit.
"""

import contextlib
import errno
import os
import sqlite3
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llasa_jax.data.bad_list import as_text
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.errors import InUseError, UserError
from llasa_jax.runtime.files import explain

JOURNAL = "journal.sqlite"
LAYOUT = 2  # kept as SQLite's user_version
COLUMNS = "id, audio, size, mtime, codec, codes, crc"
INSERT = "INSERT OR REPLACE INTO codes VALUES (?, ?, ?, ?, ?, ?, ?)"
# SQLite's own files beside the journal, while it is open and after a crash
SUFFIXES = ("", "-wal", "-shm", "-journal")


class Journal:
    """The codes of one source's clips by one codec, by the clip's index in the source.

    `folder` is made if need be. One process at a time may have the journal open, unless it is
    opened as `read_only`. Codes count only for the same audio, unchanged, and the same codec.
    Raises `UserError` where another process has it open, where it is damaged or something else, and
    (at any later time too) where its disk is full or cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        audio: AudioSource,
        fingerprint: str,
        name: str = JOURNAL,
        read_only: bool = False,
    ):
        self._path, self._audio, self._fingerprint = folder / name, audio, fingerprint
        self._database: Any = None  # a sqlite3.Connection while it is open
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self._database = _connect(self._path, read_only)
        self.damaged = 0  # rows met so far whose checksum is not theirs

    def get(self, index: int) -> np.ndarray | None:
        """The codes of a clip, uint16 (frames,); None where there are none that count."""
        clip = as_text(self._audio.utterance(index).id)
        with self._explained():
            row = self._database.execute(
                f"SELECT {COLUMNS} FROM codes WHERE id = ?", (clip,)
            ).fetchone()
        if row is None or row[1:5] != self._made_from(index):
            return None
        return self._whole(row)

    def put(self, clips: Iterable[tuple[int, np.ndarray]]) -> None:
        """Keeps the codes of these clips, in one transaction."""
        rows = []
        for index, codes in clips:
            row = (
                as_text(self._audio.utterance(index).id),
                *self._made_from(index),
                codes.astype("<u2").tobytes(),
            )
            rows.append((*row, _checksum(row)))
        with self._explained(), self._database as transaction:
            transaction.executemany(
                "INSERT OR REPLACE INTO codes VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )

    def absorb(self, path: Path) -> None:
        """Takes all rows of another journal, and deletes it."""
        with (
            self._explained(),
            contextlib.closing(_connect(path)) as other,
            self._database as transaction,
        ):
            transaction.executemany(INSERT, other.execute(f"SELECT {COLUMNS} FROM codes"))
        for suffix in SUFFIXES:
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    def other_codec(self) -> str | None:
        """The fingerprint of a codec other than this one's that has codes here."""
        with self._explained():
            row = self._database.execute(
                "SELECT codec FROM codes WHERE codec != ? LIMIT 1", (self._fingerprint,)
            ).fetchone()
        return row and row[0]

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _made_from(self, index: int) -> tuple[str, int, int, str]:
        audio, size, changed = self._audio.key(index)
        return as_text(audio), size, changed, self._fingerprint

    def _whole(self, row: tuple) -> np.ndarray | None:
        if row[6] != _checksum(row[:6]) or not isinstance(row[5], bytes):
            self.damaged += 1
            return None
        return np.frombuffer(row[5], "<u2").astype(np.uint16)

    @contextlib.contextmanager
    def _explained(self):
        """SQLite's errors and the system's as sentences."""
        try:
            yield
        except OSError as error:
            raise UserError(explain(error, self._path)) from error
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise InUseError(
                    f"{self._path}: in use ({error}); wait for the other run that is encoding to"
                    " the same folder."
                ) from error
            if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or not name.startswith(
                ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")
            ):
                raise UserError(
                    f"{self._path}: damaged, or not a journal of codes ({error}); move it away, and"
                    " its clips are encoded again."
                ) from error
            raise UserError(explain(_system_error(self._path, name, error), self._path)) from error


def remove_journal(folder: Path) -> None:
    """Deletes the journal in a folder, and the folder if nothing else is in it."""
    for suffix in SUFFIXES:
        (folder / f"{JOURNAL}{suffix}").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    if read_only:
        # A file: URI, in which ?, # and % have meanings
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        return sqlite3.connect(uri, uri=True, check_same_thread=False)
    database = sqlite3.connect(path, timeout=0, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")
        # A power cut may cost the last codes, never the journal. FULL would wait for the disk at
        # every few clips.
        database.execute("PRAGMA synchronous=NORMAL")
        (layout,) = database.execute("PRAGMA user_version").fetchone()
        if layout not in (0, LAYOUT):
            raise sqlite3.DatabaseError(f"layout {layout}, not {LAYOUT}")
        with database:  # a write takes the lock, which then stays until the journal is closed
            database.execute(
                "CREATE TABLE IF NOT EXISTS codes (id TEXT PRIMARY KEY, audio TEXT, size INT,"
                " mtime INT, codec TEXT, codes BLOB, crc INT)"
            )
            database.execute(f"PRAGMA user_version={LAYOUT}")
    except BaseException:
        database.close()
        raise
    return database


def _checksum(row: tuple) -> int:
    """CRC-32 of all that a row says: id, audio, size, mtime, codec and codes."""
    *texts, codes = row
    codes = codes if isinstance(codes, bytes) else b""
    return zlib.crc32(codes, zlib.crc32("\0".join(map(str, texts)).encode()))


def _system_error(path: Path, name: str, error: sqlite3.Error) -> OSError:
    """What the system says of a file that SQLite could not open or write, of which SQLite tells
    little.
    """
    if name.startswith("SQLITE_FULL"):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    opened = []
    try:
        # As many as SQLite has open: too many may be the matter.
        for _ in SUFFIXES:
            opened.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
    except OSError as cause:
        return cause
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return OSError(errno.EIO, str(error), str(path))
