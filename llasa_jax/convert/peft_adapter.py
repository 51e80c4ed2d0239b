"""PEFT's LoRA adapters, in and out: `adapter_config.json` beside `adapter_model.safetensors`.

    PEFT (after base_model.model.)                      ours
    model.layers.{l}.self_attn.q_proj.lora_A.weight     lora.q.a[l]      [R, D]
    model.layers.{l}.self_attn.q_proj.lora_B.weight     lora.q.b[l]      [N*H, R] -> [N, H, R]
    model.embed_tokens.lora_embedding_A, ..._B          lora.embed.a, b  [R, vocab_size], [D, R]
    model.embed_tokens.token_adapter.trainable_tokens_delta    rows.embed       [X, D]
    model.norm.weight                                   norm             of a module trained whole

Tables are padded to V. Letters as in `llasa_jax.model.axes`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llasa_jax.convert.hf_files import write_json
from llasa_jax.convert.model_folder import (
    CHECKPOINTS,
    MODEL_FILE,
    Model,
    adapters_of,
    check_fingerprint,
    load_trained,
    open_model,
    params_folder,
    read_description,
)
from llasa_jax.convert.names import EMBED, HEAD, LAYER, TOP, places
from llasa_jax.convert.params_io import recorded_checksums, write_checksums
from llasa_jax.convert.peft_config import TARGETS, WHOLE, read_config
from llasa_jax.convert.safetensors_io import SafetensorsFolder, SafetensorsWriter, cast
from llasa_jax.errors import UserError, listed
from llasa_jax.model.axes import LAYER_AXES, parameter_axes, sizes
from llasa_jax.model.checksum import checksum, compare
from llasa_jax.model.config import AdapterConfig, ModelConfig
from llasa_jax.model.lora import MODULES, Adapter, split
from llasa_jax.model.sharding import make_mesh
from llasa_jax.runtime import files
from llasa_jax.runtime.storage import as_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def base_name(model: str | Path) -> str:
    """What an adapter's config calls a model: HF's id or path of what was imported, or the name of
    the run.
    """
    model = as_path(model)
    is_run = (model / CHECKPOINTS).is_dir()
    return model.name if is_run else open_model(model, weights=False).origin.get("base_model", "")


def open_adapter(folder: Path, base: str | Path, step: int | None = None) -> Adapter:
    """The adapter in `folder`, PEFT's or a LoRA run's (at `step`, the latest by default), for the
    model `base`.

    UserError where it was made for another base, by name, shape or fingerprint, and for what is no
    LoRA adapter or asks for what is not done here.
    """
    folder = as_path(folder)
    model = open_model(base)
    if not (folder / MODEL_FILE).is_file():
        return _read(folder, model, base_name(base))
    config, origin = read_description(folder)
    adapters, trained_over = adapters_of(origin)
    if adapters is None:
        raise UserError(
            f"{folder} is a model of its own and no adapter; give it as the model, without {base}"
        )
    if config != model.config:
        raise UserError(
            f"the adapters in {folder} were made for {trained_over}, not for {base}, which is of"
            " another geometry; use them with their own base"
        )
    step = int(params_folder(folder, step).parent.name)
    check_fingerprint(folder, step, as_path(base), model.fingerprint())
    mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    params = jax.device_get(load_trained(folder, mesh, np.float32, step))
    return Adapter(adapters, params, origin.get("prompt"))


def open_adapters(folders: Sequence[str], base: Path, texts: int) -> list[Adapter | None]:
    """One of `folders` for all of so many texts, or one for each; an empty name is no adapter. Each
    folder is read once.
    """
    if len(folders) not in (0, 1, texts):
        raise UserError(
            f"{len(folders)} adapters were given for {texts} texts; give one for all, or one for"
            " each ('' is none)"
        )
    opened = {
        folder: open_adapter(as_path(folder), base) for folder in dict.fromkeys(folders) if folder
    }
    return [
        opened.get(folder)
        for folder in (folders if len(folders) == texts else [*folders] * texts or [""] * texts)
    ]


def _read(folder: Path, model: Model, base: str) -> Adapter:
    config = model.config
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds no adapter: it has neither PEFT's {CONFIG} nor a LoRA run's"
            f" {MODEL_FILE}"
        )
    values = files.read_json(folder / CONFIG, "the adapter's config", fix="save it again with PEFT")
    adapters, matrices = read_config(values, config, folder / CONFIG)
    made_for = values.get("base_model_name_or_path") or ""
    if made_for and base and Path(made_for).name.lower() != Path(base).name.lower():
        raise UserError(
            f"the adapter in {folder} was made for {made_for} and the model here is {base}; use its"
            f" own base, or correct base_model_name_or_path in its {CONFIG} if they are the same"
        )
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
        )
        what = (
            f"only the pickle {pickles[0]}, which can run any code as it is read"
            if pickles
            else "no weights"
        )
        raise UserError(f"{folder} holds {what}; save the adapter with PEFT as {WEIGHTS}")
    stored = SafetensorsFolder(folder, WEIGHTS)
    # Matrices without factors, as those of other layers, keep factors of zero.
    wanted = {
        name: place
        for name, place in _names(config, adapters).items()
        if place[0][0] != "lora" or (place[0][1], place[1]) in matrices
    }
    _check_tensors(folder, stored, wanted, config, adapters, base)
    sums = recorded_checksums(folder)  # none beside an adapter that PEFT itself wrote
    size = sizes(config, adapters)
    _, axes = split(parameter_axes(config, adapters), adapters)
    params = jax.tree.map(
        lambda letters: np.zeros([size[letter] for letter in letters], np.float32), axes
    )
    for name, (path, layer, _) in wanted.items():
        part = _at(params, path) if layer is None else _at(params, path)[layer]
        found = stored.read(name)
        compare({name: [checksum(found)]}, sums, folder / WEIGHTS)
        value = cast(found, np.dtype(np.float32))
        if path == ("lora", "embed", "a"):
            part[:, : value.shape[1]] = value
        else:
            part.reshape(-1)[: value.size] = value.reshape(-1)
    return Adapter(adapters, params)


def _check_tensors(
    folder: Path,
    stored: SafetensorsFolder,
    wanted: dict,
    config: ModelConfig,
    adapters: AdapterConfig,
    base: str,
) -> None:
    """UserError where the tensors of an adapter are not those that its config asks for."""
    # PEFT also keeps copies of the base's tables.
    found = {name for name in stored.tensors if ".base_layer." not in name}
    if config.tie_word_embeddings and "embed" in adapters.modules:
        embed, head = PREFIX + EMBED, PREFIX + HEAD
        if {embed, head} <= found and stored.read(embed).tobytes() != stored.read(head).tobytes():
            raise UserError(
                f"the adapter in {folder} has weights of its own for embed_tokens and for lm_head,"
                " and this model ties the two; merge the adapter into its base with PEFT's"
                " merge_and_unload and import that model"
            )
        found.discard(head)
    problems = {
        "lacks": sorted(set(wanted) - found),
        "has the unknown": sorted(found - set(wanted)),
        "has the misshapen": [
            f"{name} {list(stored.tensors[name].shape)} instead of {list(shape)}"
            for name, (_, _, shape) in wanted.items()
            if name in found and stored.tensors[name].shape != shape
        ],
    }
    if any(problems.values()):
        problem = "; ".join(
            f"{what} {listed(names, most=1)}" for what, names in problems.items() if names
        )
        raise UserError(
            f"the adapter in {folder} does not hold the tensors that its {CONFIG} asks for in this"
            f" model ({base or 'of no name'}): it {problem}; use its own base, or save it again"
            " with PEFT"
        )


def _at(tree: dict, path: tuple[str, ...]) -> np.ndarray:
    leaf: Any = tree
    for name in path:
        leaf = leaf[name]
    return leaf


def _names(
    config: ModelConfig, adapters: AdapterConfig
) -> dict[str, tuple[tuple[str, ...], int | None, tuple[int, ...]]]:
    """Each of PEFT's tensors: where it lies in our tree, at which layer, and PEFT's shape."""
    size = sizes(config, adapters) | {"V": config.vocab_size}
    found: dict[str, tuple[tuple[str, ...], int | None, tuple[int, ...]]] = {}
    _, axes = split(parameter_axes(config, adapters), adapters)
    for name, factors in axes.get("lora", {}).items():
        for factor, letters in factors.items():
            stacked = name in LAYER_AXES
            letters = letters[stacked:]
            at = letters.index("R")
            sides = (letters[:at], "R", letters[at + 1 :])
            shape = tuple(math.prod(size[letter] for letter in side) for side in sides if side)
            suffix = (
                f"lora_embedding_{factor.upper()}"
                if name == "embed"
                else f"lora_{factor.upper()}.weight"
            )
            for layer in range(config.num_hidden_layers) if stacked else (None,):
                module = (
                    f"model.layers.{layer}.{LAYER[name]}"
                    if stacked
                    else TOP[name].removesuffix(".weight")
                )
                found[f"{PREFIX}{module}.{suffix}"] = ("lora", name, factor), layer, shape
    for table, letters in axes.get("rows", {}).items():
        module = TOP[table].removesuffix(".weight")
        shape = tuple(size[letter] for letter in letters)
        found[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = (
            ("rows", table),
            None,
            shape,
        )
    whole = {
        "layers." + name if name in LAYER else name
        for module in adapters.modules
        for name in MODULES[module]
    }
    for name, place in places(config).items():
        if place.path in whole:
            found[PREFIX + name] = tuple(place.path.split(".")), place.layer, place.shape
    return found


def write_adapter(
    folder: Path, adapter: Adapter, config: ModelConfig, base: str, dtype: np.dtype
) -> None:
    """Writes PEFT's two files, and the checksums of the tensors, into `folder`. `base` is what PEFT
    will load under the adapter: HF's id or a path.
    """
    adapters = adapter.config
    tied = config.tie_word_embeddings
    wanted = _names(config, adapters)
    if tied and "embed" in adapters.modules:
        # PEFT would leave the head as it was
        wanted[PREFIX + HEAD] = wanted[PREFIX + EMBED]
    modules = [name for module in adapters.modules for name in WHOLE[module]] + (
        ["lm_head"] if tied and "embed" in adapters.modules else []
    )
    ids = list(adapters.token_ids)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_rslora": adapters.rslora,
        "target_modules": [TARGETS[name] for name in adapters.targets],
        "modules_to_save": modules or None,
        "trainable_token_indices": (
            ({"embed_tokens": ids} | ({} if tied else {"lm_head": ids})) if ids else None
        ),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, values)
    shapes = {name: shape for name, (_, _, shape) in wanted.items()}
    sums = {}
    with SafetensorsWriter(
        folder, shapes, dict.fromkeys(shapes, dtype), 1 << 62, single=WEIGHTS
    ) as writer:
        for name, (path, layer, shape) in wanted.items():
            value = _at(adapter.params, path) if layer is None else _at(adapter.params, path)[layer]
            if path == ("lora", "embed", "a"):
                value = value[:, : shape[1]]
            value = cast(np.ascontiguousarray(value.reshape(-1, *shape[1:])[: shape[0]]), dtype)
            writer.write(name, value)
            sums[name] = [checksum(value)]
    write_checksums(folder, sums)
