"""Datasets as sequences of records, for the training pipeline."""

import os
from collections.abc import Sequence

import numpy as np

from llasa_jax.data.builder import Records, open_dataset
from llasa_jax.data.seal import TEXTS
from llasa_jax.speech.prompts import Utterance


class Utterances(Sequence[Utterance]):
    """One split of a dataset made by `encode`, with random access. Picklable, and cheap to open:
    records are read when asked for.
    """

    def __init__(self, records: Records):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Utterance:  # type: ignore[override]  # no slices
        return Utterance(**self._records[index])


def record_of(utterance: Utterance, codes: np.ndarray) -> dict:
    """An utterance with its codes, uint16 (frames,), as `write_dataset` takes it."""
    return {name: getattr(utterance, name) for name in TEXTS} | {"codes": codes}


def open_utterances(folder: str | os.PathLike, split: str) -> Utterances:
    """Opens a split. UserError if the folder is not a dataset, or lacks the split or a file."""
    return Utterances(open_dataset(folder, split))
