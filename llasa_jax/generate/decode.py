"""Rows of speech on one cache of keys and values: started, advanced, read and copied.

A fixed number of rows share the cache. A row that has ended can be started again with another
prompt while the others go on (continuous batching), and several rows can be started with one
prompt, which is then read once (search). Programs compile once for each number of rows, cache
length and prompt length, both rounded up.

`steps.py` has the programs that run on the devices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import llasa_jax.generate.steps as steps
from llasa_jax.errors import UserError
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.steps import STEPS
from llasa_jax.model.sharding import RULES
from llasa_jax.runtime import hosts
from llasa_jax.speech.vocab import CODES_PER_SECOND, NUM_CODES, SpeechVocab

SHORTEST_BUCKET = 128
# The head's rows that are read are a multiple of this, so that any usual `tensor` divides them.
HEAD_MULTIPLE = 512
# of UTF-8 text read aloud: about 14 letters of English, or 4.5 Chinese characters of 3 bytes
BYTES_PER_SECOND = 14
BYTES_PER_DIGIT = 5  # a digit is read as a word or more


@dataclass(frozen=True)
class Generated:
    """New speech of one row, without its prompt.

    `codes` uint16, 50 a second; `tokens` int32, every id drawn, the end marker included; `stopped`:
    the model ended the speech by itself, false if the length limit did; `logprob`: the mean log
    probability of the tokens, before temperature and penalties, among those that could be drawn.
    """

    codes: np.ndarray
    tokens: np.ndarray
    stopped: bool
    logprob: float = math.nan


@dataclass(frozen=True)
class Request:
    """What a row goes on from: `prompt`, int32 ids. It draws at most `limit` tokens, and no end
    marker among the first `shortest`.

    `seed` and `number` pick its random numbers: the same two and prompt give the same speech, in
    whichever row. `adapter` is the row of `choice` (see `llasa_jax.model.lora.side_by_side`) that
    it uses, in a model with several adapters.
    """

    prompt: np.ndarray
    limit: int
    shortest: int = 0
    number: int = 0
    adapter: int = 0
    seed: int = 0


def reading_seconds(text: str) -> float:
    """About how long it takes to read `text` aloud."""
    size = len(text.encode()) + (BYTES_PER_DIGIT - 1) * sum(c.isdigit() for c in text)
    return size / BYTES_PER_SECOND


def plausible_limit(text: str) -> int:
    """How many codes `text` may take: three times what reading it aloud takes, and three seconds
    more.
    """
    return math.ceil(CODES_PER_SECOND * (3 * reading_seconds(text) + 3))


class Rows:
    """`rows` speeches at once by one model.

    `graphdef` is a `Llama`'s and `params` its weights as a dict; they may lie sharded on a mesh.
    `stop_ids` end a row: the end marker's alone by default. `loop_codes`: once so many codes have
    repeated those of up to a second before, the code that would go on with the loop cannot be
    drawn; 0 leaves loops alone. The settings' seed is not used: each request has its own.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: dict,
        vocab: SpeechVocab,
        rows: int,
        settings: SamplingSettings | None = None,
        stop_ids: Sequence[int] | None = None,
        loop_codes: int = 0,
    ):
        settings = settings or SamplingSettings()
        self.count, self.vocab, self.config = rows, vocab, nnx.merge(graphdef, params).config
        # Of the head only the rows of tokens that can be drawn are read: with codes alone, a third.
        first, last = 0, self.config.vocab_size
        if settings.speech_only:
            last = vocab.code_base + NUM_CODES
            first = max(0, last - -(-(NUM_CODES + 8) // HEAD_MULTIPLE) * HEAD_MULTIPLE)
        ids = np.arange(first, last)
        stops = np.isin(ids, [vocab.speech_end] if stop_ids is None else stop_ids)
        allowed = np.full(len(ids), not settings.speech_only)
        allowed[ids >= vocab.code_base] = True
        allowed[ids == vocab.speech_end] = True
        choices = params.get("choice")
        self._choices = hosts.on_this_host(choices) if choices else None
        # Seeds are the requests': as part of what is compiled for, each would compile again.
        self._program = {
            "graphdef": graphdef,
            "settings": replace(settings, seed=0),
            "loop_codes": loop_codes,
        }
        self._fixed = {
            "params": params,
            "tables": steps.head_rows(graphdef, params, first=first, last=last),
            "first": jnp.asarray(first, jnp.int32),
            "allowed": jnp.asarray(allowed),
            "stops": jnp.asarray(stops),
        }
        self._slots = SHORTEST_BUCKET
        self._state = steps.empty_state(
            **self._program, **self._fixed, rows=rows, slots=SHORTEST_BUCKET
        )
        place = jax.tree.leaves(params)[0].sharding
        if isinstance(place, NamedSharding):  # heads lie where the weights that make them lie
            place = NamedSharding(place.mesh, PartitionSpec(None, None, None, RULES["K"]))
            self._state |= {name: jax.device_put(self._state[name], place) for name in "kv"}
        # The host's copy of where the rows stand.
        self._at, self._end = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._tokens: list[list[np.ndarray]] = [[] for _ in range(rows)]
        self._report = {name: np.ones(rows, bool) for name in ("ended", "stopped", "finite")}
        self._report["logprob"] = np.zeros(rows, np.float32)

    @property
    def ended(self) -> np.ndarray:
        """bool (rows,): which rows have ended, or were never started."""
        return self._report["ended"]

    def start(self, rows: Sequence[int], request: Request, numbers: Sequence[int] = ()) -> None:
        """Starts `request` in each of `rows`, whose prompt is read once for all of them. `numbers`
        are the rows' own, in place of the request's.

        Raises UserError where the prompt fills the model's positions, or its limit is below 1.
        """
        length, positions = len(request.prompt), self.config.max_position_embeddings
        if not 0 < length < positions:
            raise UserError(
                f"the prompt has {length} tokens and the model {positions} positions, which leaves"
                " no room for speech; shorten the text or the prompt's audio"
            )
        if request.limit < 1:
            raise UserError(f"a limit of {request.limit} tokens was given; give a positive number")
        chosen, drawn = np.zeros(self.count, bool), np.zeros(self.count, np.int32)
        chosen[list(rows)], drawn[list(rows)] = True, numbers or request.number
        prompt = np.zeros((1, prompt_bucket(length)), np.int32)
        prompt[0, :length] = request.prompt
        # Speech rarely takes all of its limit, and what is attended to is as long as the cache.
        self._resize(max(prompt.shape[1], self._needed(length + request.limit // 2)))
        end = min(length + request.limit, positions)
        choice = self._choices and jax.tree.map(lambda of: of[[request.adapter]], self._choices)
        self._state = steps.start(
            **self._program,
            **self._fixed,
            state=self._state,
            prompt=prompt,
            chosen=chosen,
            numbers=drawn,
            key=jax.random.key(request.seed),
            choice=choice,
            at=np.int32(length),
            end=np.int32(end),
            floor=np.int32(length + request.shortest),
        )
        for row in rows:
            self._at[row], self._end[row], self._tokens[row] = length, end, []
            self._report["ended"] = self.ended & ~chosen

    def advance(self, count: int = STEPS, leave: int = 1) -> int:
        """Draws tokens in all rows that have not ended, up to `count` each; returns early once
        `leave` of them end. Returns how many tokens were drawn.

        Raises UserError where the model's scores are not finite.
        """
        ahead = np.minimum(self._at + count, self._end)[~self.ended]
        self._resize(self._needed(int(ahead.max(initial=0))))
        self._state, drawn = steps.advance(
            **self._program,
            **self._fixed,
            state=self._state,
            steps=np.int32(min(count, STEPS)),
            leave=np.int32(leave),
        )
        names = ("ended", "stopped", "finite", "logprob", "at")
        drawn, report = hosts.on_this_host((drawn, {name: self._state[name] for name in names}))
        at = report.pop("at").astype(np.int64)
        new = np.where(self.ended, 0, at - self._at)
        self._at = np.where(self.ended, self._at, at)
        for row in np.flatnonzero(new):
            self._tokens[row].append(drawn[row, : new[row]])
        self._report = report
        if not report["finite"].all():
            raise UserError(
                "the model's scores are not finite; its weights are damaged or training diverged:"
                " use an earlier checkpoint"
            )
        return int(new.sum())

    def result(self, row: int) -> Generated:
        """What a row has said, so far if it has not ended."""
        tokens = np.concatenate([*self._tokens[row], np.empty(0, np.int32)]).astype(np.int32)
        return Generated(
            self.vocab.codes_of(tokens),
            tokens,
            bool(self._report["stopped"][row]),
            float(self._report["logprob"][row]) / max(1, len(tokens)),
        )

    def stop(self, rows: Sequence[int]) -> None:
        """Ends rows where they are."""
        ended = self.ended.copy()
        ended[list(rows)] = True
        self._report["ended"] = ended
        self._state["ended"] = jnp.asarray(ended)

    def copy(self, parents: Sequence[int]) -> None:
        """Row i goes on from what row `parents[i]` has said, with random numbers of its own."""
        at = np.asarray(parents)
        self._state = steps.copy(state=self._state, parents=at)
        self._tokens = [list(self._tokens[parent]) for parent in parents]
        self._at, self._end = self._at[at], self._end[at]
        self._report = {name: values[at] for name, values in self._report.items()}

    def _needed(self, length: int) -> int:
        return cache_bucket(min(length, self.config.max_position_embeddings))

    def _resize(self, slots: int) -> None:
        """Makes the cache longer, or a quarter shorter or more, where the rows need it: what is
        attended to is as long as the cache.
        """
        slots = max(slots, self._needed(int(self._at[~self.ended].max(initial=0))))
        if slots > self._slots or slots <= self._slots * 3 // 4:
            self._slots = slots
            self._state = steps.resize(state=self._state, slots=slots)


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
    or has `max_new_tokens` more: a row for each, all at once, and no guards. See `Rows`.

    `max_new_tokens` is one number or one a row, and counts the end marker. A row's result depends
    on its prompt, the seed and its place among the rows, not on the other rows.

    Raises UserError where a prompt fills the model's positions, and where the scores are not
    finite.
    """
    if not len(prompts):
        return []
    rows = Rows(graphdef, params, vocab, len(prompts), settings, stop_ids)
    seed = settings.seed if settings else 0
    limits = np.broadcast_to(max_new_tokens, len(prompts))
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        rows.start([row], Request(prompt, int(limit), 0, row, row, seed))
    while not rows.ended.all():
        rows.advance(leave=len(prompts))
    return [rows.result(row) for row in range(len(prompts))]


def prompt_bucket(length: int) -> int:
    """Slots for a prompt: the next power of two, which `PROMPT_BLOCK` divides or is a multiple
    of.
    """
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def cache_bucket(length: int) -> int:
    """Slots for a cache: the next multiple of 128, or of an eighth of the next power of two."""
    step = max(SHORTEST_BUCKET, prompt_bucket(length) // 8)
    return -(-length // step) * step
