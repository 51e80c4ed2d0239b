"""Known corpora, each in the layout in which it is published, as lines of a manifest.

A reader takes the corpus's folder and yields dicts of a manifest's fields (see data/manifest.py),
with absolute paths. The programs in data/ at the top of the repository print them.
"""

import argparse
import csv
import dataclasses
import json
import os
import re
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from llasa_jax.data.manifest import Clip, numbered_lines, read_manifest, variants
from llasa_jax.errors import UserError, first_line, printable
from llasa_jax.runtime.files import parse_json, read_text, sentence_of
from llasa_jax.speech.audio import tar_member

Line = dict[str, str]
Reader = Callable[[Path], Iterable[Line]]
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def main(read: Reader, description: str | None, arguments: list[str] | None = None) -> int:
    """A program's whole work: the corpus in the folder that the command line names, as JSON lines
    on stdout. Returns the exit status.

    Lines without text and those whose audio is missing are left out, counted and reported.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="the corpus, unpacked")
    folder = parser.parse_args(arguments).folder
    warnings.showwarning = lambda message, *_, **__: print(
        f"{parser.prog}: warning: {printable(str(message))}", file=sys.stderr
    )
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", newline="\n")
    try:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder of the unpacked corpus.")
        with out:
            written, left_out = write(read, folder, out)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: error: {printable(sentence_of(error, folder))}", file=sys.stderr)
        return 2
    summary = f"{written} clips"
    if left_out:
        summary += f"; {len(left_out)} are left out, the first because {left_out[0]}"
    print(f"{parser.prog}: {printable(summary)}", file=sys.stderr)
    return 0


def write(read: Reader, folder: Path, out: TextIO) -> tuple[int, list[str]]:
    """Writes the corpus in `folder` as JSON lines, without clips that have no text or no audio. How
    many lines there are, and why each of the others is left out. UserError where none is left.
    """
    written, left_out = 0, []
    for line in read(Path(os.path.abspath(folder))):
        if reason := _unusable(line):
            left_out.append(reason)
            continue
        line = {key: value for key, value in line.items() if value}
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
        written += 1
    if not written:
        raise UserError(
            left_out[0] if left_out else f"{folder}: no clips in it; is it another corpus?"
        )
    return written, left_out


def _unusable(line: Line) -> str:
    if not line["text"].strip():
        return f"{line['audio']}: it has no text."
    if any("\ud800" <= character <= "\udfff" for character in "".join(line.values())):
        return f"{line['audio']}: the name is not UTF-8; rename it."
    member = tar_member(line["audio"])
    if not os.path.isfile(member[0] if member else line["audio"]):
        return f"{line['audio']}: no such audio file."
    return ""


def beside(folder: Path) -> Iterator[Line]:
    """Any folder of recordings, at any depth, with what NAME.wav says in NAME.txt beside it."""
    for audio in sorted(folder.rglob("*")):
        if audio.suffix.lower() in AUDIO_SUFFIXES:
            text = audio.with_suffix(".txt")
            yield {
                "id": audio.relative_to(folder).with_suffix("").as_posix(),
                "audio": str(audio),
                "text": read_text(text, "the transcript").strip() if text.is_file() else "",
            }


def ljspeech(folder: Path) -> Iterator[Line]:
    """LJSpeech 1.1: metadata.csv with id|text|normalized text, and wavs/ID.wav."""
    for clip in read_manifest(folder / "metadata.csv"):
        yield _line(clip) | {"language": "en"}


def libritts(folder: Path) -> Iterator[Line]:
    """LibriTTS and LibriTTS-R: SUBSET/SPEAKER/CHAPTER/ID.wav and ID.normalized.txt beside it.

    `folder` holds the subsets (train-clean-100, dev-other, ...), or is one of them.
    """
    subset = re.compile(r"(train|dev|test)-(clean|other)")
    subsets = [path for path in _folders(folder) if subset.match(path.name)]
    if subset.match(folder.name):
        subsets = [folder]
    if not subsets:
        raise UserError(
            f"{folder}: not LibriTTS; give the folder that holds train-clean-100, dev-clean, ..."
        )
    for part in subsets:
        for speaker in _folders(part):
            for path in sorted(speaker.glob("*/*.normalized.txt")):
                name = path.name.removesuffix(".normalized.txt")
                yield {
                    "id": name,
                    "audio": str(path.with_name(f"{name}.wav")),
                    "text": read_text(path, "the transcript").strip(),
                    "speaker": speaker.name,
                    "language": "en",
                    "split": _split(part.name.split("-")[0]),
                }


def vctk(folder: Path) -> Iterator[Line]:
    """VCTK: wav48_silence_trimmed/SPEAKER/ID_mic1.flac (0.92) or wav48/SPEAKER/ID.wav (0.80), and
    txt/SPEAKER/ID.txt.

    Of the two microphones' recordings of a sentence it takes the first. Speaker p315 has no texts.
    `description` is what speaker-info.txt says of the speaker.
    """
    audio = folder / "wav48_silence_trimmed"
    ending = "_mic1.flac"
    if not audio.is_dir():
        audio, ending = folder / "wav48", ".wav"
    if not audio.is_dir() or not (folder / "txt").is_dir():
        raise UserError(
            f"{folder}: not VCTK; give the folder that holds wav48_silence_trimmed and txt."
        )
    speakers = _vctk_speakers(folder / "speaker-info.txt")
    for texts in _folders(folder / "txt"):
        for path in sorted(texts.glob("*.txt")):
            yield {
                "id": path.stem,
                "audio": str(audio / texts.name / f"{path.stem}{ending}"),
                "text": read_text(path, "the transcript").strip(),
                "speaker": texts.name,
                "description": speakers.get(texts.name, ""),
                "language": "en",
            }


def _vctk_speakers(path: Path) -> dict[str, str]:
    """Lines of ID AGE GENDER ACCENT REGION as "p225": "female, 23 years, English accent, ..."."""
    found = {}
    for _, line in numbered_lines(path) if path.is_file() else ():
        fields = line.partition("(")[0].split(None, 4)  # remarks stand in brackets
        if len(fields) < 4 or not fields[1].isdigit():
            continue
        name, age, gender, accent, *region = fields
        gender = {"F": "female", "M": "male"}.get(gender, gender)
        parts = [gender, f"{age} years", f"{accent} accent", *(" ".join(r.split()) for r in region)]
        found[name if name[0].isalpha() else f"p{name}"] = ", ".join(filter(None, parts))
    return found


def common_voice(folder: Path) -> Iterator[Line]:
    """Common Voice, one language: validated.tsv and clips/; train.tsv, dev.tsv and test.tsv say
    which split a clip belongs to.

    Further recordings of their sentences are in none of the three: they go where their speaker is,
    or to train, so that no speaker is in two splits.
    """
    splits: dict[str, str] = {}
    speakers: dict[str, str] = {}
    for part in ("train", "dev", "test"):
        for row in _tsv(folder / f"{part}.tsv") if (folder / f"{part}.tsv").is_file() else ():
            splits[row["path"]] = speakers[row["client_id"]] = _split(part)
    for row in _tsv(folder / "validated.tsv"):
        name = row["path"] if row["path"].endswith(AUDIO_SUFFIXES) else f"{row['path']}.mp3"
        yield {
            "id": name.rpartition(".")[0],
            "audio": str(folder / "clips" / name),
            "text": row["sentence"].strip(),
            "speaker": row["client_id"],
            "language": row.get("locale") or folder.name,
            "split": splits.get(row["path"]) or speakers.get(row["client_id"], "train"),
        }


def _tsv(path: Path) -> Iterator[Line]:
    lines = numbered_lines(path)
    names = next(lines, ("", ""))[1].split("\t")
    for needed in ("client_id", "path", "sentence"):
        if needed not in names:
            raise UserError(f"{path}: no column {needed!r}; give Common Voice's own file.")
    for where, line in lines:
        fields = line.split("\t")  # quotation marks belong to the sentences
        if len(fields) != len(names):
            raise UserError(
                f"{where}: {len(fields)} fields instead of {len(names)}; copy the file again."
            )
        yield dict(zip(names, fields, strict=True))


def emilia(folder: Path) -> Iterator[Line]:
    """Emilia, and other WebDatasets of speech: tars of KEY.mp3 (or another format) and KEY.json
    with text, speaker and language, at any depth below `folder`.

    Nothing is unpacked: `audio` is the place in the tar (see `speech.audio.tar_member`).
    """
    tars = sorted(folder.rglob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no .tar files in it or below; give the folder of the tars.")
    for path in tars:
        try:
            with tarfile.open(path, "r:") as tar:
                yield from _webdataset(path, tar)
        except tarfile.TarError as error:
            raise UserError(
                f"{path}: damaged, or not an uncompressed tar ({first_line(error)}); copy it again."
            ) from None


def _webdataset(path: Path, tar: tarfile.TarFile) -> Iterator[Line]:
    audio: dict[str, tarfile.TarInfo] = {}
    about: dict[str, dict] = {}
    for member in tar:
        place, _, name = member.name.rpartition("/")
        key, _, suffix = name.partition(".")  # as WebDataset splits names
        key = f"{place}/{key}"
        if not member.isreg() or member.issparse():
            continue
        if f".{suffix.lower()}" in AUDIO_SUFFIXES:
            audio[key] = member
        elif suffix == "json":
            where = f"{path}, {member.name}:"
            if member.size > 1 << 20:
                raise UserError(f"{where} more than a megabyte; it is no clip's description.")
            file = tar.extractfile(member)
            assert file is not None  # a regular file
            text = file.read().decode("utf-8", "surrogateescape")
            about[key] = parse_json(text, where)
        if key in audio and key in about:
            clip, fields = audio.pop(key), about.pop(key)
            yield {
                "id": str(fields.get("id") or fields.get("_id") or key.rpartition("/")[2]),
                "audio": f"{path}:{clip.offset_data}:{clip.size}",
                "text": str(fields.get("text") or "").strip(),
                "speaker": str(fields.get("speaker") or ""),
                "language": str(fields.get("language") or ""),
            }
    if audio or about:
        lonely = sorted({*audio, *about})[0].lstrip("/")
        raise UserError(f"{path}: {lonely} has no audio or no .json beside it; copy the tar again.")


def aishell3(folder: Path) -> Iterator[Line]:
    """AISHELL-3: train/ and test/, each with wav/SPEAKER/ID.wav and content.txt, whose lines are
    ID.wav, a tab, and each character followed by its pinyin.
    """
    parts = [part for part in ("train", "test") if (folder / part / "content.txt").is_file()]
    if not parts:
        raise UserError(f"{folder}: not AISHELL-3; give the folder that holds train and test.")
    for part in parts:
        path = folder / part / "content.txt"
        for where, line in numbered_lines(path):
            name, tab, content = line.partition("\t")
            if not tab or not name.endswith(".wav"):
                raise UserError(f"{where}: not ID.wav, a tab and the text; copy the file again.")
            characters = [c for c in content.split() if not re.fullmatch(r"[a-zü:]+[0-6]", c)]
            speaker = name[:7]  # SSB0005 of SSB00050001.wav
            yield {
                "id": name.removesuffix(".wav"),
                "audio": str(folder / part / "wav" / speaker / name),
                "text": "".join(characters),
                "speaker": speaker,
                "language": "zh",
                "split": _split(part),
            }


def coqui(folder: Path) -> Iterator[Line]:
    """Coqui's own format, metadata.csv, or metadata_train.csv and metadata_eval.csv, whose first
    line names the columns: audio_file|text|speaker_name, paths relative to the folder. Or its
    ljspeech format, id|text|normalized text.
    """
    parts = {"metadata.csv": "", "metadata_train.csv": "train", "metadata_eval.csv": "dev"}
    found = [name for name in parts if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no metadata.csv or metadata_train.csv in it.")
    for name in found:
        for clip in read_manifest(folder / name):
            yield _line(clip) | {"split": _split(parts[name])}


def _line(clip: Clip) -> Line:
    return dataclasses.asdict(clip) | {"audio": str(clip.audio), "text": clip.text.strip()}


def piper(folder: Path) -> Iterator[Line]:
    """Piper's: metadata.csv with file|text or file|speaker|text, and audio beside it, in wav/ or in
    wavs/. Fields may be quoted, as Python's csv writes them.
    """
    rows = []
    for where, text in numbered_lines(folder / "metadata.csv"):
        try:
            (fields,) = csv.reader([text], delimiter="|")
        except csv.Error as error:
            raise UserError(f"{where}: cannot be read ({error}); correct the line.") from None
        if not 2 <= len(fields) <= 3:
            raise UserError(
                f"{where}: {len(fields)} fields; Piper has file|text or file|speaker|text."
            )
        rows.append((fields[0].strip(), "".join(fields[1:-1]).strip(), fields[-1].strip()))
    if 2 * sum(bool(speaker) and variants(speaker, text) for _, speaker, text in rows) > len(rows):
        raise UserError(
            f"{folder / 'metadata.csv'}: the second field is the text, not a speaker; use"
            " data/ljspeech.py."
        )
    for name, speaker, text in rows:
        places = [folder / f"{place}{name}" for place in ("", "wav/", "wavs/")]
        files = [path for at in places for path in (at, at.with_name(f"{at.name}.wav"))]
        yield {
            "id": name.removesuffix(".wav"),
            "audio": str(next((path for path in files if path.is_file()), files[-1])),
            "text": text,
            "speaker": speaker,
        }


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _split(part: str) -> str:
    return {"dev": "validation"}.get(part, part)
