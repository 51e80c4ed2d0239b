"""What lies beside a dataset's records and tells it from others: the fingerprint of its records,
and which command made it of what. So a command that is given again knows its own finished work, and
nothing that is not a dataset's is ever deleted.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llasa_jax.data.bad_list import as_text
from llasa_jax.errors import UserError
from llasa_jax.runtime import storage
from llasa_jax.runtime.claims import CLAIMS
from llasa_jax.runtime.files import explain, read_json
from llasa_jax.runtime.storage import is_remote

TEXTS = ("id", "text", "speaker", "description", "language")
SEAL = "seal.json"
FILES = ("dataset_info.json", "features.json", "metadata.json", SEAL)
RECORD_FILE = r"llasa_speech-\w+\.array_record-\d+-of-\d+"


class RecordDigest:
    """A fingerprint of records that does not depend on their order: the sum of their hashes."""

    def __init__(self):
        self._sum = 0

    def of(self, split: str, rows: Iterable[dict]) -> Iterator[dict]:
        for row in rows:
            one = hashlib.sha256(f"{split}\0".encode())
            for name in TEXTS:
                # The length, so that no two records are one text cut elsewhere.
                text = str(row[name]).encode("utf-8", "backslashreplace")
                one.update(f"{len(text)}:".encode() + text)
            one.update(np.asarray(row["codes"]).astype("<i8").tobytes())
            if "worse" in row:
                one.update(b"\0" + np.asarray(row["worse"]).astype("<i8").tobytes())
            self._sum = (self._sum + int.from_bytes(one.digest(), "big")) % 2**256
            yield row

    def hexdigest(self) -> str:
        return f"{self._sum:064x}"


def identity(*parts: object) -> str:
    """Identifies a command by its settings and input: 64 hex digits. Iterables other than strings
    are taken element by element.
    """
    digest = hashlib.sha256()
    for part in parts:
        many = part if isinstance(part, Iterable) and not isinstance(part, str) else (part,)
        for one in many:
            digest.update(as_text(f"{one!r}\n").encode())
        digest.update(b"\0")
    return digest.hexdigest()


def is_made(out: Path, made_from: str) -> dict | None:
    """The summary of the dataset in `out`, if it is whole and was `made_from` the same; None where
    there is none. Raises `UserError` for anything else there (see `check_new`).
    """
    if _is_free(out):
        return None
    seal = read_seal(out) if (out / SEAL).is_file() else {}
    if made_from and seal.get("made_from") == made_from:
        return seal.get("summary", {})
    if seal:
        raise UserError(
            f"{out}: already exists, a dataset that was made of other input or with other settings;"
            " give another folder, or move it away first."
        )
    check_new(out)
    return None


def check_unfinished(out: Path) -> None:
    """`check_new`, but for a finished dataset, which `is_made` judges."""
    if not (out / SEAL).is_file():
        check_new(out)


def remove_dataset(folder: Path) -> None:
    """Deletes a dataset's files and its folder. Raises `UserError`, and deletes nothing, where the
    folder holds anything else.
    """
    if foreign := foreign_files(folder):
        raise UserError(
            f"{folder}: is not deleted, for it holds {foreign[0]}, which is not part of a dataset"
            " of codes; move that away, or give another folder."
        )
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def foreign_files(folder: Path) -> list[str]:
    """Names in a folder of what `write_dataset` has not put there."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in FILES and not re.fullmatch(RECORD_FILE, path.name)
    )


def check_new(out: Path) -> None:
    """Raises `UserError` where a dataset must not be written: over a file, into a folder that holds
    something, or under a name that is not UTF-8, which ArrayRecord does not take.
    """
    if not _is_free(out):
        raise UserError(f"{out}: already exists; give another folder, or delete it first.")
    if not is_remote(out) and as_text(os.path.abspath(out)) != os.path.abspath(out):
        raise UserError(f"{as_text(out)}: is not a name in UTF-8; give another folder.")


def _is_free(out: Path) -> bool:
    if is_remote(out):
        # What a process that was killed as it put the dataset up has left is free (see `files`).
        return not storage.entries(out) or (out / CLAIMS).is_dir()
    try:
        return not (os.path.lexists(out)) or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(explain(error, out)) from error


def read_seal(folder: Path) -> dict:
    """What `write_dataset` kept beside the records, {} where there is nothing."""
    path = folder / SEAL
    if not (path.is_file() if is_remote(path) else os.path.lexists(path)):
        return {}
    return read_json(path, "the dataset's seal", fix="copy the whole folder again.")
