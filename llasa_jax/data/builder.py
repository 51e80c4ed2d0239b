"""The dataset on disk: a TFDS dataset of ArrayRecord files, written and read without TensorFlow.

An example is a dict of `id`, `text`, `speaker`, `description`, `language` (str) and `codes` (uint16
array (frames,)). metadata.json says which codec made the codes, seal.json which records they are.

An example of a pair has besides: `worse`, the codes of a worse speech of the text; `prompt`, how
many codes at the start of both are a voice to clone; `stopped`, whether the model ended them by
itself, the better and the worse; and `scores`, a text. Read as an utterance it is the better one.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.shuffle import DuplicatedKeysError
from tensorflow_datasets.core.utils.shard_utils import ShardConfig

from llasa_jax.data.seal import SEAL, TEXTS, RecordDigest, check_new, read_seal
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.files import is_full, read_json
from llasa_jax.runtime.storage import as_path
from llasa_jax.runtime.writing import new_folder
from llasa_jax.speech.vocab import NUM_CODES

RECORDS_A_FILE = 8_000
FEW, FEW_FILES = 1_000, 64  # small datasets are cut finer, for several devices to encode them
PAIR = ("worse", "prompt", "stopped", "scores")  # what a pair has besides an utterance
MOST_FILES = 512  # each stays open, and 1,024 open files is a usual limit


def file_count(records: int) -> int:
    """Into how many files a split of so many records is cut."""
    few = min(records // FEW, FEW_FILES)
    return max(1, few, min(records // RECORDS_A_FILE, MOST_FILES))


def _features(pairs: bool) -> tfds.features.FeaturesDict:
    codes = tfds.features.Tensor(shape=(None,), dtype=np.uint16)
    texts = dict.fromkeys(TEXTS, tfds.features.Text())
    of_pairs = {
        "worse": codes,
        "prompt": tfds.features.Scalar(np.int64),
        "stopped": tfds.features.Tensor(shape=(2,), dtype=np.bool_),
        "scores": tfds.features.Text(),
    }
    return tfds.features.FeaturesDict(texts | {"codes": codes} | (of_pairs if pairs else {}))


class LlasaSpeech(tfds.core.GeneratorBasedBuilder):
    """Utterances as text and XCodec2 codes, or with `pairs` two of each text; `splits` and
    `metadata` as in `write_dataset`.
    """

    name = "llasa_speech"
    code_path = Path(
        __file__
    )  # TFDS would look below the package's own folder, with a module it does not depend on
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "id, text, codes, speaker, description, language."}

    def __init__(
        self, splits: dict[str, Iterable[dict]], metadata: dict, pairs: bool = False, **kwargs
    ):
        self._splits, self._metadata, self._pairs = splits, metadata, pairs
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Utterances as text and XCodec2 codes, for Llasa.",
            features=_features(self._pairs),
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(examples) for split, examples in self._splits.items()
        }

    def _generate_examples(self, examples):
        for example in examples:
            try:
                codes = {
                    name: checked_codes(example[name])
                    for name in ("codes", "worse")[: 1 + self._pairs]
                }
                yield example["id"], {**example, "text": checked_text(example["text"]), **codes}
            except ValueError as error:
                raise UserError(
                    f"the record {example['id']!r} has {error}; fix it or leave it out."
                ) from None


class _ShardConfig(ShardConfig):
    """Small files: to find a record, ArrayRecord takes 2.5 us for every thousand that its file has,
    and TFDS would put 120,000 there.
    """

    @classmethod
    def calculate_number_shards(
        cls, total_size: int, num_examples: int, uses_precise_sharding: bool = True
    ) -> int:
        return file_count(num_examples)


class _DownloadConfig(tfds.download.DownloadConfig):
    def get_shard_config(self) -> ShardConfig:
        return _ShardConfig()


def serialized(serializer: ExampleSerializer, example: dict) -> bytes:
    """A record's bytes, equal in all processes: the order of an example's features is not fixed
    otherwise.
    """
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def write_dataset(
    out: str | os.PathLike,
    splits: Mapping[str, Iterable[dict]],
    metadata: dict,
    made_from: str = "",
    summary: Callable[[], dict] = dict,
    pairs: bool = False,
) -> None:
    """Writes a dataset that `tfds.builder_from_directory(out)` and `open_dataset(out, split)` read.

    `splits` gives each split's examples, streamed: memory holds at most TFDS's shuffle buffer (1
    GB; it orders records by the hash of their id). `metadata` is a flat dict, kept in
    metadata.json: codec, fingerprint, hop, sample_rate. `made_from` identifies the command and its
    input, for `is_made`; `summary()`, asked when all records are written, is kept beside it. With
    `pairs` the examples are pairs. The dataset is written to a hidden folder beside `out` and
    renamed at the end. Raises `UserError` if `out` is there already, a split is empty, two records
    of a split share an id, or a record has no text, no codes, or codes outside 0..65,535.
    """
    out = as_path(out)
    check_new(out)
    digest, fault = RecordDigest(), None
    with new_folder(out, last=SEAL) as building:
        try:
            builder = LlasaSpeech(
                splits={split: digest.of(split, rows) for split, rows in splits.items()},
                metadata=metadata,
                pairs=pairs,
                data_dir=building,
                file_format="array_record",
            )
            config = _DownloadConfig(try_download_gcs=False)
            # TFDS announces the folder that is about to be renamed.
            with (
                contextlib.redirect_stdout(io.StringIO()),
                mock.patch.object(ExampleSerializer, "serialize_example", serialized),
            ):
                builder.download_and_prepare(
                    download_dir=building / "downloads", download_config=config
                )
        except AssertionError as error:
            if "No examples" not in str(error):
                raise
            raise UserError(
                f"{out}: not written, a split has no examples; leave it out of {', '.join(splits)}."
            ) from error
        except Exception as error:  # noqa: BLE001 raised below
            fault = _explained(out, error)
        if fault is not None:
            raise fault  # out here, so that it is not made the cause of its own cause
        seal = {"records": digest.hexdigest(), "made_from": made_from, "summary": summary()}
        # Out of TFDS's NAME/VERSION, which would be empty folders in the dataset's.
        for path in Path(builder.data_path).iterdir():
            path.rename(building / path.name)
        for name in (LlasaSpeech.name, "downloads"):
            shutil.rmtree(building / name, ignore_errors=True)
        (building / SEAL).write_text(json.dumps(seal, indent=2) + "\n", encoding="utf-8")


def _explained(out: Path, error: Exception) -> Exception:
    """The error itself, or the mistake that is behind it. TFDS raises others of its own from it,
    since to say which two records share an id it needs TensorFlow.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, DuplicatedKeysError):
            return UserError(
                f"{out}: not written, two records of one split share an id; give each its own."
            )
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    # ArrayRecord tells a full disk in words alone.
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) if is_full(error) else error


def dataset_fingerprint(folder: str | os.PathLike) -> str:
    """64 hex digits that are equal for two datasets only if their splits hold the same records (all
    texts and codes), in whatever order.

    Read from what `write_dataset` kept, without looking at the records; of a dataset that lacks it,
    made from all records. Raises `UserError` as `open_dataset` does.
    """
    known = read_seal(as_path(folder)).get("records")
    if known:
        return str(known)
    digest = RecordDigest()
    for split, size in split_sizes(folder).items():
        records = open_dataset(folder, split) if size else ()
        for _ in digest.of(split, (records[i] for i in range(size))):
            pass
    return digest.hexdigest()


def record_order(ids: Sequence[str], split: str) -> np.ndarray:
    """In which order `write_dataset` puts records with these ids into a split: indices, by TFDS's
    hash of the split and the id.

    As TFDS's `Hasher`, but into one array of 16 bytes per record.
    """
    salted = hashlib.md5(hashing._to_bytes(split), usedforsecurity=False)
    digests = bytearray(16 * len(ids))
    for i, one in enumerate(ids):
        md5 = salted.copy()
        md5.update(one.replace("\\", "/").encode())
        digests[16 * i : 16 * i + 16] = md5.digest()
    halves = np.frombuffer(bytes(digests), ">u8").astype(np.uint64).reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0]))


def checked_text(text: str) -> str:
    """The text as it is. ValueError, saying what the record has instead, if it is none or blank."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no text")
    return text


def checked_codes(codes) -> np.ndarray:
    """Codes, integers (frames,), as uint16. ValueError, saying what the record has instead, where
    they are no codes of XCodec2.
    """
    codes = np.asarray(codes)
    if codes.size == 0:
        raise ValueError("no codes")
    if codes.ndim != 1 or codes.dtype.kind not in "iu":
        raise ValueError(
            f"codes of shape {codes.shape} and type {codes.dtype}, not a flat array of integers"
        )
    low, high = int(codes.min()), int(codes.max())
    if low >= 0 and high < NUM_CODES:
        return codes.astype(np.uint16)
    if low >= NUM_CODES:
        raise ValueError(
            f"codes from {low} to {high}, which look like token ids: subtract the id of <|s_0|>"
            " (128264 in Llasa's own vocabulary)"
        )
    raise ValueError(f"codes from {low} to {high}, outside 0..{NUM_CODES - 1}")


class Records:
    """One split with random access, for Grain: `len(records)` and `records[i]`, a dict of str and a
    uint16 array. Picklable.

    `pair(i)` is a dict with a pair's `PAIR` fields besides, where `has_pairs`. Reading raises
    `UserError`, naming the split as `name`, where a file is damaged.
    """

    def __init__(self, source, name: str, has_pairs: bool = False):
        self._source, self.name, self.has_pairs = source, name, has_pairs

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return _utterance(self._read(index))

    def pair(self, index: int) -> dict:
        example = self._read(index)
        return _utterance(example) | {name: example[name] for name in PAIR}

    def _read(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            example, damage = self._source[index], ""
        except RuntimeError as error:
            example, damage = {}, f" ({error})"
        # A file that was cut short may also give records without fields.
        if any(example.get(name) is None for name in ("codes", *TEXTS)):
            raise UserError(
                f"{self.name}: record {index} cannot be read, its file is damaged{damage}; copy"
                " the folder again."
            )
        return example


def _utterance(example: dict) -> dict:
    return {"codes": example["codes"], **{key: example[key].decode() for key in TEXTS}}


def open_dataset(folder: str | os.PathLike, split: str) -> Records:
    """Opens one split of a dataset that `write_dataset` made.

    Raises `UserError` if the folder is no such dataset, has no such split, or the split is empty or
    lacks one of its files.
    """
    folder = as_path(folder)
    builder = _builder(folder, split)
    info = builder.info
    if split not in info.splits:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(sorted(info.splits))}.")
    missing = [str(path) for path in info.splits[split].filepaths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"{folder}: the split {split!r} lacks {Path(missing[0]).name}; copy the whole folder"
            " again."
        )
    if not info.splits[split].num_examples:
        raise UserError(
            f"{folder}: the split {split!r} is empty; leave it out of the settings, or make the"
            " dataset again."
        )
    name = f"{folder}, split {split!r}"
    return Records(builder.as_data_source(split), name, "worse" in (info.features or {}))


def split_sizes(folder: str | os.PathLike) -> dict[str, int]:
    """How many records each split has. Raises `UserError` if the folder is no such dataset."""
    return {name: s.num_examples for name, s in _builder(as_path(folder)).info.splits.items()}


def read_metadata(folder: str | os.PathLike) -> dict:
    """The `metadata` that `write_dataset` was given. Raises `UserError` if the folder is no such
    dataset.
    """
    folder = as_path(folder)
    described = {}
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no dataset of codes, it has no {name}; make one with `llasa-jax"
                " encode`."
            )
        described[name] = read_json(
            folder / name, "the dataset's description", fix="copy the whole folder again."
        )
    name = described["dataset_info.json"].get("name")
    if name != LlasaSpeech.name:
        raise UserError(
            f"{folder}: a TFDS dataset named {name!r}, not {LlasaSpeech.name!r}; make one with"
            " `llasa-jax encode`."
        )
    return described["metadata.json"]


def _builder(folder: Path, split: str = ""):
    """TFDS's builder of a dataset's folder. Raises `UserError` where that is none, or damaged.

    Of a bucket it is one of the local copy, which has the record files of `split` only.
    """
    read_metadata(folder)
    records = re.compile(rf"llasa_speech-{re.escape(split)}\.array_record-.*") if split else None

    def wanted(name: str) -> bool:
        return not name.count(".array_record-") or bool(records and records.fullmatch(name))

    local = local_copy(folder, wanted)
    try:
        return tfds.builder_from_directory(local)
    except Exception as error:  # noqa: BLE001 of whatever is wrong in its files
        raise UserError(
            f"{folder}: damaged, TFDS cannot open it ({first_line(error)}); copy the whole folder"
            " again."
        ) from error
