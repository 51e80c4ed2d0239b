"""The speech codec behind one interface: 16 kHz waves to codes and back."""

import re
from pathlib import Path

from llasa_jax.codec.interface import DEFAULT_CODEC, HOP, Codec
from llasa_jax.codec.original import load_original
from llasa_jax.codec.xcodec2 import MAX_BATCH_SAMPLES, Xcodec2Codec, load_xcodec2
from llasa_jax.codec.xcodec2_jax import Precision, devices_named, load_jax
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import is_remote

__all__ = ["DEFAULT_CODEC", "HOP", "MAX_BATCH_SAMPLES", "Codec", "Xcodec2Codec", "load_codec"]


def load_codec(
    name: str | Path = DEFAULT_CODEC, device: str = "cpu", precision: Precision = "float32"
) -> Codec:
    """Loads an XCodec2 checkpoint from a folder or the Hugging Face hub, onto a device.

    `device` also chooses the implementation: PyTorch's for a device as PyTorch names it, JAX's for
    "jax" (all devices that JAX has in this process) or "jax:2,3" (some of them). Both give the same
    codes. `precision` is that of JAX's products, "float32", "bfloat16_3x" or "bfloat16".

    Its config.json tells the format: transformers', or that of the original package
    (`HKUSTAudio/xcodec2`; see `codec/original.py`). Strict: every tensor of the checkpoint is used
    and every tensor of the model is in it, with its shape; safetensors only. (The `xcodec2` package
    under recent transformers drops the SnakeBeta `beta` tensors with a warning, and its codes are
    noise.) Raises `UserError` for what is not such a checkpoint, for a device that is not there,
    and for a hub that cannot be reached.
    """
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig

    name = str(name).removeprefix("hf://")
    if is_remote(name):
        codec = load_codec(local_copy(name), device, precision)
        codec.name = name  # not that of the copy
        return codec
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(
            f"{name}: no such codec folder; give a folder, or a name on the hub such as"
            f" {DEFAULT_CODEC}."
        )
    if is_folder and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"{name}: no codec, it has no config.json; give a folder with an XCodec2 checkpoint."
        )
    in_jax = device.partition(":")[0] == "jax"
    place = devices_named(device) if in_jax else _torch_device(device)

    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(name)
        if in_jax:
            return load_jax(name, config_dict, place, precision)
        # Of the two formats only the original's has this key, whatever its model_type.
        load = load_original if "codec_encoder_hidden_size" in config_dict else load_xcodec2
        return load(name, config_dict, place)
    except (OSError, ValueError, SafetensorError) as error:
        hint = (
            "give a complete checkpoint in safetensors"
            if is_folder
            else "check the name and the network, or give a local folder"
        )
        raise UserError(
            f"{name}: the codec cannot be loaded ({first_line(error)}); {hint}."
        ) from error


def _torch_device(name: str):
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available to this PyTorch ({first_line(error)}); use cpu or"
            " cuda."
        ) from error
