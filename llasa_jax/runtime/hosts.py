"""What the hosts of a run must agree on, for a step that one host does not take hangs all the
others.
"""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from llasa_jax.errors import UserError
from llasa_jax.runtime.stop_signal import StopSignal

FAILED = 1000  # above every signal


def largest(value: int) -> int:
    """The largest of all hosts' values. Every host must ask, and waits for the others."""
    return (
        int(np.max(multihost_utils.process_allgather(np.int32(value))))
        if jax.process_count() > 1
        else int(value)
    )


def stopped(stop: StopSignal, failed: bool = False) -> int:
    """The signal that any host has received, 0 if none: all hosts stop after the same step. All
    must ask.

    UserError where another host has `failed`, so that nobody waits for it.
    """
    verdict = largest(FAILED if failed else stop.received)
    if verdict == FAILED and not failed:
        raise UserError(
            "another host's data failed, and training stops on all; its own log says why"
        )
    stop.received = stop.received if failed else verdict
    return stop.received


def evenly(batches: Iterable[dict], empty: dict) -> Iterator[dict]:
    """This host's batches, and after them as many `empty` ones as it takes for every host to have
    the same number.
    """
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        if not largest(batch is not None):
            return
        yield empty if batch is None else batch
