"""Audio in datasets of Hugging Face and of TFDS, as `AudioSource`s (see llasa_jax/readers.py) for
online training.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol
from unittest import mock

import numpy as np

from llasa_jax.data.manifest import Clip, assign_splits, file_key
from llasa_jax.encode.hf_dataset import load_splits, row_id, row_texts
from llasa_jax.errors import UserError
from llasa_jax.runtime.files import read_json
from llasa_jax.speech.audio import as_codec_wave, audio_samples, read_audio, resampled_length
from llasa_jax.speech.prompts import Utterance

# What well-known datasets call their columns, the best first; tried where data.online.columns is
# empty.
USUAL = {
    "text": (
        "text_normalized",
        "normalized_text",
        "text",
        "sentence",
        "transcript",
        "transcription",
    ),
    "speaker": ("speaker", "speaker_id"),
}
Audio = str | bytes | tuple[np.ndarray, int]  # a file, a file's bytes, or samples and their rate


class Table(Protocol):
    """One split of a dataset, with random access. Picklable."""

    columns: Sequence[str]
    audio_columns: Sequence[str]  # those that can only be audio
    files: Sequence[str]  # where it lies

    def __len__(self) -> int: ...

    def texts(self, index: int, columns: dict[str, str]) -> dict[str, str]:
        """Our field names with a row's texts, by a map of field names to columns."""

    def audio(self, index: int, column: str) -> Audio | None: ...

    def samples(self, index: int, column: str, name: str) -> int | None:
        """How many samples its wave will have; None where there is no audio. UserError, which calls
        it `name`, for what is no audio.
        """


class TableAudio:
    """The rows of a dataset's splits, as an `AudioSource`.

    `columns` maps our field names to the dataset's; empty, the usual names are looked for. Rows are
    called `<split>_<number>` unless it maps `id`. As with `import-hf-dataset`, `validation_share`
    of "train" is the split "validation" where the dataset has none of its own.
    """

    def __init__(
        self,
        name: str,
        tables: dict[str, Table],
        columns: dict[str, str],
        validation_share: float = 0.0,
        seed: int = 0,
    ):
        self.name, self._tables = name, tables
        self.columns = columns or _usual_columns(name, tables)
        for split, table in tables.items():
            for field, column in self.columns.items():
                if column not in table.columns:
                    raise UserError(
                        f"{name}: no column {column!r} for {field} in {split!r}; it has"
                        f" {', '.join(table.columns)}."
                    )
        self._audio = self.columns["audio"]
        self._fields = {field: column for field, column in self.columns.items() if field != "audio"}
        self._rows = [(split, row) for split, table in tables.items() for row in range(len(table))]
        named = self._fields.pop("id", None)
        own = (
            tables[split].texts(row, {"id": named})["id"] if named else ""
            for split, row in self._rows
        )
        self._ids = [row_id(*row, value) for row, value in zip(self._rows, own, strict=True)]
        if len(set(self._ids)) < len(self._ids):
            raise UserError(
                f"{name}: rows share an id in the column {named!r}; leave id out of"
                " data.online.columns."
            )
        rows = zip(self._ids, self._rows, strict=True)
        clips = [
            Clip(Path(), "", clip, split="" if split == "train" else split)
            for clip, (split, _) in rows
        ]
        assigned = assign_splits(clips, 0.0 if "validation" in tables else validation_share, seed)
        self._splits = [assigned[clip] for clip in self._ids]
        self._stamps = {split: _stamp(table.files) for split, table in tables.items()}

    def __len__(self) -> int:
        return len(self._rows)

    def split(self, name: str) -> Sequence[int]:
        from llasa_jax.data.builder import record_order

        indices = [index for index, split in enumerate(self._splits) if split == name]
        if not indices:
            raise UserError(
                f"{self.name}: no split {name!r}, it has {', '.join(sorted(set(self._splits)))}."
            )
        return [indices[i] for i in record_order([self._ids[index] for index in indices], name)]

    def utterance(self, index: int) -> Utterance:
        split, row = self._rows[index]
        return Utterance(
            **self._tables[split].texts(row, self._fields), id=self._ids[index], codes=None
        )

    def key(self, index: int) -> tuple[str, int, int]:
        split, row = self._rows[index]
        return f"{self.name}, {split} {row}", *self._stamps[split]

    def samples(self, index: int) -> int:
        """As for `wave`. UserError too for a row without text."""
        split, row = self._rows[index]
        if not self._tables[split].texts(row, self._fields)["text"].strip():
            raise UserError(
                f"{self._where(index)}: no text in {self._fields['text']!r}; give it one, or leave"
                " the row out."
            )
        return self._there(index, self._tables[split].samples(row, self._audio, self._where(index)))

    def wave(self, index: int) -> np.ndarray:
        split, row = self._rows[index]
        audio = self._there(index, self._tables[split].audio(row, self._audio))
        return (
            as_codec_wave(*audio, self._where(index))
            if isinstance(audio, tuple)
            else read_audio(audio, self._where(index))
        )

    def _there(self, index: int, value):
        if value is None:
            raise UserError(
                f"{self._where(index)}: no audio in {self._audio!r}; leave the row out."
            )
        return value

    def _where(self, index: int) -> str:
        split, row = self._rows[index]
        return f"{self.name}, {split} row {row}"


def open_hf_audio(
    source: str, columns: dict[str, str], validation_share: float = 0.0, seed: int = 0
) -> TableAudio:
    """A folder or hub id as `import-hf-dataset` takes it, with a column of audio; `NAME:CONFIG` for
    one with configurations.
    """
    name, _, config = (source, "", "") if os.path.exists(source) else source.partition(":")
    tables = {split: HFTable(rows) for split, rows in load_splits(name, config or None).items()}
    return TableAudio(source, tables, columns, validation_share, seed)


class HFTable:
    """A split of a `datasets.Dataset`, memory-mapped; its audio is decoded here and not by
    torchcodec.
    """

    def __init__(self, rows):
        self._rows, self._views = rows, {}
        self.columns = rows.column_names
        self.audio_columns = [
            column for column, feature in rows.features.items() if type(feature).__name__ == "Audio"
        ]
        self.files = [file["filename"] for file in rows.cache_files]

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, index: int, columns: dict[str, str]) -> dict[str, str]:
        return row_texts(self._columns(*columns.values())[index], columns)

    def audio(self, index: int, column: str) -> Audio | None:
        audio = self._columns(column)[index][column]
        if audio is None:
            return None
        if audio.get("array") is not None:
            return np.asarray(audio["array"], np.float32), audio["sampling_rate"]
        return audio.get("bytes") or audio["path"]

    def samples(self, index: int, column: str, name: str) -> int | None:
        audio = self.audio(index, column)
        return audio if audio is None else _samples(audio, name)

    def _columns(self, *names: str):
        """The rows with these columns alone, so that nothing of the others is read."""
        if names not in self._views:
            self._views[names] = self._rows.select_columns(list(dict.fromkeys(names)))
        return self._views[names]


def open_tfds_audio(
    name: str, columns: dict[str, str], validation_share: float = 0.0, seed: int = 0
) -> TableAudio:
    """A prepared TFDS dataset: its folder, or a name such as `ljspeech` or `librispeech:2.1.1` in
    TFDS's data folder.
    """
    folder = _builder(name).info.data_dir
    splits = [split for split, info in _builder(folder).info.splits.items() if info.num_examples]
    return TableAudio(
        f"tfds:{name}",
        {split: TFDSTable(folder, split) for split in splits},
        columns,
        validation_share,
        seed,
    )


class TFDSTable:
    """A split of a TFDS dataset in ArrayRecord files. It goes to other processes by its folder's
    name.
    """

    def __init__(self, folder: str, split: str):
        self._folder, self._split = folder, split
        builder = _builder(folder)
        if builder.info.file_format.value != "array_record":
            raise UserError(
                f"{folder}: files of {builder.info.file_format.value}, which have no random access;"
                " prepare it again with file_format='array_record' (tfds build"
                " --file_format=array_record)."
            )
        self._source, self._names = builder.as_data_source(split), builder.info.features
        self._rates = _read_features(folder)[1]
        self._heads: dict[int, dict] = {}
        self.columns, self.audio_columns = list(self._names), list(self._rates)
        self.files = [str(path) for path in builder.info.splits[split].filepaths]

    def __reduce__(self):
        return TFDSTable, (self._folder, self._split)

    def __len__(self) -> int:
        return len(self._source)

    def texts(self, index: int, columns: dict[str, str]) -> dict[str, str]:
        if index not in self._heads:
            self._look(index)
        return {
            field: self._text(column, self._heads[index][column])
            for field, column in columns.items()
        }

    def samples(self, index: int, column: str, name: str) -> int | None:
        if index not in self._heads:
            self._look(index)
        if column not in self._heads[index]:
            self._heads[index][column] = _samples(self.audio(index, column), name)
        return self._heads[index][column]

    def _look(self, index: int) -> None:
        """Keeps all of a row but the audio, of which the length: TFDS decodes the whole row
        whatever is wanted, 5 ms for 10 seconds.
        """
        row = self._source[index]
        arrays = {
            column: rate
            for column, rate in self._rates.items()
            if rate and not isinstance(row[column], bytes)
        }
        lengths = {
            column: resampled_length(len(row[column]), rate) for column, rate in arrays.items()
        }
        self._heads[index] = {
            column: value for column, value in row.items() if column not in self._rates
        } | lengths

    def _text(self, column: str, value) -> str:
        if hasattr(self._names[column], "int2str"):
            return self._names[column].int2str(int(value))
        return value.decode() if isinstance(value, bytes) else str(value)

    def audio(self, index: int, column: str) -> Audio | None:
        audio, rate = self._source[index][column], self._rates[column]
        if isinstance(audio, bytes):
            return audio
        if not rate:
            raise UserError(
                f"{self._folder}: does not say the sample rate of {column!r}; prepare it with a"
                " newer version of TFDS."
            )
        if audio.dtype.kind == "i":
            # Wider types hold 16-bit samples, or 32-bit ones, among which 16 bits would be silence.
            sixteen = (
                audio.dtype.itemsize == 2
                or not audio.size
                or np.abs(audio.astype(np.int64)).max() <= 2**15
            )
            audio = audio / np.float32(2**15 if sixteen else 2**31)
        return audio.astype(np.float32), rate


def is_tfds_folder(path: str | os.PathLike) -> bool:
    return all((Path(path) / name).is_file() for name in ("features.json", "dataset_info.json"))


@functools.lru_cache(maxsize=8)
def _builder(name: str):
    """The TFDS builder of a folder or a prepared dataset's name, which gives audio as it is stored.

    TFDS's own audio feature needs TensorFlow, if only to name a type. Raises UserError where there
    is no such dataset.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.features.feature import FeatureConnector
    from tensorflow_datasets.core.features.top_level_feature import TopLevelFeature

    def plain(folder):
        features = FeatureConnector.from_json(_read_features(folder)[0])
        features.load_metadata(folder, feature_name=None)
        return features

    try:
        with mock.patch.object(TopLevelFeature, "from_config", plain):
            return (
                tfds.builder_from_directory(name)
                if is_tfds_folder(name)
                else tfds.core.read_only_builder.builder_from_files(name)
            )
    except (tfds.core.DatasetNotFoundError, OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"tfds:{name}: cannot be opened ({' '.join(str(error).split())}); prepare it where"
            f" TensorFlow is installed (tfds build {name} --file_format=array_record), and name its"
            " folder or set TFDS_DATA_DIR."
        ) from error


def _read_features(folder: str | os.PathLike) -> tuple[dict, dict[str, int]]:
    """The features of features.json with audio as plain arrays or bytes, and each audio column's
    sample rate (0 if unknown).
    """
    described = read_json(Path(folder) / "features.json", "the TFDS dataset's features")
    audio = {}
    for column, feature in described.get("featuresDict", {}).get("features", {}).items():
        if not feature["pythonClassName"].endswith(".audio_feature.Audio"):
            continue
        content = feature.pop("audio")
        audio[column] = int(content.get("sampleRate", 0))
        module = "tensorflow_datasets.core.features."
        if content.get("lazyDecode"):
            feature |= {"pythonClassName": f"{module}text_feature.Text", "text": {}}
        else:
            tensor = {
                "shape": content["shape"],
                "dtype": content["dtype"],
                "encoding": content.get("encoding", "none").lower(),
            }
            feature |= {"pythonClassName": f"{module}tensor_feature.Tensor", "tensor": tensor}
    return described, audio


def _usual_columns(name: str, tables: dict[str, Table]) -> dict[str, str]:
    table = next(iter(tables.values()))
    found = {
        field: next((column for column in columns if column in table.columns), None)
        for field, columns in USUAL.items()
    }
    found = {field: column for field, column in found.items() if column}
    if len(table.audio_columns) != 1 or "text" not in found:
        raise UserError(
            f"{name}: its columns of audio and text cannot be told from {', '.join(table.columns)};"
            " name them in data.online.columns, as audio=COLUMN,text=COLUMN."
        )
    return {"audio": table.audio_columns[0], **found}


def _samples(audio: Audio, name: str) -> int:
    return (
        resampled_length(len(audio[0]), audio[1])
        if isinstance(audio, tuple)
        else audio_samples(audio, name)
    )


def _stamp(files: Iterable[str]) -> tuple[int, int]:
    """The size of the files together and their last change."""
    keys = [file_key(file) for file in files]
    return sum(size for _, size, _ in keys), max((time for *_, time in keys), default=0)
