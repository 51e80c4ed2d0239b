"""What object stores lack, made of what they have: folders that appear whole, and files that
grow.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.claims import CLAIMS, Claim
from llasa_jax.runtime.storage import file_system, is_remote, reaching

THREADS = 8  # transfers at a time
SYNC_SECONDS = 30.0  # between two looks at files that grow


# Folders that appear whole


@contextmanager
def new_bucket_folder(destination: Path, needs: int, last: str) -> Iterator[Path]:
    """Gives a folder on this machine to fill, and puts its files up at the end, `last` as the last:
    readers take the folder for whole when that is there. Large ones may go before (`put_early`). On
    any failure nothing is left there.

    UserError where something lies there already (what a killed process has left is removed), where
    another process writes it, where it cannot be written, and where this machine has no room.
    """
    _check_free(destination, last)
    with (
        Claim(destination, "writing") as claim,
        tempfile.TemporaryDirectory(prefix="llasa-jax-") as scratch,
    ):
        _check_free(destination, last)
        free = shutil.disk_usage(scratch).free
        if free < needs:
            raise UserError(
                f"{scratch} has {free / 1e9:.1f} GB free and {needs / 1e9:.1f} GB are needed on"
                f" this machine before they go to {destination}; make room, or set TMPDIR to a"
                " larger disk"
            )
        _clear(destination)  # of a process that was killed
        try:
            yield Path(scratch)
            claim.check()
            upload(Path(scratch), destination, last)
        except BaseException:
            with contextlib.suppress(UserError):
                claim.check()  # or it is another's now
                _clear(destination)
            raise


def _clear(destination: Path) -> None:
    for name in storage.entries(destination):
        if not name.startswith(CLAIMS):
            storage.remove(f"{destination}/{name}")


def put_early(file: Path, destination: str | os.PathLike) -> None:
    """Puts up a file of a folder that `new_bucket_folder` has given, and removes it from this
    machine: for one that nobody needs here any more.
    """
    with reaching(destination):
        file_system(destination).put_file(str(file), f"{destination}/{file.name}")
    file.unlink()


def _check_free(destination: Path, last: str) -> None:
    there = storage.entries(destination)
    others = [name for name in there if not name.startswith(CLAIMS)]
    # Without the last file, and with a claim, it is what a killed process has left.
    if last in others or (others and len(others) == len(there)):
        raise UserError(
            f"{destination} already exists and is not empty; choose a new folder or remove it"
        )


def upload(source: Path, destination: str | os.PathLike, last: str = "") -> None:
    """Puts all files of a folder up, `last` when all others are there."""
    system = file_system(destination)
    names = [each.relative_to(source).as_posix() for each in source.rglob("*") if each.is_file()]

    def put(name: str) -> None:
        with reaching(destination):
            system.put_file(str(source / name), f"{destination}/{name}")

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(put, sorted(name for name in names if name != last)):
            pass
    if last in names:
        put(last)


@contextmanager
def new_bucket_file(destination: Path) -> Iterator[Path]:
    """Gives a file on this machine to fill, with the same suffix, and puts it up at the end."""
    with tempfile.TemporaryDirectory(prefix="llasa-jax-") as scratch:
        partial = Path(scratch) / destination.name
        partial.touch()
        yield partial
        with reaching(destination):
            file_system(destination).put_file(str(partial), os.fspath(destination))


# Files that grow


def working_folder(folder: str | os.PathLike) -> Path:
    """Where a process keeps the growing files of `folder`: there, or for a bucket in a temporary
    folder, which a `Mirror` puts up.
    """
    return _scratch(str(storage.as_path(folder))) if is_remote(folder) else Path(folder)


@cache
def _scratch(folder: str) -> Path:
    scratch = tempfile.mkdtemp(prefix="llasa-jax-run-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch)


class Mirror:
    """Keeps a bucket's folder `there` like a folder `here` of this machine, as its files grow: at
    every `sync`, and every `SYNC_SECONDS` while it is a context. Does nothing where `there` is no
    bucket.

    A store that fails while files grow is warned of once, and tried again at the next time.
    """

    def __init__(self, here: Path, there: str | os.PathLike):
        self._here, self._there = here, os.fspath(there)
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._complained = False

    def fetch(self, names: list[str]) -> None:
        """Brings these files here, if they are there. UserError where the store fails."""
        if not is_remote(self._there):
            return
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                content = storage.read_bytes(f"{self._there}/{name}")
                (self._here / name).write_bytes(content)

    def sync(self, forgive: bool = True) -> None:
        """Puts up what has changed. UserError where that fails, unless it is to `forgive`."""
        if not is_remote(self._there):
            return
        with self._lock:
            try:
                self._put_changed()
            except (OSError, UserError) as error:
                if not forgive:
                    raise
                if not self._complained:
                    warnings.warn(
                        f"files of {self._there} are not up to date there ({error}); they are tried"
                        " again as training goes on",
                        stacklevel=2,
                    )
                self._complained = True

    def _put_changed(self) -> None:
        system = file_system(self._there)
        for path in sorted(self._here.rglob("*")):
            if not path.is_file() or path.name.startswith("."):
                continue
            name, status = path.relative_to(self._here).as_posix(), path.stat()
            state = status.st_size, status.st_mtime_ns
            if self._sent.get(name) != state:
                with reaching(self._there):
                    system.pipe_file(f"{self._there}/{name}", path.read_bytes())
                self._sent[name] = state

    def _keep_up(self) -> None:
        while not self._end.wait(SYNC_SECONDS):
            self.sync()

    def __enter__(self) -> "Mirror":
        if is_remote(self._there):
            self._thread = threading.Thread(target=self._keep_up, name="mirror", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        if self._thread:
            self._thread.join(SYNC_SECONDS)
        self.sync()
