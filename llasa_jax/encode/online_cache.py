"""Codes that online training has made, kept for its next epoch, run and restart, and a dataset for
offline training in the end.

The journal is that of `encode`, `<folder>.partial/journal.sqlite`, so `encode --out <folder>` would
go on from it. It stays when the dataset is written: it knows which audio the codes were made from.
Every host of several writes a journal of its own, and at the next start the first host puts all
into one.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from llasa_jax.codec import Codec, load_codec
from llasa_jax.data.builder import read_metadata, write_dataset
from llasa_jax.data.records import record_of
from llasa_jax.data.seal import SEAL, foreign_files, remove_dataset
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.bucket_journal import open_journal, working_place
from llasa_jax.encode.devices import divide_machine
from llasa_jax.encode.encoder import Encoder
from llasa_jax.encode.journal import JOURNAL, SUFFIXES, Journal
from llasa_jax.encode.offline import codec_metadata
from llasa_jax.encode.planned import PlannedClips
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts, storage
from llasa_jax.runtime.bucket_files import upload
from llasa_jax.runtime.storage import absolute, as_path, is_remote


class CodesCache:
    """The codes of one source's clips in `folder`. UserError where they are of another codec, where
    another run writes them, and where the folder holds anything else.

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
        # In a bucket, this machine works on it among its copies, and puts it up.
        self._there = absolute(folder)
        self._folder = working_place(self._there)
        self._audio, self._splits, self._codec = audio, splits, codec
        self._partial = self._folder.with_name(f"{self._folder.name}.partial")
        self._fresh = self._folder.with_name(f"{self._folder.name}.fresh")
        self._several = jax.process_count() > 1
        # A journal cannot be closed, and stays locked, while the encoder's thread is at it.
        self._lock = threading.Lock()
        self._shared: Journal | None = None
        self._own: Journal | None = None
        self._new = False
        _on_the_first_host(self._prepare)  # all journals are one before anybody looks
        if self._several:
            self._shared = self._journal(read_only=True)
        self._own = self._journal(
            f"{Path(JOURNAL).stem}.{jax.process_index()}.sqlite" if self._several else JOURNAL
        )

    def get(self, index: int) -> np.ndarray | None:
        """The codes of a clip, uint16 (frames,); None where there are none."""
        with self._lock:
            for journal in filter(None, (self._own, self._shared)):
                codes = journal.get(index)
                if codes is not None:
                    return codes
        return None

    def put(self, clips: Sequence[tuple[int, np.ndarray]]) -> None:
        """Keeps the codes of these clips, by their indices."""
        with self._lock:
            if self._own is None:
                return  # closed, while the codec was at its last clips
            self._own.put(clips)
            self._new = True

    def finish(self, skipped: set[int]) -> None:
        """Writes the dataset if all clips but `skipped` have codes, and it is not there already.
        All hosts must ask.
        """
        new, skipped_anywhere = hosts.largest(self._new), hosts.largest(len(skipped))
        if self._several:
            self.close()
            hosts.largest(0)  # all journals are closed

        def write():
            if self._several:
                self._merge()
                self._own = self._journal()
            if not new and self._there.is_dir():
                return
            there = {
                split: [i for i in indices if self.get(i) is not None]
                for split, indices in self._splits.items()
            }
            missing = sum(map(len, self._splits.values())) - sum(map(len, there.values()))
            if missing <= max(skipped_anywhere, len(skipped)) and all(there.values()):
                self._write(there)

        _on_the_first_host(write)

    def close(self) -> None:
        with self._lock:
            for journal in filter(None, (self._own, self._shared)):
                journal.close()
            self._own = self._shared = None

    def _journal(self, name: str = JOURNAL, read_only: bool = False) -> Journal:
        if is_remote(self._there):
            return open_journal(self._there, self._audio, self._codec.fingerprint)
        return Journal(self._partial, self._audio, self._codec.fingerprint, name, read_only)

    def _prepare(self) -> None:
        self._check()
        self._merge()

    def _check(self) -> None:
        # What lies in the folder is deleted once a new dataset is written, so nothing else may.
        for folder in dict.fromkeys((self._there, self._folder, self._fresh, self._partial)):
            if not (folder.exists() if is_remote(folder) else os.path.lexists(folder)):
                continue
            if not folder.is_dir():
                raise UserError(f"{folder}: is not a folder; give another data.online.cache")
            foreign = (
                [path.name for path in folder.iterdir() if not _is_journal(path.name)]
                if folder == self._partial
                else foreign_files(folder)
            )
            if foreign:
                raise UserError(
                    f"{folder}: holds {min(foreign)}, which no cache of codes holds; give"
                    " data.online.cache a folder of its own"
                )
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
        with self._journal() as journal:
            for path in sorted(self._partial.glob(f"{Path(JOURNAL).stem}.*.sqlite")):
                journal.absorb(path)
            other = journal.other_codec()
        if other:
            raise UserError(
                f"{self._partial}: the cache holds codes of another codec ({other}) than"
                f" {self._codec.name} ({self._codec.fingerprint}); delete it, or give another"
                " data.online.cache"
            )

    def _write(self, splits: dict[str, list[int]]) -> None:
        if self._fresh.is_dir():
            remove_dataset(self._fresh)  # from a run that was killed here
        write_dataset(
            self._fresh,
            {split: self._records(indices) for split, indices in splits.items()},
            codec_metadata(self._codec),
        )
        # A kill between these two leaves the journal, from which the next run writes the dataset.
        if self._folder.is_dir():
            remove_dataset(self._folder)
        self._fresh.rename(self._folder)
        if is_remote(self._there):
            storage.remove(self._there)
            upload(self._folder, self._there, SEAL)
        print(
            f"{self._there}: all codes are there; data.mode=offline with data.path={self._there}"
            " trains on them without the codec"
        )

    def _records(self, indices: Sequence[int]) -> Iterator[dict]:
        for index in indices:
            codes = self.get(index)
            if codes is None:
                raise UserError(
                    f"{self._partial}: the codes of {self._audio.ids[index]!r} are damaged, or its"
                    " audio has changed; the same command encodes it again"
                )
            yield record_of(self._audio.utterance(index), codes)


def _is_journal(name: str) -> bool:
    stem = re.escape(Path(JOURNAL).stem)
    return bool(re.fullmatch(rf"{stem}(\.\d+)?\.sqlite({'|'.join(SUFFIXES)})", name))


def _on_the_first_host(work: Callable[[], None]) -> None:
    """Does `work` on the first host, while the others wait for it. If it fails, all raise."""
    failure = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as error:  # noqa: BLE001 raised below, when the others know
            failure = error
    if hosts.largest(failure is not None):
        raise failure or UserError(
            "the first host cannot use data.online.cache, and training stops on all; its own log"
            " says why"
        )


def check_place(cache: str | os.PathLike, out: str | os.PathLike) -> None:
    """UserError where a cache and a run's folder `out` are one, or one lies in the other: a cache
    replaces its folder.
    """
    if is_remote(cache) or is_remote(out):
        places = [os.fspath(path).rstrip("/") + "/" for path in (cache, out)]
        inside = places[0].startswith(places[1]) or places[1].startswith(places[0])
        if inside:
            raise _not_apart(cache, out)
        return
    run = os.path.realpath(out)
    for suffix in ("", ".partial", ".fresh"):
        folder = os.path.realpath(os.path.abspath(cache) + suffix)
        if os.path.commonpath([run, folder]) in (run, folder):
            raise _not_apart(cache, out)


def _not_apart(cache: str | os.PathLike, out: str | os.PathLike) -> UserError:
    return UserError(
        f"data.online.cache={cache} and the run's folder, out={out}, must not lie in each other;"
        " give the cache a folder of its own"
    )


def open_encoder(
    online: OnlineSettings,
    records: Sequence,
    validation: Sequence,
    codec: Codec | None = None,
    out: str = "",
) -> Encoder | None:
    """What encodes the online sources among the records of `open_sources`, with the cache that is
    set; None where none is online.

    `codec` takes the place of the one that `data.online.codec` names. `out` is the run's folder.
    UserError where the cache must not lie where it is set, and where it is of no use.
    """
    if online.cache and out:
        check_place(online.cache, out)
    clips = [one for one in (*records, *validation) if isinstance(one, PlannedClips)]
    if not clips:
        return None
    if online.cache and is_remote(online.cache) and jax.process_count() > 1:
        raise UserError(
            f"data.online.cache={online.cache}: a cache in a bucket works with one host; encode the"
            " audio first (`llasa-jax encode`), or give a folder that all hosts share"
        )
    codec = codec or load_codec(online.codec, online.device, online.precision)
    divide_machine(online)
    caches: dict[int, CodesCache | None] = {one.number: None for one in clips}
    if online.cache:
        names = {
            one.number: (
                as_path(online.cache) / as_path(one.audio.name).stem
                if len(caches) > 1
                else as_path(online.cache)
            )
            for one in clips
        }
        if len(set(names.values())) < len(names):
            raise UserError(
                "two sources of audio share a name, and would share a cache; rename one, or train"
                " without data.online.cache"
            )
        for number, folder in names.items():
            parts = [one for one in clips if one.number == number]
            caches[number] = CodesCache(
                folder, parts[0].audio, {one.split: one.indices for one in parts}, codec
            )
    return Encoder(codec, clips, online, [caches[number] for number in sorted(caches)])
