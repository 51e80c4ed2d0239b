"""A model on disk: ours, a training run's, or a Hugging Face checkpoint's.

Ours is a folder of

    model.json     its geometry (`ModelConfig`) and where it came from
    hf/            the HF checkpoint's small files, byte for byte: configs and tokenizer
    params/        the weights, an Orbax checkpoint, with their checksums

A training run's folder is laid out alike, with `checkpoints/STEP/params` in place of `params`, so
that whatever takes a model takes a run as well and means its latest step. A LoRA run's checkpoints
hold only what was trained; the rest is read from its base. `model.json` says where that lay, and
each checkpoint has its fingerprint: the base may be moved or copied, but not changed.

Wherever a model is named, the folder of a Hugging Face checkpoint or its id on the hub will do too.
"""

import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from llasa_jax.convert import hf_files
from llasa_jax.convert.hf_config import model_config
from llasa_jax.convert.load_hf import HfReader
from llasa_jax.convert.names import our_shapes
from llasa_jax.convert.params_io import (
    ABOUT,
    ParamsReader,
    computed_checksums,
    recorded_checksums,
    restore,
    tree_shapes,
    write_checksums,
)
from llasa_jax.errors import UserError, first_line
from llasa_jax.model.checksum import checksums
from llasa_jax.model.config import AdapterConfig, ModelConfig, Quantization, RopeScaling
from llasa_jax.model.lora import join, split
from llasa_jax.model.quantize import Quantized, quantize_stack
from llasa_jax.model.sharding import abstract_params
from llasa_jax.runtime import storage
from llasa_jax.runtime.files import read_json
from llasa_jax.runtime.storage import as_path, is_remote
from llasa_jax.runtime.writing import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE, HF_FOLDER, PARAMS, CHECKPOINTS = "model.json", "hf", "params", "checkpoints"
CHUNK_BYTES = 64 << 20
COMMIT = "commit_success.txt"  # Orbax's last file of a checkpoint in a bucket


@dataclass(frozen=True)
class Model:
    """A model that can be read. `origin` says where the weights came from: at least `base_model`,
    HF's id or the name of the start. `is_hf` says whether this is a Hugging Face checkpoint, with
    its own weights files.
    """

    folder: Path
    config: ModelConfig
    origin: dict
    is_hf: bool

    @property
    def files(self) -> Path:
        """The folder of its config.json and tokenizer, on this machine."""
        return hf_files.small_files(self.folder if self.is_hf else self.folder / HF_FOLDER)

    def reader(self, step: int | None = None) -> ParamsReader | HfReader:
        """Its weights, those of a run at `step` (the latest by default). UserError where there are
        none, or they do not fit the geometry.
        """
        if self.is_hf:
            return HfReader(self.folder, self.config)
        return ParamsReader(params_folder(self.folder, step), our_shapes(self.config))

    def fingerprint(self, step: int | None = None) -> str:
        """What tells these weights from all others, whatever their mesh, chunks and files: a hash
        of all checksums. Read from what was recorded when they were saved, else from all weights.
        """
        sums = {} if self.is_hf else recorded_checksums(params_folder(self.folder, step))
        sums = sums or computed_checksums(self.reader(step))
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def open_model(model: str | Path, weights: bool = True) -> Model:
    """The model in a folder of ours, in a training run's, in a Hugging Face checkpoint's, or with
    such an id on the hub, which is downloaded (only its small files unless `weights` are wanted).
    UserError where there is no model, or its description is damaged.
    """
    folder, name = hf_files.locate(model, weights)
    path = folder / MODEL_FILE
    if path.is_file():
        return Model(folder, *_description(path), is_hf=False)
    if not (folder / hf_files.CONFIG).is_file():
        raise UserError(
            f"{folder} holds no model: it has no {MODEL_FILE}, as a model of ours or a run, and no"
            f" {hf_files.CONFIG}, as a Hugging Face checkpoint"
        )
    path = folder / hf_files.CONFIG
    config = model_config(hf_files.read_json(path), path)
    card = hf_files.licence(hf_files.small_files(folder))
    origin = {"base_model": name, **card, **hf_files.prompt_of(path)}
    if weights:
        origin |= HfReader(folder, config).original_dtypes()
    return Model(folder, config, origin, is_hf=True)


def _description(path: Path) -> tuple[ModelConfig, dict]:
    description = read_json(path, "the model's description", fix="import the model again")
    try:
        config = dict(description["config"])
        if description["checksum"] != _geometry_checksum(config):
            raise ValueError("its config is not as it was written")
        if config["rope_scaling"] is not None:
            config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
        return ModelConfig(**config), dict(description["source"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: the model's description is damaged ({type(error).__name__}:"
            f" {first_line(error)}); import the model again"
        ) from error


def write_description(folder: Path, config: ModelConfig, source: dict) -> None:
    """Writes `model.json`. `source` is the `origin` of a `Model`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(config)
    description = {"config": values, "source": source, "checksum": _geometry_checksum(values)}
    write_whole(folder / MODEL_FILE, json.dumps(description, indent=2) + "\n")


def _geometry_checksum(config: dict) -> int:
    """Any RoPE theta makes a model, so nothing else would show that one digit of it has changed."""
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())


def read_description(folder: str | Path) -> tuple[ModelConfig, dict]:
    """The geometry and the origin of a model, as `open_model` finds it."""
    model = open_model(folder)
    return model.config, model.origin


def copy_description(source: str | Path, destination: Path) -> None:
    """Copies all that is not weights, so that a training run's folder stands alone."""
    model = open_model(source)
    write_description(destination, model.config, model.origin)
    hf_files.copy_small_files(model.files, destination / HF_FOLDER)


def saved_steps(folder: Path) -> list[int]:
    """Steps with a finished checkpoint in a run's folder, ascending. Orbax renames a checkpoint to
    its number when it is whole; in a bucket it writes `commit_success.txt` as the last file.
    """
    checkpoints = as_path(folder) / CHECKPOINTS
    if is_remote(checkpoints):
        names = [step for step, contents in remote_steps(checkpoints).items() if COMMIT in contents]
    else:
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    # Not 06, which somebody else has made.
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def remote_steps(checkpoints: Path) -> dict[str, set[str]]:
    """The steps in a bucket's folder of checkpoints, whole or not, by name, each with the names of
    what is directly in it.
    """
    steps: dict[str, set[str]] = {}
    for name in storage.entries(checkpoints):
        step, _, rest = name.partition("/")
        steps.setdefault(step, set()).add(rest.partition("/")[0])
    return steps


def read_about(folder: Path, step: int | str) -> dict:
    """What a run noted beside a checkpoint; nothing if that is damaged."""
    path = folder / CHECKPOINTS / str(step) / ABOUT / "metadata"
    try:
        return read_json(path, "the checkpoint's note")
    except UserError:
        return {}


def adapters_of(source: dict) -> tuple[AdapterConfig | None, Path | None]:
    """The adapters of a LoRA run and its base, a folder or hub id, from the origin in `model.json`;
    None and None for other models.
    """
    if "lora" not in source:
        return None, None
    try:
        # Runs of earlier versions call the token ids rows.
        fields: dict[str, Any] = {
            "token_ids" if key == "rows" else key: tuple(value)
            if isinstance(value, list)
            else value
            for key, value in source["lora"]["adapters"].items()
        }
        return AdapterConfig(**fields), as_path(source["lora"]["base"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the adapters in a LoRA run's {MODEL_FILE} are damaged ({first_line(error)}); give"
            " the command that trained it again, which writes the file again"
        ) from error


def quantization_of(source: dict) -> Quantization:
    """How the frozen weights of a LoRA run were kept, from the source in `model.json`; "none" for
    other models.
    """
    return source.get("lora", {}).get("quantize", "none")


def params_folder(folder: Path, step: int | None = None) -> Path:
    """Where the weights lie: `params/` of a model, or those of a run's step (the latest by
    default).
    """
    folder = as_path(folder)
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


def load_params(
    folder: str | Path, mesh: Mesh, dtype, step: int | None = None, base: str | Path | None = None
) -> dict:
    """The weights, each read straight into its shards on `mesh` and cast to `dtype`.

    A LoRA run's are its base's and its adapters, as one tree for a `Llama` with the adapters of
    `adapters_of`; `base` says where the base lies now, by default where it lay. UserError where it
    is not there, or is another model, and where a weight's checksum is not the recorded one.
    """
    config, source = read_description(folder)
    adapters, _ = adapters_of(source)
    refuse_base(folder, source, base)
    if adapters is None:
        return restore_params(folder, abstract_params(config, mesh, dtype), step)
    folder = as_path(folder)
    trained = load_trained(folder, mesh, dtype, step)
    return join(load_base(folder, mesh, dtype, step, base), trained)


def load_trained(folder: Path, mesh: Mesh, dtype, step: int | None = None) -> dict:
    """What a LoRA run trained: its adapters, and what else it trained of the model."""
    config, source = read_description(folder)
    adapters, _ = adapters_of(source)
    return restore_params(
        folder, split(abstract_params(config, mesh, dtype, adapters), adapters)[1], step
    )


def load_base(
    folder: Path, mesh: Mesh, dtype, step: int | None = None, base: str | Path | None = None
) -> dict:
    """The weights of a LoRA run's base, quantised as in training.

    UserError where it is not there, or is another than the checkpoint of `step` was made with.
    """
    config, source = read_description(folder)
    base = base_of(folder, base)
    number = params_folder(folder, step).parent.name
    check_fingerprint(folder, number, base, open_model(base).fingerprint())
    return restore_params(
        base, abstract_params(config, mesh, dtype, quantization=quantization_of(source))
    )


def base_of(run: Path, base: str | Path | None = None) -> Path:
    """Where the base of the LoRA run `run` lies: in `base`, or where it lay in training. UserError
    where it is not there.
    """
    if not base:
        _, base = adapters_of(read_description(run)[1])
        assert base is not None  # as `run` is a LoRA run
    check_base(run, as_path(base))
    return as_path(base)


def refuse_base(model: str | Path, origin: dict, base: str | Path | None) -> None:
    """UserError where a `base` is named for a model that is no LoRA run, and so has none."""
    if base and "lora" not in origin:
        raise UserError(f"{model} is no LoRA run, so it has no base; leave --base out")


def check_base(run: Path, base: Path) -> None:
    """UserError where the base of the LoRA run `run` is not there. What can be a hub id passes."""
    if base.is_absolute() and not base.is_dir():
        raise UserError(
            f"{run} holds adapters for the model in {base}, which is not there; put it back, or say"
            " where it lies now (--base)"
        )


def check_fingerprint(run: Path, step: int | str, base: Path, found: str) -> None:
    """UserError where a checkpoint of the LoRA run `run` was made with another base than that of
    the fingerprint `found`.
    """
    made_with = read_about(as_path(run), step).get("fingerprint", found)
    if made_with != found:
        raise UserError(
            f"{run} holds adapters for another model than the one that is in {base} now"
            f" (fingerprint {made_with}, not {found}); put back the model that it was trained with"
        )


def restore_params(folder: str | Path, target: dict, step: int | None = None) -> dict:
    """The weights as `target`, a tree of `ShapeDtypeStruct`s with shardings, has them. UserError
    where they are damaged.

    Where it has `Quantized`, one weight (of all layers) at a time is read as bfloat16 and
    quantised, so that devices never hold more.
    """
    model = open_model(folder)
    if model.is_hf:
        reader = model.reader()
    else:
        reader = ParamsReader(params_folder(model.folder, step), tree_shapes(target))
    layers = target.get("layers", {})
    kept = {name: leaf for name, leaf in layers.items() if isinstance(leaf, Quantized)}
    quantised = {}
    for name in sorted(kept, key=lambda name: prod(kept[name].shape), reverse=True):
        sharding = kept[name].q.sharding
        whole = jax.ShapeDtypeStruct(kept[name].shape, jnp.bfloat16, sharding=sharding)
        quantised[name] = quantize_stack(reader.onto(f"layers.{name}", whole), kept[name])
    others = {name: leaf for name, leaf in layers.items() if name not in kept}
    params = restore(reader, target | ({"layers": others} if layers else {}))
    return params | ({"layers": params["layers"] | quantised} if layers else {})


def save_params(folder: Path, params: dict) -> None:
    """Writes `params/`, with its checksums, into a model's folder."""
    where = (Path(folder) / PARAMS).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(where, params, save_args=chunking(params))
    write_checksums(where, checksums(params))


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


def load_tokenizer(model: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, as `open_model` finds it. UserError if it has none, or it cannot be
    read.
    """
    folder, _ = hf_files.locate(model, weights=False)
    files = folder / HF_FOLDER if (folder / HF_FOLDER).is_dir() else folder
    tokenizer = hf_files.load_tokenizer(hf_files.small_files(files))
    if tokenizer is None:
        raise UserError(
            f"{model} holds no tokenizer ({files / hf_files.TOKENIZER_CONFIG} is missing); add"
            " the tokenizer's files, or import the model again"
        )
    return tokenizer
