"""GRPO's batches: the model speaks texts, scorers rate what it says, and that is what it learns
from.

A round is the speeches of one draw of texts, and is trained on `align.grpo.updates` times. What is
drawn in a round follows from the seed, the round's number and the weights, so a run that goes on
draws again what it drew before.
"""

import dataclasses
import json
import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grain
import jax
import numpy as np
from flax import nnx

from llasa_jax.align.grpo import advantages, needs_old
from llasa_jax.align.journal import packed
from llasa_jax.align.prefer import SPEECH, draw
from llasa_jax.align.rewards import reward_of
from llasa_jax.align.round import Round, read, together, written
from llasa_jax.align.settings import GrpoSettings
from llasa_jax.codec import Codec
from llasa_jax.data.batching import BatchShape, Planned, fill
from llasa_jax.data.batching.packing import pack_rows
from llasa_jax.errors import UserError
from llasa_jax.evaluate.checkpoints import line_of, mentioned_by
from llasa_jax.evaluate.references import References
from llasa_jax.evaluate.scorers import Scores, Scoring
from llasa_jax.evaluate.texts import Item, language_of
from llasa_jax.generate.decode import plausible_limit, reading_seconds
from llasa_jax.generate.line import Line
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.settings import SpeechSettings
from llasa_jax.generate.speaker import Said, Speaker
from llasa_jax.runtime.writing import write_whole
from llasa_jax.speech.audio import SAMPLE_RATE, audio_samples, write_audio
from llasa_jax.speech.prompts import Prompter, Utterance, join_texts
from llasa_jax.speech.vocab import CODES_PER_SECOND

FOLDER = "rollouts"  # in a run's folder: a file for each round
OVERHEAD = 16  # tokens of a speech beside its prompt and its codes, at most


@dataclass(frozen=True)
class Trained:
    """What is trained: how the model speaks, and the log-probabilities (see `TrainStep.log_probs`)
    that a batch on the host has, in it and in the reference.
    """

    graphdef: nnx.GraphDef
    params: Callable[[], dict]
    log_probs: Callable[[dict], np.ndarray]
    reference: Callable[[dict], np.ndarray]


@dataclass
class Place:
    """How many rounds are drawn, how many updates of the last one are still to come, and for how
    many rounds the guards have been alarmed.
    """

    round: int = 0
    left: int = 0
    flat: int = 0
    astray: int = 0


class Rollouts(grain.DatasetIterator):
    """Batches of speeches, as `fill` makes them, with the arrays of `GrpoLoss`.

    A batch has all rows. Several hosts speak together, each scores a part of the texts, and all
    make the same batch. Call `begin` before the first one. It must be closed: that ends the
    scorers' process. UserError, before any training, where a text cannot be spoken, a speech may
    not fit, or a scorer cannot be loaded; while training, where the guards of the settings say that
    it has gone astray.
    """

    def __init__(
        self,
        settings: GrpoSettings,
        items: Sequence[Item],
        prompter: Prompter,
        codec: Codec,
        shape: BatchShape,
        folder: Path,
        seed: int,
    ):
        super().__init__()
        self._scorers = ExitStack()  # Grain closes what has failed below, too
        if len(items) < settings.texts:
            raise UserError(
                f"there are {len(items)} texts, and align.grpo.texts speaks {settings.texts} in a"
                " round; give more texts, or lower it"
            )
        self._settings, self._items, self._prompter = settings, items, prompter
        self.codec, self._shape, self._folder, self._seed = codec, shape, folder, seed
        names = mentioned_by(prompter)
        self._lines = [line_of(item, names) for item in items]
        check_fit(settings, self._lines, prompter, shape, codec.hop)
        self._references = References(items, codec)
        how = settings.device, language_of(items, settings.language)
        with ExitStack() as stack:  # ends the processes if this fails
            self._scoring = stack.enter_context(
                Scoring(settings.scorers, *how, processes=settings.processes)
            )
            known = self._scoring.higher_is_better
            if unknown := [one.score for one in settings.parts if one.score not in known]:
                raise UserError(
                    f"align.grpo.rewards names {unknown[0]}, which align.grpo.scorers do not"
                    f" measure; they measure {', '.join(known)}"
                )
            # Beside the others, for both may give a number of one name.
            self._guards = {
                name: stack.enter_context(Scoring([name], *how, processes=settings.processes))
                for name in sorted({one.scorer for one in settings.guards})
            }
            # Codes become sound while the next texts are spoken.
            self._pool = ThreadPoolExecutor(1)
            stack.callback(self._pool.shutdown, cancel_futures=True)
            self._scorers = stack.pop_all()
        self.last = math.inf  # how many rounds there will be
        self._next: Round | None = None  # where it is spoken ahead
        self._place = Place()
        self._batch: dict[str, np.ndarray] = {}
        self.numbers: dict[str, float] = {}  # of the round, where the last batch is its first
        self._trained: Trained
        self._speaker: Speaker

    @property
    def rounds_per_epoch(self) -> int:
        """What is left of the texts in an epoch is not spoken: others in the next."""
        return len(self._items) // self._settings.texts

    def begin(self, trained: Trained) -> None:
        """Takes what speaks."""
        self._trained = trained
        rows = self._settings.rows
        params = trained.params()
        self._speaker = Speaker(trained.graphdef, params, self._prompter, self.codec, rows=rows)
        if self._next:  # of a checkpoint
            for at in self._next.said:
                self._submit(self._next, at)

    def get_state(self) -> dict:
        place = dataclasses.asdict(self._place)
        if self._place.left:  # the weights that spoke are gone by now
            place["batch"] = {name: written(array) for name, array in self._batch.items()}
        if self._next:
            place["next"] = self._next.written()
        return {"parents": [place]}

    def set_state(self, state: dict) -> None:
        (place,) = state["parents"]
        place = dict(place)
        self._batch = {name: read(found) for name, found in place.pop("batch", {}).items()}
        spoken = place.pop("next", None)
        self._next = spoken and Round.read(spoken)
        self._place = Place(**place)

    def __next__(self) -> dict[str, np.ndarray]:
        self.numbers = {}
        place = self._place
        if not place.left:
            # Sampling moves small arrays between host and devices, which the loop's guard forbids.
            with jax.transfer_guard("allow"):
                spoken, self._next = self._next or self._speak(place.round), None
                if self._settings.ahead and place.round + 1 < self.last:
                    self._next = self._speak(place.round + 1)
                self._batch = self._rated(spoken)
            place.round += 1
            place.left = self._settings.updates
        place.left -= 1
        return self._batch

    def close(self) -> None:
        self._scorers.close()

    def _speak(self, number: int) -> Round:
        """Speaks the texts of a round, and begins to score them."""
        settings = self._settings
        self._speaker.use(self._trained.params())
        seed = zlib.crc32(f"{self._seed} {number}".encode()) & 0x7FFFFFFF
        sampling = dataclasses.replace(sampling_of(settings), seed=seed)
        chosen = self._chosen(number)
        spoken = Round(number, dict.fromkeys(chosen, []))
        how = {at: self._lines[at] for at in chosen}, settings.samples, sampling
        for at, speeches in draw(self._speaker, *how, speech_of(settings)):
            spoken.said[at] = speeches
            self._submit(spoken, at)
        self._speaker.use(self._trained.params())  # without the cache of those that have spoken
        if needs_old(settings):
            zeros = np.zeros(len(chosen) * settings.samples)
            spoken.old = self._trained.log_probs(self._filled(spoken.said, zeros))
        return spoken

    def _rated(self, spoken: Round) -> dict[str, np.ndarray]:
        """Waits for the scores of a round, logs them, and makes the batch."""
        settings, chosen = self._settings, list(spoken.said)
        scored = {at: self._scores(begun.result()) for at, begun in spoken.scored.items()}
        scores = together(scored, chosen)
        speeches = [one for of_text in spoken.said.values() for one in of_text]
        stopped = np.array([one.stopped for one in speeches])
        codes = np.array([sum(map(len, one.pieces)) for one in speeches])
        texts = [at for at in chosen for _ in range(settings.samples)]
        reading = np.array([reading_seconds(self._items[at].text) for at in texts])
        pace = codes / CODES_PER_SECOND / reading
        rewards = reward_of(settings, scores.numbers, stopped, pace)
        of_groups = rewards.reshape(len(chosen), settings.samples)
        found = advantages(of_groups, settings.scale).ravel()
        flat = float((of_groups.std(axis=1) < 1e-6).mean())
        self.numbers = {
            "reward": float(rewards.mean()),
            "reward_deviation": float(of_groups.std(axis=1, ddof=1).mean()),
            "flat_texts": flat,
            "stopped": float(stopped.mean()),
            "pace": float(np.median(pace)),
            **{
                f"score_{name}": float(np.nanmean(values))
                for name, values in scores.numbers.items()
                if not np.isnan(values).all()
            },
        }
        rows = [
            {
                "id": self._items[at].id,
                "sample": place % settings.samples,
                "codes": packed(np.concatenate(one.pieces)),
                "stopped": one.stopped,
                "logprob": one.logprob,
                "transcript": scores.transcripts[place],
                "scores": scores.of(place),
                "pace": float(pace[place]),
                "reward": float(rewards[place]),
                "advantage": float(found[place]),
            }
            for place, (at, one) in enumerate(zip(texts, speeches, strict=True))
        ]
        if jax.process_index() == 0:
            self._log(spoken.number, rows, speeches)
        self._guard(flat)
        batch = self._filled(spoken.said, found)
        if spoken.old is not None:
            batch["old"] = spoken.old
        if settings.kl:
            batch["reference"] = self._trained.reference(batch)
        return batch

    def _chosen(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.rounds_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._items))
        texts = self._settings.texts
        return [int(at) for at in order[place * texts : (place + 1) * texts]]

    def _submit(self, spoken: Round, at: int) -> None:
        """Has a text's speeches scored, if that is this host's part."""
        if list(spoken.said).index(at) % jax.process_count() == jax.process_index():
            spoken.scored[at] = self._pool.submit(self._begin, at, spoken.said[at])

    def _begin(self, at: int, speeches: Sequence[Said]) -> list[Future[Scores]]:
        """Begins to score a text's speeches: by what is rewarded, then by each of the guards."""
        waves = [self._speaker.sound(one, SPEECH).wave for one in speeches]
        count = len(waves)
        given = waves, [self._items[at].text] * count, [self._references.of(at)] * count
        return [scoring.submit(*given) for scoring in (self._scoring, *self._guards.values())]

    def _scores(self, begun: list[Future[Scores]]) -> Scores:
        """Waits for what `_begin` has begun; the guards' numbers are named after their scorers."""
        (numbers, transcripts), *guarded = [future.result() for future in begun]
        by_guard = dict(zip(self._guards, guarded, strict=True))
        for guard in self._settings.guards:
            found = by_guard[guard.scorer].numbers
            if guard.score not in found:
                raise UserError(
                    f"align.grpo.guards names {guard.score}, which {guard.scorer} does not measure;"
                    f" it measures {', '.join(found)}"
                )
            numbers = numbers | {f"{guard.scorer}_{guard.score}": found[guard.score]}
        return Scores(numbers, transcripts)

    def _planned(self, at: int, said: Said, advantage: float) -> Planned:
        """A speech with loss on what was drawn alone."""
        line = self._lines[at]
        codes = np.concatenate([said.prompt, *said.pieces])
        text = join_texts(line.prompt_text, line.text)
        about = line.speaker, line.description, line.language
        spoken = Utterance(text, codes, line.id, *about)
        example = self._prompter.example(spoken)
        learned = np.flatnonzero(example.loss)
        example.loss[learned[: 1 + len(said.prompt)]] = False  # the start marker was given too
        if not said.stopped:
            example.loss[learned[-1]] = False
        values = np.where(example.loss, advantage, 0.0).astype(np.float32)
        return Planned(0, spoken, dataclasses.replace(example, values={"advantage": values}))

    def _filled(self, said: dict[int, list[Said]], of_each: np.ndarray) -> dict[str, np.ndarray]:
        """The speeches in rows, with the advantage `of_each`."""
        shape = self._shape
        texts = [(at, one) for at, speeches in said.items() for one in speeches]
        planned = [
            self._planned(at, one, advantage)
            for (at, one), advantage in zip(texts, of_each, strict=True)
            if len(one.pieces[0])
        ]
        lengths = [len(one.example.tokens) for one in planned if one.example]
        rows = [[planned[i] for i in row] for row in pack_rows(lengths, shape.length)]
        rows += [[] for _ in range(shape.accumulation * shape.rows - len(rows))]
        return fill(rows, shape, ("advantage",))

    def _log(self, number: int, rows: list[dict], speeches: Sequence[Said]) -> None:
        """Writes a round, and its sound where it is asked for."""
        folder = self._folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_whole(folder / f"{number:06}.jsonl", "".join(lines))
        every = self._settings.audio_every
        if every and number % every == 0:
            try:
                for place, one in enumerate(speeches):
                    if len(wave := self._speaker.sound(one, SPEECH).wave):
                        write_audio(folder / f"{number:06}" / f"{place:03}.wav", wave, SAMPLE_RATE)
            except (OSError, UserError) as error:  # a full disk: not worth a run
                warnings.warn(f"the sound of a round is left out: {error}", stacklevel=2)

    def _guard(self, flat: float) -> None:
        """UserError where nothing has been learned, or speech has gone astray, for `patience`
        rounds.
        """
        settings, place = self._settings, self._place
        stopped, pace = self.numbers["stopped"], self.numbers["pace"]
        wrong = []
        if stopped < settings.least_stopped:
            wrong.append(f"the model ended {stopped:.0%} of it by itself")
        if not 1 / settings.most_pace <= pace <= settings.most_pace:
            wrong.append(f"it took {pace:.2f} times as long as reading the text")
        for guard in settings.guards:
            value = self.numbers.get(f"score_{guard.scorer}_{guard.score}", math.nan)
            if not guard.least <= value <= guard.most:  # nor where there is none
                wrong.append(f"its {guard.score} by {guard.scorer} is {value:.3g}")
        place.flat = place.flat + 1 if flat == 1 else 0
        place.astray = place.astray + 1 if wrong else 0
        if settings.patience and place.flat >= settings.patience:
            raise UserError(
                f"in {place.flat} rounds all speeches of each text had one reward, so nothing is"
                " learned; raise align.grpo.temperature, choose rewards that tell speeches apart,"
                f" or go on from an earlier checkpoint; the speeches are in {self._folder / FOLDER}"
            )
        if settings.patience and place.astray >= settings.patience:
            raise UserError(
                f"for {place.astray} rounds speech has gone astray: {', '.join(wrong)}; lower"
                " optimizer.learning_rate, raise align.grpo.unstopped, pace or kl, and begin with"
                f" another out folder; the speeches are in {self._folder / FOLDER}"
            )


def sampling_of(settings: GrpoSettings) -> SamplingSettings:
    """How speeches are drawn."""
    return SamplingSettings(
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )


def speech_of(settings: GrpoSettings) -> SpeechSettings:
    """How long speeches may be."""
    return dataclasses.replace(SPEECH, max_seconds=settings.max_seconds)


def check_fit(
    settings: GrpoSettings, lines: Sequence[Line], prompter: Prompter, shape: BatchShape, hop: int
) -> None:
    """UserError where a round's longest speeches may not fit into a batch. `hop` are the samples of
    a code.
    """

    def length(line: Line) -> int:
        text = join_texts(line.prompt_text, line.text)
        voice = 0
        if isinstance(line.prompt_audio, Path):
            voice = audio_samples(line.prompt_audio) // hop + 1
        most = math.ceil(settings.max_seconds * CODES_PER_SECOND) or plausible_limit(line.text)
        return len(prompter.opening(text, **line.named)) + voice + most + OVERHEAD

    lengths = [length(line) for line in lines]
    longest, rows = max(lengths), shape.accumulation * shape.rows
    speeches = settings.texts * settings.samples
    room = rows * (shape.length // longest)
    if speeches > room:
        worst = lines[lengths.index(longest)]
        raise UserError(
            f"a round is {speeches} speeches (align.grpo.texts x samples) of up to {longest:,}"
            f" tokens, as the text {worst.id} may take, and a step has room for {room:,}; raise"
            " train.rows, train.accumulation or data.max_length, lower align.grpo.texts or"
            " align.grpo.max_seconds, or leave out the longest texts"
        )
