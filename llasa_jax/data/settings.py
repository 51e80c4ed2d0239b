"""Settings of one dataset among those that a run trains on."""

from dataclasses import dataclass
from typing import Literal

from llasa_jax.speech.prompts import PromptSettings


@dataclass(frozen=True)
class SourceSettings:
    """One dataset of a mixture: as `data.path` and its splits, with its share of the draws and, if
    need be, a prompt of its own.

    `weight` is relative to the other sources' and counts records, not tokens. `prompt` replaces the
    run's as a whole, and `mode` `data.mode`. Where its task is chat, `path` is a JSONL file of
    conversations, which is one split by itself.
    """

    path: str = ""
    split: str = "train"
    validation_split: str = ""
    weight: float = 1.0
    prompt: PromptSettings | None = None
    mode: Literal["", "offline", "online"] = ""
