"""Offline encoding: audio and text become a dataset of codes, crash-safe and resumable.

It is the `Encoder` of online training over every clip of a source, shard by shard. In one process
codes go into one journal, `<out>.partial/journal.sqlite`, as they are made; tasks that make shards
elsewhere have a journal each. The dataset is sealed when all shards are there.
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

from tqdm import tqdm

from llasa_jax.codec import Codec, load_codec
from llasa_jax.data.bad_list import BadList
from llasa_jax.data.seal import SEAL, check_unfinished, identity, is_made
from llasa_jax.data.shards import Made, Shard, forget_shard, seal_dataset
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.bucket_journal import beside, open_journal, remove_journals
from llasa_jax.encode.filters import FILTERED, Filters
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.encode.shards import Looked, ShardMaker, remove_shards
from llasa_jax.encode.sources import ManifestAudio
from llasa_jax.errors import UserError, listed
from llasa_jax.runtime.settings import check
from llasa_jax.runtime.storage import absolute, as_path, check_writable


class NoGoodClipsError(UserError):
    """All clips are bad, and so many may be."""


MAX_CLIP_SECONDS = OnlineSettings().max_clip_seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """A dataset that is to be encoded. It goes to other processes where `source` and `codec` do.

    `source` opens the audio. `codec` is a loaded one, or a name or folder for `load_codec(codec,
    device)`. Audio is read by `workers` processes for each codec, no more than `batch_seconds` of
    it ahead of the codec. `clips_a_file` 0 cuts the dataset as `builder.file_count` says. Clips
    that `filters` leave out are listed as bad ones are, but do not count in `max_bad_share`. Raises
    `UserError` for a value out of its range.
    """

    source: Callable[[], AudioSource]
    out: str | os.PathLike
    codec: str | os.PathLike | Codec
    device: str = "cpu"
    max_bad_share: float = 0.05
    batch_seconds: float = 600.0
    workers: int = 4
    max_clip_seconds: float = MAX_CLIP_SECONDS
    clips_a_file: int = 0
    filters: Filters = Filters()

    def __post_init__(self):
        infinite = float("inf")
        faults = {
            f"max_bad_share {self.max_bad_share} must be in [0, 1]": 0 <= self.max_bad_share <= 1,
            f"batch_seconds {self.batch_seconds} must be above 0": (
                0 < self.batch_seconds < infinite
            ),
            f"workers {self.workers} must be in [1, 1024]": 1 <= self.workers <= 1024,
            f"max_clip_seconds {self.max_clip_seconds} must be above 0": self.max_clip_seconds > 0,
            f"clips_a_file {self.clips_a_file} must not be below 0": self.clips_a_file >= 0,
        }
        for words, right in faults.items():
            if not right:
                raise UserError(f"{words}; correct the setting.")
        check(self.filters)
        object.__setattr__(self, "out", absolute(self.out))

    @property
    def folder(self) -> Path:
        """The dataset's, from the root of the disk or bucket."""
        return as_path(self.out)

    def open(self, codec: Codec | None = None) -> ShardMaker:
        """What makes its shards, with this codec or its own."""
        if codec is None:
            codec = (
                load_codec(self.codec, self.device)
                if isinstance(self.codec, str | Path)
                else cast(Codec, self.codec)
            )
        settings = OnlineSettings(
            device=self.device,
            workers=self.workers,
            read_ahead=self.batch_seconds,
            max_bad_share=1.0,  # judged at the end, when all good clips are encoded
            gpu_memory=0.0,
            max_clip_seconds=self.max_clip_seconds,
        )
        return ShardMaker(
            self.source(), self.folder, codec, settings, self.clips_a_file, self.filters
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `encode` did: clips encoded now, made by earlier runs, and bad; hours of speech;
    examples of each split.
    """

    encoded: int
    resumed: int
    bad: int
    hours: float
    splits: dict[str, int]


def encode(
    manifest: str | os.PathLike,
    out: str | os.PathLike,
    codec: str | Codec,
    device: str = "cpu",
    validation_share: float = 0.0,
    seed: int = 0,
    columns: str = "",
    **options,
) -> Summary:
    """Encodes a manifest's audio (`columns` are those of `read_manifest`) into a new dataset (see
    `write_dataset`) in the folder `out`.

    An utterance without a split of its own goes to "validation" or "train" by a hash of `seed` and
    its id, so it stays where it is when others come or go; `validation_share` of the clips, and
    never none, are "validation". `options` are those of `Job`, and the rest is as in `encode_here`.
    """
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share {validation_share} must be in [0, 1).")
    source = functools.partial(ManifestAudio, manifest, validation_share, seed, columns)
    return encode_here(Job(source, out, codec, device, **options))


def encode_here(job: Job) -> Summary:
    """Encodes every clip of a job's source into a new dataset: makes all shards in this process,
    and seals them.

    Codes are kept as they are made, and the same command goes on from them after an interruption;
    given again when it is done, it does nothing. Clips that cannot be read, that have no text, or
    that are longer than `max_clip_seconds` are passed over and listed, with reasons, in
    `<out>.bad.jsonl`. Raises `UserError`, keeps the journal and writes no dataset if they are more
    than `max_bad_share` of all, or all; also if `out` holds anything else or another run is writing
    it.
    """
    check_writable(job.folder.parent)
    check_unfinished(job.folder)  # before the codec is loaded
    with job.open() as maker:
        looked = [maker.look(shard) for shard in maker.shards]
        if (summary := _is_made(job, looked)) is not None:
            return summary
        made: list[Made] = []
        clips = len(maker.source)
        with (
            open_journal(job.folder, maker.source, maker.made_with) as journal,
            tqdm(desc="encode", total=clips, unit="clip") as bar,
        ):
            there = [maker.find(*each) for each in zip(maker.shards, looked, strict=True)]
            done: Callable[[int], object] = bar.update
            if maker.source.read_forward:
                todo = [look for look, found in zip(looked, there, strict=True) if not found]
                maker.fill(todo, journal, bar.update)
                done = _counted
            for shard, look, found in zip(maker.shards, looked, there, strict=True):
                if found:
                    maker.resumed += found.examples
                    bar.update(len(shard.members))
                made.append(found or maker.make(shard, look, journal, done))
            if maker.resumed:
                print(f"{maker.resumed} of {clips} clips were encoded by an earlier run.")
        return _seal(job, maker, made)


def _counted(clips: int) -> None:
    """For clips that are counted already."""


def make_part(job: Job, first: int, count: int) -> int:
    """Makes every `count`-th shard of a job from the `first` on, and passes over those that are
    made. They lie in `<out>.shards/` until `seal`. Returns how many are its. Raises `UserError`
    where another process makes one of them.
    """
    if not 0 <= first < count:
        raise UserError(f"the part {first}/{count} is none; number them from 0/{count} on.")
    check_writable(job.folder.parent)
    if (job.folder / SEAL).is_file():
        print(f"{job.folder}: is sealed already.")
        return 0
    with job.open() as maker:
        shards = maker.shards[first::count]
        total = sum(len(shard.members) for shard in shards)
        with tqdm(desc=f"encode {first}/{count}", total=total, unit="clip") as bar:
            for shard in shards:
                make_shard(maker, shard, bar.update)
    return len(shards)


def make_shard(maker: ShardMaker, shard: Shard, done: Callable[[int], object]) -> Made:
    """Makes one shard, with a journal of its own, where it is not made already; calls `done` with
    how many clips are there.
    """
    looked = maker.look(shard)
    if not (made := maker.find(shard, looked)):
        place = maker.folder / shard.name
        with open_journal(place, maker.source, maker.made_with) as journal:
            return maker.make(shard, looked, journal, done)
    done(len(shard.members))
    return made


def seal(job: Job, codec: Codec | None = None) -> Summary:
    """Makes the dataset of shards that are all there (see `make_part`), made with the same
    settings. Of `codec` only the description is used. Raises `UserError` where some are missing or
    of other input.
    """
    check_unfinished(job.folder)
    maker = job.open(codec)
    looked = [maker.look(shard) for shard in maker.shards]
    if (summary := _is_made(job, looked)) is not None:
        return summary
    found = [maker.find(*each) for each in zip(maker.shards, looked, strict=True)]
    missing = [s.name for s, made in zip(maker.shards, found, strict=True) if not made]
    if missing:
        raise UserError(
            f"{maker.folder}: {len(missing)} of {len(found)} shards are not there, or made of other"
            f" input ({listed(missing)}); make them with --shard and the same options first."
        )
    made = [each for each in found if each]
    maker.resumed = sum(each.examples for each in made)
    return _seal(job, maker, made)


def _seal(job: Job, maker: ShardMaker, made: list[Made]) -> Summary:
    """Judges and lists the bad clips of all shards, and makes the dataset of the others."""
    source, codec, out = maker.source, maker.codec, job.folder
    bad_list = BadList(beside(out, "bad.jsonl"))
    bad = [line for each in made for line in each.bad]
    for line in bad:
        bad_list.add(line)
    bad_list.publish()
    faulty = sum(FILTERED not in line["reason"] for line in bad)
    too_many = faulty > job.max_bad_share * len(source)
    if too_many or not sum(each.examples for each in made):
        for shard, each in zip(maker.shards, made, strict=True):
            if each.bad:  # those that are fixed count when the command is given again
                forget_shard(maker.folder, shard)
        raise (UserError if too_many else NoGoodClipsError)(
            f"{source.name}: {len(bad)} of {len(source)} clips are bad (max_bad_share is"
            f" {job.max_bad_share}); the first: {bad[0]['reason']} Fix those listed in"
            f" {bad_list.path}, or take them out, and run again: the good ones are kept."
        )
    counts: Counter[str] = Counter()
    for shard, each in zip(maker.shards, made, strict=True):
        counts[shard.split] += each.examples
    splits = {split: count for split, count in counts.items() if count}
    hours = sum(each.frames for each in made) * codec.hop / codec.sample_rate / 3600
    shards = list(zip(maker.shards, made, strict=True))
    made_from = _of_all(each.made_from for each in made)
    # Not how many were encoded now: however often it was interrupted, the dataset is the same.
    kept = {"bad": len(bad), "hours": hours, "splits": splits}
    seal_dataset(out, maker.folder, shards, codec_metadata(codec), made_from, kept)
    clean_up(out)
    words = ", ".join(f"{count} {split}" for split, count in splits.items())
    print(
        f"{out}: {words}; {hours:.2f} hours of speech"
        + (f"; {len(bad)} bad clips, see {bad_list.path}." if bad else ".")
    )
    return Summary(maker.encoded, maker.resumed, len(bad), hours, splits)


def _is_made(job: Job, looked: list[Looked]) -> Summary | None:
    """The summary of a dataset that was made of the same; None where there is none."""
    kept = is_made(job.folder, _of_all(each.made_from for each in looked))
    if kept is None:
        return None
    clean_up(job.folder)
    print(f"{job.folder}: done already by the same command.")
    splits = kept["splits"]
    return Summary(0, sum(splits.values()), kept["bad"], kept["hours"], splits)


def clean_up(out: Path) -> None:
    """Deletes the journals and shards that a dataset was made of."""
    remove_journals(out)
    remove_shards(out)


def _of_all(shards: Iterable[str]) -> str:
    return identity("encode", sorted(shards))


def codec_metadata(codec: Codec) -> dict:
    """What a dataset says of the codec that made it."""
    return {
        "codec": codec.name,
        "fingerprint": codec.fingerprint,
        "hop": codec.hop,
        "sample_rate": codec.sample_rate,
    }
