"""Work that nothing can interrupt, left alone: the codec's thread and what else a stop must not
wait for, and the process's end.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

UNINTERRUPTIBLE = (  # the name of threads that run a codec or a compiled program
    "llasa-jax uninterruptible"
)

T = TypeVar("T")


def unless(stopped: Callable[[], int], work: Callable[[], T]) -> T | None:
    """What `work()` returns, or None as soon as `stopped()`: then its thread is left at it, and the
    process to `leave`.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def run():
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 raised again below
            failure.append(error)

    thread = threading.Thread(target=run, name=UNINTERRUPTIBLE, daemon=True)
    thread.start()
    while thread.is_alive() and not stopped():
        thread.join(0.1)
    if failure:
        raise failure[0]
    return result[0] if result else None


def leave(status: int) -> int:
    """`status`, unless a thread is still inside a codec or the like: then the process ends here,
    with that status.

    PyTorch cannot be interrupted, and Python's own end would abort the process for a daemon thread
    that comes back from it.
    """
    threads = [thread for thread in threading.enumerate() if thread.name == UNINTERRUPTIBLE]
    for thread in threads:
        thread.join(1.0)
    if any(thread.is_alive() for thread in threads):
        atexit._run_exitfuncs()  # JAX takes leave of the other hosts
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
