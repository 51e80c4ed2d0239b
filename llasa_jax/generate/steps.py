"""The programs that `Rows` runs on the devices: from the state of all rows to the next.

Each gets all of `Rows._program` (what it is compiled for) and `Rows._fixed`, and uses what it
needs. `tables` are the rows of the output tables, [C, F] each, of the tokens that can be drawn, the
first of which is `first`; `allowed` and `stops` are bool [C].

Letters: B rows, P prompt slots, S cache slots, C tokens that can be drawn, R recent tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from llasa_jax.generate.sampling import ban, draw, process
from llasa_jax.model.llama import Cache
from llasa_jax.speech.vocab import CODES_PER_SECOND

# Tokens of a prompt that are processed at a time: attention's scores are [block, S] for each head,
# and over a whole prompt of 30,000 tokens they would take hundreds of GB.
PROMPT_BLOCK = 512
# Steps between two looks at the rows. A look takes about a millisecond.
STEPS = 64
# The longest loop, in codes, that is recognised as one: a second of speech.
LONGEST_LOOP = CODES_PER_SECOND


@partial(jax.jit, static_argnames=("graphdef", "first", "last"))
def head_rows(graphdef, params, *, first, last):
    """The rows of the output tables, [C, F] each, of the tokens from `first` to `last`."""
    model = nnx.merge(graphdef, params)
    factors = model.output_factors(jnp.zeros((1, model.config.hidden_size), model.dtype))
    return [table[first:last].astype(model.dtype) for table in factors[1]]


@partial(jax.jit, static_argnames=("graphdef", "settings", "loop_codes", "rows", "slots"))
def empty_state(
    graphdef, settings, loop_codes, params, tables, first, allowed, stops, *, rows, slots
):
    model = nnx.merge(graphdef, params)
    cache = Cache.empty(model.config, rows, slots, model.dtype)
    zeros = jnp.zeros(rows, jnp.int32)
    state = {
        "k": cache.k,
        "v": cache.v,
        "hidden": jnp.zeros((rows, model.config.hidden_size), model.dtype),
        "last": zeros,  # the last token
        "at": zeros,  # the slot of the next one
        "end": zeros,  # the first slot beyond the limit
        "floor": zeros,  # the first slot that may hold a stop id
        "ended": ~jnp.zeros(rows, bool),
        "stopped": jnp.zeros(rows, bool),
        "finite": ~jnp.zeros(rows, bool),
        "logprob": jnp.zeros(rows, jnp.float32),
        "key": jax.random.key_data(jax.random.split(jax.random.key(0), rows)),
    }
    if settings.repetition_penalty != 1:
        state["seen"] = jnp.zeros((rows, len(allowed)), bool)
    if loop_codes:
        state["recent"] = jnp.full((rows, LONGEST_LOOP), -1)
        state["repeats"] = jnp.zeros((rows, LONGEST_LOOP), jnp.int32)
    if "choice" in params:
        state["choice"] = jax.tree.map(
            lambda of: jnp.zeros((rows, *of.shape[1:]), of.dtype), params["choice"]
        )
    return state


@partial(
    jax.jit, static_argnames=("graphdef", "settings", "loop_codes"), donate_argnames=("state",)
)
def start(
    graphdef,
    settings,
    loop_codes,
    params,
    tables,
    first,
    allowed,
    stops,
    state,
    prompt,
    chosen,
    numbers,
    key,
    choice,
    at,
    end,
    floor,
):
    """The `chosen` rows (bool [B]) stand behind `prompt` [1, P]; all of them get its cache."""
    model = nnx.merge(graphdef, params if choice is None else params | {"choice": choice})
    P = prompt.shape[1]
    cache = Cache.empty(model.config, 1, P, model.dtype)
    hidden_D, cache = _read_prompt(model, prompt, at[None], cache)

    def put(new, old):
        return jnp.where(chosen.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    here = chosen[None, :, None, None, None]
    state = state | {
        name: state[name].at[:, :, :P].set(jnp.where(here, new, state[name][:, :, :P]))
        for name, new in (("k", cache.k), ("v", cache.v))
    }
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    start = {
        "hidden": hidden_D,
        "last": 0,
        "at": at,
        "end": end,
        "floor": floor,
        "ended": False,
        "stopped": False,
        "finite": True,
        "logprob": 0.0,
        "key": jax.random.key_data(keys),
    }
    if "seen" in state:
        place = jnp.where(jnp.arange(P) < at, prompt[0] - first, -1)
        place = jnp.where(place < 0, len(allowed), place)  # out of range: dropped
        start["seen"] = jnp.zeros(len(allowed), bool).at[place].set(True, mode="drop")
    if "recent" in state:
        start |= {"recent": -1, "repeats": 0}
    state |= {name: put(new, state[name]) for name, new in start.items()}
    if choice is not None:
        state["choice"] = jax.tree.map(put, choice, state["choice"])
    return state


@partial(
    jax.jit, static_argnames=("graphdef", "settings", "loop_codes"), donate_argnames=("state",)
)
def advance(
    graphdef, settings, loop_codes, params, tables, first, allowed, stops, state, steps, leave
):
    """Up to `steps` more tokens in each row, until `leave` more rows have ended. Returns the state
    and the tokens, int32 [B, STEPS].
    """
    if "choice" in state:
        params = params | {"choice": state["choice"]}
    model = nnx.merge(graphdef, params)
    B, S = state["k"].shape[1:3]
    rows = jnp.arange(B)
    enough = state["ended"].sum() + leave

    def step(carry):
        at_step, state, drawn = carry
        features, _ = model.output_factors(state["hidden"])
        scores = jnp.zeros((B, len(allowed)), jnp.float32)
        for x, table in zip(features, tables, strict=True):
            scores += jnp.einsum("BF,CF->BC", x, table, preferred_element_type=jnp.float32)
        running, at = ~state["ended"], state["at"]
        total = jax.nn.logsumexp(jnp.where(allowed, scores, -jnp.inf), axis=-1)
        finite = state["finite"] & (jnp.isfinite(total) | state["ended"])
        may = allowed & ~(stops & (at < state["floor"])[:, None])
        shown = scores
        if loop_codes:
            looping = state["repeats"] >= loop_codes
            shown = ban(shown, state["recent"], looping)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state["key"]), at)
        choice = draw(process(shown, state.get("seen"), may, settings), keys, settings)
        # An ended row stands still: it draws on, but nothing of that is kept.
        token = jnp.where(running, choice + first, state["last"])
        stopped = state["stopped"] | (running & stops[choice])
        here = jnp.minimum(jnp.where(running, at, at - 1), S - 1)
        cache = Cache(state["k"], state["v"])
        hidden, cache = model.decode(token[:, None], here[:, None], cache)
        chance = scores[rows, choice] - total
        new = state | {
            "k": cache.k,
            "v": cache.v,
            "hidden": hidden[:, 0],
            "last": token,
            "at": jnp.where(running, at + 1, at),
            "ended": state["ended"] | stopped | (at + 1 >= state["end"]),
            "stopped": stopped,
            "finite": finite,
            "logprob": state["logprob"] + jnp.where(running, chance, 0),
        }
        if "seen" in state:
            new["seen"] = state["seen"].at[rows, choice].max(running)
        if loop_codes:
            recent = state["recent"]
            new["repeats"] = jnp.where(recent == choice[:, None], state["repeats"] + 1, 0)
            new["recent"] = jnp.concatenate([choice[:, None], recent[:, :-1]], axis=1)
        return at_step + 1, new, drawn.at[:, at_step].set(token)

    def go_on(carry):
        at_step, state, _ = carry
        ended = state["ended"]
        return (at_step < steps) & ~ended.all() & (ended.sum() < enough)

    start = (jnp.asarray(0), state, jnp.zeros((B, STEPS), jnp.int32))
    _, state, drawn = jax.lax.while_loop(go_on, step, start)
    return state, drawn


@partial(jax.jit, donate_argnames=("state",))
def copy(state, parents):
    caches = {name: jnp.take(state[name], parents, axis=1) for name in "kv"}
    own = {"k", "v", "key"}
    rest = {name: values for name, values in state.items() if name not in own}
    return state | jax.tree.map(lambda of: of[parents], rest) | caches


@partial(jax.jit, static_argnames=("slots",))
def resize(state, slots):
    def resized(cache):
        more = max(0, slots - cache.shape[2])
        return jnp.pad(cache, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))[:, :, :slots]

    return state | {name: resized(state[name]) for name in "kv"}


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
