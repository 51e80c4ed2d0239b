"""Offline encoding: a manifest of audio and text becomes a dataset of codes, crash-safe and
resumable.

Codes go into a journal, `<out>.partial/journal.sqlite`, as they are made; the dataset is built from
it when all are there.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llasa_jax.codec import Codec, load_codec
from llasa_jax.data.builder import check_new, write_dataset
from llasa_jax.data.manifest import Clip, assign_splits, file_key, read_manifest
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import SAMPLE_RATE, read_audio

JOURNAL = "journal.sqlite"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `encode` did: clips encoded now, taken from the journal, and bad; hours of speech;
    examples of each split.
    """

    encoded: int
    resumed: int
    bad: int
    hours: float
    splits: dict[str, int]


def encode(
    manifest: str | os.PathLike,
    out: str | os.PathLike,
    codec: str | Codec,
    device: str = "cpu",
    validation_share: float = 0.0,
    seed: int = 0,
    max_bad_share: float = 0.05,
    batch_seconds: float = 600.0,
    workers: int = 4,
    columns: str = "",
) -> Summary:
    """Encodes a manifest's audio (`columns` are those of `read_manifest`) into a new dataset (see
    `write_dataset`) in the folder `out`.

    `codec` is a loaded one, or a name or folder for `load_codec(codec, device)`. Audio is read by
    `workers` threads and handed to the codec `batch_seconds` at a time; that much is lost by an
    interruption at most, and the same command then goes on. An utterance without a split of its own
    goes to "validation" or "train" by a hash of `seed` and its id, so it stays where it is when
    others come or go; `validation_share` of the clips, and never none, are "validation". Clips that
    cannot be read are passed over and listed, with reasons, in `<out>.bad.jsonl`. Raises
    `UserError`, keeps the journal and writes no dataset if they are more than `max_bad_share` of
    all, or all; also if `out` exists or another run is writing it.
    """
    out = Path(os.path.abspath(out))
    if (
        not 0 <= validation_share < 1
        or not 0 <= max_bad_share <= 1
        or batch_seconds <= 0
        or workers < 1
    ):
        raise UserError(
            f"validation_share {validation_share} must be in [0, 1), max_bad_share {max_bad_share}"
            f" in [0, 1], batch_seconds {batch_seconds} above 0 and workers {workers} at least 1;"
            " correct the setting."
        )
    check_new(out)
    utterances = read_manifest(manifest, columns)
    if isinstance(codec, str | os.PathLike):
        codec = load_codec(codec, device)

    partial = out.with_name(f"{out.name}.partial")
    bad_path = out.with_name(f"{out.name}.bad.jsonl")
    with contextlib.closing(open_journal(partial)) as journal:
        # Codes in the journal count only for the same audio file, unchanged, and the same codec.
        files = {
            utterance.id: (*file_key(utterance.audio), codec.fingerprint)
            for utterance in utterances
        }
        ready = {
            row[0]
            for row in journal.execute("SELECT id, audio, size, mtime, codec FROM codes")
            if files.get(row[0]) == row[1:]
        }
        # Neighbours in file size are near in length: the codec batches equal lengths, and the
        # longest come last.
        todo = sorted(
            (u for u in utterances if u.id not in ready), key=lambda u: (files[u.id][1], u.id)
        )
        resumed, bad = len(ready), []
        if resumed:
            print(f"{resumed} of {len(utterances)} clips were encoded by an earlier run.")
        with (
            tqdm(total=len(todo), unit="clip", desc="encode") as progress,
            contextlib.closing(_windows(todo, workers, batch_seconds)) as windows,
        ):
            for clips, faults in windows:
                codes = codec.encode([wave for _, wave in clips])
                with journal:
                    journal.executemany(
                        "INSERT OR REPLACE INTO codes VALUES (?, ?, ?, ?, ?, ?)",
                        [
                            (u.id, *files[u.id], row.astype("<u2").tobytes())
                            for (u, _), row in zip(clips, codes, strict=True)
                        ],
                    )
                ready.update(u.id for u, _ in clips)
                bad.extend(faults)
                progress.update(len(clips) + len(faults))

        bad_path.unlink(missing_ok=True)
        if bad:
            lines = [
                json.dumps(
                    {"id": u.id, "audio": str(u.audio), "reason": reason}, ensure_ascii=False
                )
                for u, reason in bad
            ]
            bad_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if len(bad) > max_bad_share * len(utterances) or not ready:
            raise UserError(
                f"{manifest}: {len(bad)} of {len(utterances)} clips are bad (max_bad_share is"
                f" {max_bad_share}); the first: {bad[0][1]} Mend those listed in {bad_path}, or"
                " take them out of the manifest, and run again: the good ones are kept."
            )
        assigned = assign_splits(utterances, validation_share, seed)
        splits = {}
        for utterance in utterances:
            if utterance.id in ready:
                splits.setdefault(assigned[utterance.id], []).append(utterance)
        metadata = {
            "codec": codec.name,
            "fingerprint": codec.fingerprint,
            "hop": codec.hop,
            "sample_rate": codec.sample_rate,
        }
        write_dataset(
            out, {split: _examples(journal, members) for split, members in splits.items()}, metadata
        )
        frames = journal.execute("SELECT id, length(codes) / 2 FROM codes").fetchall()
    shutil.rmtree(partial)

    hours = (
        sum(length for clip, length in frames if clip in ready)
        * codec.hop
        / codec.sample_rate
        / 3600
    )
    summary = Summary(
        len(ready) - resumed,
        resumed,
        len(bad),
        hours,
        {split: len(members) for split, members in sorted(splits.items())},
    )
    counts = ", ".join(f"{count} {split}" for split, count in summary.splits.items())
    print(
        f"{out}: {counts}; {hours:.2f} hours of speech"
        + (f"; {len(bad)} bad clips, see {bad_path}." if bad else ".")
    )
    return summary


def _windows(utterances: list[Clip], workers: int, seconds: float) -> Iterator[tuple[list, list]]:
    """Reads audio in threads, a bounded way ahead: ([(utterance, wave)], [(utterance, reason)]) of
    at least `seconds` of audio.
    """

    def read(utterance):
        try:
            return read_audio(utterance.audio), None
        except (UserError, OSError) as error:
            return None, str(error)

    pool, pending, waiting = ThreadPoolExecutor(workers), deque(), iter(utterances)
    clips, faults, samples = [], [], 0
    try:
        while True:
            while len(pending) < 4 * workers and (utterance := next(waiting, None)) is not None:
                pending.append((utterance, pool.submit(read, utterance)))
            if not pending:
                break
            utterance, future = pending.popleft()
            wave, reason = future.result()
            if reason is None:
                clips.append((utterance, wave))
                samples += len(wave)
            else:
                faults.append((utterance, reason))
            if samples >= seconds * SAMPLE_RATE:
                yield clips, faults
                clips, faults, samples = [], [], 0
        if clips or faults:
            yield clips, faults
    finally:
        pool.shutdown(cancel_futures=True)


def open_journal(partial: Path, name: str = JOURNAL) -> sqlite3.Connection:
    """Opens, or makes, the journal in a folder, for this process alone. UserError where another has
    it open, or it is none.
    """
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / name
    journal = sqlite3.connect(path, timeout=0, check_same_thread=False)
    try:
        journal.execute("PRAGMA locking_mode=EXCLUSIVE")
        journal.execute("PRAGMA journal_mode=WAL")
        journal.execute(
            "CREATE TABLE IF NOT EXISTS codes (id TEXT PRIMARY KEY, audio TEXT, size INT, mtime"
            " INT, codec TEXT, codes BLOB)"
        )
        with journal:  # a write takes the lock, which then stays until the journal is closed
            journal.execute("PRAGMA user_version=1")
    except sqlite3.OperationalError as error:
        journal.close()
        raise UserError(
            f"{path}: in use ({error}); wait for the other run that is encoding to the same folder."
        ) from error
    except sqlite3.DatabaseError as error:
        journal.close()
        raise UserError(
            f"{path}: not a journal of codes ({error}); delete {partial} to begin again."
        ) from error
    return journal


def _examples(journal: sqlite3.Connection, utterances: list[Clip]) -> Iterator[dict]:
    for utterance in utterances:
        (codes,) = journal.execute(
            "SELECT codes FROM codes WHERE id = ?", (utterance.id,)
        ).fetchone()
        example = dataclasses.asdict(utterance)
        del example["audio"], example["split"]
        yield {**example, "codes": np.frombuffer(codes, "<u2").astype(np.uint16)}
