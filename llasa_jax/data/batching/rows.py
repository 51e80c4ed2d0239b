"""Records to token ids, packed into rows, and rows to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import grain
import numpy as np

from llasa_jax.data.batching.draws import Source, StreamShare, drawn, draws_per_epoch, tagged
from llasa_jax.data.batching.packing import WINDOW, pack_rows
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Conversation, Example, Pair, Utterance


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

    def __call__(
        self, source: int, record: Utterance | Conversation | Pair | None
    ) -> Example | None:
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
    record: Utterance | Conversation | Pair
    example: Example | None


def batches(
    sources: Sequence[Source],
    shape: BatchShape,
    *,
    ahead: int = 0,
    values: Sequence[str] = (),
    **options,
) -> grain.IterDataset:
    """This host's rows of every batch of records with codes: `plan` and `fill`, with the options of
    `plan`.

    `ahead` batches are made in a thread before they are asked for; its iterator must be closed.
    Batches and states do not depend on `ahead`: the state is that after the last batch taken.
    """
    made = plan(sources, shape, **options).map(lambda rows: fill(rows, shape, values))
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
    streams: int = 1,
    here: Sequence[int] | None = None,
    window: int = WINDOW,
) -> grain.IterDataset:
    """This host's rows of every batch, accumulation x len(here) of them: each row is the list of
    the `Planned` clips that share it, empty where the data ran out.

    With `repeat` it mixes, shuffles and never ends; without, it runs once over every source in
    order. The data is cut into `streams`, each with an order, windows and a place of its own, and
    the s-th fills the s-th part of a batch's rows. `here` are the rows of the batch that this host
    fills, in ascending order (default: all); it plans only the streams that they are of. So what is
    in a row does not depend on the hosts. The state is {"parents": the places in these streams}.
    `window` is how many clips are packed together. `streams` must divide `shape.rows`.
    """
    streams = streams if repeat else 1
    here = range(shape.rows) if here is None else here
    each = shape.rows // streams
    if not repeat:
        every = [
            tagged(i, grain.MapDataset.source(source.records)) for i, source in enumerate(sources)
        ]
        orders = [grain.MapDataset.concatenate(every)]
    elif streams == 1:
        orders = [drawn(sources, seed)]
    else:
        orders = [
            grain.MapDataset.select_from_datasets(
                [drawn(sources, seed)], StreamShare(stream, streams, seed)
            )
            for stream in streams_of(here, shape.rows, streams)
        ]
    # A window is never longer than an epoch, so that two epochs over a few clips see each of them
    # exactly twice.
    window = min(window, ceil(draws_per_epoch(sources) / streams)) if pack else 1
    to_example = ToExample(sources, shape.length, too_long)
    rows = [
        _packed(order, to_example, window, shape.length).batch(
            shape.accumulation * each, drop_remainder=False, batch_fn=list
        )
        for order in orders
    ]
    together = grain.experimental.ZipIterDataset(rows, strict=False)
    return together.map(_Own(shape.accumulation, each, here))


def streams_of(here: Sequence[int], rows: int, streams: int) -> list[int]:
    """Which of the `streams` fill the rows `here` of a batch of `rows`."""
    return sorted({row * streams // rows for row in here})


class _Own:
    """Of the rows of some streams, `each` x accumulation a stream, those that are `here`."""

    def __init__(self, accumulation: int, each: int, here: Sequence[int]):
        first = {stream: at for at, stream in enumerate(sorted({row // each for row in here}))}
        # Which stream's row, and which of its rows
        self._at = [
            (first[row // each], turn * each + row % each)
            for turn in range(accumulation)
            for row in here
        ]

    def __call__(self, parts: Sequence[Sequence[list[Planned]]]) -> list[list[Planned]]:
        return [parts[part][at] if at < len(parts[part]) else [] for part, at in self._at]


def _packed(
    order: grain.MapDataset, to_example: ToExample, window: int, length: int
) -> grain.IterDataset:
    """Drawn records as rows of `Planned` clips."""
    dataset = order.map(lambda draw: Planned(draw[0], draw[1], to_example(*draw))).filter(
        lambda planned: planned.example is not None
    )
    clips = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    windows = clips.batch(window, drop_remainder=False, batch_fn=list)
    return grain.experimental.FlatMapIterDataset(windows, _ToRows(length))


def fill(
    rows: Sequence[Sequence[Planned]], shape: BatchShape, values: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The rows of `plan` as arrays [accumulation, this host's rows, length].

    `tokens` and `targets` int32 (targets are the next tokens), `loss_mask` bool (targets with
    loss), `segment_ids` int32 (0 is padding), `positions` int32, and those of the examples' values
    that `values` names, float32, each at its token as a target. Bad clips, which have no
    example, become padding at the end of their row. Raises UserError for a clip that is not encoded
    yet.
    """
    for planned in (planned for row in rows for planned in row):
        if planned.example is not None and planned.example.lacks_codes:
            raise UserError(
                f"the clip {planned.record.id!r} is not encoded yet, and cannot be trained on; set"
                " data.mode=online, or encode it first with `llasa-jax encode`"
            )
    filled = [
        row_of(
            [planned.example for planned in row if planned.example is not None],
            shape.length,
            values,
        )
        for row in rows
    ]
    return {
        name: np.stack([row[name] for row in filled]).reshape(shape.accumulation, -1, shape.length)
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


def row_of(
    examples: Sequence[Example], length: int, values: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """One row of `fill`, of examples that fit into it."""
    names = {
        "tokens": np.int32,
        "targets": np.int32,
        "loss_mask": bool,
        "segment_ids": np.int32,
        "positions": np.int32,
        **dict.fromkeys(values, np.float32),
    }
    row = {name: np.zeros(length, dtype) for name, dtype in names.items()}
    if not examples:
        return row
    lengths = [n for example in examples for n in example.lengths or (len(example.tokens),)]
    used = sum(lengths)
    row["tokens"][:used] = np.concatenate([example.tokens for example in examples])
    # The last place of a row has no next token: its target stays 0, without loss.
    row["targets"][:-1] = row["tokens"][1:]
    # Every example begins with tokens without loss, so the last token of a clip is never trained to
    # predict the first token of the next.
    row["loss_mask"][: used - 1] = np.concatenate([example.loss for example in examples])[1:]
    for name in values:
        of_tokens = [(example.values or {})[name] for example in examples]
        row[name][: used - 1] = np.concatenate(of_tokens)[1:]
    # Hidden tokens (`prompt.mask: upstream`) get the padding's segment, so nothing attends to them;
    # positions count on over them.
    row["segment_ids"][:used] = np.repeat(np.arange(1, len(lengths) + 1), lengths) * np.concatenate(
        [e.visible for e in examples]
    )
    row["positions"][:used] = np.concatenate([np.arange(length) for length in lengths])
    return row
