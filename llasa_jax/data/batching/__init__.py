"""From records to batches: mixed, shuffled, tokenised, many clips packed into a row.

A spoken sentence is about 400 tokens. Padding each to 2,048, as upstream does, wastes four fifths
of the compute. Here a row holds as many whole clips as fit, separated by `segment_ids`; positions
restart in each clip. Best-fit decreasing over windows of 1,024 clips fills LJSpeech's rows to 99%
(`benchmarks/row_filling.py`).

    draws     which record comes next (mixing, shuffling, streams)
    packing   which clips share a row
    rows      records -> `Planned` rows -> batches of arrays
    measure   how many steps an epoch takes

Which clips share a row follows from their lengths alone. So `plan` needs no codes, and `fill` puts
them in: at once where they are records, and as the codec makes them in online training
(`llasa_jax/encode/online.py`), which therefore sees the same rows.
"""

from llasa_jax.data.batching.draws import (
    Mix,
    Source,
    StreamShare,
    drawn,
    draws_per_epoch,
    sources_of,
)
from llasa_jax.data.batching.measure import Fit, measure
from llasa_jax.data.batching.packing import WINDOW, pack_rows
from llasa_jax.data.batching.rows import (
    BatchShape,
    Planned,
    ToExample,
    batches,
    fill,
    plan,
    streams_of,
)

__all__ = [
    "WINDOW",
    "BatchShape",
    "Fit",
    "Mix",
    "Planned",
    "Source",
    "StreamShare",
    "ToExample",
    "batches",
    "drawn",
    "draws_per_epoch",
    "fill",
    "measure",
    "pack_rows",
    "plan",
    "sources_of",
    "streams_of",
]
