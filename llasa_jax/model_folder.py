"""A model on disk, as this project keeps it.

    model.json     its geometry (`ModelConfig`) and where it came from
    hf/            the HF checkpoint's small files, byte for byte: config, generation config, tokenizer
    params/        the weights, an Orbax checkpoint

A training run's folder is laid out alike, with `checkpoints/STEP/params` in place of `params`, so that whatever takes a model
takes a run as well and means its latest step.
"""

import dataclasses
import json
import shutil
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from llasa_jax.config import ModelConfig, RopeScaling
from llasa_jax.errors import UserError
from llasa_jax.quantize import Quantized, quantize_stack
from llasa_jax.sharding import abstract_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE, HF_FOLDER, PARAMS, CHECKPOINTS = "model.json", "hf", "params", "checkpoints"
CHUNK_BYTES = 64 << 20


def write_description(folder: Path, config: ModelConfig, source: dict) -> None:
    """Writes `model.json`. `source` says where the weights came from: at least `base_model`, HF's id or path of the start."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_text(json.dumps({"config": dataclasses.asdict(config), "source": source}, indent=2) + "\n")


def read_description(folder: Path) -> tuple[ModelConfig, dict]:
    """The geometry and the source from `model.json`. UserError if the folder holds no model."""
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no model, it has no {MODEL_FILE}; make one with `llasa-jax import-hf HF_FOLDER {folder}`")
    description = json.loads(path.read_text())
    config = description["config"]
    if config["rope_scaling"] is not None:
        config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
    return ModelConfig(**config), description["source"]


def copy_description(source: Path, destination: Path) -> None:
    """Copies all that is not weights, so that a training run's folder stands alone."""
    destination.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / MODEL_FILE, destination / MODEL_FILE)
    shutil.copytree(source / HF_FOLDER, destination / HF_FOLDER, dirs_exist_ok=True)


def saved_steps(folder: Path) -> list[int]:
    """Steps with a finished checkpoint in a run's folder, ascending. Orbax renames a checkpoint to its number when it is whole."""
    checkpoints = Path(folder) / CHECKPOINTS
    return sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()) if checkpoints.is_dir() else []


def params_folder(folder: Path, step: int | None = None) -> Path:
    """Where the weights lie: `params/` of a model, or those of a run's step (the latest by default)."""
    folder = Path(folder)
    if (folder / PARAMS).is_dir() and step is None:
        return folder / PARAMS
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{folder} holds no weights; finish `llasa-jax import-hf` or train until the first checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return folder / CHECKPOINTS / str(steps[-1] if step is None else step) / PARAMS


def load_params(folder: Path, mesh: Mesh, dtype, step: int | None = None) -> dict:
    """The weights, each read straight into its shards on `mesh` and cast to `dtype`."""
    config, _ = read_description(folder)
    return restore_params(folder, abstract_params(config, mesh, dtype), step)


def restore_params(folder: Path, target: dict, step: int | None = None) -> dict:
    """The weights as `target`, a tree of `ShapeDtypeStruct`s with shardings, has them.

    Where it has `Quantized`, one weight (of all layers) at a time is read as bfloat16 and quantised, so that devices never hold more.
    """
    where = params_folder(folder, step).absolute()
    kept = {name: leaf for name, leaf in target["layers"].items() if isinstance(leaf, Quantized)}
    quantised = {}
    for name in sorted(kept, key=lambda name: prod(kept[name].shape), reverse=True):
        weight = jax.ShapeDtypeStruct(kept[name].shape, jnp.bfloat16, sharding=kept[name].codes.sharding)
        stack = _restore(where, {"layers": {name: weight}})["layers"][name]
        quantised[name] = quantize_stack(stack, kept[name])
        del stack
    rest = target | {"layers": {name: leaf for name, leaf in target["layers"].items() if name not in kept}}
    params = _restore(where, rest)
    return params | {"layers": params["layers"] | quantised}


def _restore(where: Path, target: dict) -> dict:
    """Some of the weights in `where`: those that `target` names."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
        return checkpointer.restore(where, args=args)


def save_params(folder: Path, params: dict) -> None:
    """Writes `params/` into a model's folder."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((Path(folder) / PARAMS).absolute(), params, save_args=chunking(params))


def chunking(params: dict) -> dict:
    """Orbax's `save_args` for a parameter tree: a layer a chunk and tables in pieces, so that an export need not hold a whole stack."""

    def save_args(path, _) -> ocp.SaveArgs:
        return ocp.SaveArgs(shard_axes=(0,)) if path[0] == jax.tree_util.DictKey("layers") else ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)

    return jax.tree.map_with_path(save_args, params)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that a model's folder carries. UserError if it carries none."""
    from transformers import AutoTokenizer

    where = Path(folder) / HF_FOLDER
    if not (where / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer ({HF_FOLDER}/tokenizer_config.json is missing); import the model again")
    return AutoTokenizer.from_pretrained(where)
