"""Where audio to encode comes from: a manifest's files, or the tables of `encode/tables.py`.

Reading processes import this module, so it imports little.
"""

import os
from pathlib import Path

import numpy as np

from llasa_jax.data.manifest import assign_splits, file_key, read_manifest
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.errors import UserError
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import as_path, is_remote
from llasa_jax.speech.audio import audio_samples, read_audio
from llasa_jax.speech.prompts import Utterance


class ManifestAudio(AudioSource):
    """The clips of a manifest (see `read_manifest`), split as `assign_splits` does."""

    def __init__(
        self,
        manifest: str | os.PathLike,
        validation_share: float = 0.0,
        seed: int = 0,
        columns: str = "",
    ):
        self.name, self.faults = str(manifest), {}
        self._clips = read_manifest(manifest, columns)
        self.ids = [clip.id for clip in self._clips]
        splits = assign_splits(self._clips, validation_share, seed)
        self.split_names = [splits[clip] for clip in self.ids]

    def utterance(self, index: int) -> Utterance:
        clip = self._clips[index]
        return Utterance(clip.text, None, clip.id, clip.speaker, clip.description, clip.language)

    def key(self, index: int) -> tuple[str, int, int]:
        return file_key(self._clips[index].audio)

    def samples(self, index: int) -> int:
        return audio_samples(self._clips[index].audio)

    def waves(self) -> "Files":
        return Files()

    def place(self, index: int) -> Path:
        return self._clips[index].audio


class Files:
    """Audio in files of its own (see `Waves`). A place is a file's path."""

    def wave(self, place: Path) -> np.ndarray:
        return read_audio(place)

    def where(self, place: Path) -> str:
        return str(place)


def open_audio(path: str, online: OnlineSettings) -> AudioSource:
    """The source that a `path` of the settings names: a manifest, a dataset's folder or hub id, or
    `tfds:NAME`. UserError if it is none.
    """
    from llasa_jax.encode.hf_table import open_hf_audio
    from llasa_jax.encode.tables import parse_columns
    from llasa_jax.encode.tfds_table import is_tfds_folder, open_tfds_audio

    shares = online.validation_share, online.split_seed
    suffix = as_path(path).suffix.lower()
    is_manifest = suffix in (".jsonl", ".json", ".csv") or as_path(path).is_file()
    if is_manifest and not path.startswith("tfds:"):
        return ManifestAudio(path, *shares, online.columns)
    columns = parse_columns(online.columns, "data.online.columns") if online.columns else {}
    if "codes" in columns:
        raise UserError(
            f"data.online.columns {online.columns} names codes, but online training makes them;"
            " name the column of audio."
        )
    path = os.fspath(local_copy(path)) if is_remote(path) else path
    if path.startswith("tfds:") or is_tfds_folder(path):
        return _faultless(open_tfds_audio(path.removeprefix("tfds:"), columns, *shares))
    name, _, config = (path, "", "") if os.path.exists(path) else path.partition(":")
    return _faultless(open_hf_audio(name, columns, *shares, config=config or None))


def _faultless(source: AudioSource) -> AudioSource:
    for reason in source.faults.values():
        raise UserError(reason)
    return source
