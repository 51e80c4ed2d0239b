"""The rows of datasets with a column of audio, as clips to encode: `hf_table` and `tfds_table` read
the formats.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from llasa_jax.data.manifest import Clip, assign_splits, file_key
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import as_codec_wave, audio_samples, read_audio, resampled_length
from llasa_jax.speech.prompts import Utterance

FIELDS = ("codes", "audio", "rate", "text", "id", "speaker", "description", "language")
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
    """One split of a dataset, with random access. Picklable. `columns`, where it is an argument,
    maps our field names to the dataset's columns.
    """

    @property
    def columns(self) -> Sequence[str]: ...

    @property
    def audio_columns(self) -> Sequence[str]:
        """Those that can only be audio."""

    @property
    def files(self) -> Sequence[str]:
        """Where the split is stored."""

    def __len__(self) -> int: ...

    def has(self, column: str) -> bool: ...

    def texts(self, index: int, columns: dict[str, str]) -> dict[str, str]:
        """Our field names with a row's texts, "" where the row has none. UserError for what is not
        a text.
        """

    def audio(self, index: int, columns: dict[str, str]) -> Audio | None:
        """The column `audio`, by the column `rate` where it is samples without a rate."""

    def samples(self, index: int, columns: dict[str, str], name: str) -> int | None:
        """How many samples its wave will have; None where there is no audio. UserError, which calls
        it `name`, for what is no audio.
        """


class TableAudio(AudioSource):
    """The rows of a dataset's splits, as clips to encode.

    `columns` maps our field names to the dataset's; empty, the usual names are looked for. Rows are
    called `<split>_<number>` unless it maps `id`; of rows that share an id all but the first are
    `faults`. `validation_share` of "train", chosen by `seed`, is the split "validation" where the
    dataset has none of its own. UserError for columns that are not there.
    """

    def __init__(
        self,
        name: str,
        tables: Mapping[str, Table],
        columns: dict[str, str],
        validation_share: float = 0.0,
        seed: int = 0,
    ):
        self.name, self.faults, self._tables = name, {}, tables
        self.columns = columns or _usual_columns(name, tables)
        check_columns(name, tables, self.columns)
        self._audio = {f: c for f, c in self.columns.items() if f in ("audio", "rate")}
        texts = {f: c for f, c in self.columns.items() if f not in self._audio}
        named = texts.pop("id", None)
        self._texts = texts
        self._rows = [(split, row) for split, table in tables.items() for row in range(len(table))]
        self.ids: list[str] = []
        first: dict[str, int] = {}
        for index, (split, row) in enumerate(self._rows):
            own = tables[split].texts(row, {"id": named})["id"] if named else ""
            clip = row_id(split, row, own)
            if clip in first:
                other = self._rows[first[clip]]
                self.faults[index] = (
                    f"{name}: rows share an id in the column {named!r}: {split} row {row} has"
                    f" {clip!r}, as {other[0]} row {other[1]} has; give each its own, or leave id"
                    " out of the columns."
                )
                clip = f"{clip} ({split} row {row})"
            first[clip] = index
            self.ids.append(clip)
        rows = zip(self.ids, self._rows, strict=True)
        clips = [
            Clip(Path(), "", clip, split="" if split == "train" else split)
            for clip, (split, _) in rows
        ]
        assigned = assign_splits(clips, 0.0 if "validation" in tables else validation_share, seed)
        self.split_names = [assigned[clip] for clip in self.ids]
        self._stamps = {split: _stamp(table.files) for split, table in tables.items()}
        self._of_paths = {s for s, table in tables.items() if holds_path(table, self._audio)}

    def utterance(self, index: int) -> Utterance:
        split, row = self._rows[index]
        texts = self._tables[split].texts(row, self._texts)
        return Utterance(codes=None, id=self.ids[index], **texts)  # type: ignore[arg-type]

    def key(self, index: int) -> tuple[str, int, int]:
        split, row = self._rows[index]
        if split in self._of_paths and isinstance(
            path := self._tables[split].audio(row, self._audio), str
        ):
            return file_key(path)
        return f"{self.name}, {split} {row}", *self._stamps[split]

    def samples(self, index: int) -> int:
        """As for `wave`. UserError too for a row without text."""
        split, row = self._rows[index]
        self.check_text(index, self._tables[split].texts(row, self._texts)["text"])
        where = self._where(index)
        samples = self._tables[split].samples(row, self._audio, where)
        if samples is None:
            raise _no_audio(where, self._audio["audio"])
        return samples

    def waves(self) -> "Rows":
        return Rows(self.name, self._tables, self._audio)

    def place(self, index: int) -> tuple[str, int]:
        return self._rows[index]

    def check_text(self, index: int, text: str) -> None:
        if not text.strip():
            raise UserError(
                f"{self._where(index)}: no text in {self._texts['text']!r}; give it one, or leave"
                " the row out."
            )

    def _where(self, index: int) -> str:
        return self.waves().where(self._rows[index])


@dataclass(frozen=True)
class Rows:
    """The audio of tables (see `Waves`), in their columns `audio` and `rate`. A place is a split
    and the number of a row in it.
    """

    name: str
    tables: Mapping[str, Table]
    columns: dict[str, str]

    def wave(self, place: tuple[str, int]) -> np.ndarray:
        split, row = place
        audio, where = self.tables[split].audio(row, self.columns), self.where(place)
        if audio is None:
            raise _no_audio(where, self.columns["audio"])
        if isinstance(audio, tuple):
            return as_codec_wave(*audio, where)
        return read_audio(audio, where)

    def where(self, place: tuple[str, int]) -> str:
        return "{}, {} row {}".format(self.name, *place)


def holds_path(table: Table, columns: dict[str, str]) -> bool:
    """Whether a table's audio lies in files of its own, by its first row."""
    try:
        return (
            "audio" in columns
            and len(table) > 0
            and table.has(columns["audio"])
            and isinstance(table.audio(0, columns), str)
        )
    except UserError:
        return False  # every row will say what is wrong


def _no_audio(where: str, column: str) -> UserError:
    return UserError(f"{where}: no audio in {column!r}; leave the row out.")


def check_columns(name: str, tables: Mapping[str, Table], columns: dict[str, str]) -> None:
    """UserError where a split lacks a column that is mapped."""
    for split, table in tables.items():
        for field, column in columns.items():
            if not table.has(column):
                raise UserError(
                    f"{name}: no column {column!r} for {field} in {split!r}; it has"
                    f" {', '.join(table.columns)}."
                )


def parse_columns(columns: str, setting: str = "--columns") -> dict[str, str]:
    """`codes=audio_codes,text=sentence` as {"codes": "audio_codes", "text": "sentence"}. UserError
    for what is no such map. `text=json.text` is the field `text` of a column of records.
    """
    pairs = [pair.partition("=") for pair in columns.split(",")]
    mapping = {name.strip(): column.strip() for name, _, column in pairs}
    if len(mapping) < len(pairs) or not set(mapping) <= set(FIELDS) or not all(mapping.values()):
        raise UserError(
            f"{setting} {columns} is no map; write codes=COLUMN,text=COLUMN and, where there are"
            f" any, {', '.join((*FIELDS[4:], 'rate'))}."
        )
    if "text" not in mapping or ("codes" in mapping) == ("audio" in mapping):
        raise UserError(
            f"{setting} {columns} must name a column for text and one for either codes or audio."
        )
    return mapping


def row_id(split: str, index: int, value: str | None = None) -> str:
    """What a row is called: what its own column says, or its split and number."""
    return f"{split}_{index:08d}" if value in (None, "") else str(value)


def _usual_columns(name: str, tables: Mapping[str, Table]) -> dict[str, str]:
    table = next(iter(tables.values()))
    found = {
        field: next(column for column in columns if column in table.columns)
        for field, columns in USUAL.items()
        if any(column in table.columns for column in columns)
    }
    if len(table.audio_columns) != 1 or "text" not in found:
        raise UserError(
            f"{name}: its columns of audio and text cannot be told from {', '.join(table.columns)};"
            " name them in data.online.columns, as audio=COLUMN,text=COLUMN."
        )
    return {"audio": table.audio_columns[0], **found}


def samples_of(audio: Audio, name: str) -> int:
    return (
        resampled_length(len(audio[0]), audio[1])
        if isinstance(audio, tuple)
        else audio_samples(audio, name)
    )


def as_floats(samples: np.ndarray) -> np.ndarray:
    """Samples of any type as float32 in [-1, 1]; integers are of 16 bits or of 32."""
    if samples.dtype.kind == "i":
        # Wider types hold 16-bit samples, or 32-bit ones, among which 16 bits would be silence.
        sixteen = (
            samples.dtype.itemsize == 2
            or not samples.size
            or np.abs(samples.astype(np.int64)).max() <= 2**15
        )
        samples = samples / np.float32(2**15 if sixteen else 2**31)
    return samples.astype(np.float32)


def _stamp(files: Iterable[str]) -> tuple[int, int]:
    """The size of the files together and their last change."""
    keys = [file_key(file) for file in files]
    return sum(size for _, size, _ in keys), max((time for *_, time in keys), default=0)
