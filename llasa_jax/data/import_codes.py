"""Folders of `{id}.npy` or `{id}.wav.npy` codes, as XCodec2's own script writes them, and a file of
transcripts, as a dataset.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llasa_jax.data.bad_list import reason_of
from llasa_jax.data.importing import UNKNOWN_CODEC, Imported, Noted, write_import
from llasa_jax.data.manifest import Clip, assign_splits, file_key, read_transcripts
from llasa_jax.data.seal import identity
from llasa_jax.errors import UserError
from llasa_jax.runtime.copies import local_copy

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
MAX_BYTES = 2**27  # of a clip's file of codes: 90 hours even as int64


def import_codes(
    folder: str | os.PathLike,
    transcripts: str | os.PathLike,
    out: str | os.PathLike,
    codec_name: str = UNKNOWN_CODEC,
    code_offset: int = 0,
    validation_share: float = 0.0,
    seed: int = 0,
    max_bad_share: float = 0.05,
    columns: str = "",
) -> Imported:
    """Imports the clips of `transcripts` (with `columns` see `read_transcripts`) whose codes lie
    somewhere below `folder`, into the new dataset `out`.

    A transcript's id is the codes' path below `folder` or, where that is the only one, its last
    part, either without suffixes. `code_offset` is subtracted from every code: 128264 where they
    are Llasa's token ids. `validation_share` and `seed` are those of `encode`. Transcripts without
    codes, and codes without a transcript, count as bad. Raises UserError as `write_import` does.
    """
    folder = local_copy(folder)
    clips = read_transcripts(transcripts, columns)
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share is {validation_share}; give a share in [0, 1).")
    paths = sorted(folder.rglob("*.npy"))
    if not paths:
        raise UserError(
            f"{folder}: no .npy files in it or below; give the folder that holds the codes."
        )
    by_path = {_without_suffixes(path.relative_to(folder).as_posix()): path for path in paths}
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        by_name.setdefault(_without_suffixes(path.name), []).append(path)

    found: dict[str, Path] = {}
    for clip in clips:
        key = _without_suffixes(clip.id)
        candidates = [by_path[key]] if key in by_path else by_name.get(key, [])
        if len(candidates) > 1:
            raise UserError(
                f"{transcripts}: the id {clip.id!r} may be {candidates[0].relative_to(folder)} or"
                f" {candidates[1].relative_to(folder)}; write the path below the folder as the id."
            )
        if candidates:
            found[clip.id] = candidates[0]
    unspoken = sorted(set(paths) - set(found.values()))
    assigned = assign_splits(clips, validation_share, seed)
    splits: dict[str, list[Clip]] = {}
    for clip in clips:
        splits.setdefault(assigned[clip.id], []).append(clip)

    def rows(members: list[Clip], leftover: list[Path]) -> Iterator[dict | Noted]:
        for path in leftover:
            yield Noted(path.relative_to(folder).as_posix(), "no transcript")
        for clip in members:
            yield _row(clip, found.get(clip.id), code_offset)

    first = min(splits)
    streams = {
        split: rows(members, unspoken if split == first else [])
        for split, members in splits.items()
    }
    made_from = identity(
        "import-codes",
        (codec_name, code_offset, validation_share, seed),
        (dataclasses.replace(clip, audio=Path()) for clip in clips),
        ((path.relative_to(folder).as_posix(), *file_key(path)[1:]) for path in paths),
    )
    return write_import(folder, out, streams, codec_name, max_bad_share, made_from)


def _row(clip: Clip, path: Path | None, code_offset: int) -> dict | Noted:
    if path is None:
        return Noted(clip.id, "no codes: no .npy file of that name")
    try:
        codes = _load(path)
    except Exception as error:  # noqa: BLE001 NumPy's reader raises many kinds on damaged headers
        return Noted(clip.id, f"codes that cannot be read ({path.name}: {reason_of(error)})")
    row = dataclasses.asdict(clip)
    del row["audio"], row["split"]
    return {**row, "codes": as_codes(codes, code_offset)}


def _load(path: Path) -> np.ndarray:
    """The array of a .npy file. ValueError where its header claims more than the file holds, for
    NumPy would take the memory before it looks, and where it is too large for the codes of a clip.
    """
    if not path.is_file():
        raise ValueError("not a regular file")  # a FIFO would be waited for without end
    size = path.stat().st_size
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
        claimed = math.prod(shape) * dtype.itemsize
        if claimed > size - file.tell():
            raise ValueError(f"its header claims {claimed} bytes, but it has {size}")
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes, too many for the codes of a clip")
    return np.load(path, allow_pickle=False)


def as_codes(codes, offset: int) -> np.ndarray:
    """Codes as others keep them, flat (frames,): axes of length 1, as of batch and codebook,
    dropped, and `offset` subtracted.
    """
    codes = np.asarray(codes)
    codes = (
        codes.reshape(max(codes.shape))
        if codes.size and codes.size == max(codes.shape, default=0)
        else codes
    )
    return codes.astype(np.int64) - offset if offset and codes.dtype.kind in "iu" else codes


def _without_suffixes(name: str) -> str:
    name = name.removesuffix(".npy")
    for suffix in AUDIO_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name
