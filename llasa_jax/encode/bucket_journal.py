"""The journal of codes whose dataset will lie in a bucket: SQLite works on this machine, and the
file is put up from time to time, so that another machine can go on from it.
"""

import contextlib
import os
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np

from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.journal import JOURNAL, Journal, remove_journal
from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.claims import Claim
from llasa_jax.runtime.copies import cache_folder
from llasa_jax.runtime.storage import file_system, is_remote, reaching

PUT_UP_SECONDS = 300.0


def working_place(folder: Path) -> Path:
    """Where this machine works on a dataset: in its own folder, or for one in a bucket among the
    copies of what is there. Its journal lies beside it, in `<folder>.partial`.
    """
    if not is_remote(folder):
        return folder
    return cache_folder() / f"{folder.name}-{sha256(str(folder).encode()).hexdigest()[:16]}"


def open_journal(folder: Path, audio: AudioSource, fingerprint: str) -> Journal:
    """The journal beside a dataset's folder, of this machine or in a bucket."""
    partial = beside(working_place(folder), "partial")
    if is_remote(folder):
        return BucketJournal(partial, audio, fingerprint, beside(folder, "partial"))
    return Journal(partial, audio, fingerprint)


def remove_journals(folder: Path) -> None:
    """Deletes the journal beside a dataset's folder."""
    remove_journal(beside(working_place(folder), "partial"))
    if is_remote(folder):
        storage.remove(beside(folder, "partial"))


def beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


class BucketJournal(Journal):
    """A `Journal` in the folder `here` that begins with what lies in `there`, a bucket's folder,
    holds that against other machines, and is put up there every `PUT_UP_SECONDS` and as it is
    closed. What cannot be put up is warned of once: it stays on this machine.
    """

    def __init__(self, here: Path, audio: AudioSource, fingerprint: str, there: Path):
        self._there = os.fspath(there / JOURNAL)
        self._new, self._put_up, self._complained = False, time.monotonic(), False
        self._claim = Claim(there, "encoding")
        self._claim.__enter__()
        try:
            super().__init__(here, audio, fingerprint)
            with (
                contextlib.suppress(FileNotFoundError),
                tempfile.TemporaryDirectory(prefix="llasa-jax-") as scratch,
            ):
                copy = Path(scratch) / JOURNAL
                copy.write_bytes(storage.read_bytes(self._there))
                self.absorb(copy)
        except BaseException:
            self._claim.__exit__()
            raise

    def put(self, clips: Iterable[tuple[int, np.ndarray]]) -> None:
        self._claim.check()
        super().put(clips)
        self._new = True
        if time.monotonic() - self._put_up > PUT_UP_SECONDS:
            self._save()

    def close(self) -> None:
        if self._database is not None:
            if self._new:
                self._save()
            super().close()
            self._claim.__exit__()

    def _save(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="llasa-jax-") as scratch:
                copy = Path(scratch) / JOURNAL
                with self._explained(), contextlib.closing(sqlite3.connect(copy)) as other:
                    self._database.backup(other)
                with reaching(self._there):
                    file_system(self._there).put_file(str(copy), self._there)
            self._new = False
        except UserError as error:
            if not self._complained:
                warnings.warn(f"{self._there} is not up to date ({error})", stacklevel=2)
            self._complained = True
        self._put_up = time.monotonic()
