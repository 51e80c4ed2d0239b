"""A text to speak, the voice to clone, and the speech that comes of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llasa_jax.errors import UserError, printable

LONGEST_NAME = 2000  # characters of a speaker, a language or a description


# eq=False: a wave has no single answer to whether it is equal.
@dataclass(frozen=True, eq=False)
class Recording:
    """A voice to clone: its wave, float32 (samples,) 16 kHz, and its codes, uint16."""

    wave: np.ndarray
    codes: np.ndarray


NO_VOICE = Recording(np.empty(0, np.float32), np.empty(0, np.uint16))


@dataclass(frozen=True)
class Line:
    """A text to speak, and how.

    `speaker`, `description` and `language` are what the prompt mentions, as in the training data.
    `prompt_audio`, a recording of the voice to clone (a path, a wave, float32 16 kHz, or what
    `Speaker.record` made of them), goes with `prompt_text`, what it says; neither is in the speech.
    `adapter` is the place of one of the `Speaker`'s. `id`, if there is one, picks the random
    numbers, so that a line is spoken alike among whichever others; otherwise its place among the
    lines does.

    Raises UserError for a name that no training data can have, and for half a voice to clone.
    """

    text: str
    speaker: str = ""
    description: str = ""
    language: str = ""
    prompt_audio: str | Path | np.ndarray | Recording | None = None
    prompt_text: str = ""
    adapter: int = 0
    id: str = ""

    def __post_init__(self):
        for name, value in self.named.items():
            if len(value) > LONGEST_NAME:
                raise UserError(
                    f"the {name} has {len(value):,} characters, more than {LONGEST_NAME:,}; give"
                    f" the {name} as it is in the training data"
                )
            if printable(value) != value or value != value.strip():
                raise UserError(
                    f"the {name} {printable(value)!r} has line breaks, control characters or blanks"
                    f" at its ends; give the {name} as it is in the training data"
                )
        if self.prompt_audio is not None and not self.prompt_text.strip():
            is_path = isinstance(self.prompt_audio, str | Path)
            what = self.prompt_audio if is_path else "a wave"
            raise UserError(
                f"{what}: cloning needs to know what the prompt says; give its transcript as"
                " prompt text"
            )
        if self.prompt_text and self.prompt_audio is None:
            raise UserError(
                "prompt text was given without prompt audio; give the recording that says it, or"
                " leave the text out"
            )

    @property
    def named(self) -> dict[str, str]:
        """The fields that the prompt may mention."""
        return {name: getattr(self, name) for name in ("speaker", "description", "language")}


@dataclass(frozen=True)
class Speech:
    """What was said of a line.

    `codes` uint16, 50 a second; `wave` float32 (samples,), 16 kHz, without what was trimmed;
    `stopped`: the model ended every piece by itself, not the limit; `tokens`: how many were drawn;
    `logprob`: their mean log probability.
    """

    codes: np.ndarray
    wave: np.ndarray
    stopped: bool
    tokens: int
    logprob: float
