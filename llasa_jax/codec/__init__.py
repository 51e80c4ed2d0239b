"""The speech codec behind one interface: 16 kHz waves to codes and back."""

import re
from pathlib import Path

from llasa_jax.codec.interface import DEFAULT_CODEC, HOP, Codec
from llasa_jax.codec.original import load_original
from llasa_jax.codec.xcodec2 import MAX_BATCH_SAMPLES, Xcodec2Codec, load_xcodec2
from llasa_jax.errors import UserError, first_line

__all__ = ["DEFAULT_CODEC", "HOP", "MAX_BATCH_SAMPLES", "Codec", "Xcodec2Codec", "load_codec"]


def load_codec(name: str | Path = DEFAULT_CODEC, device: str = "cpu") -> Codec:
    """Loads an XCodec2 checkpoint from a folder or the Hugging Face hub, onto a PyTorch device.

    Its config.json tells the format: transformers', or that of the original package
    (`HKUSTAudio/xcodec2`; see `codec/original.py`). Strict: every tensor of the checkpoint is used
    and every tensor of the model is in it, with its shape; safetensors only. (The `xcodec2` package
    under recent transformers drops the SnakeBeta `beta` tensors with a warning, and its codes are
    noise.) Raises `UserError` for what is not such a checkpoint, for a device that is not there,
    and for a hub that cannot be reached.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig

    name = str(name)
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
    try:
        torch_device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device!r} is not available to this PyTorch ({first_line(error)}); use cpu or"
            " cuda."
        ) from error

    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(name)
        # Of the two formats only the original's has this key, whatever its model_type.
        load = load_original if "codec_encoder_hidden_size" in config_dict else load_xcodec2
        return load(name, config_dict, torch_device)
    except (OSError, ValueError, SafetensorError) as error:
        hint = (
            "give a complete checkpoint in safetensors"
            if is_folder
            else "check the name and the network, or give a local folder"
        )
        raise UserError(
            f"{name}: the codec cannot be loaded ({first_line(error)}); {hint}."
        ) from error
