"""Clips that are left out although they can be read: too short, mostly silent, clipped, noisy, or
of another language. They are counted and listed as bad clips are.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from llasa_jax.encode.audio_source import AudioSource, Waves
from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import setting
from llasa_jax.speech.audio import SAMPLE_RATE
from llasa_jax.speech.prompts import Utterance

FRAME = SAMPLE_RATE // 50  # samples of 20 ms
SILENT = 10 ** (-40 / 20)  # of the loudest frame, -40 dB
FILTERED = ": filtered, "  # what the reasons of clips that are left out on purpose hold
FULL = 0.999  # of full scale: a sample that was cut off


@dataclass(frozen=True)
class Filters:
    """What a clip must be to be encoded; the defaults leave nothing out."""

    min_seconds: float = setting(0.0, low=0, high=3600)
    """Leave shorter clips out."""
    max_silence: float = setting(1.0, low=0, high=1)
    """Leave clips out of which more than this share is silent (40 dB below the loudest 20 ms)."""
    max_clipped: float = setting(1.0, low=0, high=1)
    """Leave clips out of whose samples more than this share is at full scale."""
    min_dnsmos: float = setting(0.0, low=0, high=5)
    """Leave clips out whose DNSMOS P.835 overall quality is lower; needs the extra `evaluate`."""
    languages: tuple[str, ...] = ()
    """Leave clips out whose record names another language, or none; empty, all are taken."""

    def check_wave(self, wave: np.ndarray, where: str) -> None:
        """UserError, with the reason, where a clip of 16 kHz float32 (samples,) is left out."""
        seconds = len(wave) / SAMPLE_RATE
        if seconds < self.min_seconds:
            self._refuse(where, f"{seconds:.2f} s long", "min_seconds", self.min_seconds)
        if self.max_silence < 1 and (share := silent_share(wave)) > self.max_silence:
            self._refuse(where, f"{share:.0%} silent", "max_silence", self.max_silence)
        if self.max_clipped < 1 and (share := float((np.abs(wave) >= FULL).mean())) > (
            self.max_clipped
        ):
            self._refuse(where, f"{share:.2%} clipped", "max_clipped", self.max_clipped)
        if self.min_dnsmos > 0 and (score := dnsmos(wave)) < self.min_dnsmos:
            self._refuse(where, f"a DNSMOS of {score:.2f}", "min_dnsmos", self.min_dnsmos)

    def check_text(self, utterance: Utterance, where: str) -> None:
        """UserError where the record's language is not wanted."""
        if self.languages and utterance.language not in self.languages:
            named = f"of the language {utterance.language!r}" if utterance.language else "of none"
            self._refuse(where, named, "languages", ",".join(self.languages))

    @staticmethod
    def _refuse(where: str, what: str, name: str, value: object) -> None:
        raise UserError(f"{where}{FILTERED}{what} ({name} is {value}).")


def silent_share(wave: np.ndarray) -> float:
    """The share of a wave's frames of 20 ms that are 40 dB below the loudest."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    if not len(frames):
        return 0.0
    levels = np.sqrt((frames.astype(np.float64) ** 2).mean(1))
    return float((levels < SILENT * levels.max()).mean())


def dnsmos(wave: np.ndarray) -> float:
    """DNSMOS P.835's overall quality of a wave, 1 to 5, by Microsoft's model in `speechmos`."""
    return float(_dnsmos().run(np.clip(wave, -1, 1), SAMPLE_RATE)["ovrl_mos"])


@functools.cache
def _dnsmos() -> Any:
    try:
        from speechmos import dnsmos
    except ImportError as error:
        raise UserError(
            "min_dnsmos needs the package speechmos; run `pip install 'llasa-jax[evaluate]'`."
        ) from error
    return dnsmos


class FilteredAudio(AudioSource):
    """A source of which clips are left out by `filters`, as bad ones are."""

    def __init__(self, source: AudioSource, filters: Filters):
        self._source, self._filters = source, filters
        self.name, self.ids, self.faults = source.name, source.ids, source.faults
        self.split_names, self.read_forward = source.split_names, source.read_forward

    def utterance(self, index: int) -> Utterance:
        return self._source.utterance(index)

    def check_text(self, index: int, text: str) -> None:
        self._source.check_text(index, text)
        self._filters.check_text(self._source.utterance(index), self.key(index)[0])

    def key(self, index: int) -> tuple[str, int, int]:
        return self._source.key(index)

    def samples(self, index: int) -> int:
        return self._source.samples(index)

    def waves(self) -> "FilteredWaves":
        return FilteredWaves(self._source.waves(), self._filters)

    def place(self, index: int) -> Any:
        return self._source.place(index)


@dataclass(frozen=True)
class FilteredWaves:
    """The waves of a source that `filters` leave in (see `Waves`)."""

    source: Waves
    filters: Filters

    def wave(self, place: Any) -> np.ndarray:
        wave = self.source.wave(place)
        self.filters.check_wave(wave, self.where(place))
        return wave

    def where(self, place: Any) -> str:
        return self.source.where(place)


def parse_languages(text: str) -> tuple[str, ...]:
    """`en,de` as its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
