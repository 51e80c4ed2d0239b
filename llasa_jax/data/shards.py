"""A dataset in shards: which records go into which file is known from their ids alone, so files can
be made anywhere, in any order, and become the dataset that `write_dataset` would have written.

TFDS orders a split by the hash of its ids and cuts it into files of nearly equal counts. A shard is
one such file. Beside it lies a small JSON file that says what is in it, written last: where that is
there, the shard is whole.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.utils.shard_utils import get_shard_boundaries
from tensorflow_datasets.core.writer import ExampleWriter, ShardWriter

from llasa_jax.data.builder import LlasaSpeech, file_count, record_order, serialized
from llasa_jax.data.seal import SEAL, RecordDigest
from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.files import read_json
from llasa_jax.runtime.storage import is_remote, reaching
from llasa_jax.runtime.writing import new_file, new_folder, write_whole


@dataclass(frozen=True)
class Shard:
    """One file of a split: the `number`-th of `count`. `members` are the indices of its clips, in
    the file's order.
    """

    split: str
    number: int
    count: int
    members: np.ndarray = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05}-of-{self.count:05}"

    @property
    def file(self) -> str:
        return record_file(self.split, self.number, self.count)


@dataclass(frozen=True)
class Made:
    """What a shard's JSON file says: which command `made_from` what, the sum of its records' hashes
    (see `RecordDigest`), how many there are and their bytes, the codes in them, and the clips that
    are `bad`.
    """

    made_from: str
    records: str
    examples: int
    size: int
    frames: int
    bad: list[dict[str, str]]


def record_file(split: str, number: int, count: int) -> str:
    return f"{LlasaSpeech.name}-{split}.array_record-{number:05}-of-{count:05}"


def plan_shards(
    ids: Sequence[str], split_names: Sequence[str], clips_a_file: int = 0
) -> list[Shard]:
    """The shards of all splits, in the order of their names. `clips_a_file` 0 is as many as
    `file_count` says.
    """
    names = np.asarray(split_names)
    shards = []
    for split in sorted({str(name) for name in np.unique(names)}):
        members = np.flatnonzero(names == split)
        members = members[record_order([ids[int(i)] for i in members], split)]
        count = max(1, len(members) // clips_a_file) if clips_a_file else file_count(len(members))
        ends = get_shard_boundaries(len(members), count)
        shards += [
            Shard(split, number, count, members[start:end])
            for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]
    return shards


def write_shard(
    folder: Path,
    shard: Shard,
    records: Iterable[dict],
    made_from: str,
    bad: list[dict[str, str]],
) -> Made:
    """Writes a shard's file of these records, in its order, to `folder`, and what is in it.
    UserError where a bucket does not take it, OSError where the disk does not.
    """
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    features = _builder({}, folder).info.features
    digest, size, frames = RecordDigest(), 0, 0

    class Counting(ExampleWriter):
        def write(self, path, examples):
            def counted():
                nonlocal size
                for key, example in examples:
                    size += len(example)
                    yield key, example

            return super().write(path, counted())

    def examples() -> Iterator[tuple[int, dict]]:
        nonlocal frames
        for record in digest.of(shard.split, records):
            frames += len(record["codes"])
            yield 0, record

    serializer = _Serializer(features.get_serialized_info())
    writer = ShardWriter(features, serializer, Counting(tfds.core.FileFormat.ARRAY_RECORD))
    with new_file(folder / shard.file) as partial:
        count = writer.write(examples(), partial)
    made = Made(made_from, digest.hexdigest(), count, size, frames, bad)
    write_whole(folder / f"{shard.name}.json", json.dumps(dataclasses.asdict(made)) + "\n")
    return made


class _Serializer(ExampleSerializer):
    def serialize_example(self, example: dict) -> bytes:
        return serialized(self, example)


def read_shard(folder: Path, shard: Shard) -> Made | None:
    """What is in a shard that was made in `folder`; None where it is not there whole."""
    path = folder / f"{shard.name}.json"
    if not path.is_file() or not (folder / shard.file).is_file():
        return None
    said = read_json(path, "the shard's description", fix="delete it, and the shard is made again.")
    try:
        return Made(**said)
    except TypeError:
        return None


def forget_shard(folder: Path, shard: Shard) -> None:
    """Deletes the description of a shard that was made in `folder`, so that it is made again."""
    path = folder / f"{shard.name}.json"
    if path.is_file():
        path.unlink()


def seal_dataset(
    out: Path,
    folder: Path,
    shards: Sequence[tuple[Shard, Made]],
    metadata: dict,
    made_from: str,
    summary: dict,
) -> None:
    """Makes the dataset `out` of all its shards in `folder`, as `write_dataset` writes it: whole or
    not at all. Splits without any record are left out.
    """
    lengths: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    records = 0
    for shard, made in shards:
        lengths.setdefault(shard.split, []).append(made.examples)
        sizes[shard.split] = sizes.get(shard.split, 0) + made.size
        records += int(made.records, 16)
    used = {split for split in lengths if sum(lengths[split])}
    with new_folder(out, sum(sizes.values()) if is_remote(out) else 0, last=SEAL) as building:
        for shard, _ in shards:
            if shard.split in used:
                _bring(folder / shard.file, building / shard.file)
        builder = _builder(metadata, building)
        builder.info.set_splits(
            tfds.core.splits.SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=split,
                        shard_lengths=lengths[split],
                        num_bytes=sizes[split],
                        filename_template=builder._get_filename_template(split),
                    )
                    for split in sorted(used)
                ]
            )
        )
        builder.info.write_to_directory(building)
        seal = {
            "records": f"{records % 2**256:064x}",
            "made_from": made_from,
            "summary": summary,
        }
        (building / SEAL).write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")


def _bring(source: Path, destination: Path) -> None:
    """A shard's file into the folder that is made: a second name for it, or a copy where the disk
    is another.
    """
    if is_remote(source):
        with reaching(source):
            storage.file_system(source).get_file(os.fspath(source), str(destination))
        return
    try:
        os.link(source, destination)
    except FileNotFoundError:
        raise UserError(
            f"{source}: has vanished while the dataset was sealed; make it again."
        ) from None
    except OSError:
        shutil.copyfile(source, destination)


def _builder(metadata: dict, folder: Path) -> LlasaSpeech:
    place = "." if is_remote(folder) else folder
    return LlasaSpeech(splits={}, metadata=metadata, data_dir=place, file_format="array_record")
