"""XCodec2 in PyTorch, from transformers. PyTorch and transformers are imported when a codec is
loaded.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from llasa_jax.codec.interface import DEFAULT_CODEC, HOP
from llasa_jax.errors import UserError, listed
from llasa_jax.speech.audio import SAMPLE_RATE
from llasa_jax.speech.vocab import NUM_CODES

# The decoder's tensors: transformers' names, then the original's.
_DECODER = ("acoustic_decoder.", "generator.backbone.", "generator.head.", "fc_post_a.")
# Of equally long clips in one forward pass; a longer clip goes alone.
MAX_BATCH_SAMPLES = 120 * SAMPLE_RATE


def load_xcodec2(name: str, config_dict: dict, device) -> "Xcodec2Codec":
    """Loads a checkpoint in transformers' format, given its config.json, onto a PyTorch device.

    Raises `UserError` for another model, and where a tensor is missing, unknown or of another
    shape.
    """
    import torch
    from transformers import Xcodec2Model

    config = read_config(name, config_dict)
    model: Xcodec2Model
    loaded: dict
    # transformers does not type what output_loading_info adds.
    model, loaded = Xcodec2Model.from_pretrained(  # type: ignore[misc]
        name,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    faults = {
        "lacks": loaded["missing_keys"],
        "has the unknown": loaded["unexpected_keys"],
        "has the wrong shape for": [key[0] for key in loaded["mismatched_keys"]],
        "cannot read": [str(message) for message in loaded["error_msgs"]],
    }
    refuse_faults(name, faults, "get a checkpoint saved by transformers' Xcodec2Model")
    return Xcodec2Codec(name, model.to(device))


def read_config(name: str, config_dict: dict):
    """The `Xcodec2Config` of a checkpoint in transformers' format.

    Raises `UserError` for another model, and for codes that are not Llasa's.
    """
    from transformers import Xcodec2Config

    if config_dict.get("model_type") != "xcodec2":
        raise UserError(
            f"{name}: no codec, its config.json says model_type {config_dict.get('model_type')!r}, "
            f"not 'xcodec2'; use {DEFAULT_CODEC}."
        )
    config = Xcodec2Config.from_dict(config_dict)
    levels, hop, rate = (
        int(np.prod(config.quantization_levels)),
        config.hop_length,
        config.sampling_rate,
    )
    if (levels, hop, rate) != (NUM_CODES, HOP, SAMPLE_RATE):
        raise UserError(
            f"{name}: {levels} codes of {hop} samples at {rate} Hz, but Llasa speaks {NUM_CODES}"
            f" codes of {HOP} samples at {SAMPLE_RATE} Hz; use {DEFAULT_CODEC}."
        )
    return config


def check_waves(waves: list[np.ndarray]) -> None:
    """Raises `UserError` for an empty wave, more than one channel, and NaN or infinite samples."""
    for index, wave in enumerate(waves):
        if wave.ndim != 1 or wave.size == 0:
            raise UserError(
                f"clip {index} to encode has shape {wave.shape}; give mono waves with at least"
                " one sample."
            )
        if not np.isfinite(wave).all():
            raise UserError(
                f"clip {index} to encode has NaN or infinite samples; read it with"
                " llasa_jax.speech.audio.read_audio."
            )


def check_codes(codes) -> np.ndarray:
    """Codes as an array. Raises `UserError` for no codes, and for a code outside 0..65535."""
    codes = np.asarray(codes)
    if codes.ndim != 1 or codes.size == 0 or codes.dtype.kind not in "iu":
        raise UserError(
            f"codes to decode have shape {codes.shape} and type {codes.dtype}; give a flat,"
            " non-empty array of integers."
        )
    if codes.min() < 0 or codes.max() >= NUM_CODES:
        raise UserError(
            f"codes to decode reach from {codes.min()} to {codes.max()}, outside 0..65535;"
            " subtract the token base."
        )
    return codes


def refuse_faults(name: str, faults: dict[str, Iterable[str]], fix: str) -> None:
    """Raises `UserError` where a strict load found any, by what is the matter with the tensors
    named.
    """
    found = [f"{verb} {listed(sorted(keys), 3)}" for verb, keys in faults.items() if keys]
    if found:
        raise UserError(f"{name}: the codec's checkpoint {' and '.join(found)}; {fix}.")


class Xcodec2Codec:
    """transformers' `Xcodec2Model` as a `Codec`, in eval mode and float32.

    A clip is prepared as XCodec2's own `encode_code` does it: zeros up to a multiple of 320
    samples, a whole 320 where it is one already, so floor(samples / 320) + 1 codes; the log-mel
    features see 160 more zeros at both ends. Clips share a batch only with clips of the same padded
    length, so nothing is padded for a neighbour's sake and a clip's codes are those of the clip
    alone (up to float32 round-off in the matrix products, which can flip a value lying on a
    rounding edge).
    """

    sample_rate = SAMPLE_RATE
    hop = HOP

    def __init__(self, name: str, model):
        from transformers import SeamlessM4TFeatureExtractor

        self.name = name
        self.model = model.float().eval()
        self.fingerprint = fingerprint_of(model.state_dict())
        self._mel = SeamlessM4TFeatureExtractor(
            feature_size=80, num_mel_bins=80, stride=2, sampling_rate=SAMPLE_RATE
        )

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves, float32 (samples,) at 16 kHz, to codes, uint16 (samples // 320 + 1,), in the same
        order.

        Raises `UserError` for an empty wave, more than one channel, and NaN or infinite samples.
        """
        check_waves(waves)
        clips_of_length = defaultdict(list)
        for index, wave in enumerate(waves):
            clips_of_length[(len(wave) // HOP + 1) * HOP].append(index)
        codes = [np.zeros(0, np.uint16)] * len(waves)
        for length, clips in clips_of_length.items():
            size = max(1, MAX_BATCH_SAMPLES // length)
            for start in range(0, len(clips), size):
                batch = clips[start : start + size]
                padded = np.stack(
                    [
                        np.pad(waves[i].astype(np.float32), (0, length - len(waves[i])))
                        for i in batch
                    ]
                )
                for index, row in zip(batch, self._encode_batch(padded), strict=True):
                    codes[index] = row
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes, integers (frames,), to the wave, float32 (frames * 320,) at 16 kHz.

        Raises `UserError` for no codes, and for a code outside 0..65535 (token ids are code + the
        tokenizer's base).
        """
        import torch

        codes = check_codes(codes)
        with torch.inference_mode(), _exact_float32():
            wave = self._wave(
                torch.from_numpy(codes.astype(np.int64))[None, None].to(self.model.device)
            )
        return wave[0, 0].float().cpu().numpy()

    def _encode_batch(self, waves: np.ndarray) -> np.ndarray:
        """Waves (batch, frames * 320) to codes, uint16 (batch, frames)."""
        import torch

        mel = self._mel(
            list(np.pad(waves, ((0, 0), (HOP // 2, HOP // 2)))),
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
        )
        with torch.inference_mode(), _exact_float32():
            codes = self._codes(
                torch.from_numpy(waves)[:, None].to(self.model.device),
                mel["input_features"].to(self.model.device),
            )
        return codes[:, 0].cpu().numpy().astype(np.uint16)

    def _codes(self, waves, features):
        """Waves (batch, 1, samples) and their log-mel features (batch, frames, 160) to codes
        (batch, 1, frames).
        """
        return self.model.encode(waves, input_features=features).audio_codes

    def _wave(self, codes):
        """Codes (batch, 1, frames) to waves (batch, 1, samples)."""
        return self.model.decode(codes).audio_values


def _exact_float32():
    """Codes are rounded values: on a GPU, cuDNN's default TF32 convolutions would give other codes
    than a CPU.
    """
    import torch

    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    )


def fingerprint_of(tensors) -> str:
    """Names and shapes of everything, and all values but the decoder's: what decides which code a
    sound gets. A finetuned decoder keeps the fingerprint, for its codes mean the same.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}\n".encode())
        if not name.startswith(_DECODER):
            digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
