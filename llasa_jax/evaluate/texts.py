"""What an evaluation speaks: a list of texts, Seed-TTS-eval's lists, or records of a dataset."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from llasa_jax.data.records import open_utterances
from llasa_jax.errors import UserError
from llasa_jax.evaluate.recognisers import language_code
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.files import parse_json, read_text
from llasa_jax.runtime.storage import as_path


@dataclass(frozen=True)
class Item:
    """A text to speak, in the words of `generate`: `prompt_audio` is a voice to clone, which says
    `prompt_text`.

    `recording` is the text spoken by a human, where there is one: an audio file, or its codes.
    """

    id: str
    text: str
    speaker: str = ""
    description: str = ""
    language: str = ""
    prompt_audio: Path | None = None
    prompt_text: str = ""
    recording: Path | np.ndarray | None = None


FORMS = (
    "give a .txt file with a text per line, a .jsonl file, a .lst file as Seed-TTS-eval's"
    " (id|prompt text|prompt wav|text), or DATASET:SPLIT"
)
KEYS = {field.name for field in fields(Item)} - {"recording"} | {"audio"}


def items_to_speak(texts: str, most: int, speaker: str, language: str) -> tuple[list[Item], str]:
    """`read_items`, those that name nobody spoken by `speaker`; and `language`, or if it is "" that
    of the items, where it is one. UserError as `read_items` and `language_code`.
    """
    items = [replace(item, speaker=item.speaker or speaker) for item in read_items(texts, most)]
    return items, language_of(items, language)


def language_of(items: Sequence[Item], language: str) -> str:
    """`language`, or if it is "" that of the items, where it is one. UserError for one that no
    recogniser could know, before anything large is loaded.
    """
    languages = {item.language for item in items}
    language = language or (languages.pop() if len(languages) == 1 else "")
    language_code(language)
    return language


def read_items(texts: str, most: int = 0) -> list[Item]:
    """The first `most` (0: all) items of `texts`, a file's path or DATASET:SPLIT.

    UserError for what is none of these, an empty list, an audio file that is missing, a line that
    cannot be understood, and two items of one id.
    """
    path = as_path(texts)
    readers = {".txt": _of_lines, ".jsonl": _of_jsonl, ".lst": _of_columns}
    folder, _, split = texts.rpartition(":")
    if path.suffix.lower() in readers and path.is_file():
        items = list(readers[path.suffix.lower()](local_copy(path)))
    elif folder and as_path(folder).is_dir():
        items = [
            Item(
                each.id,
                each.text,
                each.speaker,
                each.description,
                each.language,
                recording=each.codes,
            )
            for each in _first(open_utterances(folder, split), most)
        ]
    elif path.exists():
        raise UserError(f"{texts}: is no list of texts; {FORMS}")
    else:
        raise UserError(f"{texts}: no such list of texts; {FORMS}")
    if not items:
        raise UserError(f"{texts}: holds no text to speak; {FORMS}")
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise UserError(f"{texts}: the id {twice} is given twice; give each text its own")
    return items[: most or None]


def _first(records: Sequence, most: int) -> Iterator:
    return (records[at] for at in range(min(len(records), most or len(records))))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of each line that is not empty."""
    text = read_text(path, "the list of texts", fix=FORMS)
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _of_lines(path: Path) -> Iterator[Item]:
    for number, (_, line) in enumerate(_lines(path), 1):
        yield Item(str(number), line)


def _of_jsonl(path: Path) -> Iterator[Item]:
    for number, (where, line) in enumerate(_lines(path), 1):
        values = parse_json(line, where, fix="write an object with text on each line")
        if unknown := values.keys() - KEYS:
            raise UserError(
                f"{where}: the key {min(unknown)} is not known; known are {', '.join(sorted(KEYS))}"
            )
        if wrong := [key for key, value in values.items() if not isinstance(value, str)]:
            raise UserError(f"{where}: {wrong[0]} is not a text; put it in quotes")
        audio = {
            name: _audio(path, values.pop(key), where)
            for key, name in (("audio", "recording"), ("prompt_audio", "prompt_audio"))
            if values.get(key)
        }
        if not values.get("text", "").strip():
            raise UserError(f"{where}: has no text to speak; give one as text")
        if bool(values.get("prompt_text")) != ("prompt_audio" in audio):
            raise UserError(
                f"{where}: prompt_audio and prompt_text go together; give both or neither"
            )
        yield Item(**{"id": str(number)} | values | audio)


def _of_columns(path: Path) -> Iterator[Item]:
    """Seed-TTS-eval's: id|text, id|prompt text|prompt wav|text, and a recording as a fifth."""
    for where, line in _lines(path):
        columns = [column.strip() for column in line.split("|")]
        if len(columns) not in (2, 4, 5) or not all(columns):
            raise UserError(
                f"{where}: has {len(columns)} columns, or an empty one; write id|prompt text|prompt"
                " wav|text, with a recording of the text as a fifth column where there is one, or"
                " id|text"
            )
        name, text = columns[0], columns[1 if len(columns) == 2 else 3]
        if len(columns) == 2:
            yield Item(name, text)
            continue
        recording = _audio(path, columns[4], where) if len(columns) == 5 else None
        yield Item(
            name,
            text,
            prompt_audio=_audio(path, columns[2], where),
            prompt_text=columns[1],
            recording=recording,
        )


def _audio(texts: Path, name: str, where: str) -> Path:
    """An audio file that a list names, from the list's folder on."""
    path = texts.parent / name
    if not path.is_file():
        raise UserError(f"{where}: there is no {path}; copy the audio beside the list")
    return path
