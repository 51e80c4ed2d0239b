"""The reference of preference training: how probable the model that a run begins with finds the
speeches. It is computed once, before the first step, and kept in the run's folder, so that no
second model is in memory.
"""

import json
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from llasa_jax.data.batching import Source, fill, plan
from llasa_jax.data.records import Pairs
from llasa_jax.errors import UserError
from llasa_jax.runtime.files import read_json
from llasa_jax.runtime.writing import write_whole
from llasa_jax.train.prepare import Job
from llasa_jax.train.progress import say
from llasa_jax.train.state import TrainState

FILE = "reference.json"


def read(job: Job) -> None:
    """Gives the job's pairs the reference that the run's folder has, if it has one. It must come
    before any batch is made.
    """
    path = job.run / FILE
    if path.is_file():
        fix = "copy the run's whole folder again"
        _give(job, read_json(path, "the pairs' reference", list, fix=fix, limit=2**34))


def complete(job: Job, state: TrainState) -> None:
    """Computes the reference and keeps it, where training has not begun. UserError where a run that
    goes on has lost it.
    """
    path = job.run / FILE
    if state.step == 0:
        say("the log-probabilities of all pairs in the model that training begins with come first")
        known = [_of_source(job, state, source) for source in job.sources]
        if jax.process_index() == 0:
            write_whole(path, json.dumps(known) + "\n")
        _give(job, known)
    elif not path.is_file():
        raise UserError(
            f"{job.run} has lost its {FILE}, which cannot be made again from a model that has"
            " learned; restore the file from a copy, or choose another out folder"
        )


def _give(job: Job, known: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """`known` are a dictionary for each source."""
    for source, numbers in zip(job.sources, known, strict=True):
        assert isinstance(source.records, Pairs)
        source.records.reference = {name: (a, b) for name, (a, b) in numbers.items()}


def _of_source(job: Job, state: TrainState, source: Source) -> dict[str, tuple[float, float]]:
    """By the ids of a source's pairs: the log-probabilities, nats, of the better and the worse."""
    functions, shape = job.functions, job.shape
    here = functions.rows_here(shape.accumulation, shape.rows, shape.length)
    at = [turn * shape.rows + row for turn in range(shape.accumulation) for row in here]
    found: dict[str, tuple[float, float]] = {}
    # Every host plans all rows, for it needs all numbers, and computes on its own.
    for rows in plan([source], shape, seed=0, repeat=False, pack=job.settings.data.pack):
        rows = [*rows, *[[]] * (shape.accumulation * shape.rows - len(rows))]
        batch = functions.place(fill([rows[i] for i in at], shape), shape.rows)
        log_probs = functions.log_probs(state.frozen, state.trainable, batch)
        numbers = jax.device_get(log_probs).reshape(-1, shape.length)
        for row, of_tokens in zip(rows, numbers, strict=True):
            begin = 0
            for planned in row:
                sums = []
                for length in planned.example.lengths:
                    # At the last token of a sequence the target is the next one's, without loss.
                    of_one = of_tokens[begin : begin + length]
                    sums.append(float(np.sum(of_one, dtype=np.float64)))
                    begin += length
                found[planned.record.id] = (sums[0], sums[1])
    return found
