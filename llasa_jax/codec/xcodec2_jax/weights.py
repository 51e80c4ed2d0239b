"""XCodec2's weights from safetensors, in either checkpoint format, as parameters for `encoder.py`
and `decoder.py`: nested dicts with transformers' names, the layers of a stack under one name.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from llasa_jax.codec.xcodec2 import fingerprint_of, read_config, refuse_faults
from llasa_jax.codec.xcodec2_jax.decoder import inverse_transform
from llasa_jax.codec.xcodec2_jax.encoder import kaiser_taps
from llasa_jax.codec.xcodec2_jax.original_names import (
    canonical_name,
    is_constant,
    joined,
    joined_shape,
    original_config,
    original_names,
)
from llasa_jax.errors import UserError

PARTS = {
    "encoder": (
        "semantic_encoder.",
        "semantic_adapter.",
        "acoustic_encoder.",
        "fc_encoder.",
        "quantizer.project_in.",
    ),
    "decoder": ("quantizer.project_out.", "acoustic_decoder."),
}
_UNUSED = "semantic_encoder.masked_spec_embed"  # for training alone
_STACK = re.compile(
    r"(semantic_encoder\.encoder\.layers|acoustic_decoder\.(?:layers|prior_net|post_net))"
    r"\.(\d+)\.(.+)"
)


class Tensors(Mapping):
    """A checkpoint's tensors by name, each read from its file, as float32, when it is asked for."""

    def __init__(self, files: list[Path], rename: Callable[[str], str | None] = str):
        """`rename` gives the name that a tensor goes by, None for one to leave out."""
        from safetensors import safe_open

        handles = [safe_open(file, framework="pt") for file in files]
        self._places: dict[str, tuple[Any, str]] = {}
        for handle in handles:
            for key in handle.keys():  # noqa: SIM118 a safe_open is no mapping
                if (name := rename(key)) is not None:
                    self._places[name] = handle, key

    def __getitem__(self, name: str):
        handle, key = self._places[name]
        return handle.get_tensor(key).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        handle, key = self._places[name]
        return tuple(handle.get_slice(key).get_shape())

    def array(self, name: str) -> np.ndarray:
        return self[name].numpy()


@dataclass(frozen=True)
class Weights:
    """A checked checkpoint: every tensor of the model is in it, in its shape, and nothing else."""

    config: object  # an `Xcodec2Config`
    fingerprint: str
    names: list[str]  # transformers'
    read: Callable[[str], np.ndarray]

    def names_of(self, part: str) -> list[str]:
        """The tensors of "encoder" or "decoder"."""
        return [name for name in self.names if name.startswith(PARTS[part]) and name != _UNUSED]

    def part(self, part: str, dtype=np.float32) -> dict:
        """The parameters of "encoder" or "decoder", arrays in the host's memory."""
        tree: dict = {}
        depths: dict[str, int] = {}
        names = self.names_of(part)
        for name in names:
            if stacked := _STACK.fullmatch(name):
                depths[stacked[1]] = max(depths.get(stacked[1], 0), int(stacked[2]) + 1)
        for name in names:
            array, stacked = _in_our_order(self.read(name)), _STACK.fullmatch(name)
            if not stacked:
                _branch(tree, name)[name.rpartition(".")[2]] = array.astype(dtype)
                continue
            path = f"{stacked[1]}.{stacked[3]}"
            branch, leaf = _branch(tree, path), path.rpartition(".")[2]
            if leaf not in branch:
                branch[leaf] = np.empty((depths[stacked[1]], *array.shape), dtype)
            branch[leaf][int(stacked[2])] = array
        return tree

    def named(self, part: str, params: dict) -> dict[str, np.ndarray]:
        """The parameters that `part` gives, trained perhaps, as transformers' tensors by name."""
        tensors = {}
        for name in self.names_of(part):
            stacked = _STACK.fullmatch(name)
            path = f"{stacked[1]}.{stacked[3]}" if stacked else name
            array = np.asarray(reduce(getitem, path.split("."), params))
            if stacked:
                array = array[int(stacked[2])]
            if array.ndim == 3:
                array = array.transpose(2, 1, 0)
            tensors[name] = np.ascontiguousarray(array.reshape(self.read(name).shape))
        return tensors


def _in_our_order(array: np.ndarray) -> np.ndarray:
    """A kernel [O, C, W] as [W, C, O], or as a weight [O, C] where it has one tap."""
    if array.ndim < 3:
        return array
    return array[..., 0] if array.shape[2] == 1 else array.transpose(2, 1, 0)


def _branch(tree: dict, path: str) -> dict:
    """The dict that holds the path's last name."""
    for step in path.split(".")[:-1]:
        tree = tree.setdefault(step, {})
    return tree


def open_weights(name: str, config_dict: dict) -> Weights:
    """Opens a checkpoint of a folder or hub id, in either format, given its config.json.

    Raises `UserError` for another model, for what this implementation does not compute, and where a
    tensor is missing, unknown or of another shape.
    """
    files = checkpoint_files(name)
    if "codec_encoder_hidden_size" in config_dict:
        return _original_weights(name, Tensors(files, canonical_name))
    tensors = Tensors(files)
    config = read_config(name, config_dict)
    shapes = {key: tensors.shape(key) for key in tensors}
    _check(
        name, config, shapes, unknown=(), fix="get a checkpoint saved by transformers' Xcodec2Model"
    )
    return Weights(config, fingerprint_of(tensors), sorted(tensors), tensors.array)


def checkpoint_files(name: str) -> list[Path]:
    """`model.safetensors` of a folder or hub id, or the files that its index names.

    Raises OSError where there is neither.
    """
    from transformers.utils import cached_file

    def found(file: str, **options) -> str | None:
        return cached_file(name, file, **options)

    index = found("model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    files = {"model.safetensors"}
    if index is not None:
        files = set(json.loads(Path(index).read_text())["weight_map"].values())
    # A missing file raises.
    return [Path(str(found(file))) for file in sorted(files)]


def model_shapes(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of transformers' `Xcodec2Model`; no memory is taken."""
    import torch
    from transformers import Xcodec2Model

    with torch.device("meta"):
        model = Xcodec2Model(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _check(name: str, config, shapes: dict, unknown, fix: str) -> None:
    """Refuses a model that this implementation does not compute, and a broken checkpoint."""
    semantic = config.semantic_model_config
    unsupported = {
        "position_embeddings_type": semantic.position_embeddings_type != "relative_key",
        "add_adapter": semantic.add_adapter,
        "use_intermediate_ffn_before_adapter": semantic.use_intermediate_ffn_before_adapter,
        "hidden_act": config.hidden_act != "silu" or semantic.hidden_act not in ("silu", "swish"),
        "num_key_value_heads": config.num_key_value_heads != config.num_attention_heads,
        "rope_parameters": config.rope_parameters["rope_type"] != "default",
    }
    if any(unsupported.values()):
        settings = ", ".join(key for key, is_set in unsupported.items() if is_set)
        raise UserError(
            f"{name}: the jax codec does not compute this model's {settings}; use the torch one."
        )
    expected = model_shapes(config)
    faults: dict[str, Iterable[str]] = {
        "lacks": expected.keys() - shapes.keys(),
        "has the unknown": (shapes.keys() - expected.keys()) | set(unknown),
        "has the wrong shape for": [
            key for key in expected.keys() & shapes.keys() if expected[key] != shapes[key]
        ],
    }
    refuse_faults(name, faults, fix)


def _original_weights(name: str, tensors: Tensors) -> Weights:
    """The original package's tensors as transformers' ones."""
    fix = "get the whole checkpoint of HKUSTAudio/xcodec2, or use HKUSTAudio/xcodec2-hf"
    try:
        config = original_config(tensors)
    except KeyError as error:
        raise UserError(f"{name}: the codec's checkpoint lacks {error.args[0]}; {fix}.") from error
    sources = {key: original_names(key, tensors) for key in model_shapes(config)}
    shapes = {
        key: joined_shape(key, [tensors.shape(source) for source in names])
        for key, names in sources.items()
        if all(source in tensors for source in names)
    }
    used = {source for names in sources.values() for source in names}
    _check(
        name, config, shapes, {key for key in tensors.keys() - used if not is_constant(key)}, fix
    )
    for key in filter(is_constant, tensors):
        constant = kaiser_taps() if key.endswith(".filter") else inverse_transform()[1]
        value = tensors.array(key).reshape(-1)
        if value.shape != np.shape(constant) or not np.allclose(value, constant, atol=1e-5):
            raise UserError(f"{name}: {key} is not XCodec2's; {fix}.")
    read = lambda key: joined(key, [tensors.array(source) for source in sources[key]])  # noqa: E731
    return Weights(config, fingerprint_of(tensors), sorted(sources), read)
