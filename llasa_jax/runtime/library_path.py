"""Paths that every library can use, whatever the folder is called."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llasa_jax.runtime.storage import is_remote


@contextmanager
def library_path(folder: Path) -> Iterator[Path]:
    """The absolute path of `folder`, or, where Orbax or TensorStore could not use that, a link to
    it in a temporary folder.

    Orbax takes `[` in a path for a pattern; TensorStore takes only UTF-8, and a backslash for a
    slash. A path in a bucket stays as it is.
    """
    if is_remote(folder):
        yield folder
        return
    name = os.path.abspath(folder)
    if "[" not in name and "\\" not in name and _is_utf8(name):
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(prefix="llasa-jax-") as scratch:
        link = Path(scratch) / "folder"
        link.symlink_to(name)
        yield link


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
