"""Records to token ids, packed into rows, and rows to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import grain
import numpy as np

from llasa_jax.data.batching.draws import HostShare, Source, drawn, draws_per_epoch, tagged
from llasa_jax.data.batching.packing import WINDOW, pack_rows
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Conversation, Example, Utterance


@dataclass(frozen=True)
class BatchShape:
    """One step's batch: `accumulation` times `rows` rows of `length` tokens. `rows` is global, over
    all hosts.
    """

    accumulation: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.accumulation * self.rows * self.length


class ToExample:
    """Turns a drawn record into an `Example`; None where there is no record, or where it is longer
    than `length` tokens and `too_long` is "drop".
    """

    def __init__(self, sources: Sequence[Source], length: int, too_long: Literal["drop", "cut"]):
        self._sources, self._length, self._too_long = sources, length, too_long

    def __call__(self, source: int, record: Utterance | Conversation | None) -> Example | None:
        if record is None:
            return None
        example = self._sources[source].prompter.plan(record)
        if len(example.tokens) <= self._length:
            return example
        if self._too_long == "drop":
            return None
        return Example(
            *(getattr(example, name)[: self._length] for name in ("tokens", "loss", "visible"))
        )


@dataclass(frozen=True)
class Planned:
    """A drawn record and its example (see `Prompter.plan`). The example already has its final
    length; in online training its codes come later.
    """

    source: int
    record: Utterance | Conversation
    example: Example | None


def batches(
    sources: Sequence[Source], shape: BatchShape, *, ahead: int = 0, **options
) -> grain.IterDataset:
    """This host's part of every batch of records with codes: `plan` and `fill`, with the options of
    `plan`.

    `ahead` batches are made in a thread before they are asked for; its iterator must be closed.
    Batches and states do not depend on `ahead`: the state is that after the last batch taken.
    """
    _, hosts = options.get("process", (0, 1))
    made = plan(sources, shape, **options).map(lambda rows: fill(rows, shape, hosts))
    # Every dozen batches a window of clips is tokenised and packed, which takes some 0.3 s. Without
    # the thread, the step after it waits for that.
    return grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=ahead)


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
    """This host's rows of every batch, at most accumulation x rows / hosts: each row is the list of
    the `Planned` clips that share it.

    With `repeat` it mixes, shuffles and never ends; without, it runs once over every source in
    order. `process` is (index, count) of this host; `window` is how many clips are packed together.
    Raises UserError where the rows do not divide over the hosts.
    """
    index, count = process
    if shape.rows % count:
        raise UserError(
            f"train.rows={shape.rows} does not divide over {count} hosts; choose a multiple of"
            f" {count}"
        )
    # Split among hosts only after mixing and repeating: together the hosts have then seen the same
    # draws as a single host would have, to within one draw each.
    if repeat:
        dataset = drawn(sources, seed)
        dataset = (
            grain.MapDataset.select_from_datasets([dataset], HostShare(index, count, seed))
            if count > 1
            else dataset
        )
    else:
        every = [
            tagged(i, grain.MapDataset.source(source.records)) for i, source in enumerate(sources)
        ]
        dataset = grain.MapDataset.concatenate(every)[index::count]
    to_example = ToExample(sources, shape.length, too_long)
    dataset = dataset.map(lambda draw: Planned(draw[0], draw[1], to_example(*draw))).filter(
        lambda planned: planned.example is not None
    )
    clips = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    # A window is never longer than an epoch, so that two epochs over a few clips see each of them
    # exactly twice.
    window = min(window, ceil(draws_per_epoch(sources) / count)) if pack else 1
    windows = clips.batch(window, drop_remainder=False, batch_fn=list)
    rows = grain.experimental.FlatMapIterDataset(windows, _ToRows(shape.length))
    return rows.batch(shape.accumulation * shape.rows // count, drop_remainder=False, batch_fn=list)


def fill(
    rows: Sequence[Sequence["Planned"]], shape: BatchShape, hosts: int = 1
) -> dict[str, np.ndarray]:
    """The rows as arrays [accumulation, this host's rows, length], with empty rows at the end where
    the data ran out.

    `tokens` and `targets` int32 (targets are the next tokens), `loss_mask` bool (targets with
    loss), `segment_ids` int32 (0 is padding) and `positions` int32. Bad clips, which have no
    example, become padding at the end of their row. Raises UserError for a clip that is not encoded
    yet.
    """
    for planned in (planned for row in rows for planned in row):
        if planned.example is not None and planned.example.lacks_codes:
            raise UserError(
                f"the clip {planned.record.id!r} is not encoded yet, and cannot be trained on; set"
                " data.mode=online, or encode it first with `llasa-jax encode`"
            )
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


class _ToRows(grain.experimental.FlatMapTransform):
    """A window of clips to rows of no more than `length` tokens."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, window: Sequence[Planned]) -> list[list[Planned]]:
        lengths = [len(planned.example.tokens) for planned in window if planned.example]
        rows = pack_rows(lengths, self._length)
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
    # Every example begins with tokens without loss, so the last token of a clip is never trained to
    # predict the first token of the next.
    row["loss_mask"][: used - 1] = np.concatenate([example.loss for example in examples])[1:]
    # Hidden tokens (`prompt.mask: upstream`) get the padding's segment, so nothing attends to them;
    # positions count on over them.
    row["segment_ids"][:used] = np.repeat(
        np.arange(1, len(examples) + 1), lengths
    ) * np.concatenate([e.visible for e in examples])
    row["positions"][:used] = np.concatenate([np.arange(length) for length in lengths])
    return row
