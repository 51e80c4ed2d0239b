"""What the hosts of a run must agree on, for a step that one host does not take hangs all the others."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def largest(value: int) -> int:
    """The largest of all hosts' values. Every host must ask, and waits for the others."""
    return int(np.max(multihost_utils.process_allgather(np.int32(value)))) if jax.process_count() > 1 else int(value)


def evenly(batches: Iterable[dict], empty: dict) -> Iterator[dict]:
    """This host's batches, and after them as many `empty` ones as it takes for every host to have the same number."""
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        if not largest(batch is not None):
            return
        yield empty if batch is None else batch
