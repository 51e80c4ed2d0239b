"""What to learn from: a manifest's lines as `Clip`s. JSONL, or `id|text` lines as LJSpeech's."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from llasa_jax.errors import UserError, listed
from llasa_jax.runtime import storage
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import as_path, is_remote
from llasa_jax.speech.audio import tar_member

FIELDS = ("audio", "text", "id", "speaker", "description", "language", "split")
COLUMNS = (*FIELDS, "normalized", "-")  # of a file with |: "-" is a column that is not used
# First lines that name the columns, as Coqui's audio_file|text|speaker_name.
_HEADER_NAMES = {"audio_file": "audio", "speaker_name": "speaker"}

Rows = list[tuple[str, dict[str, str]]]  # where a line stands, and its fields


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


def read_manifest(path: str | os.PathLike, columns: str = "") -> list[Clip]:
    """Reads a manifest: JSONL, or lines with | where the name ends in .csv or `columns` is a list.

    A JSONL line is an object with `audio` (relative to the manifest's folder, or in a tar: see
    `speech.audio.tar_member`) and `text`, and optionally `id`, `speaker`, `description`, `language`
    and `split`. Null is the same as left out; other keys are ignored with one warning. `columns`
    may map ours to the file's keys: "audio=audio_filepath,text=transcript".

    Lines with | are `id|text` or LJSpeech's `id|text|normalized text`, whose normalized text is
    used where there is one, with audio in wavs/ID.wav. A first line of names may say what the
    columns are, or `columns`, such as "id,text,speaker" (see `COLUMNS`), which is needed where the
    file does not make it clear. A | in the text is part of it where `columns` leaves no doubt.

    An id that is left out is the audio file's name without suffix, or, where two files share it,
    its path without suffix. Ids are unique. Raises `UserError` naming the line for anything else,
    and for a manifest that is missing or has no utterance.
    """
    path = as_path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such manifest; give a .jsonl file, or LJSpeech's metadata.csv."
        )
    return _clips(path, _rows(path, columns, path.suffix.lower() == ".csv", ids_only=False))


def read_transcripts(path: str | os.PathLike, columns: str = "") -> list[Clip]:
    """Reads texts of clips that are encoded already: lines with |, or JSONL where the name ends so.

    Both are those of `read_manifest`, but a JSONL line needs no `audio` where it has an `id`.
    Raises `UserError` as `read_manifest` does.
    """
    path = as_path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file of transcripts; give `id|text` lines, or a .jsonl file."
        )
    json_lines = path.suffix.lower() in (".jsonl", ".json")
    return _clips(path, _rows(path, columns, not json_lines, ids_only=True))


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
        held_out = {min(hashes, key=lambda clip: hashes[clip])}
    return {u.id: u.split or ("validation" if u.id in held_out else "train") for u in utterances}


def file_key(path: str | os.PathLike) -> tuple[str, int, int]:
    """An audio file's absolute path, size in bytes and time of change; -1 where it is not there.

    Bytes of the path that are not UTF-8 are escaped, as databases and JSON take text only. What
    lies in a bucket is as it was when this process first looked into its folder.
    """
    if is_remote(path):
        member = tar_member(path)
        entry = storage.known_entry(member.tar if member else path)
        if entry is None:
            return os.fspath(path), -1, -1
        return os.fspath(path), member.size if member else entry.size, entry.changed
    path = os.path.abspath(path)
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    member = tar_member(path)
    try:
        stat = os.stat(member.tar if member else path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return name, -1, -1
    return name, member.size if member else stat.st_size, stat.st_mtime_ns


def _rows(path: Path, columns: str, piped: bool, ids_only: bool) -> Rows:
    """The fields of every line, checked. `columns` that is a list means lines with |."""
    names = [name.strip() for name in columns.split(",") if columns]
    mapping = {}
    if any("=" in name for name in names):
        mapping = _mapping(columns)
        if piped:
            raise UserError(f"{path}: has no keys to map; give the columns as id,text,speaker.")
    elif names:
        _check_columns(columns, names)
        piped = True
    ignored: Counter[str] = Counter()
    if piped:
        rows = _pipe_rows(path, names, ignored)
    else:
        rows = [
            (where, _json_row(where, line, mapping, ignored, ids_only))
            for where, line in numbered_lines(path)
        ]
    if not rows:
        raise UserError(f"{path}: the manifest is empty; give at least one utterance.")
    for where, row in rows:
        _check(where, row)
    if ignored:
        warnings.warn(
            f"{path}: {listed([repr(key[:40]) for key in ignored])} are not used; the keys are"
            f" {', '.join(FIELDS)}",
            stacklevel=4,
        )
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line of a text that is not blank stands, and the line, which may end in LF, CR LF
    or CR. UserError for a text that is not UTF-8.
    """
    local = local_copy(path)
    with local.open("rb") as raw:
        start = raw.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise UserError(f"{path}: is UTF-16 text (as PowerShell's > writes it); save it as UTF-8.")
    with local.open(encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.isascii() and re.search("[\udc80-\udcff]", line):
                raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8.")
            if line.strip():
                yield where, line.rstrip("\n")


def _clips(path: Path, rows: Rows) -> list[Clip]:
    stems = Counter(row.get("id") or PurePosixPath(row["audio"]).stem for _, row in rows)
    first_line: dict[str, str] = {}
    clips = []
    for where, row in rows:
        audio = PurePosixPath(row["audio"])
        stem = audio.stem if stems[audio.stem] == 1 else str(audio).removesuffix(audio.suffix)
        row_id = row.get("id") or stem
        if row_id in first_line:
            raise UserError(
                f"{where}: the id {row_id!r} is also that of {first_line[row_id]}; give each"
                " utterance its own id."
            )
        first_line[row_id] = where.rsplit(", ", 1)[1]
        others = {key: value for key, value in row.items() if key not in ("audio", "id")}
        clips.append(Clip(audio=_beside(path, row["audio"]), id=row_id, **others))
    return clips


def _beside(manifest: Path, audio: str) -> Path:
    """Where a manifest's audio lies: relative to its folder, or as it says, in a bucket too."""
    return as_path(audio) if is_remote(audio) else manifest.parent / audio


# JSONL


def _mapping(columns: str) -> dict[str, str]:
    """`audio=audio_filepath,text=transcript` as {"audio_filepath": "audio", ...}."""
    pairs = [[part.strip() for part in pair.split("=")] for pair in columns.split(",")]
    wrong = any(len(pair) != 2 or pair[0] not in FIELDS or not pair[1] for pair in pairs)
    # Each of ours once, and each of the file's.
    if wrong or any(len({*side}) < len(pairs) for side in zip(*pairs, strict=True)):
        raise UserError(
            f"the columns {columns!r} are no map; write audio=KEY,text=KEY with our names before"
            f" the =, which are {', '.join(FIELDS)}."
        )
    return {key: field for field, key in pairs}


def _json_row(
    where: str, line: str, mapping: dict[str, str], ignored: Counter[str], ids_only: bool
) -> dict[str, str]:
    try:
        row = json.loads(line)
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deep; write one flat object.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); write one JSON object on"
            " each line."
        ) from error
    except ValueError:  # Python reads integers of up to 4,300 digits
        raise UserError(f"{where}: has a number of thousands of digits; shorten it.") from None
    if not isinstance(row, dict):
        raise UserError(
            f'{where}: not a JSON object; write {{"audio": "...", "text": "..."}} on each line.'
        )
    mapped = set(mapping.values())
    # null, or pandas' NaN, says that there is nothing
    row = {
        mapping.get(key, key): value
        for key, value in row.items()
        # A key of the file that is mapped takes the place of one that has our name already.
        if value is not None and value == value and (key in mapping or key not in mapped)
    }
    for key in [key for key in row if key not in FIELDS]:
        near = difflib.get_close_matches(key, FIELDS, 1, cutoff=0.85) if key not in ignored else []
        if near and near[0] not in row:
            raise UserError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
        ignored[key] += 1
        del row[key]
    for key, value in row.items():
        if not isinstance(value, str):
            raise UserError(
                f"{where}: {key!r} is {json.dumps(value)[:80]}, not a string; put it in quotes."
            )
    if ids_only and "audio" not in row and row.get("id"):
        row["audio"] = row["id"]
    return row


# Lines with |


def _check_columns(columns: str, names: list[str]) -> None:
    used = [name for name in names if name != "-"]
    if set(used) - set(COLUMNS) or len(set(used)) < len(used):
        raise UserError(
            f"the columns {columns!r} are not known; list them in their order, each once, by the"
            f" names {', '.join(COLUMNS)}, where - is a column that is not used."
        )
    if "text" not in used or not {"id", "audio"} & set(used):
        raise UserError(f"the columns {columns!r} must include text, and id or audio.")


def _pipe_rows(path: Path, names: list[str], ignored: Counter[str]) -> Rows:
    lines = list(numbered_lines(path))
    if lines and not names:
        first = [_HEADER_NAMES.get(name, name) for name in lines[0][1].split("|")]
        if "text" in first and {"id", "audio"} & set(first) and len(first) == len(set(first)):
            ignored.update(name for name in first if name not in COLUMNS)
            names = [name if name in COLUMNS else "-" for name in first]
            lines = lines[1:]
        else:
            names = _usual_columns(lines)
    return [(where, _pipe_row(where, line, names)) for where, line in lines]


def _usual_columns(lines: list[tuple[str, str]]) -> list[str]:
    """id,text or LJSpeech's id,text,normalized. UserError where the lines may be something else."""
    unlike, three = [], 0
    for where, line in lines:
        fields = line.split("|")
        if len(fields) < 2:
            raise UserError(
                f"{where}: no '|'; write id|text or id|text|normalized text, as LJSpeech does."
            )
        three += len(fields) == 3
        if len(fields) > 3 or (len(fields) == 3 and not variants(fields[1], fields[2])):
            unlike.append((where, len(fields)))
            # a few normalized texts are far from theirs ("1998" and "nineteen ninety-eight")
            if len(fields) > 3 or len(unlike) > 20 + 0.2 * three:
                break
    if unlike and (unlike[-1][1] > 3 or len(unlike) > 0.2 * three):
        where, count = unlike[-1] if unlike[-1][1] > 3 else unlike[0]
        raise UserError(
            f"{where}: {count} fields, and it is not clear what they are; name them with --columns"
            " (online: data.online.columns), such as id,text,speaker or id,speaker,text or"
            " id,text,normalized, or id,text where a '|' belongs to the text."
        )
    return ["id", "text", "normalized"] if three else ["id", "text"]


def variants(text: str, other: str) -> bool:
    """Whether `other` may be `text` normalized: empty, with half of its words, or most letters."""
    words = text.lower().split()
    kept = set(words) & set(other.lower().split())
    if not other.strip() or 2 * len(kept) >= len(set(words)):
        return True
    # Where words are not separated, or written otherwise: the same letters, in any order, which is
    # quick for long texts too.
    matcher = difflib.SequenceMatcher(None, text.lower(), other.lower(), autojunk=False)
    return matcher.real_quick_ratio() > 0.6 and matcher.quick_ratio() > 0.6


def _pipe_row(where: str, line: str, names: list[str]) -> dict[str, str]:
    fields = line.split("|")
    more = len(fields) - len(names)
    if more > 0 and "normalized" not in names:
        at = names.index("text")
        fields[at : at + more + 1] = ["|".join(fields[at : at + more + 1])]
    elif more == -1 and names[-1] == "normalized":
        fields.append("")
    if len(fields) != len(names):
        raise UserError(
            f"{where}: {len(fields)} fields, but the columns are {','.join(names)}; correct the"
            " line."
        )
    row = dict(zip(names, fields, strict=True))
    normalized = row.pop("normalized", "")
    text = normalized if normalized.strip() else row["text"]
    row = {name: field.strip() for name, field in row.items() if name != "-"} | {"text": text}
    if "id" in row and not row["id"]:
        raise UserError(
            f"{where}: the id before the first '|' is empty; write the name of the file in wavs/"
            " without .wav."
        )
    return {"audio": f"wavs/{row.get('id')}.wav"} | row


def _check(where: str, row: dict[str, str]) -> None:
    for key, value in row.items():
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise UserError(
                f"{where}: {key!r} has half of a surrogate pair (\\ud800..\\udfff); write the whole"
                " character."
            )
    for key in ("audio", "text"):
        if key not in row:
            has = ", ".join(map(repr, row)) or "nothing"
            raise UserError(
                f"{where}: no {key!r}; every utterance needs an audio file and its text (this line"
                f" has {has})."
            )
        if not row[key].strip():
            raise UserError(f"{where}: {key!r} is empty; fill it in, or delete the line.")
    if row.get("split") and (
        not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", row["split"]) or row["split"] == "all"
    ):
        raise UserError(
            f"{where}: {row['split'][:80]!r} cannot be a split's name; use letters, digits and _,"
            " e.g. train or validation."
        )
