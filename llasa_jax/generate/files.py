"""Speech as files: a few texts to named files, or the lines of a file to a folder, which survives
a crash at any moment.
"""

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from llasa_jax.convert.model_folder import MODEL_FILE, open_model
from llasa_jax.convert.peft_adapter import CONFIG
from llasa_jax.data.manifest import numbered_lines
from llasa_jax.errors import UserError, listed
from llasa_jax.generate.decode import reading_seconds
from llasa_jax.generate.speaker import Line, Speech
from llasa_jax.runtime.files import folder_digest, parse_json, read_json
from llasa_jax.runtime.storage import as_path, check_writable, is_remote
from llasa_jax.runtime.writing import new_file, take_lock, write_whole
from llasa_jax.speech.audio import SAMPLE_RATE, write_audio

# Speaks lines: `Speaker.say` with its settings.
Say = Callable[[Sequence[Line]], Iterator[tuple[int, Speech]]]

KEYS = ("text", "id", "speaker", "description", "language", "prompt_audio", "prompt_text")
LOG, SETTINGS = "lines.jsonl", "settings.json"
LONGEST_ID = 200  # bytes, of a file's name
SECONDS_BETWEEN_REPORTS = 10


def check_outs(outs: Sequence[Path], codes: bool = False) -> None:
    """UserError where audio cannot be written to each of these files."""
    for out in outs:
        check_writable(out.parent)
        if not is_remote(out) and not out.parent.is_dir():
            raise UserError(f"{out}: the folder {out.parent} does not exist; make it first")
        if out.is_dir():
            raise UserError(f"{out} is a folder; name a file in it, such as {out / 'speech.wav'}")
        if out.suffix[1:].upper() not in soundfile.available_formats():
            raise UserError(
                f"{out}: audio is not written as {out.suffix or 'a file without suffix'}; name it"
                " .wav or .flac"
            )
    files = [out.with_suffix(".npy") if codes else out for out in outs]
    places = [str(out) if is_remote(out) else os.path.realpath(out) for out in files]
    if twice := {place for place in places if places.count(place) > 1}:
        raise UserError(f"{min(twice)} is given twice as the file to write; give each text its own")


def speak_files(say: Say, lines: Sequence[Line], outs: Sequence[Path], codes: bool = False) -> None:
    """Writes what is said of each line to its file, 16 kHz mono, and prints a line about it.

    With `codes` the codes go beside it, as NumPy's .npy, uint16. A file that exists is replaced
    once the new speech is whole. Raises UserError where no speech comes.
    """
    started = time.perf_counter()
    for place, speech in say(lines):
        out = outs[place]
        if not len(speech.codes):
            raise UserError(
                f"the model ended before any speech, so {out} was not written; try another seed or"
                " a higher temperature"
            )
        if codes:
            _write_codes(out.with_suffix(".npy"), speech.codes)
        with new_file(out) as partial:
            write_audio(partial, speech.wave)
        took = time.perf_counter() - started
        ending = "stopped by itself" if speech.stopped else f"cut at {speech.tokens} tokens"
        print(
            f"{out}: {len(speech.wave) / SAMPLE_RATE:.2f} s of speech, {ending};"
            f" {len(speech.codes)} codes after {took:.1f} s, compilation included"
        )


def read_lines(path: Path, common: dict[str, Any]) -> list[Line]:
    """The lines of a JSONL file: objects with `text` and optionally the other `KEYS`. Paths are
    relative to the file's folder; an id that is left out is the line's place among all, as 000001.
    `common` are the fields of lines that leave them out.

    Raises UserError, naming the line, where one is damaged, and where two have one id, or an id
    makes no name of a file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of lines; give a .jsonl file")
    lines: list[Line] = []
    for where, text in numbered_lines(path):
        fields = {k: v for k, v in parse_json(text, where, fix="correct the line").items() if v}
        if unknown := fields.keys() - set(KEYS):
            raise UserError(
                f"{where}: unknown keys {listed(sorted(unknown))}; the keys are {', '.join(KEYS)}"
            )
        if wrong := [key for key, value in fields.items() if not isinstance(value, str)]:
            raise UserError(f"{where}: {wrong[0]} is not a text; put it in quotes")
        if "prompt_audio" in fields:
            fields["prompt_audio"] = path.parent / fields["prompt_audio"]
        fields.setdefault("id", f"{len(lines) + 1:06}")
        id = fields["id"]
        if "/" in id or "\0" in id or id.startswith(".") or len(id.encode()) > LONGEST_ID:
            raise UserError(f"{where}: the id {id[:80]!r} makes no name of a file; shorten it")
        try:
            lines.append(Line(**{"text": "", **common, **fields}))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not lines:
        raise UserError(f"{path} has no lines; give at least one")
    if twice := [id for id, count in Counter(line.id for line in lines).items() if count > 1]:
        raise UserError(f"{path}: the ids {listed(twice)} stand there more than once; rename them")
    return lines


def speak_lines(
    say: Say, lines: Sequence[Line], out: Path, about: dict[str, Any], codes: bool = False
) -> int:
    """Speaks all lines that have no speech yet in the folder `out`: ID.wav for each, and with
    `codes` ID.npy. Prints the speed meanwhile. Returns how many were spoken.

    lines.jsonl gets an object for each line: its id, text, seconds, codes, whether the model
    stopped by itself, the mean log probability, and when it was written, in seconds from the
    start. A line is done once its wav is there. A line without speech has neither, and is tried
    again the next time. `about` is what the speech depends on, besides the lines: UserError where
    the folder holds speech of other settings, or of another text, and where another process is
    speaking to it.
    """
    with _opened(out, about) as done:
        for line in lines:
            if done.get(line.id, line.text) != line.text:
                raise UserError(
                    f"{out / line.id}.wav says another text than the line {line.id} has now; give"
                    " the line another id, or choose another folder"
                )
        left = [line for line in lines if line.id not in done]
        # The longest first: at the end no row is left speaking alone for long.
        left.sort(key=lambda line: -reading_seconds(line.text))
        print(f"{len(lines) - len(left):,} of {len(lines):,} lines are spoken already")
        speed, silent = _Speed(len(left)), 0
        with (out / LOG).open("a", encoding="utf-8") as log:
            for place, speech in say(left):
                if len(speech.codes):
                    _write_line(out, left[place], speech, codes, log, speed.seconds)
                else:
                    silent += 1
                speed.add(speech)
        print(speed)
        if silent:
            print(f"{silent:,} lines have no speech; give the command again with another seed")
        return len(left) - silent


def _write_line(out: Path, line: Line, speech: Speech, codes: bool, log, seconds: float) -> None:
    """The wav comes last: where the process is killed before, the line is not done, and its record
    is dropped when the folder is opened again.
    """
    record = {
        "id": line.id,
        "text": line.text,
        "seconds": round(len(speech.wave) / SAMPLE_RATE, 3),
        "codes": len(speech.codes),
        "stopped": speech.stopped,
        "logprob": round(speech.logprob, 4),
        "written": round(seconds, 2),
    }
    if codes:
        _write_codes(out / f"{line.id}.npy", speech.codes)
    with new_file(out / f"{line.id}.wav") as partial:
        write_audio(partial, speech.wave)
        log.write(json.dumps(record, ensure_ascii=False) + "\n")
        log.flush()
        os.fsync(log.fileno())


def _write_codes(path: Path, codes: np.ndarray) -> None:
    with new_file(path) as partial:
        np.save(partial, codes)


@contextmanager
def _opened(out: Path, about: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The text of each line that the folder has speech of. It is ours until the end."""
    if is_remote(out):
        raise UserError(f"{out}: lines are spoken to a local folder; copy it there afterwards")
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        if take_lock(lock) is False:
            raise UserError(f"{out} is in use by another process; wait for it to end")
        about = json.loads(json.dumps(about))
        if (out / SETTINGS).exists():
            before = read_json(out / SETTINGS, "the settings of the speech in this folder")
            if changed := [key for key in about if before.get(key) != about[key]]:
                raise UserError(
                    f"{out} holds speech of other settings ({listed(changed)}); choose another"
                    " folder, or give the same settings"
                )
        else:
            write_whole(out / SETTINGS, json.dumps(about, indent=2) + "\n")
        records = _records(out)
        write_whole(out / LOG, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        yield {record["id"]: record["text"] for record in records}
    finally:
        os.close(lock)


def _records(out: Path) -> list[dict]:
    """The records of the lines whose wav is there. The last line may be half written."""
    path, records = out / LOG, {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            record = parse_json(line, str(path))
            if (out / f"{record['id']}.wav").exists():
                records[record["id"]] = record | {"text": record["text"]}
        except (UserError, KeyError):
            continue
    return list(records.values())


class _Speed:
    """How fast lines are spoken, printed every few seconds."""

    def __init__(self, lines: int):
        self._started = self._printed = time.perf_counter()
        self._lines, self._done, self._codes, self._audio = lines, 0, 0, 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def add(self, speech: Speech) -> None:
        self._done += 1
        self._codes += len(speech.codes)
        self._audio += len(speech.wave) / SAMPLE_RATE
        if time.perf_counter() - self._printed > SECONDS_BETWEEN_REPORTS:
            self._printed = time.perf_counter()
            print(self, flush=True)

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return (
            f"{self._done:,} of {self._lines:,} lines in {seconds:.1f} s:"
            f" {self._codes / seconds:.1f} codes a second, {self._audio / seconds:.2f} seconds of"
            " speech a second"
        )


def identity(model: str | Path, step: int | None = None) -> str:
    """What tells the weights of a model, a run's step or an adapter from others, quickly."""
    folder = as_path(model)
    if not (folder / MODEL_FILE).is_file() and (folder / CONFIG).is_file():
        return folder_digest(folder)  # PEFT's adapter
    opened = open_model(model)
    return folder_digest(opened.folder) if opened.is_hf else opened.fingerprint(step)


def settings_of(*groups: Any, **more: Any) -> dict[str, Any]:
    """What speech depends on, for `speak_lines`: settings' dataclasses, None left out, and more."""
    values = {name: value for name, value in more.items() if value is not None}
    for group in groups:
        if group is not None:
            values[type(group).__name__] = dataclasses.asdict(group)
    return values
