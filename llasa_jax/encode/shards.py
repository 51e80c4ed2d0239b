"""The shards of an encoded dataset, made one by one from a source of audio: each is a task that may
run anywhere, be killed and be given again.

They lie in `<out>.shards/` until the dataset is sealed. What one holds depends on its clips and the
codec alone, so it does not matter who makes it, nor how often.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llasa_jax.codec import Codec
from llasa_jax.codec.xcodec2_jax import JaxCodec
from llasa_jax.data.bad_list import reason_of
from llasa_jax.data.records import record_of
from llasa_jax.data.seal import RECORD_FILE, TEXTS, identity
from llasa_jax.data.shards import Made, Shard, plan_shards, read_shard, write_shard
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.bucket_journal import beside, remove_journals
from llasa_jax.encode.encoder import Encoder
from llasa_jax.encode.filters import FilteredAudio, Filters
from llasa_jax.encode.journal import Journal
from llasa_jax.encode.planned import PlannedClips, Skipped, planned
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.storage import is_remote

AHEAD = 1024  # clips to choose from, for those of one length to be encoded together
# For many clips more programs are compiled, and on LJSpeech's lengths 4% of a batch is padding
# instead of 16%.
MANY_CLIPS, LENGTHS_AN_OCTAVE = 10_000, 8
NO_FILTERS = Filters()
SHARD_FILE = re.compile(rf"{RECORD_FILE}|\w+-\d+-of-\d+\.json")


@dataclasses.dataclass(frozen=True)
class Looked:
    """A shard's clips before they are encoded: those that may be, in the file's order, and the
    identity of what it is made from.
    """

    good: list[int]
    made_from: str


class ShardMaker:
    """Makes shards of the dataset `out` from `source`, with one codec and one set of processes that
    read audio. A context, at whose end they are stopped.
    """

    def __init__(
        self,
        source: AudioSource,
        out: Path,
        codec: Codec,
        settings: OnlineSettings,
        clips_a_file: int = 0,
        filters: Filters = NO_FILTERS,
    ):
        self.source = source if filters == NO_FILTERS else FilteredAudio(source, filters)
        self.codec, self._filters = codec, filters
        if isinstance(codec, JaxCodec) and len(source) >= MANY_CLIPS:
            codec.lengths_an_octave = LENGTHS_AN_OCTAVE
        self.folder = beside(out, "shards")
        self.shards = plan_shards(source.ids, source.split_names, clips_a_file)
        self.encoded = self.resumed = 0
        self._filled: set[int] = set()
        self._max_clip_seconds = settings.max_clip_seconds
        self._skipped = Skipped(quiet=True)
        workers = min(settings.workers, max(len(source), 1))
        self._settings = dataclasses.replace(settings, workers=workers)
        self._encoder: Encoder | None = None

    @property
    def made_with(self) -> str:
        """The codec and the filters: codes in a journal count for the same alone."""
        words = "" if self._filters == NO_FILTERS else f" {self._filters}"
        return self.codec.fingerprint + words

    def look(self, shard: Shard) -> Looked:
        """Which of a shard's clips may be encoded; the others are skipped."""
        good: list[int] = []

        def rows() -> Iterator[tuple]:
            for index in map(int, shard.members):
                key = self.source.key(index)
                # Neither the paths nor the order matter, but what lies there.
                yield self.source.ids[index], *key[1:]
                try:
                    if index in self.source.faults:
                        raise UserError(self.source.faults[index])
                    utterance = self.source.utterance(index)
                    self.source.check_text(index, utterance.text)
                except Exception as error:  # noqa: BLE001 one clip never ends all
                    reason = reason_of(error)
                    self._skipped.add((0, index), self.source.ids[index], key[0], reason)
                    yield (reason,)
                    continue
                good.append(index)
                yield tuple(getattr(utterance, name) for name in TEXTS)

        made_from = identity("encode", shard.name, self.made_with, self._max_clip_seconds, rows())
        return Looked(good, made_from)

    def find(self, shard: Shard, looked: Looked) -> Made | None:
        """The shard where it has been made already, of the same; None otherwise."""
        made = read_shard(self.folder, shard)
        return made if made and made.made_from == looked.made_from else None

    def make(
        self, shard: Shard, looked: Looked, journal: Journal, done: Callable[[int], object]
    ) -> Made:
        """Encodes what the journal lacks, and writes the shard; calls `done` with how many clips
        are there.
        """
        source, members = self.source, set(map(int, shard.members))
        ready = {index for index in looked.good if journal.get(index) is not None}
        done(len(members) - len(looked.good) + len(ready))
        if journal.damaged:
            print(f"The codes of {journal.damaged} clips are damaged, and made again.")
        # Neighbours in file size are near in length: the codec batches equal lengths, and the
        # longest come last.
        todo = [index for index in looked.good if index not in ready]
        todo.sort(key=lambda index: (source.key(index)[1], source.ids[index]))
        self._encode(todo, journal, done)
        bad = self._skipped.of(0) & members
        good = [index for index in looked.good if index not in bad]
        lines = [line for line in self._skipped.lines if line["id"] in {source.ids[i] for i in bad}]
        lines.sort(key=lambda line: line["id"])

        def records() -> Iterator[dict]:
            for index in good:
                codes = journal.get(index)
                if codes is None:
                    raise UserError(
                        f"{self.folder}: the codes of {source.ids[index]!r} are damaged, or its"
                        " audio has changed; give the same command again, which encodes it again."
                    )
                yield record_of(source.utterance(index), codes)

        made = write_shard(self.folder, shard, records(), looked.made_from, lines)
        now = len(good) - len(ready - self._filled)
        self.encoded += now
        self.resumed += len(good) - now
        return made

    def fill(
        self, looked: Iterable[Looked], journal: Journal, done: Callable[[int], object]
    ) -> None:
        """Encodes the clips of all these shards in the order of the source, for one that is
        `read_forward`; `make` finds them in the journal.
        """
        todo = sorted(i for look in looked for i in look.good if journal.get(i) is None)
        self._filled.update(todo)
        self._encode(todo, journal, done)

    def _encode(self, todo: list[int], journal: Journal, done: Callable[[int], object]) -> None:
        if todo:
            utterance = self.source.utterance
            groups = (([planned(utterance(index), (0, index))], None) for index in todo)
            for _ in self._start(journal).encode(groups, AHEAD):
                done(1)

    def _start(self, journal: Journal) -> Encoder:
        if self._encoder is None:
            clips = PlannedClips(self.source, "", 0, self._skipped, ())
            self._encoder = Encoder(self.codec, [clips], self._settings, [journal])
        self._encoder.caches = [journal]
        return self._encoder

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._encoder:
            self._encoder.stop()


def remove_shards(out: Path) -> None:
    """Deletes all shards of a dataset that is sealed, and their journals; nothing else."""
    folder = beside(out, "shards")
    if not folder.is_dir():
        return
    if is_remote(folder):
        storage.remove(folder)
        return
    for path in list(folder.iterdir()):
        if path.name.endswith(".partial") and path.is_dir():
            remove_journals(path.with_suffix(""))
        elif SHARD_FILE.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
