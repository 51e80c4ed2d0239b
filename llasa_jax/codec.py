"""The speech codec behind one interface: 16 kHz waves to codes and back. XCodec2, from transformers, in PyTorch.

A code is one of 65,536 and stands for 320 samples (20 ms). PyTorch and transformers are imported when a codec is loaded.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from llasa_jax.errors import UserError

DEFAULT_CODEC = "HKUSTAudio/xcodec2-hf"
SAMPLE_RATE = 16000
HOP = 320
CODEBOOK_SIZE = 65536
_MEANING = ("quantizer.", "fc_encoder.", "generator.quantizer.", "fc_prior.")  # tensors: transformers' names, the original's
MAX_BATCH_SAMPLES = 120 * SAMPLE_RATE  # of equally long clips in one forward pass; a longer clip goes alone


class Codec(Protocol):
    """What the rest of the project knows of a codec."""

    name: str
    fingerprint: str  # equal for two codecs only if their codes mean the same
    sample_rate: int
    hop: int

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves, float32 (samples,), to codes, uint16 (samples // hop + 1,), in the same order."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes, integers (frames,), to the wave, float32 (frames * hop,)."""


def load_codec(name: str | Path = DEFAULT_CODEC, device: str = "cpu") -> "Codec":
    """Loads an XCodec2 checkpoint from a folder or the Hugging Face hub, onto a PyTorch device.

    Its config.json tells the format: transformers', or that of the original package (`HKUSTAudio/xcodec2`; see `codec_original`).
    Strict: every tensor of the checkpoint is used and every tensor of the model is in it, with its shape; safetensors only.
    (The `xcodec2` package under recent transformers drops the SnakeBeta `beta` tensors with a warning, and its codes are
    noise.) Raises `UserError` for what is not such a checkpoint, for a device that is not there, and for a hub that
    cannot be reached.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig, Xcodec2Config, Xcodec2Model

    name = str(name)
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"{name}: no such codec folder; give a folder, or a name on the hub such as {DEFAULT_CODEC}.")
    if is_folder and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name}: no codec, it has no config.json; give a folder with an XCodec2 checkpoint.")
    try:
        torch_device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} is not available to this PyTorch ({_first_line(error)}); use cpu or cuda.") from error

    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(name)
        if "codec_encoder_hidden_size" in config_dict:  # of the two formats only the original's has it, whatever its model_type
            from llasa_jax.codec_original import load_original

            return load_original(name, config_dict, torch_device)
        if config_dict.get("model_type") != "xcodec2":
            raise UserError(
                f"{name}: no codec, its config.json says model_type {config_dict.get('model_type')!r}, not 'xcodec2'; use {DEFAULT_CODEC}."
            )
        config = Xcodec2Config.from_dict(config_dict)
        levels, hop, rate = int(np.prod(config.quantization_levels)), config.hop_length, config.sampling_rate
        if (levels, hop, rate) != (CODEBOOK_SIZE, HOP, SAMPLE_RATE):
            raise UserError(
                f"{name}: {levels} codes of {hop} samples at {rate} Hz, but Llasa speaks {CODEBOOK_SIZE} codes of {HOP} "
                f"samples at {SAMPLE_RATE} Hz; use {DEFAULT_CODEC}."
            )
        model, loaded = Xcodec2Model.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        hint = "give a complete checkpoint in safetensors" if is_folder else "check the name and the network, or give a local folder"
        raise UserError(f"{name}: the codec cannot be loaded ({_first_line(error)}); {hint}.") from error
    faults = {
        "lacks": loaded["missing_keys"],
        "has the unknown": loaded["unexpected_keys"],
        "has the wrong shape for": [key[0] for key in loaded["mismatched_keys"]],
        "cannot read": [str(message) for message in loaded["error_msgs"]],
    }
    refuse_faults(name, faults, "get a checkpoint saved by transformers' Xcodec2Model")
    return Xcodec2Codec(name, model.to(torch_device))


def refuse_faults(name: str, faults: dict[str, Iterable[str]], fix: str) -> None:
    """Raises `UserError` where a strict load found any, by what is the matter with the tensors named."""
    found = [f"{verb} {_some(sorted(keys))}" for verb, keys in faults.items() if keys]
    if found:
        raise UserError(f"{name}: the codec's checkpoint {' and '.join(found)}; {fix}.")


class Xcodec2Codec:
    """transformers' `Xcodec2Model` as a `Codec`, in eval mode and float32.

    A clip is prepared as XCodec2's own `encode_code` does it: zeros up to a multiple of 320 samples, a whole 320 where it
    is one already, so floor(samples / 320) + 1 codes; the log-mel features see 160 more zeros at both ends. Clips share a
    batch only with clips of the same padded length, so nothing is padded for a neighbour's sake and a clip's codes are
    those of the clip alone (up to float32 round-off in the matrix products, which can flip a value lying on a rounding edge).
    """

    sample_rate = SAMPLE_RATE
    hop = HOP

    def __init__(self, name: str, model):
        from transformers import SeamlessM4TFeatureExtractor

        self.name = name
        self.model = model.float().eval()
        self.fingerprint = _fingerprint(model.state_dict())
        self._mel = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2, sampling_rate=SAMPLE_RATE)

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves, float32 (samples,) at 16 kHz, to codes, uint16 (samples // 320 + 1,), in the same order.

        Raises `UserError` for an empty wave, more than one channel, and NaN or infinite samples.
        """
        clips_of_length = defaultdict(list)
        for index, wave in enumerate(waves):
            if wave.ndim != 1 or wave.size == 0:
                raise UserError(f"clip {index} to encode has shape {wave.shape}; give mono waves with at least one sample.")
            if not np.isfinite(wave).all():
                raise UserError(f"clip {index} to encode has NaN or infinite samples; read it with llasa_jax.audio.read_audio.")
            clips_of_length[(len(wave) // HOP + 1) * HOP].append(index)
        codes = [None] * len(waves)
        for length, clips in clips_of_length.items():
            size = max(1, MAX_BATCH_SAMPLES // length)
            for start in range(0, len(clips), size):
                batch = clips[start : start + size]
                padded = np.stack([np.pad(waves[i].astype(np.float32), (0, length - len(waves[i]))) for i in batch])
                for index, row in zip(batch, self._encode_batch(padded), strict=True):
                    codes[index] = row
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes, integers (frames,), to the wave, float32 (frames * 320,) at 16 kHz.

        Raises `UserError` for no codes, and for a code outside 0..65535 (token ids are code + the tokenizer's base).
        """
        import torch

        codes = np.asarray(codes)
        if codes.ndim != 1 or codes.size == 0 or codes.dtype.kind not in "iu":
            raise UserError(f"codes to decode have shape {codes.shape} and type {codes.dtype}; give a flat, non-empty array of integers.")
        if codes.min() < 0 or codes.max() >= CODEBOOK_SIZE:
            raise UserError(f"codes to decode reach from {codes.min()} to {codes.max()}, outside 0..65535; subtract the token base.")
        with torch.inference_mode(), _exact_float32():
            wave = self._wave(torch.from_numpy(codes.astype(np.int64))[None, None].to(self.model.device))
        return wave[0, 0].float().cpu().numpy()

    def _encode_batch(self, waves: np.ndarray) -> np.ndarray:
        """Waves (batch, frames * 320) to codes, uint16 (batch, frames)."""
        import torch

        mel = self._mel(list(np.pad(waves, ((0, 0), (HOP // 2, HOP // 2)))), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode(), _exact_float32():
            codes = self._codes(torch.from_numpy(waves)[:, None].to(self.model.device), mel["input_features"].to(self.model.device))
        return codes[:, 0].cpu().numpy().astype(np.uint16)

    def _codes(self, waves, features):
        """Waves (batch, 1, samples) and their log-mel features (batch, frames, 160) to codes (batch, 1, frames)."""
        return self.model.encode(waves, input_features=features).audio_codes

    def _wave(self, codes):
        """Codes (batch, 1, frames) to waves (batch, 1, samples)."""
        return self.model.decode(codes).audio_values


def _exact_float32():
    """Codes are rounded values: on a GPU, cuDNN's default TF32 convolutions would give other codes than a CPU."""
    import torch

    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)


def _fingerprint(tensors) -> str:
    """Names and shapes of everything, bytes of what decides a code's meaning. A finetuned decoder keeps the fingerprint."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}\n".encode())
        if name.startswith(_MEANING):
            digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
