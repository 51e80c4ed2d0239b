"""Copies of what lies in a bucket on this machine's disk, for libraries that read only local files:
made once for all processes of a machine, and compared with what the store says of sizes and MD5s.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.bucket_files import THREADS
from llasa_jax.runtime.claims import CLAIMS
from llasa_jax.runtime.storage import Entry, file_system, is_remote, reaching
from llasa_jax.runtime.writing import new_folder, take_lock


def cache_folder() -> Path:
    """Where copies from buckets are kept: $LLASA_JAX_CACHE, or llasa-jax in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LLASA_JAX_CACHE") or f"{home}/llasa-jax").expanduser()


def keep_copies_in(folder: str) -> None:
    """Makes `folder` the `cache_folder()` of this process and those that it starts; "" nothing.
    UserError for a bucket's.
    """
    if is_remote(folder):
        raise UserError(
            f"data.cache_dir={folder}: copies of what lies in buckets are kept on this machine;"
            " name a folder of its disk"
        )
    if folder:
        os.environ["LLASA_JAX_CACHE"] = os.path.abspath(os.path.expanduser(folder))


def local_copy(path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """A folder or file of this machine as it is; of a bucket a copy in `cache_folder()`, made once
    for all processes of this machine. Of a folder only the files whose relative paths are `wanted`.

    The copy is named by the files' versions, so what changes in the bucket is copied again; sizes
    and MD5s are compared. UserError where there is nothing, where the copy differs, and where the
    disk is full.
    """
    if not is_remote(path):
        return Path(path)
    files = {
        name: one
        for name, one in storage.entries(path).items()
        if wanted(name) and not name.startswith(CLAIMS)
    }
    if not files:
        storage.check_reachable(path, "the folder or file")
        raise UserError(f"{path} holds no files that are wanted; check the path")
    name, single = os.fspath(path).rstrip("/").rpartition("/")[2], _is_file(path, files)
    root = cache_folder().absolute()
    there = root / f"{name}-{_digest(path, files)}"
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f".{there.name}.lock", f"the copy of {path}"):
        if not there.is_dir():
            with new_folder(there, sum(one.size for one in files.values())) as partial:
                _download(path, files, partial, single)
    return there / name if single else there


def _is_file(path: str | os.PathLike, files: dict[str, Entry]) -> bool:
    name = os.fspath(path).rpartition("/")[2]
    with reaching(path):
        return list(files) == [name] and not file_system(path).exists(f"{path}/{name}")


def _digest(path: str | os.PathLike, files: dict[str, Entry]) -> str:
    found = hashlib.sha256(os.fspath(path).encode())
    for name, one in sorted(files.items()):
        found.update(f"{name}\0{one.size}\0{one.version}\n".encode())
    return found.hexdigest()[:16]


def _download(
    path: str | os.PathLike, files: dict[str, Entry], destination: Path, single: bool
) -> None:
    from tqdm import tqdm

    system, total = file_system(path), sum(one.size for one in files.values())

    def fetch(name: str) -> int:
        source = os.fspath(path) if single else f"{path}/{name}"
        copy = destination / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with reaching(source):
            system.get_file(source, str(copy))
        _check_copy(copy, source, files[name])
        return files[name].size

    with (
        tqdm(total=total, desc=f"copying {path}", unit="B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for size in pool.map(fetch, files):
            bar.update(size)


def _check_copy(copy: Path, source: str, entry: Entry) -> None:
    with copy.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if copy.stat().st_size != entry.size or entry.md5 not in ("", md5):
        raise UserError(
            f"the copy of {source} differs from it in size or MD5; if somebody is writing it, wait"
            " for that, and give the same command again"
        )


@contextmanager
def _alone(path: Path, what: str) -> Iterator[None]:
    """Holds a lock of this machine, waiting for it."""
    with path.open("w") as lock:
        said = False
        while take_lock(lock) is False:
            if not said:
                print(f"{what} is being made by another process, which is waited for", flush=True)
            said = True
            time.sleep(0.2)
        yield
