"""Recordings of the voices that texts should be spoken with, for scorers that compare voices."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.evaluate.texts import Item
from llasa_jax.speech.audio import read_audio


class References:
    """The reference of each of `items`; `codec` decodes recordings that are there as codes."""

    def __init__(self, items: Sequence[Item], codec: Codec | None):
        self._items, self._codec = items, codec
        self._by_speaker: dict[str, list[int]] = {}
        for at, item in enumerate(items):
            if item.recording is not None:
                self._by_speaker.setdefault(item.speaker, []).append(at)

    def of(self, item: int, own: bool = True) -> np.ndarray | None:
        """A recording of the voice that an item should have, float32 (samples,) at 16 kHz: its
        prompt, another recording of the named speaker, or the recording of its text, which its own
        resynthesis is not compared with (`own` False). None where there is none.
        """
        it = self._items[item]
        if it.prompt_audio is not None:
            return read_audio(it.prompt_audio)
        same = self._by_speaker.get(it.speaker, [])
        if it.speaker and (others := [at for at in same if at != item]):
            return self._recording(next((at for at in others if at > item), others[0]))
        return None if not own or it.recording is None else self._recording(item)

    def _recording(self, item: int) -> np.ndarray:
        recording = self._items[item].recording
        if isinstance(recording, Path):
            return read_audio(recording)
        assert self._codec is not None
        assert recording is not None
        return self._codec.decode(recording)
