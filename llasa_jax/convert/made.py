"""Which command made a model's folder or an export of what, so that the same command, given again
when it is done, says so.
"""

import hashlib
import os
from pathlib import Path

from llasa_jax.runtime import storage
from llasa_jax.runtime.files import read_text

# In a bucket, the last file of a model, a release or an adapter.
LAST = "model.json", "config.json", "adapter_config.json"
MADE_FROM = ".made_from"  # in a finished folder: the identity of its command


def identity(*parts: object) -> str:
    """Identifies a command by its settings and input: 64 hex digits."""
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()


def state_of(path: str | os.PathLike) -> list[tuple]:
    """Names, sizes and times of change of all files in a folder, or of a file: changed content
    shows in them without being read. Of a bucket, the store's versions.
    """
    if storage.is_remote(path):
        return sorted(storage.entries(path).items())
    folder = Path(path)
    files = folder.rglob("*") if folder.is_dir() else [folder]
    stats = [(os.path.relpath(file, folder), file.stat()) for file in files if file.is_file()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def is_made(destination: Path, made_from: str) -> bool:
    """Whether a command has finished `destination`; says so."""
    path = destination / MADE_FROM
    done = path.is_file() and read_text(path, "the note of its command") == made_from
    if done and storage.is_remote(destination):
        # The last file to be put up: a process that was killed meanwhile has left the others.
        done = not {*LAST}.isdisjoint(storage.entries(destination, deep=False))
    if done:
        print(f"{destination}: done already by the same command.")
    return done
