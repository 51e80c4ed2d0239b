"""From records to batches: mixed, shuffled, turned into tokens, packed many to a row.

A spoken sentence is some 400 tokens; padding each to 2,048, as upstream does, wastes four fifths of
the work. Here rows hold as many whole clips as fit, told apart by `segment_ids`; positions restart
in each. Best-fit decreasing over windows of 1,024 clips fills LJSpeech's rows to 99%
(`benchmarks/row_filling.py`).

Several sources are drawn by weight, record by record. The order of all draws is fixed by the seed
alone, and of every n in a row each of n hosts takes one, so the data is the same on any number of
hosts. An epoch is one pass over the first source; the others are drawn beside it however often
their weights say; each source is shuffled anew whenever it has been drawn once. The pipeline is
Grain's, so its place in the data is a small state that goes into every checkpoint.

Which clips share a row follows from their lengths alone. So `plan` needs no codes, and `fill` puts
them in: at once where they are records, and as the codec makes them in online training
(`llasa_jax/online.py`), which so sees the very same rows.
"""

import bisect
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm
from typing import TYPE_CHECKING, Literal

import grain
import numpy as np

from llasa_jax.data.settings import SourceSettings
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Conversation, Example, Prompter, Utterance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 1024
SAMPLE = 20_000
FEW = 64
MEASURING_THREADS = 8


@dataclass(frozen=True)
class BatchShape:
    """A step sees `accumulation` times `rows` rows of `length` tokens. `rows` counts all hosts'
    rows.
    """

    accumulation: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.accumulation * self.rows * self.length


@dataclass(frozen=True)
class Source:
    """A dataset, how its records become prompts, and its share of the records that are drawn,
    against the other sources' weights.
    """

    records: Sequence[Utterance] | Sequence[Conversation]
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


@dataclass(frozen=True)
class Fit:
    """What an epoch amounts to in rows of `length`. `exact` is false where it was extrapolated from
    a sample.

    `tokens` are those of the `clips` that are kept, `rows` what they fill, and `shares` each
    source's part of the tokens.
    """

    length: int
    clips: int
    too_long: int
    tokens: int
    rows: int
    shares: tuple[float, ...]
    exact: bool

    def steps(self, epochs: float, shape: BatchShape) -> int:
        """How many steps `epochs` take: from the rows, which are never quite full."""
        return max(1, ceil(epochs * self.rows / (shape.accumulation * shape.rows)))

    def __str__(self):
        fill = self.tokens / (self.rows * self.length)
        numbers = (
            f"{self.clips} clips, {self.tokens} tokens in {self.rows} rows of {self.length},"
            f" {fill:.1%} full"
        )
        return f"{'' if self.exact else 'about '}{numbers}; {self.too_long} too long"


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


class HostShare(grain.transforms.DatasetSelectionMap):
    """One host's draws: of every `count` in a row each host has one, and which is left to chance.

    In turn, one host of two would have all of a source that is every tenth draw, and the lengths of
    that source's records would then decide how fast it is drawn.
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
    """The records of training in the order in which they are drawn, without end: pairs of a
    source's index and its record.

    None in place of a pair whose record is None: Grain maps nothing that is not there.
    """
    return grain.MapDataset.select_from_datasets(
        [
            # Far apart, since Grain adds the epoch to the seed: one dataset under two tasks is in
            # two orders.
            _shuffled(
                _tagged(i, grain.MapDataset.source(source.records)), (seed + 1_000_003 * i) % 2**32
            )
            for i, source in enumerate(sources)
        ],
        Mix([source.weight for source in sources]),
    )


def _shuffled(dataset: grain.MapDataset, seed: int) -> grain.MapDataset:
    # Grain's shuffle of four records or so does not return for some seeds (0.2.18).
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
    """How many draws pass once over the first source."""
    weights = _whole([source.weight for source in sources])
    return -(-len(sources[0].records) * sum(weights) // weights[0])


def _whole(weights: Sequence[float]) -> list[int]:
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def _tagged(index: int, dataset: grain.MapDataset) -> grain.MapDataset:
    return dataset.map(lambda record: (index, record))


class ToExample:
    """A drawn record to an `Example`, or None where it is longer than `length` and is to be
    dropped, or there is no record.
    """

    def __init__(self, sources: Sequence[Source], length: int, too_long: Literal["drop", "cut"]):
        self._sources, self._length, self._too_long = sources, length, too_long

    def __call__(self, source: int, record: Utterance | Conversation | None) -> Example | None:
        if record is None:
            return None
        example = self._sources[source].prompter.example(record)
        if len(example.tokens) <= self._length:
            return example
        if self._too_long == "drop":
            return None
        return Example(
            *(getattr(example, name)[: self._length] for name in ("tokens", "loss", "visible"))
        )


@dataclass(frozen=True)
class Planned:
    """A drawn record and its example, which has the length that it will have in its row, but in
    online training not yet its codes.
    """

    source: int
    record: Utterance | Conversation
    example: Example | None


def measure(
    sources: Sequence[Source],
    length: int,
    *,
    seed: int,
    pack: bool = True,
    too_long: Literal["drop", "cut"] = "drop",
    sample: int = SAMPLE,
) -> Fit:
    """Counts the clips, tokens and rows of `length` of the first epoch, from its first `sample`
    draws. UserError if none fits.
    """
    draws = draws_per_epoch(sources)
    count = min(draws, sample)
    order = drawn(sources, seed)

    def look(draw: int) -> tuple[int, int]:
        source, record = order[draw] or (0, None)
        return source, 0 if record is None else len(sources[source].prompter.example(record).tokens)

    # In threads, since the length of a clip of audio is read from its file.
    with ThreadPoolExecutor(MEASURING_THREADS) as pool:
        source, tokens = np.array(list(pool.map(look, range(count)))).T
    source, tokens = source[tokens > 0], tokens[tokens > 0]
    if not len(tokens):
        raise UserError("none of the clips can be read; look at data.path and its audio")
    fits = tokens <= length
    if not fits.any() and too_long == "drop":
        raise UserError(
            f"none of the clips fits rows of {length} tokens (the shortest has {tokens.min()});"
            " raise data.max_length"
        )
    kept = np.minimum(tokens, length) * (fits | (too_long == "cut"))
    used = kept[kept > 0].tolist()
    rows = (
        sum(len(pack_rows(used[i : i + WINDOW], length)) for i in range(0, len(used), WINDOW))
        if pack
        else len(used)
    )
    scale = draws / count
    shares = np.bincount(source, kept, len(sources)) / kept.sum()
    counts = (round(number * scale) for number in (len(used), (~fits).sum(), kept.sum(), rows))
    return Fit(length, *counts, tuple(shares.tolist()), count == draws)


def batches(sources: Sequence[Source], shape: BatchShape, **options) -> grain.IterDataset:
    """This host's part of every batch of records with codes: `plan` and `fill` in one, with the
    options of `plan`.
    """
    _, hosts = options.get("process", (0, 1))
    return plan(sources, shape, **options).map(lambda rows: fill(rows, shape, hosts))


def plan(
    sources: Sequence[Source],
    shape: BatchShape,
    *,
    seed: int,
    repeat: bool = True,
    pack: bool = True,
    too_long: Literal["drop", "cut"] = "drop",
    process: tuple[int, int] = (0, 1),
    window: int = WINDOW,
) -> grain.IterDataset:
    """This host's rows of every batch, no more than accumulation x rows / hosts of them: each is a
    list of the `Planned` that share it.

    With `repeat` it never ends and mixes and shuffles; without, it runs once over every source in
    order. `process` is (index, count) of this host; `window` is how many clips are packed together.
    """
    index, count = process
    if shape.rows % count:
        raise UserError(
            f"train.rows={shape.rows} does not divide over {count} hosts; choose a multiple of"
            f" {count}"
        )
    # Split only after mixing and repeating: together the hosts then have had the same draws as one
    # host would have, to within one each.
    if repeat:
        dataset = drawn(sources, seed)
        dataset = (
            grain.MapDataset.select_from_datasets([dataset], HostShare(index, count, seed))
            if count > 1
            else dataset
        )
    else:
        tagged = [
            _tagged(i, grain.MapDataset.source(source.records)) for i, source in enumerate(sources)
        ]
        dataset = grain.MapDataset.concatenate(tagged)[index::count]
    to_example = ToExample(sources, shape.length, too_long)
    dataset = dataset.map(lambda draw: Planned(*draw, to_example(*draw))).filter(
        lambda planned: planned.example is not None
    )
    clips = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    # No window is longer than an epoch: a run of two epochs over few clips then sees each of them
    # twice.
    window = min(window, ceil(draws_per_epoch(sources) / count)) if pack else 1
    windows = clips.batch(window, drop_remainder=False, batch_fn=list)
    rows = grain.experimental.FlatMapIterDataset(windows, _ToRows(shape.length))
    return rows.batch(shape.accumulation * shape.rows // count, drop_remainder=False, batch_fn=list)


def fill(
    rows: Sequence[Sequence["Planned"]], shape: BatchShape, hosts: int = 1
) -> dict[str, np.ndarray]:
    """The rows as arrays [accumulation, rows of this host, length], with empty rows at the end
    where the data ran out.

    `tokens` and `targets` int32 (targets are the next tokens), `loss_mask` bool (targets that
    count), `segment_ids` int32 (0 is padding) and `positions` int32. Clips without an example,
    which turned out bad, leave padding at the end of their row.
    """
    here = shape.rows // hosts
    filled = [
        _row([planned.example for planned in row if planned.example is not None], shape.length)
        for row in rows
    ]
    filled += [_row([], shape.length)] * (shape.accumulation * here - len(rows))
    return {
        name: np.stack([row[name] for row in filled]).reshape(shape.accumulation, here, -1)
        for name in filled[0]
    }


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which of `lengths` go together into rows of `capacity`, as lists of indices: the longest
    first, each where it fits most tightly.

    The rows come shuffled, seeded by the lengths as they were drawn: in the order of packing, rows
    of many short clips would be last.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free in each row, and the row, in order
    for clip in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[clip], 0))
        free, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(clip)
        bisect.insort(room, (free - lengths[clip], row))
    return [rows[i] for i in np.random.default_rng([*lengths]).permutation(len(rows))]


class _ToRows(grain.experimental.FlatMapTransform):
    """A window of clips to rows of no more than `length` tokens."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, window: Sequence[Planned]) -> list[list[Planned]]:
        rows = pack_rows([len(planned.example.tokens) for planned in window], self._length)
        return [[window[i] for i in row] for row in rows]


def _row(examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    names = {
        "tokens": np.int32,
        "targets": np.int32,
        "loss_mask": bool,
        "segment_ids": np.int32,
        "positions": np.int32,
    }
    row = {name: np.zeros(length, dtype) for name, dtype in names.items()}
    if not examples:
        return row
    lengths = [len(example.tokens) for example in examples]
    used = sum(lengths)
    row["tokens"][:used] = np.concatenate([example.tokens for example in examples])
    row["targets"][:-1] = row["tokens"][1:]
    # A conversation opens with tokens that carry no loss, so a clip's last token never learns the
    # next clip's first.
    row["loss_mask"][: used - 1] = np.concatenate([example.loss for example in examples])[1:]
    # What nothing may attend to is put into the padding's segment; its position runs on.
    row["segment_ids"][:used] = np.repeat(
        np.arange(1, len(examples) + 1), lengths
    ) * np.concatenate([e.visible for e in examples])
    row["positions"][:used] = np.concatenate([np.arange(length) for length in lengths])
    return row
