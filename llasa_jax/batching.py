"""From utterances to batches: shuffled, turned into tokens, packed many to a row.

A spoken sentence is some 400 tokens; padding each to 2,048, as upstream does, wastes four fifths of the work. Here rows hold as
many whole clips as fit (first-fit over a window of open rows), told apart by `segment_ids`; positions restart in each.
The pipeline is Grain's, so its place in the data is a small state that goes into every checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.prompts import Example, Prompter, Utterance

OPEN_ROWS = 64


@dataclass(frozen=True)
class BatchShape:
    """A step sees `accumulation` times `rows` rows of `length` tokens. `rows` counts all hosts' rows."""

    accumulation: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.accumulation * self.rows * self.length


@dataclass(frozen=True)
class Fit:
    """What a dataset amounts to at one row length. `exact` is false where it was extrapolated from a sample."""

    clips: int
    too_long: int
    tokens: int
    exact: bool


class ToExample(grain.transforms.Map):
    """A record to an `Example`, or None where it is longer than `length` and is to be dropped."""

    def __init__(self, prompter: Prompter, length: int, too_long: Literal["drop", "cut"]):
        self._prompter, self._length, self._too_long = prompter, length, too_long

    def map(self, record: Utterance) -> dict | None:
        example = self._prompter.example(record)
        if len(example.tokens) > self._length:
            if self._too_long == "drop":
                return None
            example = Example(*(getattr(example, name)[: self._length] for name in ("tokens", "loss", "visible")))
        return {"tokens": example.tokens, "loss": example.loss, "visible": example.visible}


def measure(records: Sequence[Utterance], prompter: Prompter, length: int, sample: int = 20_000) -> Fit:
    """Counts the clips and tokens that fit rows of `length`, over all records or an even sample of them. UserError if none fits."""
    count = min(len(records), sample)
    lengths = np.array([len(prompter.example(records[i]).tokens) for i in np.linspace(0, len(records) - 1, count, dtype=int)])
    fits = lengths <= length
    if not fits.any():
        raise UserError(f"none of the clips fits rows of {length} tokens (the shortest has {lengths.min()}); raise data.max_length")
    scale = len(records) / count
    return Fit(round(fits.sum() * scale), round((~fits).sum() * scale), round(lengths[fits].sum() * scale), count == len(records))


def batches(
    records: Sequence[Utterance],
    prompter: Prompter,
    shape: BatchShape,
    *,
    seed: int,
    repeat: bool = True,
    pack: bool = True,
    too_long: Literal["drop", "cut"] = "drop",
    process: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """This host's part of every batch: a dataset of dicts of arrays [accumulation, rows of this host, length].

    `tokens` and `targets` int32 (targets are the next tokens), `loss_mask` bool (targets that count), `segment_ids` int32 (0 is
    padding) and `positions` int32. With `repeat` it never ends and shuffles every epoch anew; without, it runs once in order, and
    its last batch is filled with empty rows. `process` is (index, count) of this host.
    """
    index, count = process
    if shape.rows % count:
        raise UserError(f"train.rows={shape.rows} does not divide over {count} hosts; choose a multiple of {count}")
    dataset = grain.MapDataset.source(records)
    if repeat:
        dataset = dataset.shuffle(seed=seed).repeat()
    # Split only after repeating: every host then has the same share of every epoch, to within one clip.
    dataset = dataset[index::count].map(ToExample(prompter, shape.length, too_long)).filter(lambda example: example is not None)
    lengths = dict.fromkeys(("tokens", "loss", "visible"), shape.length)
    rows = grain.experimental.FirstFitPackIterDataset(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)),
        length_struct=lengths,
        num_packing_bins=OPEN_ROWS,
        shuffle_bins=repeat,
        seed=seed,
        max_sequences_per_bin=None if pack else 1,
    )
    rows_here = shape.rows // count
    return rows.map(_finish_row).batch(shape.accumulation * rows_here, drop_remainder=False, batch_fn=_Stack(shape.accumulation, rows_here))


def _finish_row(row: dict) -> dict:
    tokens, segment_ids = row["tokens"], row["tokens_segment_ids"]
    last = np.zeros(1, bool)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.append(tokens[1:], 0).astype(np.int32),
        # A conversation opens with tokens that carry no loss, so a clip's last token never learns the next clip's first.
        "loss_mask": np.append(row["loss"][1:], last).astype(bool),
        # What nothing may attend to is put into the padding's segment; its position runs on.
        "segment_ids": np.where(row["visible"].astype(bool), segment_ids, 0).astype(np.int32),
        "positions": row["tokens_positions"].astype(np.int32),
    }


class _Stack:
    """Rows to [accumulation, rows, length], with empty rows where the data ran out."""

    def __init__(self, accumulation: int, rows: int):
        self._shape = (accumulation, rows)

    def __call__(self, rows: Sequence[dict]) -> dict:
        missing = int(np.prod(self._shape)) - len(rows)
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        padded = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in stacked.items()}
        return {name: array.reshape(*self._shape, -1) for name, array in padded.items()}
