"""Clips of audio as records before they are encoded, and the list of those that turned out bad."""

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llasa_jax.codec import HOP
from llasa_jax.data.bad_list import as_json, reason_of
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.readers import Key
from llasa_jax.speech.prompts import Utterance

SHOWN = 20  # bad clips reported on the terminal


@dataclass(frozen=True)
class PlannedClip(Utterance):
    """An utterance that is not encoded yet: `codes` is None. `key` names its audio."""

    key: Key = (-1, -1)


class Skipped:
    """Clips that turned out bad, each with its reason: remembered, reported once, and listed in a
    file as soon as one is given. `quiet` ones are not reported on the terminal.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._reasons: dict[Key, str] = {}
        self.lines: list[dict[str, str]] = []
        self._written = 0
        self._listed: set[str] = set()
        self._path: Path | None = None
        self._lock = threading.Lock()

    def add(self, key: Key, clip_id: str, audio: str, reason: str) -> None:
        with self._lock:
            if key in self._reasons:
                return
            self._reasons[key] = reason
            self.lines.append({"id": clip_id, "audio": audio, "reason": reason})
            self._write()
        if len(self) <= SHOWN and not self._quiet:
            more = (
                ""
                if len(self) < SHOWN
                else " (others that follow are only listed in the run's bad.jsonl)"
            )
            warnings.warn(f"the clip {clip_id!r} is skipped: {reason}{more}", stacklevel=2)

    def list_in(self, path: Path) -> None:
        """Lists all clips in this file from now on, after the lines that it has."""
        with self._lock:
            self._path, self._written = path, 0
            self._listed = (
                set(path.read_text(encoding="utf-8", errors="replace").splitlines())
                if path.is_file()
                else set()
            )
            self._write()

    def of(self, number: int) -> set[int]:
        """The indices of a source's skipped clips."""
        return {index for source, index in self._reasons if source == number}

    def __contains__(self, key: Key) -> bool:
        return key in self._reasons

    def __len__(self) -> int:
        return len(self._reasons)

    def explained(self) -> str:
        """The first reason, and where the others are."""
        first = next(iter(self._reasons.values())).rstrip(".")
        return f"the first: {first}" + (f". All are listed in {self._path}" if self._path else "")

    def _write(self) -> None:
        if self._path is None or self._written == len(self.lines):
            return
        lines = [as_json(line) for line in self.lines[self._written :]]
        self._written = len(self.lines)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines if line not in self._listed)


class PlannedClips(Sequence[PlannedClip | None]):
    """One split of a source of audio as records to plan rows with. `number` tells the source from
    the run's others.

    A clip whose length cannot be read from its header is skipped: None. `indices` takes the place
    of the split's.
    """

    def __init__(
        self,
        audio: AudioSource,
        split: str,
        number: int,
        skipped: Skipped,
        indices: Sequence[int] | None = None,
    ):
        self.audio, self.split, self.number, self.skipped = audio, split, number, skipped
        self.indices = [*(audio.split(split) if indices is None else indices)]
        self._samples = np.full(len(self.indices), -1, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> PlannedClip | None:  # type: ignore[override]  # no slices
        index = self.indices[at]
        key = self.number, index
        utterance = self.audio.utterance(index)
        if self._samples[at] < 0:
            try:
                self._samples[at] = self.audio.samples(index)
            except Exception as error:  # noqa: BLE001 decoders raise their own kinds
                self.skipped.add(key, utterance.id, self.audio.key(index)[0], reason_of(error))
                return None
        # The codec pads to a whole number of codes, and by one where it is whole already.
        return planned(utterance, key, int(self._samples[at]) // HOP + 1)


def planned(utterance: Utterance, key: Key, num_codes: int = 0) -> PlannedClip:
    """An utterance of a source of audio as a planned clip; `num_codes` 0 if that is not known."""
    return PlannedClip(**vars(utterance) | {"codes": None, "num_codes": num_codes}, key=key)


class EncodedClips(Sequence[Utterance | None]):
    """Planned clips with those codes that are given; None for a skipped clip."""

    def __init__(self, clips: PlannedClips, codes: dict[Key, np.ndarray | None]):
        self._clips, self._codes = clips, codes

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, at: int) -> Utterance | None:  # type: ignore[override]  # no slices
        clip = self._clips[at]
        if clip is None or (codes := self._codes[clip.key]) is None:
            return None
        return replace(clip, codes=codes)
