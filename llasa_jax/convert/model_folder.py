"""A model on disk, as this project keeps it.

    model.json     its geometry (`ModelConfig`) and where it came from
hf/            the HF checkpoint's small files, byte for byte: config, generation config, tokenizer
    params/        the weights, an Orbax checkpoint

A training run's folder is laid out alike, with `checkpoints/STEP/params` in place of `params`, so
that whatever takes a model takes a run as well and means its latest step. A LoRA run's checkpoints
hold only what was trained; the rest is read from its base, which `model.json` names, and whose
fingerprint each checkpoint has.
"""

import dataclasses
import hashlib
import json
import shutil
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llasa_jax.errors import UserError, first_line
from llasa_jax.model.config import AdapterConfig, ModelConfig, Quantization, RopeScaling
from llasa_jax.model.lora import join, split
from llasa_jax.model.quantize import Quantized, quantize_stack
from llasa_jax.model.sharding import abstract_params
from llasa_jax.runtime.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE, HF_FOLDER, PARAMS, CHECKPOINTS, ABOUT = (
    "model.json",
    "hf",
    "params",
    "checkpoints",
    "about",
)
CHUNK_BYTES = 64 << 20


def write_description(folder: Path, config: ModelConfig, source: dict) -> None:
    """Writes `model.json`. `source` says where the weights came from: at least `base_model`, HF's
    id or path of the start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_text(
        json.dumps({"config": dataclasses.asdict(config), "source": source}, indent=2) + "\n"
    )


def read_description(folder: Path) -> tuple[ModelConfig, dict]:
    """The geometry and the source from `model.json`. UserError if the folder holds no model."""
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no model, it has no {MODEL_FILE}; make one with `llasa-jax import-hf"
            f" HF_FOLDER {folder}`"
        )
    description = read_json(path, "the model's description", fix="import the model again")
    try:
        config = description["config"]
        if config["rope_scaling"] is not None:
            config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
        return ModelConfig(**config), dict(description["source"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: the model's description is damaged ({type(error).__name__}:"
            f" {first_line(error)}); import the model again"
        ) from error


def copy_description(source: Path, destination: Path) -> None:
    """Copies all that is not weights, so that a training run's folder stands alone."""
    destination.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / MODEL_FILE, destination / MODEL_FILE)
    shutil.copytree(source / HF_FOLDER, destination / HF_FOLDER, dirs_exist_ok=True)


def saved_steps(folder: Path) -> list[int]:
    """Steps with a finished checkpoint in a run's folder, ascending. Orbax renames a checkpoint to
    its number when it is whole.
    """
    checkpoints = Path(folder) / CHECKPOINTS
    return (
        sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
        if checkpoints.is_dir()
        else []
    )


def read_about(folder: Path, step: int) -> dict:
    """What a run noted beside a checkpoint; nothing if that is damaged."""
    try:
        return read_json(folder / CHECKPOINTS / str(step) / ABOUT / "metadata", "the note")
    except UserError:
        return {}


def adapters_of(source: dict) -> tuple[AdapterConfig | None, Path | None]:
    """The adapters of a LoRA run and the folder of its base, from the source in `model.json`; None
    and None for other models.
    """
    if "lora" not in source:
        return None, None
    told = source["lora"]["adapters"]
    return AdapterConfig(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    ), Path(source["lora"]["base"])


def quantization_of(source: dict) -> Quantization:
    """How the frozen weights of a LoRA run were kept, from the source in `model.json`; "none" for
    other models.
    """
    return source.get("lora", {}).get("quantize", "none")


def params_folder(folder: Path, step: int | None = None) -> Path:
    """Where the weights lie: `params/` of a model, or those of a run's step (the latest by
    default).
    """
    folder = Path(folder)
    if (folder / PARAMS).is_dir() and step is None:
        return folder / PARAMS
    steps = saved_steps(folder)
    if not steps:
        raise UserError(
            f"{folder} holds no weights; finish `llasa-jax import-hf` or train until the first"
            " checkpoint"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    return folder / CHECKPOINTS / str(steps[-1] if step is None else step) / PARAMS


def load_params(folder: Path, mesh: Mesh, dtype, step: int | None = None) -> dict:
    """The weights, each read straight into its shards on `mesh` and cast to `dtype`.

    A LoRA run's are its base's and its adapters, as one tree for a `Llama` with the adapters of
    `adapters_of`. UserError where the base is not there any more, or is another model.
    """
    config, source = read_description(folder)
    adapters, base = adapters_of(source)
    if adapters is None:
        return restore_params(folder, abstract_params(config, mesh, dtype), step)
    trained = load_trained(folder, mesh, dtype, step)
    base_params = load_base(folder, mesh, dtype, step)
    return join(base_params, trained)


def load_trained(folder: Path, mesh: Mesh, dtype, step: int | None = None) -> dict:
    """What a LoRA run trained: its adapters, and what else it trained of the model."""
    config, source = read_description(folder)
    adapters, _ = adapters_of(source)
    return restore_params(
        folder, split(abstract_params(config, mesh, dtype, adapters), adapters)[1], step
    )


def load_base(folder: Path, mesh: Mesh, dtype, step: int | None = None) -> dict:
    """The weights of a LoRA run's base, quantised as in training.

    UserError where it is not there, or is another than the checkpoint of `step` was made with.
    """
    config, source = read_description(folder)
    _, base = adapters_of(source)
    check_base(folder, base)
    params = restore_params(
        base, abstract_params(config, mesh, dtype, quantization=quantization_of(source))
    )
    check_fingerprint(
        folder, params_folder(folder, step).parent.name, base, fingerprint(params, mesh, base)
    )
    return params


def check_base(run: Path, base: Path) -> None:
    """UserError where the base of the LoRA run `run` is not there."""
    if not (base / MODEL_FILE).is_file():
        raise UserError(
            f"{run} holds adapters for the model in {base}, which is not there; put it back, for"
            " they are nothing without it"
        )


def check_fingerprint(run: Path, step: int | str, base: Path, found: str) -> None:
    """UserError where a checkpoint of the LoRA run `run` was made with another base than that of
    the fingerprint `found`.
    """
    made_with = read_about(Path(run), step).get("fingerprint", found)
    if made_with != found:
        raise UserError(
            f"{run} holds adapters for another model than the one that is in {base} now"
            f" (fingerprint {made_with}, not {found}); put back the model that it was trained with"
        )


def fingerprint(params: dict, mesh: Mesh, folder: Path) -> str:
    """What tells the weights `params` of the model in `folder` from others': see `digest`. What is
    quantised is read again.
    """
    layers = params["layers"]
    if isinstance(layers["v"], Quantized):
        layers = layers | {"v": _restore_whole(params_folder(folder).absolute(), "v", layers["v"])}

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def sample(norm, attn_norm, mlp_norm, v):
        return norm, attn_norm, mlp_norm, v[:, 0, 0]

    return digest(
        *sample(params["norm"], *(layers[name] for name in ("attn_norm", "mlp_norm", "v")))
    )


def digest(*samples: np.ndarray) -> str:
    """A hash of a model's norm, of all its attn_norm and mlp_norm, and of the first row of every
    layer's v, rounded to bfloat16.
    """
    return hashlib.sha256(
        b"".join(np.asarray(x).astype(jnp.bfloat16).tobytes() for x in samples)
    ).hexdigest()[:16]


def restore_params(folder: Path, target: dict, step: int | None = None) -> dict:
    """The weights as `target`, a tree of `ShapeDtypeStruct`s with shardings, has them.

    Where it has `Quantized`, one weight (of all layers) at a time is read as bfloat16 and
    quantised, so that devices never hold more.
    """
    where = params_folder(folder, step).absolute()
    kept = {
        name: leaf for name, leaf in target.get("layers", {}).items() if isinstance(leaf, Quantized)
    }
    if not kept:
        return _restore(where, target)
    largest_first = sorted(kept, key=lambda name: prod(kept[name].shape), reverse=True)
    quantised = {
        name: quantize_stack(_restore_whole(where, name, kept[name]), kept[name])
        for name in largest_first
    }
    params = _restore(
        where,
        target
        | {"layers": {name: leaf for name, leaf in target["layers"].items() if name not in kept}},
    )
    return params | {"layers": params["layers"] | quantised}


def _restore_whole(where: Path, name: str, kept: Quantized) -> jax.Array:
    """A layers' matrix as it was before it was quantised, in bfloat16."""
    weight = jax.ShapeDtypeStruct(kept.shape, jnp.bfloat16, sharding=kept.codes.sharding)
    return _restore(where, {"layers": {name: weight}})["layers"][name]


def _restore(where: Path, target: dict) -> dict:
    """Some of the weights in `where`: those that `target` names."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return checkpointer.restore(where, args=args)


def save_params(folder: Path, params: dict) -> None:
    """Writes `params/` into a model's folder."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((Path(folder) / PARAMS).absolute(), params, save_args=chunking(params))


def chunking(params: dict) -> dict:
    """Orbax's `save_args` for a parameter tree: a layer a chunk and tables in pieces, so that an
    export need not hold a whole stack.
    """

    def save_args(path, _) -> ocp.SaveArgs:
        return (
            ocp.SaveArgs(shard_axes=(0,))
            if path[0] == jax.tree_util.DictKey("layers")
            else ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        )

    return jax.tree.map_with_path(save_args, params)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that a model's folder carries. UserError if it carries none."""
    from transformers import AutoTokenizer

    where = Path(folder) / HF_FOLDER
    if not (where / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder} holds no tokenizer ({HF_FOLDER}/tokenizer_config.json is missing); import"
            " the model again"
        )
    return AutoTokenizer.from_pretrained(where)
