"""`llasa-jax import-hf`: an HF checkpoint becomes a model's folder of ours, tensor by tensor."""

import dataclasses
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llasa_jax.convert.extend_vocab import NewCodes, added_rows
from llasa_jax.convert.hf_config import model_config
from llasa_jax.convert.hf_files import (
    CONFIG,
    TOKENIZER_FILES,
    copy_small_files,
    licence,
    load_tokenizer,
    locate,
    prompt_of,
    read_json,
    small_files,
    speaks,
    vocabulary,
    write_generation_config,
    write_json,
)
from llasa_jax.convert.load_hf import HfReader
from llasa_jax.convert.made import MADE_FROM, identity, is_made, state_of
from llasa_jax.convert.model_folder import HF_FOLDER, MODEL_FILE, PARAMS, write_description
from llasa_jax.convert.names import EMBED, HEAD, Place, our_shapes
from llasa_jax.convert.params_io import ParamsWriter
from llasa_jax.convert.safetensors_io import SafetensorsFolder, cast, fault, named_dtype
from llasa_jax.errors import UserError
from llasa_jax.model.config import ModelConfig
from llasa_jax.runtime.storage import as_path
from llasa_jax.runtime.writing import new_folder
from llasa_jax.speech.vocab import extend_tokenizer

COMPARED_ROWS = 4096
WORKERS = 4  # threads, each with one tensor in memory


def import_hf(
    source: str | Path,
    destination: Path,
    *,
    dtype: str | None = None,
    extend_vocab: bool = False,
    seed: int = 0,
    new_codes: NewCodes = "mean",
) -> None:
    """Makes the model's folder `destination` from `source`, an HF checkpoint's folder or hub id.

    Weights stay in their own types, bit for bit, unless `dtype` ("float32", "bfloat16", "float16")
    is given. `extend_vocab` adds Llasa's speech tokens to a text model's tokenizer and tables, with
    rows drawn by `seed`, those of the codes as `added_rows` says of `new_codes`. At most four
    tensors, of tables a piece, are in memory at a time, whatever the model's size. Raises UserError
    for what is no such checkpoint; then nothing is left behind. Warns of a NaN in a weight, and of
    a head beside a tied embedding that differs from it. Given again when it is done, does nothing.
    """
    if new_codes != "mean" and not extend_vocab:
        raise UserError("--new-codes says how codes are added; give it with --extend-vocab")
    folder, name = locate(source)
    made_from = identity("import-hf", dtype, extend_vocab, seed, new_codes, state_of(folder))
    if is_made(as_path(destination), made_from):
        return
    files = small_files(folder)
    config = model_config(read_json(folder / CONFIG), folder / CONFIG)
    source_reader = HfReader(folder, config)
    checkpoint, table = source_reader.checkpoint, source_reader.table
    tokens = vocabulary(files)
    old_vocab = config.vocab_size
    if extend_vocab:
        config, tokenizer = _extended(config, tokens, files)
    elif not tokens:
        warnings.warn(
            f"{folder} has no tokenizer, so the model can neither be trained nor speak; add its"
            " tokenizer files",
            stacklevel=2,
        )
    elif max(tokens.values()) >= old_vocab:
        raise UserError(
            f"{folder}: the tokenizer has {max(tokens.values()) + 1} tokens and the model"
            f" {old_vocab}; they do not match"
        )
    if config.tie_word_embeddings and {EMBED, HEAD} <= checkpoint.tensors.keys():
        _compare_head(checkpoint)

    found = _dtypes(checkpoint, table, mixed_is_fine=dtype is not None)
    dtypes = found if dtype is None else dict.fromkeys(found, named_dtype(dtype))
    needs = sum(
        int(np.prod(shape)) * dtypes[path].itemsize for path, shape in our_shapes(config).items()
    )
    with new_folder(destination, needs, last=MODEL_FILE) as partial:
        copy_small_files(files, partial / HF_FOLDER)
        if extend_vocab:
            _write_extended(partial / HF_FOLDER, tokenizer)
        # Each thread reads layers into memory of its own, again and again: fresh pages take as long
        # to clear as to fill.
        own = threading.local()
        largest = max(
            checkpoint.tensors[name].bytes
            for name, place in table.items()
            if place.layer is not None
        )

        def convert(item: tuple[str, Place]) -> list[str]:
            name, place = item
            count = config.vocab_size - old_vocab if place.path in ("embed", "head") else 0
            added = added_rows(checkpoint, name, count, seed, new_codes)
            return _import_tensor(
                checkpoint, name, place, config, dtypes[place.path], writer, added, own.memory
            )

        with (
            ParamsWriter(partial / PARAMS, config, dtypes) as writer,
            ThreadPoolExecutor(
                WORKERS, initializer=lambda: setattr(own, "memory", np.empty(largest, np.uint8))
            ) as pool,
        ):
            for faults in tqdm(
                pool.map(convert, table.items()),
                "importing",
                len(table),
                unit="tensor",
                disable=None,
            ):
                for fault_ in faults:
                    warnings.warn(fault_, stacklevel=2)
        write_description(
            partial,
            config,
            {
                "base_model": name,
                **licence(files),
                **prompt_of(files / CONFIG),
                **source_reader.original_dtypes(),
            },
        )
        (partial / MADE_FROM).write_text(made_from)


def _import_tensor(
    checkpoint: SafetensorsFolder,
    name: str,
    place: Place,
    config: ModelConfig,
    dtype: np.dtype,
    writer: ParamsWriter,
    added: np.ndarray,
    memory: np.ndarray,
) -> list[str]:
    """Copies one tensor, followed by the rows `added`, and tells what is wrong in it."""
    shape = our_shapes(config)[place.path]
    faults = set()

    def put(piece: np.ndarray, index: int | None) -> None:
        piece = cast(piece, dtype)
        faults.add(fault(piece))
        writer.write(place.path, piece, index)

    if place.layer is not None:
        put(checkpoint.read(name, memory=memory).reshape(shape[1:]), place.layer)
    elif len(shape) == 1:
        put(checkpoint.read(name), None)
    else:
        rows, old = writer.rows(place.path), place.shape[0]
        for index, start in enumerate(range(0, shape[0], rows)):
            known = checkpoint.read(name, start, start + rows) if start < old else added[:0]
            new = added[max(0, start - old) : max(0, start + rows - old)]
            padding = np.zeros((rows - len(known) - len(new), shape[1]), added.dtype)
            put(np.concatenate([known, new, padding]) if len(known) < rows else known, index)
    where = checkpoint.tensors[name].file
    return [
        f"{where}: {name} contains {kind} as {dtype}; use another checkpoint or type"
        for kind in sorted(faults - {""})
    ]


def _dtypes(
    checkpoint: SafetensorsFolder, table: dict[str, Place], mixed_is_fine: bool
) -> dict[str, np.dtype]:
    """The type of each parameter, by path. UserError where the layers of one differ, for they are
    stacked.
    """
    dtypes: dict[str, np.dtype] = {}
    for name, place in table.items():
        dtype = checkpoint.tensors[name].dtype
        if dtypes.setdefault(place.path, dtype) != dtype and not mixed_is_fine:
            raise UserError(
                f"{checkpoint.folder}: {name} is {dtype} and the same tensor of other layers"
                f" {dtypes[place.path]}; choose one with --dtype"
            )
    return dtypes


def _compare_head(checkpoint: SafetensorsFolder) -> None:
    embed, head = checkpoint.tensors[EMBED], checkpoint.tensors[HEAD]

    def rows(name: str, at: int) -> np.ndarray:
        return checkpoint.read(name, at, at + COMPARED_ROWS).view(np.uint8)

    if (embed.shape, embed.dtype) == (head.shape, head.dtype) and all(
        np.array_equal(rows(EMBED, at), rows(HEAD, at))
        for at in range(0, embed.shape[0], COMPARED_ROWS)
    ):
        return
    warnings.warn(
        f"{checkpoint.folder}: config.json ties the head to the embedding, yet {HEAD} differs from"
        f" {EMBED}; the embedding is used, as the config says (transformers 4 does so too, 5 uses"
        " both: to have that, set tie_word_embeddings to false and import again)",
        stacklevel=3,
    )


def _extended(config: ModelConfig, tokens: dict[str, int], folder: Path):
    """The geometry and the tokenizer with the speech tokens."""
    if speaks(tokens):
        raise UserError(f"{folder} has the speech tokens already; import it without --extend-vocab")
    tokenizer = load_tokenizer(folder) if tokens else None
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer to extend; add its tokenizer files")
    extend_tokenizer(tokenizer)
    if len(tokenizer) < config.vocab_size:
        raise UserError(
            f"{folder}: the tables have {config.vocab_size} rows, more than the {len(tokenizer)} of"
            " the extended tokenizer"
        )
    return dataclasses.replace(config, vocab_size=len(tokenizer)), tokenizer


def _write_extended(hf: Path, tokenizer) -> None:
    for name in TOKENIZER_FILES:
        (hf / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(hf)
    write_json(hf / CONFIG, {**read_json(hf / CONFIG), "vocab_size": len(tokenizer)})
    write_generation_config(hf, tokenizer.get_vocab())
