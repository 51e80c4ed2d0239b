"""From a text to speech: prompt, KV cache, sampling, codec.

One compiled program holds the prompt's forward pass and the loop over new tokens. Lengths are
rounded up to powers of two, so that it serves many texts. Letters: B rows, P prompt slots, S cache
slots, V vocabulary.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from llasa_jax.errors import UserError
from llasa_jax.generate.sampling import SamplingSettings, draw, process
from llasa_jax.model.llama import Cache, Llama
from llasa_jax.model.lora import Adapter, join, place, side_by_side
from llasa_jax.model.sharding import abstract_params, make_mesh
from llasa_jax.runtime.files import new_file
from llasa_jax.speech.audio import read_audio, write_audio
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.speech.vocab import CODES_PER_SECOND, NUM_CODES, SpeechVocab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_BUCKET = 128
# of UTF-8 text read aloud: about 14 letters of English, or 4.5 Chinese characters of 3 bytes
BYTES_PER_SECOND = 14
BYTES_PER_DIGIT = 5  # a digit is read as a word or more


@dataclass(frozen=True)
class Generated:
    """New speech of one row, without its prompt.

    `codes` uint16, 50 a second; `tokens` int32, every id drawn, the end marker included; `stopped`:
    the model ended the speech by itself, false if the length limit did.
    """

    codes: np.ndarray
    tokens: np.ndarray
    stopped: bool


def plausible_limit(text: str) -> int:
    """How many codes `text` may take: three times what reading it aloud takes, and three seconds
    more.
    """
    size = len(text.encode()) + (BYTES_PER_DIGIT - 1) * sum(c.isdigit() for c in text)
    return math.ceil(CODES_PER_SECOND * (3 * size / BYTES_PER_SECOND + 3))


def generate_codes(
    graphdef: nnx.GraphDef,
    params: dict,
    prompts: Sequence[np.ndarray],
    vocab: SpeechVocab,
    max_new_tokens: int | Sequence[int],
    settings: SamplingSettings | None = None,
    stop_ids: Sequence[int] | None = None,
) -> list[Generated]:
    """Goes on from each of `prompts` (int32 ids, of any lengths) until it draws one of `stop_ids`
    or has `max_new_tokens` more.

    `graphdef` is a `Llama`'s and `params` its weights as a dict; they may lie sharded on a mesh.
    `max_new_tokens` is one number or one a row, and counts the end marker. `stop_ids` are the end
    marker's alone by default. A row's result depends on its prompt, the seed and its place among
    the rows, not on the other rows. Compiles once for each number of rows, lengths up to the next
    power of two, and settings but the seed.

    Raises UserError where a prompt fills the model's positions, and where the scores are not
    finite.
    """
    if not len(prompts):
        return []
    settings = settings or SamplingSettings()
    config = nnx.merge(graphdef, params).config
    lengths = np.array([len(prompt) for prompt in prompts])
    positions = config.max_position_embeddings
    for row, length in enumerate(lengths):
        if not 0 < length < positions:
            raise UserError(
                f"prompt {row} has {length} tokens and the model {positions} positions, which"
                " leaves no room for speech; shorten the text or the prompt's audio"
            )
    ends = np.minimum(lengths + np.broadcast_to(max_new_tokens, lengths.shape), positions)
    if (ends <= lengths).any():
        raise UserError(f"max_new_tokens is {max_new_tokens}; give a positive number")
    tokens = np.zeros((len(prompts), _bucket(ends.max())), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    allowed = np.full(config.vocab_size, not settings.speech_only)
    allowed[vocab.code_base : vocab.code_base + NUM_CODES] = True
    allowed[vocab.speech_end] = True
    tokens, ends, stopped, finite = jax.device_get(
        _generate(
            graphdef,
            params,
            tokens,
            lengths,
            ends,
            allowed,
            np.array([vocab.speech_end] if stop_ids is None else stop_ids),
            jax.random.key(settings.seed),
            prompt_slots=_bucket(lengths.max()),
            # The seed only makes the key: as part of what is compiled for, each seed would compile
            # again.
            settings=dataclasses.replace(settings, seed=0),
        )
    )
    if not finite.all():
        raise UserError(
            "the model's scores are not finite; its weights are damaged or training diverged: use"
            " an earlier checkpoint"
        )
    new = [
        tokens[row, start:end] for row, (start, end) in enumerate(zip(lengths, ends, strict=True))
    ]
    return [
        Generated(vocab.codes_of(ids), ids, bool(by_itself))
        for ids, by_itself in zip(new, stopped, strict=True)
    ]


def _bucket(length: int) -> int:
    return max(SHORTEST_BUCKET, 1 << (int(length) - 1).bit_length())


@partial(jax.jit, static_argnames=("graphdef", "prompt_slots", "settings"))
def _generate(
    graphdef,
    params,
    tokens_BS,
    lengths_B,
    ends_B,
    allowed_V,
    stop_ids,
    key,
    *,
    prompt_slots,
    settings,
):
    """Fills in `tokens` from `lengths` to `ends`. Returns them, where each row ended, whether by a
    stop id, and whether soundly.
    """
    model = nnx.merge(graphdef, params)
    rows = jnp.arange(tokens_BS.shape[0])
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(rows)

    prompt_BP, slots = tokens_BS[:, :prompt_slots], jnp.arange(prompt_slots)
    seen_BV = jnp.zeros((len(rows), model.config.vocab_size), bool)
    seen_BV = seen_BV.at[rows[:, None], prompt_BP].max(slots < lengths_B[:, None])
    cache = Cache.empty(model.config, *tokens_BS.shape, model.dtype)
    hidden_BPD, cache = model.decode(prompt_BP, jnp.broadcast_to(slots, prompt_BP.shape), cache)

    def step(state):
        scores_BV = model.logits(state["hidden"])
        running = ~state["ended"]
        finite = state["finite"] & (jnp.isfinite(scores_BV.max(-1)) | state["ended"])
        keys = jax.vmap(jax.random.fold_in)(row_keys, state["at"])
        new = draw(process(scores_BV, state["seen"], allowed_V, settings), keys, settings)
        # An ended row stands still: it draws on, but nothing of that is kept.
        at = jnp.where(running, state["at"], state["at"] - 1)
        new = jnp.where(running, new, state["tokens"][rows, at])
        stopped = state["stopped"] | (running & jnp.isin(new, stop_ids))
        hidden, cache = model.decode(new[:, None], at[:, None], state["cache"])
        return {
            "hidden": hidden[:, 0],
            "cache": cache,
            "tokens": state["tokens"].at[rows, at].set(new),
            "seen": state["seen"].at[rows, new].set(True),
            "at": at + 1,
            "ended": stopped | (at + 1 >= ends_B),
            "stopped": stopped,
            "finite": finite,
        }

    none = jnp.zeros_like(rows, bool)
    start = {
        "hidden": hidden_BPD[rows, lengths_B - 1],
        "cache": cache,
        "tokens": tokens_BS,
        "seen": seen_BV,
        "at": lengths_B,
        "ended": none,
        "stopped": none,
        "finite": ~none,
    }
    end = jax.lax.while_loop(lambda state: ~state["ended"].all(), step, start)
    return end["tokens"], end["at"], end["stopped"], end["finite"]


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
    config, source = read_description(folder)
    tokenizer = load_tokenizer(folder)
    prompter = Prompter(tokenizer, PromptSettings(**source.get("prompt", {})))
    if prompter.vocab.size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {prompter.vocab.size} tokens but the model"
            f" {config.vocab_size}; import it again"
        )
    mesh = make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    params, (adapter_config, _) = (
        load_params(folder, mesh, jnp.dtype(dtype), step, base),
        adapters_of(source),
    )
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
        params = join(
            params,
            place(adapter.params, abstract_params(config, mesh, jnp.dtype(dtype), adapter_config)),
        )
    model = nnx.eval_shape(
        lambda: Llama(
            config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), remat="none", adapters=adapter_config
        )
    )
    return nnx.graphdef(model), params, prompter, tokenizer


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
        _check_request(Path(line.out), prompt_audio, prompt_text, max_seconds)
    wave = None if prompt_audio is None else read_audio(prompt_audio)
    graphdef, params, model_prompter, tokenizer = load(
        model, dtype, step, tensor, [line.adapter for line in lines], base
    )
    # Before the codec, which takes longer to load, in case a text is refused.
    wanted = {"speaker": speaker, "description": description, "language": language}
    known = [line.adapter and line.adapter.prompt for line in lines]
    prompters = [
        Prompter(tokenizer, PromptSettings(**prompt)) if prompt else model_prompter
        for prompt in known
    ]
    for line, prompter in zip(lines, prompters, strict=True):
        prompter.opening(line.text, **wanted)
    voice = load_codec(codec, device)
    _check_codec(model, voice)
    prompt_codes = np.empty(0, np.uint16) if wave is None else voice.encode([wave])[0]
    cloned = {"prompt_text": prompt_text or "", "prompt_codes": prompt_codes}
    prompts = [
        prompter.opening(line.text, **wanted, **cloned)
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
    stop_ids = [model_prompter.vocab.speech_end] + (
        [] if sampling.speech_only else [tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    )

    started = time.perf_counter()
    results = generate_codes(
        graphdef, params, prompts, model_prompter.vocab, limits, sampling, stop_ids
    )
    took = time.perf_counter() - started
    for line, result in zip(lines, results, strict=True):
        _write(Path(line.out), result, prompt_codes, voice, took)
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


def _check_request(
    out: Path, prompt_audio: Path | None, prompt_text: str | None, max_seconds: float | None
) -> None:
    if not out.parent.is_dir():
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
