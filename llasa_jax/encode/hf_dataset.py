"""Any Hugging Face `datasets` folder or hub id with columns of codes, or of audio, as a dataset.
Needs the extra `[datasets]`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.data.builder import check_new
from llasa_jax.data.import_codes import as_codes
from llasa_jax.data.importing import UNKNOWN_CODEC, Imported, write_import
from llasa_jax.data.manifest import Clip, assign_splits
from llasa_jax.encode.offline import Summary, encode
from llasa_jax.errors import UserError

FIELDS = ("codes", "audio", "text", "id", "speaker", "description", "language")
SPLIT_NAMES = {"val": "validation", "dev": "validation", "valid": "validation"}


def parse_columns(columns: str, setting: str = "--columns") -> dict[str, str]:
    """`codes=audio_codes,text=sentence` as {"codes": "audio_codes", "text": "sentence"}. UserError
    for what is no such map.
    """
    pairs = [pair.partition("=") for pair in columns.split(",")]
    mapping = {name.strip(): column.strip() for name, _, column in pairs}
    if len(mapping) < len(pairs) or not set(mapping) <= set(FIELDS) or not all(mapping.values()):
        raise UserError(
            f"{setting} {columns} is no map; write codes=COLUMN,text=COLUMN and, where there are"
            f" any, {', '.join(FIELDS[3:])}."
        )
    if "text" not in mapping or ("codes" in mapping) == ("audio" in mapping):
        raise UserError(
            f"{setting} {columns} must name a column for text and one for either codes or audio."
        )
    return mapping


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
) -> Imported | Summary:
    """Imports every split of `source` into the new dataset `out`; `columns` maps our field names to
    its columns.

    `source` is a folder that `save_to_disk` wrote, or whatever `load_dataset(source, config)`
    takes. Codes are lists of integers, from which `code_offset` is subtracted. Audio is written out
    to `<out>.audio/`, encoded with `codec` on `device` by `encode`, and deleted; `codec_name` is
    for codes alone. `val` and `dev` become `validation`; where there is no such split,
    `validation_share` of `train` does, chosen as in `encode`. Raises UserError where `datasets` is
    not installed, a column is missing, or rows are bad.
    """
    out = Path(os.path.abspath(out))
    check_new(out)
    splits = load_splits(source, config)
    for name, column in columns.items():
        for split, rows in splits.items():
            if column not in rows.column_names:
                raise UserError(
                    f"{source}: no column {column!r} for {name} in {split!r}; it has"
                    f" {', '.join(rows.column_names)}."
                )
    if "audio" in columns:
        return _encode(
            splits,
            out,
            columns,
            codec,
            device,
            0.0 if "validation" in splits else validation_share,
            seed,
            max_bad_share,
        )
    parts = {}
    for split, rows in splits.items():
        parts[split] = np.arange(len(rows))
        if split == "train" and validation_share and "validation" not in splits:
            ids = [
                row_id(split, i, value)
                for i, value in enumerate(
                    rows[columns["id"]] if "id" in columns else [None] * len(rows)
                )
            ]
            assigned = assign_splits(
                [Clip(Path(), "", row_id) for row_id in ids], validation_share, seed
            )
            held_out = np.array([assigned[row_id] == "validation" for row_id in ids])
            parts |= {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
    streams = {
        part: _rows(
            part if part in splits else "train",
            splits.get(part, splits.get("train")),
            indices,
            columns,
            code_offset,
        )
        for part, indices in parts.items()
    }
    return write_import(source, out, streams, codec_name, max_bad_share)


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
        splits[SPLIT_NAMES.get(split, re.sub(r"\W", "_", split))] = rows
    return splits


def row_id(split: str, index: int, value: str | None = None) -> str:
    """What a row is called: what its own column says, or its split and number."""
    return f"{split}_{index:08d}" if value in (None, "") else str(value)


def row_texts(row: dict, columns: dict[str, str]) -> dict[str, str]:
    """A row's values under our field names, as texts."""
    return {
        name: "" if row[column] is None else str(row[column]) for name, column in columns.items()
    }


def _fields(split: str, index: int, row: dict, columns: dict[str, str]) -> dict[str, str]:
    texts = row_texts(
        row, {name: column for name, column in columns.items() if name not in ("codes", "audio")}
    )
    return texts | {"id": row_id(split, index, texts.get("id"))}


def _rows(
    split: str, rows, indices: np.ndarray, columns: dict[str, str], code_offset: int
) -> Iterator[dict]:
    for index in indices:
        row = rows[int(index)]
        yield {
            **_fields(split, index, row, columns),
            "codes": as_codes(row[columns["codes"]], code_offset),
        }


def _encode(
    splits: dict,
    out: Path,
    columns: dict,
    codec: str | Codec,
    device: str,
    validation_share: float,
    seed: int,
    bad: float,
) -> Summary:
    """Writes the audio and a manifest to `<out>.audio/`, from where an interrupted run goes on, and
    encodes them.
    """
    folder = out.with_name(f"{out.name}.audio")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    with manifest.open("w", encoding="utf-8") as lines:
        for split, rows in splits.items():
            for index in range(len(rows)):
                row = rows[index]
                line = _fields(split, index, row, columns) | {
                    "audio": _write_audio(folder / f"{split}_{index:08d}", row[columns["audio"]])
                }
                line |= {} if split == "train" else {"split": split}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    summary = encode(manifest, out, codec, device, validation_share, seed, bad)
    shutil.rmtree(folder)
    return summary


def _write_audio(stem: Path, audio: dict) -> str:
    """Puts a row's audio beside the manifest, unless it is there already or a file of its own;
    returns what the manifest calls it.
    """
    if audio is None:
        return f"{stem.name}.missing"
    if audio.get("array") is not None:
        import soundfile

        path = stem.with_suffix(".wav")
        if not path.exists():
            soundfile.write(
                path,
                np.asarray(audio["array"], np.float32),
                audio["sampling_rate"],
                subtype="FLOAT",
            )
        return path.name
    if audio.get("bytes") is None:
        return os.path.abspath(audio["path"])
    path = stem.with_suffix(Path(audio.get("path") or "x.wav").suffix or ".wav")
    # Written again, a file would have a new date, and the codes made from it would count as stale.
    if not path.exists() or path.stat().st_size != len(audio["bytes"]):
        path.write_bytes(audio["bytes"])
    return path.name
