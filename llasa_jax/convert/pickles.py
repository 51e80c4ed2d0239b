"""Checkpoints as `torch.save` writes them, rewritten as safetensors."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from llasa_jax.convert.hf_files import copy_small_files, write_json
from llasa_jax.convert.safetensors_io import INDEX
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime.files import read_json
from llasa_jax.runtime.writing import new_folder

if TYPE_CHECKING:
    import torch

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE_INDEX = "pytorch_model.bin.index.json"
# Where trainers keep a model's tensors beside other things.
INSIDE = ("state_dict", "model_state_dict", "model")


def pickle_to_safetensors(source: Path, destination: Path) -> None:
    """Writes the tensors of `source`, a file or a checkpoint's folder, as safetensors into the new
    folder `destination`, one shard after the other, with the folder's small files.

    Only tensors are read (`torch.load(weights_only=True)`): no code in a file can run. UserError
    for all else, and for a file that is damaged or holds anything but a state dict.
    """
    source, destination = Path(source), Path(destination)
    shards = _shards(source)
    with new_folder(destination, sum(path.stat().st_size for path in shards)) as partial:
        if source.is_dir():
            copy_small_files(source, partial)
            (partial / PICKLE_INDEX).unlink(missing_ok=True)
        weight_map: dict[str, str] = {}
        total = 0
        for path in shards:
            tensors = _tensors(path)
            name = _name(path, single=len(shards) == 1)
            if twice := sorted(weight_map.keys() & tensors.keys()):
                raise UserError(
                    f"{path}: the tensor {twice[0]} is in {weight_map[twice[0]]} too; leave only"
                    " the files of one checkpoint in the folder"
                )
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            _save(tensors, partial / name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / INDEX, index)


def _shards(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} does not exist; give a file or the folder of a checkpoint")
    index = source / PICKLE_INDEX
    if index.is_file():
        weight_map = read_json(index, "the checkpoint's index").get("weight_map")
        names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        paths = [source / Path(name).name for name in names]
    else:
        paths = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES)
        weights = [path for path in paths if path.name.startswith("pytorch_model")]
        paths = weights or paths
    absent = [path.name for path in paths if not path.is_file()]
    if absent or not paths:
        raise UserError(
            f"{source} holds no {absent[0] if absent else 'file of ' + ', '.join(SUFFIXES)}; give a"
            " complete checkpoint"
        )
    return paths


def _name(path: Path, single: bool) -> str:
    """transformers' name of the same shard."""
    number = re.search(r"-(\d+-of-\d+)$", path.stem)
    if single:
        return "model.safetensors"
    return f"model-{number[1]}.safetensors" if number else f"{path.stem}.safetensors"


def _tensors(path: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        # Mapped into memory, so that a shard is read as it is written.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is damaged ({first_line(error)}); only tensors are"
            " read, for anything else can run code: save model.state_dict() alone"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a file of torch.save, or is damaged ({first_line(error)}); copy it"
            " again from its source"
        ) from None
    for key in INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    good = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    )
    if not good or not content:
        raise UserError(
            f"{path} holds no state dict, which is tensors by name; save model.state_dict()"
        )
    return content


def _save(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    from safetensors.torch import save_file

    storages: set[int] = set()
    whole = {}
    for name, tensor in tensors.items():
        # Tensors that share memory, as tied tables do, are written as two.
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        partly = tensor.untyped_storage().nbytes() != tensor.nbytes
        whole[name] = (tensor.clone() if shared or partly else tensor).contiguous()
    try:
        save_file(whole, path, {"format": "pt"})
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path.name} cannot be written ({first_line(error)})") from error
