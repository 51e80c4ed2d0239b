"""New clips for a dataset that is there, without encoding its old ones."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from llasa_jax.data.builder import (
    dataset_fingerprint,
    open_dataset,
    read_metadata,
    split_sizes,
)
from llasa_jax.data.seal import SEAL, identity, read_seal, remove_dataset
from llasa_jax.data.shards import plan_shards, seal_dataset, write_shard
from llasa_jax.encode.audio_source import AudioSource, Waves
from llasa_jax.encode.bucket_journal import beside
from llasa_jax.encode.offline import Job, NoGoodClipsError, Summary, clean_up, encode_here
from llasa_jax.encode.shards import remove_shards
from llasa_jax.errors import UserError
from llasa_jax.runtime.storage import is_remote
from llasa_jax.speech.prompts import Utterance


class SomeAudio(AudioSource):
    """The clips of a source at some `indices`."""

    def __init__(self, source: AudioSource, indices: list[int]):
        self._source, self._indices = source, indices
        self.name = source.name
        self.ids = [source.ids[index] for index in indices]
        self.split_names = [source.split_names[index] for index in indices]
        places = {index: at for at, index in enumerate(indices)}
        self.faults = {
            places[index]: reason for index, reason in source.faults.items() if index in places
        }

    def utterance(self, index: int) -> Utterance:
        return self._source.utterance(self._indices[index])

    def check_text(self, index: int, text: str) -> None:
        self._source.check_text(self._indices[index], text)

    def key(self, index: int) -> tuple[str, int, int]:
        return self._source.key(self._indices[index])

    def samples(self, index: int) -> int:
        return self._source.samples(self._indices[index])

    def waves(self) -> Waves:
        return self._source.waves()

    def place(self, index: int) -> Any:
        return self._source.place(self._indices[index])


def append(job: Job) -> Summary | None:
    """Encodes the clips of a job whose ids its dataset does not have, and adds them to it; None
    where there are none, or only bad ones. The bytes are those of one `encode` of all clips, but
    for the seal's `made_from`.

    A clip that is there stays as it is, whatever the job's source says of it. Killed at any moment,
    the same command goes on; until the new dataset is whole, the old one stays where it is. Bad
    clips are a share of all of the source's. Raises `UserError` where `out` is no dataset of this
    codec's codes, or lies in a bucket.
    """
    out = job.folder
    new, fresh, last = (beside(out, suffix) for suffix in ("new", "fresh", "replaced"))
    if is_remote(out):
        raise UserError(
            f"{out}: --append works on this machine's disks; copy the dataset here first, or encode"
            " the new clips to a folder of their own and name both in data.sources."
        )
    if not out.is_dir() and (fresh / SEAL).is_file():
        fresh.rename(out)  # of a run that was killed between the two renames
    metadata = read_metadata(out)
    if last.is_dir():  # of a run that was killed when it had put the new dataset in place
        _remove(new, last)
    old = {split: open_dataset(out, split) for split, size in split_sizes(out).items() if size}
    rows = [(split, records, at) for split, records in old.items() for at in range(len(records))]
    old_ids = [str(records[at]["id"]) for _, records, at in rows]
    source, known = job.source(), set(old_ids)
    indices = [index for index, one in enumerate(source.ids) if one not in known]
    if not indices:
        _remove(new, fresh)
        print(f"{out}: has all of {source.name}'s clips.")
        return None
    part = dataclasses.replace(
        job,
        source=lambda: SomeAudio(source, indices),
        out=new,
        max_bad_share=min(1.0, job.max_bad_share * len(source) / len(indices)),
    )
    try:
        summary = encode_here(part)
    except NoGoodClipsError:
        clean_up(new)
        print(f"{out}: has all of {source.name}'s clips but {len(indices)} bad ones.")
        return None
    added = read_metadata(new)
    if added["fingerprint"] != metadata.get("fingerprint"):
        remove_dataset(new)
        raise UserError(
            f"{out}: holds codes of {metadata.get('codec')}, another codec than"
            f" {added['codec']}; append with the same."
        )
    for split, size in split_sizes(new).items():
        records = open_dataset(new, split)
        rows += [(split, records, at) for at in range(size)]
    ids = old_ids + [str(records[at]["id"]) for _, records, at in rows[len(old_ids) :]]
    shards = plan_shards(ids, [split for split, _, _ in rows], job.clips_a_file)
    _remove(fresh)
    folder = beside(fresh, "shards")
    made = [
        (shard, write_shard(folder, shard, (rows[i][1][rows[i][2]] for i in shard.members), "", []))
        for shard in shards
    ]
    before = read_seal(out).get("summary", {})
    splits: dict[str, int] = {}
    for shard, each in made:
        splits[shard.split] = splits.get(shard.split, 0) + each.examples
    hours = float(before.get("hours", 0)) + summary.hours
    kept = {"bad": before.get("bad", 0) + summary.bad, "hours": hours, "splits": splits}
    made_from = identity("append", dataset_fingerprint(out), dataset_fingerprint(new))
    seal_dataset(fresh, folder, made, metadata, made_from, kept)
    remove_shards(fresh)
    os.rename(out, last)
    os.rename(fresh, out)
    _remove(new, last)
    print(f"{out}: {len(indices) - summary.bad} clips are new; {hours:.2f} hours of speech.")
    return summary


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.is_dir():
            remove_dataset(folder)
