"""From prompts to codes: KV cache, sampling, and the loop over new tokens.

One compiled program holds the prompt's forward pass and the loop over new tokens. Lengths are
rounded up to powers of two, so that it serves many texts. Letters: B rows, P prompt slots, S cache
slots, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llasa_jax.errors import UserError
from llasa_jax.generate.sampling import SamplingSettings, draw, process
from llasa_jax.model.llama import Cache
from llasa_jax.speech.vocab import CODES_PER_SECOND, NUM_CODES, SpeechVocab

# Tokens of a prompt that are processed at a time: attention's scores are [block, S] for each head,
# and over a whole prompt of 30,000 tokens they would take hundreds of GB.
PROMPT_BLOCK = 512
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
    B, S = tokens_BS.shape
    cache = Cache.empty(model.config, B, S, model.dtype)
    hidden_BD, cache = _read_prompt(model, prompt_BP, lengths_B, cache)

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
        "hidden": hidden_BD,
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


def _read_prompt(model, prompt_BP, lengths_B, cache):
    """Fills the cache with the prompts, a block at a time. Returns the hidden state [B, D] of each
    prompt's last token, and the cache.
    """
    B, P = prompt_BP.shape
    block = min(P, PROMPT_BLOCK)  # both are powers of two

    def step(carry, start):
        last_BD, cache = carry
        slots = start + jnp.arange(block)
        tokens = jax.lax.dynamic_slice_in_dim(prompt_BP, start, block, axis=1)
        hidden, cache = model.decode(tokens, jnp.broadcast_to(slots, tokens.shape), cache)
        at = jnp.clip(lengths_B - 1 - start, 0, block - 1)
        is_here = (lengths_B - 1) // block == start // block
        return (jnp.where(is_here[:, None], hidden[jnp.arange(B), at], last_BD), cache), None

    none = jnp.zeros((B, model.config.hidden_size), model.dtype)
    (last_BD, cache), _ = jax.lax.scan(step, (none, cache), jnp.arange(0, P, block))
    return last_BD, cache
