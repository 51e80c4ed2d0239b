"""Faults of reading that may pass, told from damage of what is read."""

import errno
from pathlib import Path

from llasa_jax.runtime.storage import is_remote, is_store_error

# TensorStore's and XLA's words for faults that say nothing about the bytes on the disk.
PASSING_WORDS = (
    "PERMISSION_DENIED:",
    "RESOURCE_EXHAUSTED:",
    "UNAVAILABLE:",
    "DEADLINE_EXCEEDED:",
    "Input/output error",
    "Stale file handle",
)
MISSING = errno.ENOENT, errno.ENOTDIR, errno.EISDIR


def is_passing(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says nothing about the bytes on the disk."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return any(
        isinstance(each, MemoryError)
        or (isinstance(each, OSError) and each.errno is not None and each.errno not in MISSING)
        or any(word in str(each) for word in PASSING_WORDS)
        or is_store_error(each)
        for each in seen
    )


def first_unreadable(folder: Path) -> OSError | None:
    """The error of the first file or folder in `folder` that cannot be opened now. Orbax takes one
    that it may not look into for one that is missing. None for a bucket, whose errors say so.
    """
    if is_remote(folder):
        return None
    try:
        for path in (folder, *folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    file.read(1)
            else:
                next(path.iterdir(), None)
    except OSError as error:
        return None if error.errno in MISSING else error
    return None
