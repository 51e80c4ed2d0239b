"""Scorers: speech, its text and a reference in, numbers out; by name, and checked when loaded."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, Protocol

import numpy as np

from llasa_jax.errors import UserError, first_line
from llasa_jax.evaluate import recognisers, voices
from llasa_jax.evaluate.known import DOOR, KEYS, recording
from llasa_jax.evaluate.levels import Levels
from llasa_jax.evaluate.recognisers import Recogniser
from llasa_jax.runtime.signals import end_with_parent
from llasa_jax.speech.audio import SAMPLE_RATE


class Scorer(Protocol):
    """Speech to numbers.

    `higher_is_better` says of each number that has a better and a worse which it is; the first one
    decides where one number must. Other numbers may come besides.
    """

    higher_is_better: dict[str, bool]

    def __call__(
        self,
        waves: Sequence[np.ndarray],
        texts: Sequence[str],
        references: Sequence[np.ndarray | None],
    ) -> dict[str, np.ndarray]:
        """Waves, float32 (samples,) at 16 kHz, the text of each, and a recording of the voice that
        it should have (or None), to numbers by name, float64 (waves,); NaN where there is none.
        """


NAMED = "pocketsphinx, whisper, paraformer, resemblyzer, wavlm, dnsmos, utmos, levels"
DEFAULT_SCORERS = ("whisper", "wavlm", "dnsmos", "levels")
WITH_ID = "asr:ID, speaker:ID, utmos:FOLDER or pocketsphinx:GRAMMAR"


def load_scorer(name: str, device: str = "cpu", language: str = "") -> Scorer:
    """The scorer of a name: one of `NAMED`, or `asr:` or `speaker:` and a hub id or folder.

    `device` is one of PyTorch's, `language` that of the texts ("" where they are mixed or unknown).
    It is tried on recordings whose answers are known. UserError for an unknown name, for a package
    that is not installed, for a model that cannot be loaded, and for one that answers wrongly.
    """
    kind, _, place = name.partition(":")
    known: dict[str, Callable[[], Scorer]] = {
        "pocketsphinx": lambda: recognisers.pocketsphinx(language),
        "whisper": lambda: recognisers.transformers_recogniser(device=device, language=language),
        "paraformer": lambda: recognisers.paraformer(device, language),
        "resemblyzer": lambda: voices.resemblyzer(device),
        "wavlm": lambda: voices.xvector(device=device),
        "dnsmos": lambda: voices.dnsmos(device),
        "utmos": lambda: voices.utmos(device=device),
        "levels": lambda: Levels(),
    }
    placed: dict[str, Callable[[], Scorer]] = {
        "pocketsphinx": lambda: recognisers.pocketsphinx(language, place),
        "asr": lambda: recognisers.transformers_recogniser(place, device, language),
        "speaker": lambda: voices.xvector(place, device),
        "utmos": lambda: voices.utmos(place, device),
    }
    make = placed.get(kind) if place else known.get(name)
    if not make:
        raise UserError(f"there is no scorer {name!r}; give one of {NAMED}, or {WITH_ID}")
    scorer = make()
    # A grammar does not have the sentences of the known recordings.
    within = kind == "pocketsphinx" and place
    check_answers(recognisers.pocketsphinx(language) if within else scorer, name)
    return scorer


def check_answers(scorer: Scorer, name: str) -> None:
    """Raises UserError where a scorer does not give the known answers on the known recordings."""
    door, keys, other = map(recording, ("rms_1", "rms_2", "slt_2"))
    try:
        if isinstance(scorer, Recogniser):
            wrong = _misheard(scorer, door)
        elif isinstance(scorer, voices.Similarity):
            same, different = scorer([keys, other], [KEYS, KEYS], [door, door])["similarity"]
            wrong = not same > different and (
                f"it finds two voices ({different:.2f}) more alike than two recordings of one"
                f" ({same:.2f})"
            )
        elif isinstance(scorer, voices.Quality):
            noise = np.random.default_rng(0).normal(0, door.std(), len(door)).astype(np.float32)
            first = next(iter(scorer.higher_is_better))
            clean, noisy = scorer([door, np.clip(door + noise, -1, 1)])[first]
            wrong = not clean > noisy and (
                f"it rates a clean recording ({clean:.2f}) no higher than the same in noise"
                f" ({noisy:.2f})"
            )
        else:
            longer = np.concatenate([door, np.zeros(SAMPLE_RATE, np.float32)])
            tails = scorer([door, longer], [DOOR, DOOR], [None, None])["tail"]
            wrong = abs(tails[1] - tails[0] - 1) > 0.05 and "it does not find a second of silence"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"the scorer {name} fails on a known recording ({first_line(error)}); give another"
            " model, or another version of its package"
        ) from error
    if wrong:
        raise UserError(
            f"the scorer {name} does not work here: {wrong}; give another model, or copy it again"
        )


def _misheard(recogniser: Recogniser, door: np.ndarray) -> str | bool:
    """What is wrong with what a recogniser hears in an English sentence. Of one for another
    language, only that it hears something.
    """
    text = recogniser.transcribe([door])[0]
    if recogniser.language not in ("", "en"):
        return not text and "it hears nothing in a recording of speech"
    rate = recogniser.rates([DOOR], [text])["wer"][0]
    return rate > 0.34 and f"it hears {text[:80]!r} in a recording that says {DOOR!r}"


class Scores(NamedTuple):
    """Numbers by name, float64 (waves,) each, and what was heard, "" without a recogniser."""

    numbers: dict[str, np.ndarray]
    transcripts: list[str]

    def of(self, at: int) -> dict[str, float | None]:
        """The numbers of one wave, for JSON, which has no NaN: that is None."""
        return {
            name: float(values[at]) if math.isfinite(values[at]) else None
            for name, values in self.numbers.items()
        }


class Scoring:
    """Several scorers in `processes` of their own, beside the model: its Python and its memory are
    not theirs. Each process has them all. A context, at whose end the processes end.

    Raises UserError at once for what cannot be loaded.
    """

    def __init__(
        self, names: Sequence[str], device: str = "cpu", language: str = "", processes: int = 1
    ):
        self.processes = processes
        # Not forked: JAX and PyTorch have threads by now. A pool for each, so that each loads.
        self._pools = [
            ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) for _ in range(processes)
        ]
        self._turns = itertools.cycle(self._pools)
        try:
            threads = max(1, (os.cpu_count() or 1) // 2 // processes)
            loading = [pool.submit(_load, names, device, language, threads) for pool in self._pools]
            (self.higher_is_better, *_) = [each.result() for each in loading]
        except BaseException:
            self.__exit__()
            raise

    def submit(
        self,
        waves: Sequence[np.ndarray],
        texts: Sequence[str],
        references: Sequence[np.ndarray | None],
    ) -> Future[Scores]:
        """Begins to score clips, in the processes by turns, each after its earlier ones; the
        arguments are a scorer's.
        """
        return next(self._turns).submit(_score, waves, texts, references)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pool in self._pools:
            pool.shutdown(wait=not any(error), cancel_futures=True)


def load_scorers(names: Sequence[str], device: str = "cpu", language: str = "") -> list[Scorer]:
    """The scorers of all `names`. UserError as for `load_scorer`, and where two give a number of
    the same name, as two recognisers do.
    """
    scorers: list[Scorer] = []
    for at, name in enumerate(names):
        scorers.append(load_scorer(name, device, language))
        for before, other in zip(names[:at], scorers, strict=False):
            if both := scorers[-1].higher_is_better.keys() & other.higher_is_better.keys():
                raise UserError(
                    f"the scorers {before} and {name} both measure {min(both)}; give one of them"
                )
    return scorers


def score(
    scorers: Sequence[Scorer],
    waves: Sequence[np.ndarray],
    texts: Sequence[str],
    references: Sequence[np.ndarray | None],
) -> Scores:
    """The numbers of all scorers, and what the recogniser among them heard."""
    numbers: dict[str, np.ndarray] = {}
    transcripts = [""] * len(waves)
    for scorer in scorers:
        if isinstance(scorer, Recogniser):
            transcripts = scorer.transcribe(waves)
            numbers |= scorer.rates(texts, transcripts)
        else:
            numbers |= scorer(waves, texts, references)
    return Scores(numbers, transcripts)


_SCORERS: list[Scorer] = []  # of the process beside


def _load(names: Sequence[str], device: str, language: str, threads: int) -> dict[str, bool]:
    # Read when PyTorch is imported; the model has use for the other cores.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _SCORERS[:] = load_scorers(names, device, language)
    return {name: higher for scorer in _SCORERS for name, higher in scorer.higher_is_better.items()}


def _score(waves, texts, references) -> Scores:
    return score(_SCORERS, waves, texts, references)
