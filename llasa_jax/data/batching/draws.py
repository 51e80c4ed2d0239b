"""Which record comes next: several datasets, shuffled, drawn by weight, cut into streams.

The order of all draws is fixed by the seed alone, and of every n consecutive draws each of n
streams takes one. How many streams there are is a setting, whatever the number of hosts. An epoch
is one pass over the first source; the others are drawn beside it as often as their weights say, and
each is shuffled again after every pass. The pipeline is Grain's, so the place in the data is a
small state that goes into every checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING

import grain
import numpy as np

from llasa_jax.data.settings import SourceSettings
from llasa_jax.speech.prompts import Conversation, Pair, Prompter, Utterance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Datasets below this size are shuffled here: Grain's own shuffle of about four records does not
# return for some seeds (0.2.18).
FEW = 64


@dataclass(frozen=True)
class Source:
    """A dataset, how its records become prompts, and its weight: its share of the draws, relative
    to the other sources' weights.
    """

    records: (
        Sequence[Utterance] | Sequence[Conversation] | Sequence[Pair] | Sequence[Utterance | None]
    )
    prompter: Prompter
    weight: float = 1.0


def sources_of(
    settings: Sequence[SourceSettings], tokenizer: "PreTrainedTokenizerBase", records: Sequence
) -> list[Source]:
    """The datasets to draw from: `records` are those of each of `settings`, in order."""
    return [
        Source(dataset, Prompter(tokenizer, source.prompt), source.weight)
        for dataset, source in zip(records, settings, strict=True)
    ]


class Mix(grain.transforms.DatasetSelectionMap):
    """Which source the k-th draw is from, and which of that source's draws it is, evenly spread.

    Weights become whole numbers without loss (0.9 and 0.1 are 9 and 1), so that any window as long
    as their sum holds exactly as many records of each source. `grain.MapDataset.mix` rounds weights
    (0.7 and 0.3 are 233 and 100).
    """

    def __init__(self, weights: Sequence[float]):
        self._weights = _whole(weights)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        # Of the first `k` draws, `k * others // remaining` are left to the sources after this one.
        remaining, k, after = sum(self._weights), index, index + 1
        for source, weight in enumerate(self._weights):
            others = remaining - weight
            left, left_after = k * others // remaining, after * others // remaining
            if left == left_after:
                return source, k - left
            remaining, k, after = others, left, left_after
        raise AssertionError("the last source leaves nothing to others")


class StreamShare(grain.transforms.DatasetSelectionMap):
    """One stream's draws: of every `count` consecutive draws each stream gets one, at random.

    If they took turns, one stream of two would get all of a source that is every tenth draw, and
    the lengths of that source's records would decide how fast it is drawn.
    """

    def __init__(self, index: int, count: int, seed: int):
        self._index, self._count, self._seed = index, count, seed

    def __len__(self) -> int:
        return sys.maxsize // self._count

    def __getitem__(self, index: int) -> tuple[int, int]:
        turn = np.random.default_rng([self._seed % 2**32, index]).permutation(self._count)[
            self._index
        ]
        return 0, index * self._count + int(turn)


def drawn(sources: Sequence[Source], seed: int) -> grain.MapDataset:
    """The training records in the order in which they are drawn, without end: pairs of a source's
    index and its record. None where the record is None, since Grain does not map those.
    """
    return grain.MapDataset.select_from_datasets(
        [
            # Seeds far apart, since Grain adds the epoch to the seed: the same dataset under two
            # tasks gets two orders.
            _shuffled(
                tagged(i, grain.MapDataset.source(source.records)), (seed + 1_000_003 * i) % 2**32
            )
            for i, source in enumerate(sources)
        ],
        Mix([source.weight for source in sources]),
    )


def _shuffled(dataset: grain.MapDataset, seed: int) -> grain.MapDataset:
    if len(dataset) < FEW:
        return grain.MapDataset.select_from_datasets([dataset], _FewShuffled(len(dataset), seed))
    return dataset.shuffle(seed=seed).repeat()


class _FewShuffled(grain.transforms.DatasetSelectionMap):
    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, at = divmod(index, self._size)
        return 0, int(np.random.default_rng([self._seed, epoch]).permutation(self._size)[at])


def draws_per_epoch(sources: Sequence[Source]) -> int:
    """How many draws it takes to pass once over the first source."""
    weights = _whole([source.weight for source in sources])
    return -(-len(sources[0].records) * sum(weights) // weights[0])


def _whole(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers in the same proportion, without loss."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def tagged(index: int, dataset: grain.MapDataset) -> grain.MapDataset:
    """Each record with the index of its source."""
    return dataset.map(lambda record: (index, record))
