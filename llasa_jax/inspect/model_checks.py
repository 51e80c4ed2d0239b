"""Whether the tokenizer is the model's, and the codec the dataset's."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llasa_jax.codec import Codec, load_codec
from llasa_jax.convert import model_folder
from llasa_jax.data.importing import UNKNOWN_CODEC
from llasa_jax.errors import UserError
from llasa_jax.inspect.findings import Finding, Severity
from llasa_jax.runtime.files import read_json
from llasa_jax.speech.vocab import SpeechVocab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_tokenizer(model: Path, tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """Whether a tokenizer is the one that the weights in the folder `model` were made for.
    UserError if it has no speech tokens.
    """
    opened = model_folder.open_model(model, weights=False)
    config = opened.config
    size, base = len(tokenizer), SpeechVocab.of(tokenizer).code_base
    fix = f"import the model again, with its own tokenizer in {opened.files}"
    if size != config.vocab_size:
        message = f"the tokenizer has {size} tokens, the model {config.vocab_size}"
        severity: Severity = "bad" if size > config.vocab_size else "warn"
        return [Finding(severity, "tokenizer", message, fix)]
    path = opened.files / "config.json"
    hf = read_json(path, "the model's HF config") if path.is_file() else {}
    ends = hf.get("eos_token_id") or []
    for name, wanted in {
        "bos_token_id": [hf.get("bos_token_id")],
        "eos_token_id": ends if isinstance(ends, list) else [ends],
    }.items():
        for number in filter(lambda n: n is not None, wanted):
            if number not in tokenizer.added_tokens_decoder or (
                name == "bos_token_id" and number != tokenizer.bos_token_id
            ):
                token = tokenizer.convert_ids_to_tokens(number)
                message = (
                    f"the model's {name} {number} is {token!r} in the tokenizer: they do not match"
                )
                return [Finding("bad", "tokenizer", message, fix)]
    message = f"{size} tokens, as many as the model has; <|s_0|> is {base}"
    return [Finding("ok", "tokenizer", message)]


def check_codec(
    metadata: dict,
    codec: str | Path | Codec | None,
    device: str = "cpu",
    codes: np.ndarray | None = None,
) -> list[Finding]:
    """Whether a codec loads whole, gives codes the meaning that the dataset gives them, repeats
    itself, and makes sound of `codes`.
    """
    recorded = metadata.get("codec", UNKNOWN_CODEC)
    fingerprint = metadata.get("fingerprint", UNKNOWN_CODEC)
    if codec is None:
        if recorded == UNKNOWN_CODEC:
            message = "the dataset does not say which codec made its codes"
            fix = "make sure that it is the model's, and listen with `generate` early"
            return [Finding("warn", "codec", message, fix)]
        return [Finding("ok", "codec", f"codes of {recorded}; give --codec to examine it")]
    if isinstance(codec, str | Path):
        try:
            codec = load_codec(codec, device)
        except UserError as error:
            return [Finding("bad", "codec", str(error))]
    findings = []
    if fingerprint == UNKNOWN_CODEC:
        message = "the dataset lacks a fingerprint of its codec to compare with"
        findings.append(Finding("warn", "codec", message, "encode it again to be sure"))
    elif fingerprint != codec.fingerprint:
        message = (
            f"the dataset's codes are of {recorded} ({fingerprint}), but {codec.name} is another"
            f" codec ({codec.fingerprint})"
        )
        findings.append(Finding("bad", "codec", message, f"use {recorded}, or encode again"))
    wave = _buzz(codec.sample_rate)
    alone, (again, _) = codec.encode([wave])[0], codec.encode([wave, wave[::-1].copy()])
    if not np.array_equal(alone, again):
        message = (
            f"{codec.name} encodes one clip to other codes the second time"
            f" ({np.mean(alone != again):.0%} differ)"
        )
        findings.append(Finding("bad", "codec", message, "use it in eval mode and float32"))
    broken = "its weights are broken: get the checkpoint again"
    if (distinct := len(np.unique(alone))) < 10:
        message = f"{codec.name} makes only {distinct} different codes of two seconds of sound"
        findings.append(Finding("bad", "codec", message, broken))
    spoken = alone if codes is None else codes
    sound = codec.decode(spoken)
    if not np.isfinite(sound).all() or np.abs(sound).max() < 1e-4:
        message = f"{codec.name} makes silence or NaN of the dataset's codes"
        findings.append(Finding("bad", "codec", message, broken))
    if findings:
        return findings
    survived = np.mean(codec.encode([sound.astype(np.float32)])[0][: len(spoken)] == spoken)
    message = (
        f"{codec.name} is the dataset's ({fingerprint}) and repeats itself; {survived:.0%} of codes"
        " survive a round trip"
    )
    return [Finding("ok", "codec", message)]


def _buzz(sample_rate: int) -> np.ndarray:
    """Two seconds of a buzz like a voice: a gliding pitch with falling overtones."""
    time = np.arange(2 * sample_rate) / sample_rate
    pitch = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * time)) / sample_rate
    overtones = np.sum([np.sin(k * pitch) / k for k in range(1, 12)], axis=0)
    return (0.3 * overtones).astype(np.float32) / 2
