"""Audio in prepared datasets of TFDS (tensorflow.org/datasets), read without TensorFlow."""

import functools
import os
from pathlib import Path
from unittest import mock

from llasa_jax.encode.tables import Audio, TableAudio, as_floats, samples_of
from llasa_jax.errors import UserError
from llasa_jax.runtime.files import read_json
from llasa_jax.speech.audio import resampled_length


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

    def has(self, column: str) -> bool:
        return column in self.columns

    def texts(self, index: int, columns: dict[str, str]) -> dict[str, str]:
        if index not in self._heads:
            self._look(index)
        return {
            field: self._text(column, self._heads[index][column])
            for field, column in columns.items()
        }

    def samples(self, index: int, columns: dict[str, str], name: str) -> int | None:
        column = columns["audio"]
        if index not in self._heads:
            self._look(index)
        if column not in self._heads[index]:
            audio = self.audio(index, columns)
            self._heads[index][column] = None if audio is None else samples_of(audio, name)
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

    def audio(self, index: int, columns: dict[str, str]) -> Audio | None:
        column = columns["audio"]
        audio, rate = self._source[index][column], self._rates[column]
        if isinstance(audio, bytes):
            return audio
        if not rate:
            raise UserError(
                f"{self._folder}: does not say the sample rate of {column!r}; prepare it with a"
                " newer version of TFDS."
            )
        return as_floats(audio), rate


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
