"""Any Hugging Face `datasets` folder or hub id with columns of codes, or of audio, as a dataset.
Needs the extra `[datasets]`.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.data.bad_list import reason_of
from llasa_jax.data.import_codes import as_codes
from llasa_jax.data.importing import UNKNOWN_CODEC, Imported, Noted, write_import
from llasa_jax.data.manifest import Clip, assign_splits, file_key
from llasa_jax.data.seal import identity
from llasa_jax.encode.hf_table import HFTable, load_splits
from llasa_jax.encode.offline import MAX_CLIP_SECONDS, Job, Summary, encode_here
from llasa_jax.encode.parquet_table import ParquetTable, open_parquet
from llasa_jax.encode.tables import TableAudio, check_columns, holds_path, row_id
from llasa_jax.errors import UserError
from llasa_jax.runtime.storage import is_remote


def import_hf_dataset(
    source: str | os.PathLike,
    out: str | os.PathLike,
    columns: dict[str, str],
    codec: str | Codec,
    device: str = "cpu",
    config: str | None = None,
    codec_name: str = UNKNOWN_CODEC,
    code_offset: int = 0,
    validation_share: float = 0.0,
    seed: int = 0,
    max_bad_share: float = 0.05,
    workers: int = 4,
    max_clip_seconds: float = MAX_CLIP_SECONDS,
) -> Imported | Summary:
    """Imports every split of `source` into the new dataset `out`; `columns` maps our field names to
    its columns (see `parse_columns`).

    `source` is a folder that `save_to_disk` wrote, or whatever `load_dataset(source, config)`
    takes. Codes are lists of integers, from which `code_offset` is subtracted. Audio, in any form
    that `HFTable` knows, is encoded with `codec` on `device` as `encode` does it, straight from the
    dataset's files; `codec_name` is for codes alone. `val` and `dev` become `validation`; where
    there is no such split, `validation_share` of `train` does, chosen as in `encode`. Rows that
    cannot be used are listed in `<out>.bad.jsonl`. Raises UserError where `datasets` is not
    installed, a column is missing, or too many rows are bad.
    """
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share is {validation_share}; give a share in [0, 1).")
    name = f"{source}:{config}" if config else str(source)
    tables = _open_tables(source, config, columns)
    check_columns(name, tables, columns)
    if "audio" in columns:
        audio = TableAudio(name, tables, columns, validation_share, seed)
        audio.read_forward = all(isinstance(table, ParquetTable) for table in tables.values())
        if any(map(is_remote, (file for table in tables.values() for file in table.files))):
            workers = 1  # each reads all files, which may be a large download
        return encode_here(
            Job(
                lambda: audio,
                out,
                codec,
                device,
                max_bad_share,
                workers=workers,
                max_clip_seconds=max_clip_seconds,
            )
        )
    parts = {split: (split, np.arange(len(table))) for split, table in tables.items()}
    if "train" in tables and validation_share and "validation" not in tables:
        held_out = _held_out(tables["train"], columns.get("id"), validation_share, seed)
        parts["train"] = "train", np.flatnonzero(~held_out)
        parts["validation"] = "train", np.flatnonzero(held_out)
    streams = {
        part: _rows(split, tables[split], indices, columns, code_offset)
        for part, (split, indices) in parts.items()
        if len(indices)
    }
    made_from = identity(
        "import-hf-dataset",
        (codec_name, code_offset, validation_share, seed),
        sorted(columns.items()),
        (
            (split, len(table), *(file_key(file)[1:] for file in table.files))
            for split, table in tables.items()
        ),
    )
    return write_import(source, out, streams, codec_name, max_bad_share, made_from)


def _open_tables(
    source: str | os.PathLike, config: str | None, columns: dict[str, str]
) -> Mapping[str, HFTable]:
    """The splits, in Parquet files where they lie; those whose audio is in files of its own as
    `load_splits` has them, for they are small and wanted in any order.
    """
    parquet = open_parquet(source, config)
    if parquet and not any(holds_path(table, columns) for table in parquet.values()):
        return parquet
    return {
        split: HFTable(rows, str(source)) for split, rows in load_splits(source, config).items()
    }


def _held_out(table: HFTable, column: str | None, share: float, seed: int) -> np.ndarray:
    """Which rows of "train" are held out for validation: bool (rows,)."""
    ids = [
        row_id("train", i, table.texts(i, {"id": column})["id"] if column else "")
        for i in range(len(table))
    ]
    assigned = assign_splits([Clip(Path(), "", clip) for clip in ids], share, seed)
    return np.array([assigned[clip] == "validation" for clip in ids])


def _rows(
    split: str, table: HFTable, indices: np.ndarray, columns: dict[str, str], code_offset: int
) -> Iterator[dict | Noted]:
    texts = {field: column for field, column in columns.items() if field != "codes"}
    for index in map(int, indices):
        try:
            row = table.texts(index, texts)
            clip = row_id(split, index, row.get("id"))
            codes = as_codes(table.values(index, columns["codes"]), code_offset)
        except Exception as error:  # noqa: BLE001 one row never ends all
            yield Noted(row_id(split, index), reason_of(error))
            continue
        yield {**row, "id": clip, "codes": codes}
