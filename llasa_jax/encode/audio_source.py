"""What encoding, offline and online, knows of audio with texts, wherever it lies."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Utterance


class Waves(Protocol):
    """What reads a source's clips in another process. Picklable, small and quick to import."""

    def wave(self, place: Any) -> np.ndarray:
        """As `AudioSource.wave`, of the clip at a `place`."""

    def where(self, place: Any) -> str:
        """The name of the clip, for errors."""


class AudioSource:
    """Clips of audio with their texts, with random access.

    `name` says where it lies, in messages; its last part names its cache where there are several.
    `ids` are unique, `split_names` is each clip's split, and `faults` says of clips that cannot be
    used why not, by index. One that is `read_forward` is quick in the order of its clips alone.
    """

    read_forward = False
    name: str
    ids: Sequence[str]
    split_names: Sequence[str]
    faults: dict[int, str]

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, name: str) -> Sequence[int]:
        """The indices of a split's clips, in the order of a dataset made from them
        (`builder.record_order`). UserError without it.
        """
        # Imports TFDS, which reading processes do without.
        from llasa_jax.data.builder import record_order

        indices = [i for i, split in enumerate(self.split_names) if split == name]
        if not indices:
            has = ", ".join(sorted(set(self.split_names)))
            fix = "; set data.online.validation_share to hold some clips out"
            raise UserError(
                f"{self.name}: no split {name!r}, it has {has}{fix * (name == 'validation')}."
            )
        order = record_order([self.ids[i] for i in indices], name)
        return [indices[i] for i in order.tolist()]

    def utterance(self, index: int) -> Utterance:
        """Everything but the codes, which are None."""
        raise NotImplementedError

    def check_text(self, index: int, text: str) -> None:
        """Raises UserError where a clip has no text."""
        if not text.strip():
            raise UserError(f"{self.name}: {self.ids[index]!r} has no text; give it one.")

    def key(self, index: int) -> tuple[str, int, int]:
        """Where the audio lies, its size and its time of change: codes in a journal count for the
        same key only.
        """
        raise NotImplementedError

    def samples(self, index: int) -> int:
        """How many samples `wave` has, by the header where that is known to be right. Raises
        UserError for a clip that cannot be used.
        """
        raise NotImplementedError

    def waves(self) -> Waves:
        """What reading processes are sent once: a process needs neither texts nor other clips."""
        raise NotImplementedError

    def place(self, index: int) -> Any:
        """What `waves` needs to read a clip; picklable."""
        raise NotImplementedError

    def wave(self, index: int) -> np.ndarray:
        """Float32 (samples,), mono, 16 kHz. Raises UserError, with the reason, for a clip that
        cannot be used.
        """
        return self.waves().wave(self.place(index))
