"""From a text to speech: a model's folder, its prompts, the codec, and the file to write."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from flax import nnx

from llasa_jax.codec import DEFAULT_CODEC, Codec, load_codec
from llasa_jax.convert.model_folder import (
    adapters_of,
    load_params,
    load_tokenizer,
    read_description,
)
from llasa_jax.errors import UserError, printable
from llasa_jax.generate.decode import Generated, generate_codes, plausible_limit
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.model.llama import Llama
from llasa_jax.model.lora import Adapter, join, put_on_devices, side_by_side
from llasa_jax.model.sharding import abstract_params, make_mesh
from llasa_jax.runtime.files import new_file
from llasa_jax.runtime.storage import as_path, check_writable, is_remote
from llasa_jax.speech.audio import read_audio, write_audio
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.speech.vocab import CODES_PER_SECOND

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(
    folder: Path,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    step: int | None = None,
    tensor: int = 1,
    adapters: Sequence[Adapter | None] = (),
    base: str | Path | None = None,
) -> tuple[nnx.GraphDef, dict, Prompter, "PreTrainedTokenizerBase"]:
    """A model's or run's folder, ready for `generate_codes`: graph, weights, the prompts it was
    trained with, and its tokenizer.

    `step` picks a run's checkpoint (the latest by default); `tensor` is how many devices share the
    weights; `adapters` names one, or none, for each row of the batch to come, and if it is the same
    for all, for any batch; `base` says where the base of a LoRA run lies now. UserError for what is
    no such folder.
    """
    config, origin = read_description(folder)
    tokenizer = load_tokenizer(folder)
    prompter = Prompter(tokenizer, PromptSettings(**origin.get("prompt", {})))
    if prompter.vocab.size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {prompter.vocab.size} tokens but the model"
            f" {config.vocab_size}; import it again"
        )
    if not 1 <= tensor <= len(jax.devices()):
        raise UserError(
            f"the weights are to be split over {tensor} devices, but there are"
            f" {len(jax.devices())}; choose 1 to {len(jax.devices())}"
        )
    mesh = make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    params = load_params(folder, mesh, jnp.dtype(dtype), step, base)
    adapter_config, _ = adapters_of(origin)
    distinct = list({id(adapter): adapter for adapter in adapters if adapter}.values())
    if distinct:
        if adapter_config:
            raise UserError(
                f"{folder} is a LoRA run, which has its adapters already; give its base as the"
                " model"
            )
        chosen = [distinct.index(adapter) if adapter else None for adapter in adapters]
        adapter = distinct[0] if {*chosen} == {0} else side_by_side(distinct, chosen, config)
        adapter_config = adapter.config
        wanted = abstract_params(config, mesh, jnp.dtype(dtype), adapter_config)
        params = join(params, put_on_devices(adapter.params, wanted))
    model = nnx.eval_shape(
        lambda: Llama(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(dtype),
            remat="none",
            adapters=adapter_config,
        )
    )
    return nnx.graphdef(model), params, prompter, tokenizer


LONGEST_NAME = 2000  # characters of a speaker, a language or a description


@dataclass(frozen=True)
class Line:
    """A text to speak, the file to write and, beside the model, the adapter to speak with."""

    text: str
    out: Path
    adapter: Adapter | None = None


def generate(
    model: Path,
    lines: Sequence[Line],
    *,
    codec: str | Path = DEFAULT_CODEC,
    prompt_audio: Path | None = None,
    prompt_text: str | None = None,
    speaker: str = "",
    description: str = "",
    language: str = "",
    sampling: SamplingSettings | None = None,
    max_seconds: float | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    step: int | None = None,
    base: str | Path | None = None,
    device: str = "cpu",
    tensor: int = 1,
) -> list[Generated]:
    """Says each of `lines` with the model or run in the folder `model`, all in one batch, writes 16
    kHz mono and prints a line about it.

    `prompt_audio`, a recording of the voice to clone, goes with `prompt_text`, what it says;
    neither is in `out`. The speech is cut at `max_seconds`, by default at `plausible_limit`.
    `dtype` is for weights and arithmetic, `device` is the codec's, for PyTorch. An `out` that
    exists is replaced once the new speech is whole. Raises UserError for bad input and where no
    speech comes.
    """
    sampling = sampling or SamplingSettings()
    for line in lines:
        _check_request(as_path(line.out), prompt_audio, prompt_text, max_seconds)
    _check_names({"speaker": speaker, "description": description, "language": language})
    outs = [str(line.out) if is_remote(line.out) else os.path.realpath(line.out) for line in lines]
    if twice := {out for out in outs if outs.count(out) > 1}:
        raise UserError(f"{min(twice)} is given twice as the file to write; give each text its own")
    wave = None if prompt_audio is None else read_audio(prompt_audio)
    graphdef, params, model_prompter, tokenizer = load(
        model, dtype, step, tensor, [line.adapter for line in lines], base
    )
    # Before the codec, which takes longer to load, in case a text is refused.
    conditions = {"speaker": speaker, "description": description, "language": language}
    of_adapters = [line.adapter and line.adapter.prompt for line in lines]
    prompters = [
        Prompter(tokenizer, PromptSettings(**prompt)) if prompt else model_prompter
        for prompt in of_adapters
    ]
    for line, prompter in zip(lines, prompters, strict=True):
        prompter.opening(line.text, **conditions)
    voice = load_codec(codec, device)
    _check_codec(model, voice)
    prompt_codes = np.empty(0, np.uint16) if wave is None else voice.encode([wave])[0]
    prompts = [
        prompter.opening(
            line.text, **conditions, prompt_text=prompt_text or "", prompt_codes=prompt_codes
        )
        for line, prompter in zip(lines, prompters, strict=True)
    ]
    limits = [
        (
            plausible_limit(line.text)
            if max_seconds is None
            else math.ceil(max_seconds * CODES_PER_SECOND)
        )
        for line in lines
    ]
    stop_ids = [model_prompter.vocab.speech_end]
    if not sampling.speech_only:
        turn_end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert isinstance(turn_end, int)  # of one token: a list is of several
        stop_ids.append(turn_end)

    started = time.perf_counter()
    results = generate_codes(
        graphdef, params, prompts, model_prompter.vocab, limits, sampling, stop_ids
    )
    took = time.perf_counter() - started
    for line, result in zip(lines, results, strict=True):
        _write(as_path(line.out), result, prompt_codes, voice, took)
    return results


def _write(
    out: Path, result: Generated, prompt_codes: np.ndarray, voice: Codec, took: float
) -> None:
    if not len(result.codes):
        raise UserError(
            f"the model ended before any speech, so {out} was not written; try another seed or a"
            " higher temperature"
        )

    # Decoded with the prompt, so that the first new codes sound as they do in context.
    spoken = voice.decode(np.concatenate([prompt_codes, result.codes]))[
        len(prompt_codes) * voice.hop :
    ]
    with new_file(out) as partial_out:
        write_audio(partial_out, spoken, voice.sample_rate)
    ending = (
        "stopped by itself"
        if result.stopped
        else f"cut at the limit of {len(result.tokens)} tokens"
    )
    print(
        f"{out}: {len(spoken) / voice.sample_rate:.2f} s of speech, {ending}; {len(result.codes)}"
        f" codes in {took:.1f} s ({len(result.codes) / took:.0f} a second, compilation included)"
    )


def _check_codec(model: Path, voice: Codec) -> None:
    """Raises UserError where `voice` is not the codec of the model's training data."""
    _, source = read_description(model)
    trained = source.get("codec", {})
    if trained.get("fingerprint", "unknown") not in ("unknown", voice.fingerprint):
        raise UserError(
            f"{model} was trained on codes of {trained['codec']} ({trained['fingerprint']}), but"
            f" {voice.name} is another codec ({voice.fingerprint}) and would make noise of them;"
            f" give --codec {trained['codec']}"
        )


def _check_names(names: dict[str, str]) -> None:
    """Raises UserError for a speaker, description or language that no training data can have."""
    for name, value in names.items():
        if len(value) > LONGEST_NAME:
            raise UserError(
                f"the {name} has {len(value):,} characters, more than {LONGEST_NAME:,}; give the"
                f" {name} as it is in the training data"
            )
        if printable(value) != value or value != value.strip():
            raise UserError(
                f"the {name} {printable(value)!r} has line breaks, control characters or blanks at"
                f" its ends; give the {name} as it is in the training data"
            )


def _check_request(
    out: Path, prompt_audio: Path | None, prompt_text: str | None, max_seconds: float | None
) -> None:
    check_writable(out.parent)
    if not is_remote(out) and not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it, such as {out / 'speech.wav'}")
    if out.suffix[1:].upper() not in soundfile.available_formats():
        raise UserError(
            f"{out}: audio is not written as {out.suffix or 'a file without suffix'}; name it .wav"
            " or .flac"
        )
    if prompt_audio is not None and not (prompt_text or "").strip():
        raise UserError(
            f"{prompt_audio}: cloning needs to know what the prompt says; give its transcript as"
            " prompt text"
        )
    if prompt_text and prompt_audio is None:
        raise UserError(
            "prompt text was given without prompt audio; give the recording that says it, or leave"
            " the text out"
        )
    if max_seconds is not None and not 0 < max_seconds < math.inf:
        raise UserError(f"max_seconds is {max_seconds}; give a positive number of seconds")
