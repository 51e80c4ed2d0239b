"""What a model will see: the first records of training as tokens, with those that carry loss in
colour.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TextIO

import numpy as np

from llasa_jax.codec import Codec, load_codec
from llasa_jax.convert.model_folder import load_tokenizer
from llasa_jax.data.batching import Planned, ToExample, drawn, draws_per_epoch, sources_of
from llasa_jax.encode.online import encoded, to_encode
from llasa_jax.encode.online_cache import open_encoder
from llasa_jax.encode.planned import PlannedClips
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.errors import printable
from llasa_jax.runtime.storage import as_path
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.vocab import NUM_CODES
from llasa_jax.train.settings import Settings

SHOWN_CODES = 3  # at either end of a run of codes
LEARNED, PLAIN = "\x1b[32m", "\x1b[0m"


def preview(
    settings: Settings,
    records: Sequence[Sequence],
    count: int,
    *,
    as_json: bool = False,
    out: TextIO | None = None,
) -> None:
    """Writes the first `count` records of training, in the order in which they are drawn, to `out`
    (stdout); at most one epoch of them.

    `records` are those of each of `settings.sources`; audio among them is encoded for the purpose.
    Records that are too long for a row are cut, or named and left out, as training does. With
    `as_json` each is a line with `id`, `input_ids` and `labels`, which are the ids that carry loss
    and -100 elsewhere.
    """
    out = out or sys.stdout
    tokenizer = load_tokenizer(as_path(settings.model.path))
    codec = None
    if any(isinstance(data, PlannedClips) for data in records):
        online = settings.data.online
        codec = load_codec(online.codec, online.device, online.precision)
    sources = sources_of(settings.sources, tokenizer, records)
    order = drawn(sources, settings.train.seed)
    to_example = ToExample(sources, settings.data.max_length, settings.data.too_long)
    coloured = out.isatty() and not os.environ.get("NO_COLOR")
    draws = (order[draw] for draw in range(min(count, draws_per_epoch(sources))))
    # A bad clip is None; a warning has named it.
    planned = (
        Planned(draw[0], draw[1], to_example(draw[0], draw[1]))
        for draw in draws
        if draw and draw[1] is not None
    )
    for plan, codes in _with_codes(planned, settings.data.online, records, codec):
        source = sources[plan.source]
        example = encoded(plan, sources, codes).example
        if plan.example is None:
            print(
                f"{printable(plan.record.id)}: longer than"
                f" data.max_length={settings.data.max_length}, left out",
                file=sys.stderr if as_json else out,
            )
        elif example is None:
            continue  # it turned out bad when it was read; a warning has named it
        elif as_json:
            labels = np.where(example.loss, example.tokens, -100).tolist()
            ids = example.tokens.tolist()
            line = {"id": plan.record.id, "input_ids": ids, "labels": labels}
            print(json.dumps(line), file=out)
        else:
            task, path = source.prompter.settings.task, settings.sources[plan.source].path
            print(
                printable(f"== {plan.record.id}  {task} from {path}: ")
                + f"{len(example.tokens)} tokens, {example.loss.sum()} with loss",
                file=out,
            )
            for text, learned in _pieces(example.tokens, example.loss, source.prompter, tokenizer):
                print(f"{LEARNED}{text}{PLAIN}" if learned and coloured else text, end="", file=out)
            print("\n", file=out)


def _with_codes(
    planned: Iterator[Planned], online: OnlineSettings, records: Sequence, codec: Codec | None
) -> Iterator[tuple[Planned, dict]]:
    """What is planned, each with the codes of its clip, as `Encoder.encode` gives them."""
    # Looking must not lock or fill the cache of a run.
    encoder = open_encoder(replace(online, cache=""), records, (), codec)
    if encoder is None:
        yield from ((one, {}) for one in planned)
        return
    with encoder:
        groups = ((to_encode([one]), one) for one in planned)
        yield from ((one, codes) for codes, one in encoder.encode(groups, ahead=online.queue))


def _pieces(
    tokens: np.ndarray, loss: np.ndarray, prompter: Prompter, tokenizer
) -> Iterator[tuple[str, bool]]:
    """The decoded text in runs of one colour, its codes abridged, and whether they carry loss."""
    is_code = (tokens >= prompter.vocab.code_base) & (tokens < prompter.vocab.code_base + NUM_CODES)
    cuts = np.flatnonzero(np.diff(is_code) | np.diff(loss)) + 1
    for run in np.split(np.arange(len(tokens)), cuts):
        left_out = len(run) - 2 * SHOWN_CODES
        if is_code[run[0]] and left_out > 1:
            first, last = (
                tokenizer.decode(tokens[run[:SHOWN_CODES]]),
                tokenizer.decode(tokens[run[-SHOWN_CODES:]]),
            )
            text = f"{first} ... {left_out} more ... {last}"
        else:
            text = printable(tokenizer.decode(tokens[run]), keep="\n")
        yield text, bool(loss[run[0]])
