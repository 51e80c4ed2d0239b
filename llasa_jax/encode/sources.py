"""Where online training's audio comes from. A source is an `AudioSource` (see
llasa_jax/readers.py).

Reading processes import this module, so it imports little.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llasa_jax.data.manifest import assign_splits, file_key, read_manifest
from llasa_jax.encode.readers import AudioSource
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import audio_samples, read_audio
from llasa_jax.speech.prompts import Utterance


class ManifestAudio:
    """The clips of a manifest (see `read_manifest`), split as `encode` splits them (see
    `assign_splits`).
    """

    def __init__(
        self,
        manifest: str | os.PathLike,
        validation_share: float = 0.0,
        seed: int = 0,
        columns: str = "",
    ):
        self.name = str(manifest)
        self._clips = read_manifest(manifest, columns)
        splits = assign_splits(self._clips, validation_share, seed)
        self._splits = [splits[clip.id] for clip in self._clips]

    def __len__(self) -> int:
        return len(self._clips)

    def split(self, name: str) -> Sequence[int]:
        from llasa_jax.data.builder import record_order

        indices = [i for i, split in enumerate(self._splits) if split == name]
        if not indices:
            has = ", ".join(sorted(set(self._splits)))
            fix = (
                ""
                if name != "validation"
                else "; set data.online.validation_share to hold some clips out"
            )
            raise UserError(f"{self.name}: no split {name!r}, it has {has}{fix}.")
        return [indices[i] for i in record_order([self._clips[i].id for i in indices], name)]

    def utterance(self, index: int) -> Utterance:
        clip = self._clips[index]
        return Utterance(clip.text, None, clip.id, clip.speaker, clip.description, clip.language)

    def key(self, index: int) -> tuple[str, int, int]:
        return file_key(self._clips[index].audio)

    def samples(self, index: int) -> int:
        return audio_samples(self._clips[index].audio)

    def wave(self, index: int) -> np.ndarray:
        return read_audio(self._clips[index].audio)


def open_audio(path: str, online: OnlineSettings) -> AudioSource:
    """The source that a `path` of the settings names: a manifest, a dataset's folder or hub id, or
    `tfds:NAME`. UserError if it is none.
    """
    from llasa_jax.encode.hf_dataset import parse_columns
    from llasa_jax.encode.tables import is_tfds_folder, open_hf_audio, open_tfds_audio

    is_manifest = Path(path).suffix.lower() in (".jsonl", ".json", ".csv") or Path(path).is_file()
    if is_manifest and not path.startswith("tfds:"):
        return ManifestAudio(path, online.validation_share, online.split_seed, online.columns)
    columns = parse_columns(online.columns, "data.online.columns") if online.columns else {}
    if "codes" in columns:
        raise UserError(
            f"data.online.columns {online.columns} names codes, but online training makes them;"
            " name the column of audio."
        )
    if path.startswith("tfds:") or is_tfds_folder(path):
        return open_tfds_audio(
            path.removeprefix("tfds:"), columns, online.validation_share, online.split_seed
        )
    return open_hf_audio(path, columns, online.validation_share, online.split_seed)
