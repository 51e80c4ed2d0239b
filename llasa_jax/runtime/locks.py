"""Locks that the kernel drops when their holder ends, however it ends."""

import errno
import fcntl


def take_lock(file) -> bool | None:
    """Locks an open file or folder (an object with `fileno`, or a descriptor) until it is closed,
    without waiting.

    True if it is ours now, False where another process has it, None where its file system has no
    locks, as some network ones have not. OSError where the disk is full.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return None
    return True
