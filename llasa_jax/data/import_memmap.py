"""Upstream's memmap files (LLaSA_training, get_memmap_from_token.py) as a dataset, a row at a time.

`{split}_input_ids.memmap` is int32 [rows, length], its shape in `{split}_input_ids_shape.npy`. A
row:

<|TEXT_UNDERSTANDING_START|> text <|TEXT_UNDERSTANDING_END|> <|SPEECH_GENERATION_START|> codes
<|SPEECH_GENERATION_END|> padding

Upstream cuts rows that are too long, which loses the end marker: such a row would teach the model
never to stop.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llasa_jax.data.importing import UNKNOWN_CODEC, Imported, Noted, write_import
from llasa_jax.data.manifest import file_key
from llasa_jax.data.seal import identity
from llasa_jax.errors import UserError
from llasa_jax.runtime.copies import local_copy
from llasa_jax.speech.vocab import (
    SPEECH_GENERATION,
    TEXT_UNDERSTANDING,
    SpeechVocab,
    extend_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT_NAMES = {"val": "validation"}
ENDING = "_input_ids.memmap"
LOOK_AT = 1000  # rows, to see whether the tokenizer is the files' own


def import_memmap(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: "PreTrainedTokenizerBase",
    codec_name: str = UNKNOWN_CODEC,
    keep_cut: bool = False,
    max_bad_share: float = 0.05,
) -> Imported:
    """Imports every split of `folder` into the new dataset `out`; upstream's `val` becomes
    `validation`.

    `tokenizer` is the one that made the files; if it is a plain Llama's, it is given the speech
    tokens, in place. Cut rows are left out and counted; with `keep_cut`, those whose text is whole
    stay. Rows whose text encodes to other ids than the file's are kept, and listed. Raises
    UserError for files that are missing or do not fit their shape, and for another tokenizer's ids.
    """
    folder = local_copy(folder)
    files = sorted(folder.glob(f"*{ENDING}"))
    if not files:
        raise UserError(
            f"{folder}: no {{split}}{ENDING} in it; give the folder that upstream's"
            " get_memmap_from_token.py wrote."
        )
    extend_tokenizer(tokenizer)
    vocab = SpeechVocab.of(tokenizer)
    splits = {}
    for path in files:
        split = path.name.removesuffix(ENDING)
        rows = _open(path)
        if not (rows[:LOOK_AT, 0] == vocab.markers[TEXT_UNDERSTANDING[0]]).any():
            raise UserError(
                f"{path}: rows begin with the id {rows[0, 0]}, but {TEXT_UNDERSTANDING[0]} is"
                f" {vocab.markers[TEXT_UNDERSTANDING[0]]} for"
                f" {tokenizer.name_or_path or 'this tokenizer'}; give --tokenizer the one that the"
                " files were made with."
            )
        splits[SPLIT_NAMES.get(split, split)] = _utterances(split, rows, tokenizer, vocab, keep_cut)
    made_from = identity(
        "import-memmap",
        (codec_name, keep_cut),
        sorted(tokenizer.get_vocab().items()),
        ((path.name, *file_key(path)[1:]) for path in files),
    )
    return write_import(folder, out, splits, codec_name, max_bad_share, made_from)


def _open(path: Path) -> np.memmap:
    """The file as int32 [rows, length], without reading it."""
    shape_path = path.with_name(path.name.replace(ENDING, "_input_ids_shape.npy"))
    try:
        shape = np.load(shape_path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{shape_path}: the shape of {path.name} cannot be read ({error}); copy both files"
            " again."
        ) from None
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 1).any():
        raise UserError(
            f"{shape_path}: holds {shape.tolist()}, not two positive numbers [rows, length]; copy"
            " it again."
        )
    rows, length = map(int, shape)
    size = path.stat().st_size
    if size != rows * length * 4:
        raise UserError(
            f"{path}: has {size} bytes, but {rows} rows of {length} int32 ids, as {shape_path.name}"
            f" says, take {rows * length * 4}; copy both files again."
        )
    return np.memmap(path, np.int32, "r", shape=(rows, length))


def _utterances(
    split: str,
    rows: np.memmap,
    tokenizer: "PreTrainedTokenizerBase",
    vocab: SpeechVocab,
    keep_cut: bool,
) -> Iterator[dict | Noted]:
    for index in range(len(rows)):
        row_id = f"{split}_{index:08d}"
        try:
            text_ids, codes, is_cut = parse_row(np.array(rows[index]), vocab)
        except ValueError as error:
            yield Noted(row_id, str(error))
            continue
        if is_cut and not (keep_cut and codes.size):
            yield Noted(
                row_id,
                f"no {SPEECH_GENERATION[1]}: the row was cut at {rows.shape[1]} ids",
                excused=True,
            )
            continue
        text = tokenizer.decode(
            text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if is_cut:
            yield Noted(row_id, "no end: the row was cut", kept=True)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != text_ids.tolist():
            yield Noted(
                row_id,
                f"a text that encodes to other ids than the file's: {text[:80]!r}",
                kept=True,
            )
        yield {"id": row_id, "text": text, "codes": codes}


def parse_row(row: np.ndarray, vocab: SpeechVocab) -> tuple[np.ndarray, np.ndarray, bool]:
    """A row, int (length,), to its text's ids and its codes, both int (n,), and whether it was cut.

    ValueError, saying what the row has, where it is none of upstream's.
    """
    places = {}
    for marker in (*TEXT_UNDERSTANDING, *SPEECH_GENERATION):
        found = np.flatnonzero(row == vocab.markers[marker])
        if len(found) > 1:
            raise ValueError(f"{len(found)} times {marker}")
        places[marker] = int(found[0]) if len(found) else None
    text_start, text_end, start, end = places.values()
    if text_start != 0:
        raise ValueError(f"the id {row[0]} where {TEXT_UNDERSTANDING[0]} belongs")
    if start is None:
        return row[1:0], row[1:0], True
    if text_end is None or start != text_end + 1 or (end is not None and end < start):
        raise ValueError("its markers out of order")
    codes = row[start + 1 : end].astype(np.int64) - vocab.code_base
    if codes.size and (codes.min() < 0 or codes.max() >= vocab.size - vocab.code_base):
        raise ValueError("ids that are no speech tokens among its codes")
    return row[1:text_end], codes, end is None
