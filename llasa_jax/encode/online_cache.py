"""Codes that online training has made, kept for its next epoch, run and restart, and a dataset for
offline training in the end.

The journal is that of `encode`, `<folder>.partial/journal.sqlite`, so `encode --out <folder>` would
go on from it. It stays when the dataset is written: it knows which audio the codes were made from.
Every host of several writes a journal of its own, and at the next start the first host puts all
into one.
"""

import contextlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from llasa_jax.codec import Codec, load_codec
from llasa_jax.data.builder import read_metadata, write_dataset
from llasa_jax.data.records import record_of
from llasa_jax.encode.encoder import Encoder
from llasa_jax.encode.offline import JOURNAL, open_journal
from llasa_jax.encode.planned import PlannedClips
from llasa_jax.encode.readers import AudioSource
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts


class CodesCache:
    """The codes of one source's clips in `folder`. UserError where they are of another codec, and
    where another run writes them.

    `splits` has the indices of the clips of each split that is used. Codes are given for the same
    audio, unchanged, only.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        audio: AudioSource,
        splits: dict[str, Sequence[int]],
        codec: Codec,
    ):
        self._folder, self._audio, self._splits, self._codec = (
            Path(os.path.abspath(folder)),
            audio,
            splits,
            codec,
        )
        self._partial = self._folder.with_name(f"{self._folder.name}.partial")
        self._several = jax.process_count() > 1
        self._lock = (
            threading.Lock()
        )  # a journal cannot be closed, and stays locked, while the encoder's thread is at it
        self._shared: sqlite3.Connection | None = None
        self._own: sqlite3.Connection | None = None
        self._new = False
        if jax.process_index() == 0:
            self._check()
            self._merge()
        hosts.largest(0)  # all journals are one before anybody looks
        if self._several:
            self._shared = sqlite3.connect(
                f"file:{self._partial / JOURNAL}?mode=ro&immutable=1",
                uri=True,
                check_same_thread=False,
            )
        name = f"{Path(JOURNAL).stem}.{jax.process_index()}.sqlite" if self._several else JOURNAL
        self._own = open_journal(self._partial, name)
        # A power cut may cost the last codes, never the journal; without it, every few clips would
        # wait for the disk.
        self._own.execute("PRAGMA synchronous=NORMAL")

    def get(self, index: int) -> np.ndarray | None:
        clip, key = (
            self._audio.utterance(index).id,
            (*self._audio.key(index), self._codec.fingerprint),
        )
        with self._lock:
            for journal in filter(None, (self._own, self._shared)):
                row = journal.execute(
                    "SELECT audio, size, mtime, codec, codes FROM codes WHERE id = ?", (clip,)
                ).fetchone()
                if row and row[:4] == key:
                    return np.frombuffer(row[4], "<u2").astype(np.uint16)
        return None

    def put(self, clips: Sequence[tuple[int, np.ndarray]]) -> None:
        rows = [
            (
                self._audio.utterance(i).id,
                *self._audio.key(i),
                self._codec.fingerprint,
                codes.astype("<u2").tobytes(),
            )
            for i, codes in clips
        ]
        with self._lock:
            if self._own is None:
                return  # closed, while the codec was at its last clips
            with self._own:
                self._own.executemany(
                    "INSERT OR REPLACE INTO codes VALUES (?, ?, ?, ?, ?, ?)", rows
                )
            self._new = True

    def finish(self, skipped: set[int]) -> None:
        """Writes the dataset if all clips but `skipped` have codes, and it is not there already.
        All hosts must ask.
        """
        new, skipped_anywhere = hosts.largest(self._new), hosts.largest(len(skipped))
        if self._several:
            self.close()
            hosts.largest(0)
            if jax.process_index() == 0:
                self._merge()
                self._own = open_journal(self._partial)
        if jax.process_index() == 0 and (new or not self._folder.is_dir()):
            there = {
                split: [i for i in indices if self.get(i) is not None]
                for split, indices in self._splits.items()
            }
            missing = sum(map(len, self._splits.values())) - sum(map(len, there.values()))
            if missing <= max(skipped_anywhere, len(skipped)) and all(there.values()):
                self._write(there)
        hosts.largest(0)

    def close(self) -> None:
        with self._lock:
            for journal in filter(None, (self._own, self._shared)):
                journal.close()
            self._own = self._shared = None

    def _check(self) -> None:
        if not self._folder.is_dir() or not any(self._folder.iterdir()):
            return
        made_by = read_metadata(self._folder)
        if made_by.get("fingerprint") != self._codec.fingerprint:
            raise UserError(
                f"{self._folder}: the cache holds codes of {made_by.get('codec')}, which is another"
                f" codec than {self._codec.name}; set data.online.codec to it, or give another"
                " data.online.cache"
            )
        if not (self._partial / JOURNAL).is_file():
            raise UserError(
                f"{self._folder}: a whole dataset, without the journal of the audio it was made"
                f" from; train on it with data.mode=offline and data.path={self._folder}, or give"
                " another data.online.cache"
            )

    def _merge(self) -> None:
        """Puts all hosts' journals into the first, and refuses codes of another codec."""
        with contextlib.closing(open_journal(self._partial)) as journal:
            for path in sorted(self._partial.glob(f"{Path(JOURNAL).stem}.*.sqlite")):
                with contextlib.closing(open_journal(self._partial, path.name)) as other, journal:
                    journal.executemany(
                        "INSERT OR REPLACE INTO codes VALUES (?, ?, ?, ?, ?, ?)",
                        other.execute("SELECT * FROM codes"),
                    )
                path.unlink()
            others = journal.execute(
                "SELECT codec FROM codes WHERE codec != ? LIMIT 1", (self._codec.fingerprint,)
            ).fetchone()
        if others:
            raise UserError(
                f"{self._partial}: the cache holds codes of another codec ({others[0]}) than"
                f" {self._codec.name} ({self._codec.fingerprint}); delete it, or give another"
                " data.online.cache"
            )

    def _write(self, splits: dict[str, list[int]]) -> None:
        codec = self._codec
        metadata = {
            "codec": codec.name,
            "fingerprint": codec.fingerprint,
            "hop": codec.hop,
            "sample_rate": codec.sample_rate,
        }
        fresh = self._folder.with_name(f"{self._folder.name}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        write_dataset(
            fresh, {split: self._examples(indices) for split, indices in splits.items()}, metadata
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        fresh.rename(self._folder)
        print(
            f"{self._folder}: all codes are there; data.mode=offline with data.path={self._folder}"
            " trains on them without the codec"
        )

    def _examples(self, indices: Sequence[int]) -> Iterator[dict]:
        for index in indices:
            yield record_of(self._audio.utterance(index), self.get(index))


def open_encoder(
    online: OnlineSettings, records: Sequence, validation: Sequence, codec: Codec | None = None
) -> Encoder | None:
    """What encodes the online sources among the records of `open_sources`, with the cache that is
    set; None where none is online.

    `codec` takes the place of the one that `data.online.codec` names.
    """
    clips = [one for one in (*records, *validation) if isinstance(one, PlannedClips)]
    if not clips:
        return None
    codec = codec or load_codec(online.codec, online.device)
    caches: dict[int, CodesCache | None] = {one.number: None for one in clips}
    if online.cache:
        names = {
            one.number: (
                Path(online.cache) / Path(one.audio.name).stem
                if len(caches) > 1
                else Path(online.cache)
            )
            for one in clips
        }
        if len(set(names.values())) < len(names):
            raise UserError(
                "two sources of audio share a name, and would share a cache; rename one, or train"
                " without data.online.cache"
            )
        for number, folder in names.items():
            mine = [one for one in clips if one.number == number]
            caches[number] = CodesCache(
                folder, mine[0].audio, {one.split: one.indices for one in mine}, codec
            )
    return Encoder(codec, clips, online, [caches[number] for number in sorted(caches)])
