"""The end of a process that a thread would not let end."""

import atexit
import os
import sys
import threading

UNINTERRUPTIBLE = "llasa-jax encoder"  # the name of the thread that runs a codec


def leave(status: int) -> int:
    """`status`, unless a thread is still inside a codec: then the process ends here, with that status.

    PyTorch cannot be interrupted, and Python's own end would abort the process for a daemon thread that comes back from it.
    """
    for thread in threading.enumerate():
        if thread.name == UNINTERRUPTIBLE:
            thread.join(1.0)
            if thread.is_alive():
                atexit._run_exitfuncs()  # JAX takes leave of the other hosts
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    return status
