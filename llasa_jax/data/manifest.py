"""What to learn from: a manifest's lines as `Clip`s. JSONL, or LJSpeech's metadata.csv."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from llasa_jax.errors import UserError

_KEYS = ("audio", "text", "id", "speaker", "description", "language", "split")


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One spoken text. `text` is as written in the manifest; `split` is "" where the manifest
    leaves it to the encoder.
    """

    audio: Path
    text: str
    id: str
    speaker: str = ""
    description: str = ""
    language: str = ""
    split: str = ""


def read_manifest(path: str | os.PathLike) -> list[Clip]:
    """Reads a manifest: LJSpeech's (`id|text|normalised text`, audio in wavs/) where the name ends
    in .csv, else JSONL.

    A JSONL line is an object with `audio` (relative to the manifest's folder) and `text`, and
    optionally `id`, `speaker`, `description`, `language` and `split`. An id that is left out is the
    audio file's name without suffix, or, where two files share it, its path without suffix. Ids are
    unique. LJSpeech's normalised text is used where there is one. Raises `UserError` naming the
    line for anything else, and for a manifest that is missing or has no utterance.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such manifest; give a .jsonl file, or LJSpeech's metadata.csv."
        )
    return _read(path, _parse_ljspeech if path.suffix.lower() == ".csv" else _parse_json)


def read_transcripts(path: str | os.PathLike) -> list[Clip]:
    """Reads texts of clips that are encoded already: `id|text` or `id|text|normalised text` lines,
    or JSONL where the name ends so.

    A JSONL line is a manifest's, but `id` alone will do in place of `audio`. Raises `UserError` as
    `read_manifest` does.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file of transcripts; give `id|text` lines, or a .jsonl file."
        )

    def parse_json(where: str, line: str) -> dict:
        row = _parse_json(where, line)
        return {"audio": row.get("id", ""), **row}

    return _read(
        path, parse_json if path.suffix.lower() in (".jsonl", ".json") else _parse_ljspeech
    )


def assign_splits(utterances: list[Clip], validation_share: float, seed: int) -> dict[str, str]:
    """Each id's split: its own, or by a hash of seed and id, whatever the order. A share above 0
    gets at least one clip.
    """
    hashes = {
        utterance.id: (
            int.from_bytes(hashlib.sha256(f"{seed}:{utterance.id}".encode()).digest()[:8], "big")
            / 2**64
        )
        for utterance in utterances
        if not utterance.split
    }
    held_out = {clip for clip, value in hashes.items() if value < validation_share}
    if validation_share and not held_out and len(hashes) > 1:
        held_out = {min(hashes, key=hashes.get)}
    return {u.id: u.split or ("validation" if u.id in held_out else "train") for u in utterances}


def file_key(path: str | os.PathLike) -> tuple[str, int, int]:
    """An audio file's absolute path, size and time of change; -1 where it is not there."""
    path = os.path.abspath(path)
    try:
        stat = os.stat(path)
    except OSError:
        return path, -1, -1
    return path, stat.st_size, stat.st_mtime_ns


def _read(path: Path, parse: Callable[[str, str], dict]) -> list[Clip]:
    rows = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 text ({error.reason}); save the manifest as UTF-8."
                ) from error
            if line.strip():
                rows.append((where, _check(where, parse(where, line.rstrip("\r\n")))))
    if not rows:
        raise UserError(f"{path}: the manifest is empty; give at least one utterance.")

    stems = Counter(row.get("id") or PurePosixPath(row["audio"]).stem for _, row in rows)
    first_line, utterances = {}, []
    for where, row in rows:
        default = PurePosixPath(row["audio"])
        row_id = row.get("id") or (
            default.stem if stems[default.stem] == 1 else str(default.with_suffix(""))
        )
        if row_id in first_line:
            raise UserError(
                f"{where}: the id {row_id!r} is also that of {first_line[row_id]}; give each"
                " utterance its own id."
            )
        first_line[row_id] = where.rsplit(", ", 1)[1]
        utterances.append(Clip(**{**row, "audio": path.parent / row["audio"], "id": row_id}))
    return utterances


def _parse_json(where: str, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); write one JSON object on"
            " each line."
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f'{where}: not a JSON object; write {{"audio": "...", "text": "..."}} on each line.'
        )
    return row


def _parse_ljspeech(where: str, line: str) -> dict:
    fields = line.split("|")
    if len(fields) < 2:
        raise UserError(
            f"{where}: no '|'; write id|text or id|text|normalised text, as LJSpeech does."
        )
    name = fields[0].strip()
    if not name:
        raise UserError(
            f"{where}: the id before the first '|' is empty; write the name of the file in wavs/"
            " without .wav."
        )
    return {
        "audio": f"wavs/{name}.wav",
        "id": name,
        "text": fields[2] if len(fields) > 2 and fields[2].strip() else fields[1],
    }


def _check(where: str, row: dict) -> dict:
    for key, value in row.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(_KEYS)}."
            raise UserError(f"{where}: unknown key {key!r}; {fix}")
        if not isinstance(value, str):
            raise UserError(
                f"{where}: {key!r} is {json.dumps(value)}, not a string; put it in quotes."
            )
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(
                f"{where}: {key!r} has half of a surrogate pair (\\ud800..\\udfff); write the whole"
                " character."
            )
    for key in ("audio", "text"):
        if key not in row:
            raise UserError(
                f"{where}: no {key!r}; every utterance needs an audio file and its text."
            )
        if not row[key].strip():
            raise UserError(f"{where}: {key!r} is empty; fill it in, or delete the line.")
    if row.get("split") and (
        not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", row["split"]) or row["split"] == "all"
    ):
        raise UserError(
            f"{where}: {row['split']!r} cannot be a split's name; use letters, digits and _, e.g."
            " train or validation."
        )
    return row
