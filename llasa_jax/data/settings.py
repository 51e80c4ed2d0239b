"""Settings of one dataset among those that a run trains on."""

from dataclasses import dataclass
from typing import Literal

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import setting
from llasa_jax.speech.settings import PromptSettings


@dataclass(frozen=True)
class SourceSettings:
    """One dataset of a mixture."""

    path: str = setting("", path=True, resume=True)
    """As data.path; where the prompt's task is chat, a JSONL file of conversations, which is one
    split by itself."""
    split: str = setting("train")
    """Split to train on."""
    validation_split: str = setting("")
    """Split to validate on; empty, none."""
    weight: float = setting(1.0, low=1e-6, high=1_000_000)
    """Share of the draws, relative to the other sources' weights; it counts records, not tokens."""
    prompt: PromptSettings | None = None
    """A prompt of its own, in place of the run's as a whole."""
    mode: Literal["", "offline", "online"] = ""
    """As data.mode, which it is where empty."""

    @property
    def is_chat(self) -> bool:
        """Whether it is text chat, which has no codes and no splits."""
        return self.prompt is not None and self.prompt.task == "chat"

    def check(self, name: str) -> None:
        if not self.path:
            raise UserError(f"{name}.path is not set; give each source one")
        check_splits(name, "split", self.split, self.validation_split)


def check_splits(name: str, train: str, split: str, validation: str) -> None:
    """UserError where a dataset validates on the split that it trains on, or has none to train on.
    `train` is the name of the setting with the latter.
    """
    if not split:
        raise UserError(f"{name}.{train} is empty; name the split to train on")
    if split == validation:
        raise UserError(
            f"{name}.validation_split is {validation}, which is trained on too; name another split,"
            " or leave it out"
        )
