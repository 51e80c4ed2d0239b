"""`llasa-jax export-hf`: a model's or a run's folder becomes an HF checkpoint, piece by piece."""

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from llasa_jax.convert.hf_config import dtype_key
from llasa_jax.convert.hf_files import (
    CARD,
    CONFIG,
    PROMPT,
    TOKENIZER_FILES,
    copy_small_files,
    locate,
    read_json,
    speaks,
    vocabulary,
    write_generation_config,
    write_json,
)
from llasa_jax.convert.made import MADE_FROM, identity, is_made, state_of
from llasa_jax.convert.merge import merged_reader
from llasa_jax.convert.model_card import model_card
from llasa_jax.convert.model_folder import (
    CHECKPOINTS,
    Model,
    adapters_of,
    base_of,
    open_model,
    params_folder,
    refuse_base,
)
from llasa_jax.convert.names import places
from llasa_jax.convert.params_io import WORKERS, Reader
from llasa_jax.convert.peft_adapter import CONFIG as ADAPTER_CONFIG
from llasa_jax.convert.peft_adapter import base_name, open_adapter, write_adapter
from llasa_jax.convert.safetensors_io import SafetensorsWriter, cast, fault, named_dtype, parse_size
from llasa_jax.convert.verify import verify as verify_logits
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime.bucket_files import put_early
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import absolute, as_path, is_remote
from llasa_jax.runtime.writing import new_folder
from llasa_jax.speech.settings import PromptSettings


def export_hf(
    source: Path,
    destination: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    verify: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    lora: Literal["adapter", "merge"] | None = None,
    base: str | Path | None = None,
) -> None:
    """Writes the HF checkpoint `destination` from `source`, a model's folder or a run's (at `step`,
    the latest by default).

    Weights are written in the imported checkpoint's types unless `dtype` is given, the tables cut
    back to `vocab_size` rows, one copy where head and embedding are tied. Tokenizer files are those
    that were imported. `verify` compares logits with transformers' before the folder gets its name;
    `push_to_hub` uploads it to that repository, which is made private unless it is to be `public`.
    Raises UserError; then nothing is left behind.

    A LoRA run is written as PEFT's "adapter", or with its base: "merge" adds the two in float32,
    before they are rounded. `base` says where its base lies now, by default where it lay. Given
    again when it is done, writes nothing.
    """
    source, destination = as_path(source), as_path(destination)
    model = open_model(source)
    config, origin = model.config, model.origin
    adapters, _ = adapters_of(origin)
    refuse_base(source, origin, base)
    if adapters is None and lora:
        raise UserError(f"{source} is no LoRA run, so there is no adapter in it; leave --lora out")
    if adapters and lora not in ("adapter", "merge"):
        raise UserError(
            f"{source} is a LoRA run; say whether you want its adapter alone (--lora adapter) or a"
            " whole model (--lora merge)"
        )
    where = source if model.is_hf else params_folder(source, step)
    if lora == "adapter" and verify:
        raise UserError("--verify compares whole models; give it with --lora merge")
    base_state = state_of(locate(base_of(source, base))[0]) if adapters else None
    made_from = identity(
        *("export-hf", dtype, str(max_shard_size), verify, push_to_hub, lora),
        *(config, origin, state_of(where), base_state),
    )
    done = is_made(destination, made_from)
    if lora == "adapter" and not done:
        _export_adapter(model, destination, int(where.parent.name), dtype, base, made_from)
    if lora == "adapter" or done:
        if push_to_hub:
            _push(destination, push_to_hub, public)
        return
    if adapters:
        merged = merged_reader(source, step, base)
        reader: Reader = merged
        untied, config = merged.config != config, merged.config
    else:
        reader, untied = model.reader(step), False
    table = places(config)
    names = {(place.path, place.layer): name for name, place in table.items()}
    shapes = {name: place.shape for name, place in table.items()}
    dtypes = {name: _dtype_of(path, dtype, origin, reader) for (path, _), name in names.items()}
    sizes = [int(np.prod(shape)) * dtypes[name].itemsize for name, shape in shapes.items()]
    needs, limit = sum(sizes), parse_size(max_shard_size)
    early = is_remote(destination) and not verify
    if early:  # each worker may be putting a file up while the next one is begun
        needs = min(needs, (WORKERS + 1) * max(limit, *sizes))

    def put(file: Path) -> None:
        put_early(file, destination)

    with new_folder(destination, needs, last=CONFIG) as partial:
        writer = SafetensorsWriter(partial, shapes, dtypes, limit, finished=put if early else None)
        with (
            writer,
            ThreadPoolExecutor(WORKERS) as pool,
            tqdm(total=len(names), desc="exporting", unit="tensor", disable=None) as bar,
        ):
            parameters = {
                path: _Parameter(reader, path, names, shapes, dtypes, writer)
                for path in reader.dtypes
            }

            def convert(name: str) -> dict[str, str]:
                faults = parameters[table[name].path].write_tensor()
                bar.update()
                return faults

            # In the order of the files: few are begun and not whole.
            for faults in pool.map(convert, table):
                for name, kind in faults.items():
                    warnings.warn(
                        f"{where}: {name} contains {kind} as {dtypes[name]}; use another checkpoint"
                        " or type",
                        stacklevel=2,
                    )
        copy_small_files(model.files, partial)
        _write_config(
            partial,
            {"vocab_size": config.vocab_size} | ({"tie_word_embeddings": False} if untied else {}),
            dtypes,
            origin.get("prompt", {}),
        )
        tokens = vocabulary(partial)
        if speaks(tokens):
            write_generation_config(partial, tokens)
        trained = int(where.parent.name) if where.parent.parent.name == CHECKPOINTS else None
        (partial / CARD).write_text(
            model_card(
                source, origin, push_to_hub or absolute(destination).name, trained, speaks(tokens)
            )
        )
        (partial / MADE_FROM).write_text(made_from)
        if verify:
            verify_logits(partial, source, step=step, base=base).check()
    if push_to_hub:
        _push(destination, push_to_hub, public)


def _dtype_of(path: str, dtype: str | None, origin: dict, reader: Reader) -> np.dtype:
    """The type to write: the one asked for, else that of the imported checkpoint, else that of our
    weights.
    """
    if dtype is None and "dtype" not in origin:
        return reader.dtypes[path]
    return named_dtype(dtype or origin.get("other_dtypes", {}).get(path, origin["dtype"]))


class _Parameter:
    """One of our parameters on its way into HF tensors: one, or one a layer. Pieces are read as
    they are wanted, by one thread at a time.
    """

    def __init__(
        self,
        reader: Reader,
        path: str,
        names: dict[tuple[str, int | None], str],
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, np.dtype],
        writer: SafetensorsWriter,
    ):
        self._names = {layer: name for (other, layer), name in names.items() if other == path}
        self._shapes, self._dtypes, self._writer = shapes, dtypes, writer
        self._parts, self._lock = self._split(reader.pieces(path)), threading.Lock()

    def write_tensor(self) -> dict[str, str]:
        """Writes the next layer's tensor, or the only one, and tells whether it has a fault and
        which. UserError at the end where the parameter is damaged.
        """
        faults: dict[str, str] = {}
        with self._lock:
            for layer, first, rows in self._parts:
                name = self._names[layer]
                if kind := self._write(name, first, rows):
                    faults.setdefault(name, kind)
                # After the last layer comes the comparison of checksums.
                if layer is not None and layer + 1 < len(self._names):
                    break
        return faults

    def _split(
        self, pieces: Iterator[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[int | None, int, np.ndarray]]:
        """(The layer, the first row, the rows). Holds no piece that is with the caller."""
        for start, piece in pieces:
            parts = [piece] if None in self._names else [*piece]
            del piece
            for layer in range(start, start + len(parts)):
                where = (None, start) if None in self._names else (layer, 0)
                yield *where, parts.pop(0)

    def _write(self, name: str, first: int, rows: np.ndarray) -> str:
        shape = self._shapes[name]
        rows = cast(
            # Nothing of a piece that lies wholly in the padding, below the tensor's last row.
            rows.reshape(-1, *shape[1:])[: max(0, shape[0] - first)],
            self._dtypes[name],
        )
        if len(rows):
            self._writer.write(name, rows, first)
        return fault(rows)


def _export_adapter(
    run: Model,
    destination: Path,
    step: int,
    dtype: str | None,
    base: str | Path | None,
    made_from: str,
) -> None:
    base = base_of(run.folder, base)
    with new_folder(destination, last=ADAPTER_CONFIG) as partial:
        stored = named_dtype(dtype or "float32")
        adapter = open_adapter(run.folder, base, step)
        write_adapter(partial, adapter, run.config, base_name(base), stored)
        copy_small_files(run.files, partial, TOKENIZER_FILES)
        card = model_card(
            run.folder,
            run.origin | {"library_name": "peft"},
            absolute(destination).name,
            step,
            speaks(vocabulary(partial)),
        )
        (partial / CARD).write_text(card)
        (partial / MADE_FROM).write_text(made_from)


def _write_config(
    folder: Path, values: dict, dtypes: dict[str, np.dtype], prompt: dict[str, str]
) -> None:
    """The imported config, every key kept, with what is true of these weights. What `prompt`, a
    `PromptSettings` as a dict, has other than Llasa's own goes with them: a model that is asked in
    another way than it was trained says something else.
    """
    config = read_json(folder / CONFIG)
    usual = asdict(PromptSettings().filled())
    config.pop(PROMPT, None)
    if own := {name: value for name, value in prompt.items() if value != usual.get(name)}:
        values |= {PROMPT: own}
    common = Counter(map(str, dtypes.values())).most_common(1)[0][0]
    values |= {
        dtype_key(config): common,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
    }
    write_json(folder / CONFIG, config | values)


def _push(folder: Path, repo: str, public: bool) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        # Private unless asked otherwise: what is published may be somebody's voice.
        api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            folder_path=str(local_copy(folder)),
            repo_id=repo,
            commit_message="Exported by llasa-jax",
            ignore_patterns=[MADE_FROM],
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(
            f"{folder} is whole but could not be uploaded to {repo} ({reason}); log in, then `hf"
            f" upload {repo} {folder}`"
        ) from error
