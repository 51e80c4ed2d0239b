"""Datasets as sequences of records, for the training pipeline."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llasa_jax.data.builder import PAIR, Records, open_dataset
from llasa_jax.data.seal import TEXTS
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Pair, Utterance


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

    def pairs(self) -> "Pairs":
        """The pairs whose better speeches these are. UserError where there are none."""
        if not self._records.has_pairs:
            raise UserError(
                f"{self._records.name}: holds no pairs, which align.loss dpo trains on; make them"
                " with `llasa-jax prefer`"
            )
        return Pairs(self._records)


def pairs_of(datasets: Sequence[Sequence]) -> list["Pairs"]:
    """The pairs of all datasets. UserError where one has none."""
    found = []
    for dataset in datasets:
        assert isinstance(dataset, Utterances)  # the settings allow nothing else
        found.append(dataset.pairs())
    return found


class Pairs(Sequence[Pair]):
    """One split of a dataset made by `prefer`. `reference` maps the ids of pairs to their
    log-probabilities in the reference model, once they are known.
    """

    def __init__(self, records: Records):
        self._records = records
        self.reference: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]  # no slices
        record = self._records.pair(index)
        worse, prompt, stopped, _ = (record.pop(name) for name in PAIR)
        better = Utterance(**record)
        return Pair(
            better,
            replace(better, codes=worse, num_codes=len(worse)),
            int(prompt),
            (bool(stopped[0]), bool(stopped[1])),
            self.reference.get(better.id),
        )


def record_of(utterance: Utterance, codes: np.ndarray) -> dict:
    """An utterance with its codes, uint16 (frames,), as `write_dataset` takes it."""
    return {name: getattr(utterance, name) for name in TEXTS} | {"codes": codes}


def open_utterances(folder: str | os.PathLike, split: str) -> Utterances:
    """Opens a split. UserError if the folder is not a dataset, or lacks the split or a file."""
    return Utterances(open_dataset(folder, split))
