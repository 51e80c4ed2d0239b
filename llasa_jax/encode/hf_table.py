"""Audio in Hugging Face datasets (https://huggingface.co/docs/datasets). Needs the extra
`[datasets]`.
"""

import json
import math
import os
import re
from pathlib import Path

import numpy as np

from llasa_jax.encode.tables import Audio, TableAudio, as_floats, samples_of
from llasa_jax.errors import UserError

SPLIT_NAMES = {"val": "validation", "dev": "validation", "valid": "validation"}


def load_splits(source: str | os.PathLike, config: str | None) -> dict:
    """Each split of `source` (see `import_hf_dataset`), memory-mapped, with audio as its bytes.
    UserError where it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading Hugging Face datasets needs the package `datasets`; run `pip install"
            " 'llasa-jax[datasets]'`."
        ) from None
    folder = Path(source)
    saved = folder.is_dir() and any(
        (folder / name).is_file() for name in ("dataset_dict.json", "state.json")
    )
    try:
        loaded = (
            datasets.load_from_disk(folder) if saved else datasets.load_dataset(str(source), config)
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: cannot be loaded ({' '.join(str(error).split())}); check the folder, or the"
            " name and the network."
        ) from error
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    splits = {}
    for split, rows in loaded.items():
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Audio):
                rows = rows.cast_column(column, datasets.Audio(decode=False))
        splits[split_name(split)] = rows
    return splits


def split_name(name: str) -> str:
    """What we call a split of Hugging Face's."""
    return SPLIT_NAMES.get(name, re.sub(r"\W", "_", name))


def open_hf_audio(
    source: str | os.PathLike,
    columns: dict[str, str],
    validation_share: float = 0.0,
    seed: int = 0,
    config: str | None = None,
) -> TableAudio:
    """A folder or hub id as `load_splits` takes it, with a column of audio."""
    tables = {
        split: HFTable(rows, str(source)) for split, rows in load_splits(source, config).items()
    }
    name = f"{source}:{config}" if config else str(source)
    return TableAudio(name, tables, columns, validation_share, seed)


class HFTable:
    """A split of a `datasets.Dataset`, memory-mapped; its audio is decoded here and not by
    torchcodec. Paths in it may be relative to its `folder`.
    """

    def __init__(self, rows, folder: str = ""):
        self._rows, self._folder = rows, folder
        self._views: dict = {}
        self.columns = rows.column_names
        self.audio_columns = [
            column for column, feature in rows.features.items() if type(feature).__name__ == "Audio"
        ]
        self.files = [file["filename"] for file in rows.cache_files]

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, column: str) -> bool:
        """`json.text` is the field `text` of the column `json`."""
        return column in self.columns or column.partition(".")[0] in self.columns

    def texts(self, index: int, columns: dict[str, str]) -> dict[str, str]:
        tops = {field: self._top(column) for field, column in columns.items()}
        row = self._columns(*tops.values())[index]
        return {
            field: self._text(column, row[tops[field]], columns[field].removeprefix(column + "."))
            for field, column in tops.items()
        }

    def audio(self, index: int, columns: dict[str, str]) -> Audio | None:
        row = self._columns(*columns.values())[index]
        audio = row[columns["audio"]]
        if isinstance(audio, dict):
            if audio.get("array") is not None:
                return np.asarray(audio["array"], np.float32), audio["sampling_rate"]
            # An upload keeps the name of the file beside its bytes.
            audio = audio.get("bytes") or audio.get("path")
        if audio is None or isinstance(audio, bytes):
            return audio
        if isinstance(audio, str):
            beside = os.path.join(self._folder, audio)
            return beside if os.path.exists(beside) else audio
        rate = row.get(columns.get("rate"))
        if not isinstance(rate, int | float) or not 0 < rate < 10**7:
            raise UserError(
                f"the column {columns['audio']!r} holds samples without a usable sample rate"
                f" ({rate}); name the column of their rate, in Hz, as rate=COLUMN."
            )
        return as_floats(np.asarray(audio)), int(rate)

    def samples(self, index: int, columns: dict[str, str], name: str) -> int | None:
        audio = self.audio(index, columns)
        return audio if audio is None else samples_of(audio, name)

    def values(self, index: int, column: str):
        """A row's column as it is."""
        return self._columns(column)[index][column]

    def _top(self, column: str) -> str:
        return column if column in self.columns else column.partition(".")[0]

    def _text(self, column: str, value, path: str) -> str:
        """A value as text. `path` leads to it where it is a field of a record, "a.b"."""
        if path != column and value is not None:
            for name in path.split("."):
                value = json.loads(value) if isinstance(value, str | bytes) else value
                if not isinstance(value, dict) or name not in value:
                    has = ", ".join(value) if isinstance(value, dict) else "no fields"
                    raise UserError(f"the column {column!r} has no field {path!r}, it has {has}.")
                value = value[name]
        elif hasattr(self._rows.features[column], "int2str") and value is not None:
            return self._rows.features[column].int2str(value)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, float) and value.is_integer():
            return str(int(value))  # pandas makes floats of numbers among which one is missing
        if isinstance(value, dict | list):
            fields = ", ".join(f"{column}.{name}" for name in value) if value else "nothing"
            raise UserError(
                f"the column {column!r} holds "
                + (f"records, with {fields}" if isinstance(value, dict) else "lists")
                + ", and not texts; name a column or field of texts."
            )
        return str(value)

    def _columns(self, *names: str):
        """The rows with these columns alone, so that nothing of the others is read."""
        if names not in self._views:
            self._views[names] = self._rows.select_columns(list(dict.fromkeys(names)))
        return self._views[names]
