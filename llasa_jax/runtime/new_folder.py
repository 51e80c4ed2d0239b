"""A folder that appears whole under its name, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llasa_jax.errors import UserError
from llasa_jax.runtime.locks import take_lock


@contextmanager
def new_folder(destination: Path, needs: int = 0) -> Iterator[Path]:
    """Gives a hidden folder beside `destination` to fill, and renames it at the end; on any failure
    it is removed.

    One that a killed process left there is removed too: nobody holds its lock any more. `needs` is
    how many bytes will be written. Raises UserError where `destination` is in use, and where the
    disk is or will be full.
    """
    destination = Path(destination).absolute()
    in_use = UserError(
        f"{destination} already exists and is not empty; choose a new folder or remove it"
    )
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise in_use
    parent, partial = (
        destination.parent,
        destination.with_name(f".{destination.name}.{os.getpid()}.partial"),
    )
    try:
        _remove_abandoned(destination)
        partial.mkdir(parents=True)
        lock = os.open(partial, os.O_RDONLY)
        take_lock(lock)
    except OSError as error:
        raise UserError(
            f"{destination} cannot be made ({error.strerror}); choose a folder that you may"
            " write to"
        ) from error
    try:
        free = shutil.disk_usage(partial).free
        if free < needs:
            raise UserError(
                f"{parent} has {free / 1e9:.1f} GB free and {needs / 1e9:.1f} GB are needed; make"
                " room or choose another disk"
            )
        yield partial
        # Over an empty folder this succeeds; where somebody filled it meanwhile, it does not.
        partial.rename(destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {parent} is full, and nothing was left under {destination}; make room"
                " and start again"
            ) from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise in_use from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(destination: Path) -> None:
    for partial in destination.parent.glob(f".{destination.name}.*.partial"):
        try:
            lock = os.open(partial, os.O_RDONLY)
        except OSError:
            continue  # its owner has just renamed it, or may keep it from us
        if take_lock(lock):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
