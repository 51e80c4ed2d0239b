"""What can be measured in a wave without a model: pace, pauses, silence and noise."""

from collections.abc import Sequence

import numpy as np

from llasa_jax.speech.audio import SAMPLE_RATE, SILENCE_PEAK
from llasa_jax.speech.vocab import CODES_PER_SECOND

FRAME = SAMPLE_RATE // CODES_PER_SECOND  # samples, 20 ms: a code, and what a level is measured in
BELOW = 10 ** (-30 / 20)  # of the loudest speech: what is softer is a pause


class Levels:
    """Numbers of a wave's levels, in frames of 20 ms. A frame is speech if its level is at most 30
    dB below that of the loudest twentieth of the frames.

    `pace` is codes (20 ms each) of speech per letter of the text; `longest_pause` the longest
    stretch without speech inside the speech, `head` and `tail` what is before and after it, in
    seconds; `tail_noise` the level of the tail as a share of the speech's. All are NaN in silence.
    `silence` is the share of the frames that are no speech, 1 in silence.
    """

    higher_is_better = {"longest_pause": False, "head": False, "tail": False, "tail_noise": False}

    def __call__(
        self,
        waves: Sequence[np.ndarray],
        texts: Sequence[str],
        references: Sequence[np.ndarray | None] = (),
    ) -> dict[str, np.ndarray]:
        rows = [measure(wave, text) for wave, text in zip(waves, texts, strict=True)]
        return {name: np.array([row[name] for row in rows], np.float64) for name in NAMES}


NAMES = ("longest_pause", "head", "tail", "tail_noise", "pace", "seconds", "silence")


def measure(wave: np.ndarray, text: str) -> dict[str, float]:
    """The numbers of one wave, float32 (samples,) at 16 kHz, and its length in seconds."""
    numbers = dict.fromkeys(NAMES, float("nan")) | {
        "seconds": len(wave) / SAMPLE_RATE,
        "silence": 1.0,
    }
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    levels = np.sqrt((frames**2).mean(1))
    if not len(levels) or levels.max() < SILENCE_PEAK:
        return numbers
    speech = levels >= BELOW * np.quantile(levels, 0.95)
    spoken = np.flatnonzero(speech)
    tail = levels[spoken[-1] + 1 :]
    gaps = np.diff(spoken) - 1
    frame = FRAME / SAMPLE_RATE
    numbers |= {
        "longest_pause": float(gaps.max(initial=0)) * frame,
        "silence": 1 - float(speech.mean()),
        "head": float(spoken[0]) * frame,
        "tail": len(tail) * frame,
        "tail_noise": float(_rms(tail) / _rms(levels[speech])),
    }
    if letters := letters_of(text):
        numbers["pace"] = (spoken[-1] + 1 - spoken[0]) / letters
    return numbers


def letters_of(text: str) -> int:
    """Letters and digits of a text, in any script."""
    return sum(map(str.isalnum, text))


def _rms(levels: np.ndarray) -> float:
    return float(np.sqrt((levels**2).mean())) if len(levels) else 0.0
