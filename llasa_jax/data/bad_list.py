"""What the lists of bad records share: the reason as a sentence, and a record as a line of JSON."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.storage import is_remote
from llasa_jax.runtime.writing import new_file


def reason_of(error: Exception) -> str:
    """Why a record cannot be used. Decoders raise kinds of their own, which are named."""
    if isinstance(error, UserError | OSError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def as_text(text: str | os.PathLike) -> str:
    """Text that files, terminals and databases take: in names that are not UTF-8, the bytes that
    Python holds as lone surrogates are escaped (\\udce9).
    """
    return os.fspath(text).encode("utf-8", "backslashreplace").decode()


def as_json(record: dict) -> str:
    """A record as a line of JSON."""
    return as_text(json.dumps(record, ensure_ascii=False))


class BadList:
    """Lines of JSON that become the file `path` whole, or not at all; until then they lie in memory
    or, when they are many, in a file without a name, which nobody has to clean up.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lines = tempfile.SpooledTemporaryFile(2**24, "w+", encoding="utf-8")  # noqa: SIM115

    def add(self, record: dict) -> None:
        self._lines.write(as_json(record) + "\n")

    def __del__(self):
        self._lines.close()

    def publish(self) -> None:
        """Writes the file; without lines, removes one that an earlier run has left."""
        if not self._lines.tell():
            if is_remote(self.path):
                storage.remove(self.path)
            else:
                self.path.unlink(missing_ok=True)
            return
        self._lines.seek(0)
        with new_file(self.path) as partial, partial.open("w", encoding="utf-8") as file:
            shutil.copyfileobj(self._lines, file)
