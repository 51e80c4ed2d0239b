"""Settings of speech: how tokens are drawn, how texts become sound, and search."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import MAX_SEED, check, setting


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. Raises UserError for a value out of range.

    The defaults are Llasa's own; upstream adds a repetition penalty of 1.2 for finetuned voices.
    """

    temperature: float = setting(0.8, low=0, high=1000)
    """0 always takes the most probable token (greedy)."""
    top_p: float = setting(1.0, above=0, high=1)
    """Only the most probable tokens whose probabilities reach this are drawn; 1 keeps all."""
    top_k: int = setting(0, low=0, high=1_000_000)
    """Only so many most probable tokens are drawn; 0 keeps all."""
    repetition_penalty: float = setting(1.0, above=0, high=1_000_000)
    """Above 1, tokens that the prompt or the speech has already are less probable; 1 is none, and
    1.2 usual for finetuned voices."""
    speech_only: bool = True
    """Nothing but codes and the end marker can be drawn."""
    seed: int = setting(0, low=0, high=MAX_SEED)
    """The same seed gives the same speech again."""

    def __post_init__(self):
        check(self, "sampling")


@dataclass(frozen=True)
class SpeechSettings:
    """From texts to sound. Raises UserError for a value out of range."""

    fastest: float = setting(3.0, low=1, high=1000)
    """No end marker is drawn before speech this many times as fast as reading aloud would be over,
    nor as the first token: 14 bytes of UTF-8 text are read in a second."""
    max_seconds: float = setting(0.0, low=0, high=3600)
    """Longest speech of a piece of text; 0 is three times what reading it takes, and 3 seconds."""
    loop_seconds: float = setting(1.0, low=0, high=60)
    """Once codes have repeated for so long what was said up to a second before, they may not go on
    with it; 0 allows loops."""
    piece_seconds: float = setting(20.0, low=1, high=600)
    """Texts that take longer to read are cut between sentences into pieces of at most this. Each
    piece is spoken with the one before it as its prompt."""
    tail_seconds: float = setting(0.5, low=0, high=3600)
    """Longest silence that is left at the end of the speech."""
    loudness: float = setting(0.0, low=-70, high=0)
    """Loudness that every speech is given, in LUFS (ITU-R BS.1770), such as -23; 0 leaves it
    alone."""
    normalize: str = setting("", pattern=r"([a-z]{2})?", words="a language's code such as en")
    """The language in which numbers, dates and abbreviations are written out before they are spoken
    (see `llasa_jax.generate.texts`); empty speaks texts as they are."""

    def __post_init__(self):
        check(self, "speech")


@dataclass(frozen=True)
class SearchSettings:
    """How much is searched. Raises UserError for a value out of range."""

    kind: Literal["best-of", "beam"] = "best-of"
    """best-of draws `samples` and keeps the best; beam keeps the `beams` best of `samples` partial
    sequences every `every` codes, and goes on from those."""
    samples: int = setting(8, low=1, high=4096)
    """Speeches that are drawn of each text."""
    rows: int = setting(8, low=1, high=1024)
    """Rows that are drawn at once, at most."""
    beams: int = setting(2, low=1, high=256)
    """Partial sequences that a beam search goes on from."""
    every: int = setting(50, low=1, high=3000)
    """Codes, 50 a second, between two choices of a beam search."""
    search_seconds: float = setting(0.0, low=0, high=86_400)
    """Time for each piece of text, after which the best so far is taken: a best-of draws no further
    rows, a beam makes no further choices. 0 is no limit."""

    def __post_init__(self):
        check(self, "search")

    @classmethod
    def parse(cls, text: str, **settings) -> "SearchSettings":
        """From `best-of:8`, `beam` or `beam:16`, where the number is that of the samples."""
        match = re.fullmatch(r"(best-of|beam)(?::(\d{1,6}))?", text)
        if not match:
            raise UserError(f"the search {text!r} is unknown; give best-of:8, beam or beam:16")
        kind: Any = match[1]
        samples = {"samples": int(match[2])} if match[2] else {}
        return cls(kind, **samples, **settings)
