"""The samples of `prefer` on disk, a line for each text, which survives a crash at any moment."""

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.runtime.files import read_json
from llasa_jax.runtime.storage import is_remote
from llasa_jax.runtime.writing import read_rows, take_lock, write_whole

SETTINGS, ROWS = "samples.json", "samples.jsonl"


class SampleJournal:
    """The rows of the texts that are sampled and scored, by id: `rows`."""

    def __init__(self, folder: Path):
        self.rows: dict[str, dict] = {}
        path, fix = folder / ROWS, "delete the line, and its text is spoken again"
        for row in read_rows(path, "the samples", fix=fix, limit=2**34):
            self.rows[row["id"]] = row
        self._file = path.open("ab", buffering=0)

    def add(self, row: dict) -> None:
        """Keeps the row of a text, on the disk when this returns."""
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        os.fsync(self._file.fileno())
        self.rows[row["id"]] = row

    def close(self) -> None:
        self._file.close()


@contextmanager
def opened(folder: Path, settings: dict) -> Iterator[SampleJournal]:
    """The samples in `folder`, which is ours until the end. UserError where another process has it,
    and where its samples were drawn or scored with other `settings`.
    """
    if is_remote(folder):
        raise UserError(
            f"{folder}: samples are kept in a local folder; give a local --out, and copy it there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / SETTINGS, json.loads(json.dumps(settings))
    with (folder / ".lock").open("w") as lock:
        if take_lock(lock) is False:
            raise UserError(f"{folder} is in use by another process; wait for its end")
        if path.is_file():
            before = read_json(path, "the settings of the samples")
            if changed := [name for name in now if before.get(name) != now[name]]:
                raise UserError(
                    f"{folder} holds samples of another {changed[0]} ({before.get(changed[0])}, not"
                    f" {now[changed[0]]}); choose another --out, or give the same settings"
                )
        elif any(entry.name != ".lock" for entry in folder.iterdir()):
            raise UserError(f"{folder} holds something else than samples; choose another --out")
        else:
            write_whole(path, json.dumps(now, indent=1) + "\n")
        journal = SampleJournal(folder)
        try:
            yield journal
        finally:
            journal.close()


def packed(codes: np.ndarray) -> str:
    """Codes as a text for JSON."""
    return base64.b64encode(np.asarray(codes, "<u2").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2").astype(np.uint16)
