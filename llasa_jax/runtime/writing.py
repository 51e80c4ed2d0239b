"""Files and folders, of this machine or a bucket, written whole or not at all, and locks."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.bucket_files import new_bucket_file, new_bucket_folder
from llasa_jax.runtime.files import FULL, explain, parse_json, read_text


def take_lock(file) -> bool | None:
    """Locks an open file or folder (an object with `fileno`, or a descriptor) until it is closed,
    without waiting. The kernel drops the lock when the holder ends, however it ends.

    True if it is ours now, False where another process has it, None where its file system has no
    locks, as some network ones have not. OSError where the disk is full.
    """
    from filelock import lock_descriptor  # only for those who write: `--help` answers at once

    try:
        return lock_descriptor(file if isinstance(file, int) else file.fileno(), blocking=False)
    except OSError as error:
        if error.errno in FULL:
            raise
        return None


@contextmanager
def new_folder(destination: Path, needs: int = 0, last: str = "") -> Iterator[Path]:
    """Gives a hidden folder beside `destination` to fill, and renames it at the end; on any failure
    it is removed. For a bucket, gives a temporary folder, and puts up its files, `last` as the last
    (see `bucket_files.new_bucket_folder`).

    A folder that a killed process left there is removed too: nobody holds its lock any more.
    `needs` is how many bytes will be written. UserError where `destination` exists and holds
    something, and where the disk is or will be full.
    """
    if storage.is_remote(destination):
        with new_bucket_folder(destination, needs, last) as partial:
            yield partial
        return
    destination = Path(destination).absolute()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise _exists(destination)
    parent = destination.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _partial(destination, folder=True) as partial:
            free = shutil.disk_usage(partial).free
            if free < needs:
                raise UserError(
                    f"{parent} has {free / 1e6:,.0f} MB free and {needs / 1e6:,.0f} MB are needed;"
                    " make room or choose another disk"
                )
            yield partial
            # Over an empty folder this succeeds; where somebody filled it meanwhile, it does not.
            partial.rename(destination)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"the disk of {parent} is full, and nothing was left under {destination}; make room"
                " and start again"
            ) from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _exists(destination) from error
        raise UserError(explain(error, destination)) from error


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """Gives the path of a hidden, empty file beside `destination`, with the same suffix, to fill;
    at the end it takes the place of `destination`. On any failure it is removed. For a bucket, the
    file is a temporary one that is put up at the end.

    OSError where it cannot be made or renamed, UserError where a bucket does not take it.
    """
    if storage.is_remote(destination):
        with new_bucket_file(destination) as partial:
            yield partial
        return
    destination = Path(destination)
    with _partial(destination, folder=False) as partial:
        yield partial
        partial.replace(destination)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that a process that is killed meanwhile leaves the old one or the new one.
    Text is UTF-8. OSError, or for a bucket UserError, where it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    if storage.is_remote(path):
        storage.write_bytes(path, content)
        return
    with new_file(path) as partial:
        partial.write_bytes(content)


def read_rows(path: Path, name: str, *, fix: str, limit: int) -> list[dict]:
    """The rows of a file to which lines of JSON are appended; none where it is not there. A last
    line that a killed process left half written is taken off the file. `name`, `fix` and `limit`
    (bytes) are those of `read_text` and `parse_json`, whose UserErrors it raises.
    """
    if not path.is_file():
        return []
    text = read_text(path, name, limit=limit)
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_whole(path, text)
    return [
        parse_json(line, f"{path}, line {number}", fix=fix)
        for number, line in enumerate(text.splitlines(), 1)
    ]


def is_partial(path: Path) -> bool:
    """Whether a path is one of those that `new_folder` and `new_file` fill."""
    return path.name.startswith(".") and ".partial" in path.suffixes


@contextmanager
def _partial(destination: Path, folder: bool) -> Iterator[Path]:
    """A locked, empty file or folder beside `destination`, removed at the end if still there."""
    prefix = f".{destination.name if folder else destination.stem}."
    suffix = ".partial" if folder else f".partial{destination.suffix}"
    _remove_abandoned(destination.parent, prefix, suffix)
    partial = destination.with_name(f"{prefix}{os.getpid()}{suffix}")
    if folder:
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
    else:
        # The lock's file may be opened again by its path: locks belong to an open descriptor.
        lock = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        take_lock(lock)
        yield partial
    finally:
        _remove(partial)
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str, suffix: str) -> None:
    # No glob: names may hold its special characters.
    for entry in parent.iterdir():
        number = entry.name.removeprefix(prefix).removesuffix(suffix)
        if entry.name != f"{prefix}{number}{suffix}" or not number.isdigit():
            continue
        try:
            lock = os.open(entry, os.O_RDONLY)
        except OSError:
            continue  # its owner has just renamed it, or may keep it from us
        # Not where there are no locks (None): nobody knows whether it is being filled.
        if take_lock(lock):
            _remove(entry)
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exists(destination: Path) -> UserError:
    return UserError(
        f"{destination} already exists and is not empty; choose a new folder or remove it"
    )
