"""A loaded voice: texts to waves, for programs and for every command that speaks."""

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llasa_jax.codec import DEFAULT_CODEC, Codec, load_codec
from llasa_jax.convert.model_folder import (
    adapters_of,
    load_params,
    load_tokenizer,
    read_description,
    saved_steps,
)
from llasa_jax.errors import UserError, listed
from llasa_jax.generate.continuous import Batch, Job, Piece, run_continuous, run_each
from llasa_jax.generate.decode import Request, Rows, plausible_limit, reading_seconds
from llasa_jax.generate.line import NO_VOICE, Line, Recording, Speech
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.search import Search
from llasa_jax.generate.settings import SpeechSettings
from llasa_jax.generate.sound import CHUNK, SoundStream, decode_pieces, set_loudness, trim_tail
from llasa_jax.generate.texts import cut, normalize
from llasa_jax.model.llama import Llama
from llasa_jax.model.lora import Adapter, join, put_on_devices, side_by_side
from llasa_jax.model.sharding import abstract_params, make_mesh
from llasa_jax.runtime.storage import as_path
from llasa_jax.speech.audio import read_audio
from llasa_jax.speech.prompts import Prompter, join_texts
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.speech.vocab import CODES_PER_SECOND

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Said:
    """What was said of a line, before it is sound."""

    prompt: np.ndarray
    pieces: list[np.ndarray]
    stopped: bool
    tokens: int
    logprob: float


class Speaker:
    """A model and a codec in memory. `Speaker.load` reads them from disk.

    `graphdef` is a `Llama`'s and `params` its weights as a dict, which may lie sharded on a mesh;
    `prompters` builds the prompts, one for each adapter where they differ. `rows` texts are spoken
    at once, at most; each takes a row of the cache. `turn_end` is the id that ends a turn of chat,
    which ends speech too where any token may be drawn.

        speaker = Speaker.load("runs/llasa-1b")
        (wave,) = speaker.speak(["Hello there."])
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: dict,
        prompters: Prompter | Sequence[Prompter],
        codec: Codec,
        *,
        rows: int = 8,
        turn_end: int | None = None,
    ):
        self._graphdef, self.codec, self.rows = graphdef, codec, rows
        self._prompters = [prompters] if isinstance(prompters, Prompter) else list(prompters)
        self.vocab, self._turn_end = self._prompters[0].vocab, turn_end
        self._free = Lock()
        self.use(params)
        self._read_voice = lru_cache(maxsize=64)(self.record)
        # Of a run that `load` has read: its folder, and its weights at a step.
        self.folder: Path | None = None
        self._read: Callable[[int], dict]

    def use(self, params: dict) -> None:
        """Speaks with these weights from now on, of the same shapes, types and devices as those
        before: nothing is compiled again. Not while a line is spoken.
        """
        self.params = params
        # The last rows that were used: they hold a part of the head.
        self._make_rows = lru_cache(maxsize=1)(partial(Rows, self._graphdef, params, self.vocab))

    @property
    def steps(self) -> list[int]:
        """Steps of the loaded run that have a checkpoint now; none for a model that is no run."""
        return saved_steps(self.folder) if self.folder else []

    def weights(self, step: int) -> dict:
        """The weights of the loaded run at another step, for `use`, beside those in use. UserError
        where there are none.
        """
        if step not in (steps := self.steps):
            there = f"there are {listed([str(one) for one in steps])}" if steps else "there is none"
            raise UserError(f"there is no checkpoint of step {step}; {there}")
        return self._read(step)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        codec: str | Path = DEFAULT_CODEC,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        step: int | None = None,
        base: str | Path | None = None,
        device: str = "cpu",
        tensor: int = 1,
        adapters: Sequence[Adapter | None] = (),
        rows: int = 8,
    ) -> "Speaker":
        """The model or run in the folder `model`, or of a hub id, and the codec in `codec`.

        `dtype` is for weights and arithmetic; `step` picks a run's checkpoint, the latest by
        default; `base` says where the base of a LoRA run lies now; `device` is the codec's (see
        `load_codec`); `tensor` is how many devices share the weights. Several `adapters` are loaded
        side by side, and a line names its own by its place; None is no adapter.

        Raises UserError for a folder that holds no model, and for a codec that the model was not
        trained with.
        """
        distinct = list({id(adapter): adapter for adapter in adapters}.values())
        folder, side = as_path(model), adapters if len(distinct) > 1 else distinct
        graphdef, params, prompter, tokenizer = load(folder, dtype, step, tensor, side, base)
        prompters = [
            Prompter(tokenizer, PromptSettings(**adapter.prompt))
            if adapter and adapter.prompt
            else prompter
            for adapter in adapters
        ]
        turn_end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert isinstance(turn_end, int)  # of one token: a list is of several
        voice = load_codec(codec, device)
        check_codec(folder, voice)
        speaker = cls(graphdef, params, prompters or prompter, voice, rows=rows, turn_end=turn_end)
        speaker.folder = folder
        speaker._read = lambda step: load(folder, dtype, step, tensor, side, base)[1]
        return speaker

    @property
    def prompter(self) -> Prompter:
        """The prompts of the first adapter, or of the model where there is none."""
        return self._prompters[0]

    def check(self, line: Line) -> int:
        """How many tokens the prompt of `line` has, without a voice to clone. UserError where its
        text cannot be spoken.
        """
        return len(self._prompters[line.adapter].opening(line.text, **line.named))

    def speak(
        self,
        lines: Iterable[str | Line],
        sampling: SamplingSettings | None = None,
        settings: SpeechSettings | None = None,
        search: Search | None = None,
    ) -> list[np.ndarray]:
        """The waves of `lines`, float32 (samples,), 16 kHz. A line without speech has no samples.

        Raises UserError where a text cannot be spoken, as where it is empty or too long.
        """
        said = dict(self.say(lines, sampling, settings, search))
        return [said[place].wave for place in range(len(said))]

    def say(
        self,
        lines: Iterable[str | Line],
        sampling: SamplingSettings | None = None,
        settings: SpeechSettings | None = None,
        search: Search | None = None,
    ) -> Iterator[tuple[int, Speech]]:
        """(place, speech) of `lines`, as they end. Lines are read only when a row is free for them,
        so there may be any number, and codes become sound in a thread meanwhile. One call at a
        time: RuntimeError where another one has not ended.

        With a `search` one line is spoken at a time, by all rows, and the best one is kept.
        """
        if not self._free.acquire(blocking=False):
            raise RuntimeError("this Speaker is speaking; end or close the iterator of `say` first")
        try:
            yield from self._say(
                lines, sampling or SamplingSettings(), settings or SpeechSettings(), search
            )
        finally:
            self._free.release()

    def _say(
        self,
        lines: Iterable[str | Line],
        sampling: SamplingSettings,
        settings: SpeechSettings,
        search: Search | None,
    ) -> Iterator[tuple[int, Speech]]:
        rows = self.rows_for(sampling, settings, search.rows if search else self.rows)
        jobs = (
            (place, self.job(place, line, settings, sampling.seed))
            for place, line in enumerate(lines)
        )
        if search is None:
            ends = run_continuous(rows, jobs)
        else:
            search.check(sampling)
            ends = run_each(partial(search.run, rows, self.codec), jobs)
        with ThreadPoolExecutor(1) as pool:
            sounds: deque = deque()
            for place, said in ends:
                sounds.append((place, pool.submit(self.sound, said, settings)))
                while sounds and (sounds[0][1].done() or len(sounds) > rows.count):
                    place, sound = sounds.popleft()
                    yield place, sound.result()
            for place, sound in sounds:
                yield place, sound.result()

    def stream(
        self,
        line: str | Line,
        sampling: SamplingSettings | None = None,
        settings: SpeechSettings | None = None,
    ) -> Iterator[np.ndarray]:
        """The wave of one line while it is spoken, float32 pieces, 16 kHz: the first of them after
        half a second's worth of codes. See `SoundStream` for how it differs from the wave of
        `speak`; its loudness is left alone. One call at a time, as `say`.
        """
        if not self._free.acquire(blocking=False):
            raise RuntimeError("this Speaker is speaking; end or close its iterator first")
        try:
            sampling, settings = sampling or SamplingSettings(), settings or SpeechSettings()
            prompt = self._voice(line).codes if isinstance(line, Line) else NO_VOICE.codes
            sound = SoundStream(self.codec, prompt, settings.tail_seconds)
            batch, parts = Batch(self.rows_for(sampling, settings, self.rows)), deque[np.ndarray]()
            batch.add(0, self.job(0, line, settings, sampling.seed), parts.append)
            while len(batch):
                for _, result in batch.step(CHUNK):
                    if isinstance(result, UserError):
                        raise result
                while parts:
                    yield from sound.feed(parts.popleft())
            yield from sound.end()
        finally:
            self._free.release()

    def rows_for(self, sampling: SamplingSettings, settings: SpeechSettings, rows: int) -> Rows:
        """So many rows that speak with these settings; the last that were made are kept."""
        stop_ids = [self.vocab.speech_end]
        if not sampling.speech_only and self._turn_end is not None:
            stop_ids.append(self._turn_end)
        return self._make_rows(
            rows,
            replace(sampling, seed=0),
            tuple(stop_ids),
            round(settings.loop_seconds * CODES_PER_SECOND),
        )

    def job(self, place: int, line: str | Line, settings: SpeechSettings, seed: int) -> Job[Said]:
        """Speaks a line, piece by piece, each after the one before it."""
        line = Line(line) if isinstance(line, str) else line
        prompter = self._prompters[line.adapter]
        text = normalize(line.text, settings.normalize) if settings.normalize else line.text
        prompter.opening(text, **line.named)  # before audio is read, in case the text is refused
        voice = self._voice(line)
        number = zlib.crc32(line.id.encode()) & 0x7FFFFFFF if line.id else place
        pieces: list[np.ndarray] = []
        results, before = [], ""
        for at, part in enumerate(cut(text, settings.piece_seconds, settings.normalize)):
            context = np.concatenate([voice.codes, *pieces[-1:]])
            prompt = prompter.opening(
                part,
                **line.named,
                prompt_text=join_texts(line.prompt_text, before),
                prompt_codes=context,
            )
            limit = math.ceil(settings.max_seconds * CODES_PER_SECOND) or plausible_limit(part)
            shortest = math.ceil(reading_seconds(part) * CODES_PER_SECOND / settings.fastest)
            if at:  # each piece has random numbers of its own
                number = zlib.crc32(f"{number} {at}".encode()) & 0x7FFFFFFF
            shortest = max(1, min(shortest, limit - 1))
            request = Request(prompt, limit, shortest, number, line.adapter, seed)
            result = yield Piece(request, part, context, voice.wave if len(voice.wave) else None)
            pieces.append(result.codes)
            results.append(result)
            before = part
        tokens = sum(len(result.tokens) for result in results)
        return Said(
            voice.codes,
            pieces,
            all(result.stopped for result in results),
            tokens,
            sum(result.logprob * len(result.tokens) for result in results) / max(1, tokens),
        )

    def _voice(self, line: Line) -> Recording:
        if line.prompt_audio is None:
            return NO_VOICE
        if isinstance(line.prompt_audio, Recording):
            return line.prompt_audio
        if isinstance(line.prompt_audio, np.ndarray):
            return self.record(line.prompt_audio)
        return self._read_voice(str(line.prompt_audio))

    def record(self, audio: str | Path | bytes | np.ndarray, name: str = "") -> Recording:
        """The voice in an audio file, in a file's bytes, which errors call `name`, or in a wave,
        float32 16 kHz, ready to be cloned by any number of lines.
        """
        wave = audio if isinstance(audio, np.ndarray) else read_audio(audio, name)
        return Recording(wave, self.codec.encode([wave])[0])

    def sound(self, said: Said, settings: SpeechSettings) -> Speech:
        """The wave of what was said."""
        codes = np.concatenate(said.pieces)
        wave = np.empty(0, np.float32)
        if len(codes):
            rate = self.codec.sample_rate
            wave = decode_pieces(self.codec, said.prompt, said.pieces)
            wave = trim_tail(wave, settings.tail_seconds, rate)
            if settings.loudness:
                wave = set_loudness(wave, settings.loudness, rate)
        return Speech(codes, wave, said.stopped, said.tokens, said.logprob)


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


def check_codec(model: Path, voice: Codec) -> None:
    """Raises UserError where `voice` is not the codec of the model's training data."""
    _, source = read_description(model)
    trained = source.get("codec", {})
    if trained.get("fingerprint", "unknown") not in ("unknown", voice.fingerprint):
        raise UserError(
            f"{model} was trained on codes of {trained['codec']} ({trained['fingerprint']}), but"
            f" {voice.name} is another codec ({voice.fingerprint}) and would make noise of them;"
            f" give --codec {trained['codec']}"
        )
