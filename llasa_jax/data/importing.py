"""What every import shares: rows from elsewhere are checked one by one, written as a dataset, and
counted.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from llasa_jax.codec import HOP
from llasa_jax.data.bad_list import BadList
from llasa_jax.data.builder import checked_codes, checked_text, write_dataset
from llasa_jax.data.seal import is_made
from llasa_jax.errors import UserError
from llasa_jax.runtime.storage import absolute
from llasa_jax.speech.audio import SAMPLE_RATE
from llasa_jax.speech.vocab import CODES_PER_SECOND

UNKNOWN_CODEC = "unknown"


@dataclass(frozen=True)
class Noted:
    """A row that goes into `<out>.bad.jsonl` for `reason`. `kept`: it is imported all the same.
    `excused`: nothing is wrong with the source, so it does not count against `max_bad_share`.
    """

    id: str
    reason: str
    kept: bool = False
    excused: bool = False


@dataclass
class Imported:
    """Rows that became records in each split, rows that did not, rows kept with a note, and hours
    of speech.
    """

    splits: dict[str, int] = field(default_factory=dict)
    bad: int = 0
    excused: int = 0
    noted: int = 0
    hours: float = 0.0


def write_import(
    source: str | os.PathLike,
    out: str | os.PathLike,
    splits: Mapping[str, Iterable[dict | Noted]],
    codec_name: str = UNKNOWN_CODEC,
    max_bad_share: float = 0.05,
    made_from: str = "",
) -> Imported:
    """Writes the rows of `splits` to the new dataset `out` (see `write_dataset`), streamed, and
    prints what became of them.

    A row has `id`, `text` and `codes`, and may have `speaker`, `description` and `language`. Rows
    without text, with no codes or impossible ones, and with the id of an earlier row of the split
    are left out and listed in `<out>.bad.jsonl` with the sources' own `Noted`. `made_from`
    identifies the command and its input (see `identity`): where `out` is the finished dataset of
    the same, nothing is written. Raises UserError and writes no dataset if more than
    `max_bad_share` of a split is bad, or all of it is left out.
    """
    out = absolute(out)
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share is {max_bad_share}; give a share between 0 and 1.")
    if (summary := is_made(out, made_from)) is not None:
        print(f"{out}: done already by the same command.")
        return Imported(**summary)
    result, bad_list = Imported(), BadList(out.with_name(f"{out.name}.bad.jsonl"))

    def checked(split: str, rows: Iterable[dict | Noted]) -> Iterator[dict]:
        good, bad, first = 0, 0, ""
        seen: set[str] = set()
        for row in rows:
            example = row if isinstance(row, Noted) else _example(row, seen)
            if isinstance(example, dict):
                good += 1
                result.hours += len(example["codes"]) / CODES_PER_SECOND / 3600
                yield example
                continue
            kept = {"kept": True} if example.kept else {}
            bad_list.add({"id": example.id, "reason": example.reason} | kept)
            if example.kept:
                result.noted += 1
                continue
            first = first or f"{example.id!r} has {example.reason}"
            bad += not example.excused
            result.excused += example.excused
        if bad > max_bad_share * (good + bad) or not good:
            raise UserError(
                f"{source}: {bad} of {good + bad} rows of the split {split!r} are bad"
                f" (max_bad_share is {max_bad_share}), {good} are good; the first:"
                f" {first or 'none there at all'}; fix those listed in {bad_list.path}, or raise"
                " --max-bad-share."
            )
        result.splits[split] = good
        result.bad += bad

    def finish() -> dict:
        bad_list.publish()  # before the dataset is there: then the command is done
        return dataclasses.asdict(result)

    metadata = {
        "codec": codec_name,
        "fingerprint": UNKNOWN_CODEC,
        "hop": HOP,
        "sample_rate": SAMPLE_RATE,
    }
    streams = {split: checked(split, rows) for split, rows in splits.items()}
    try:
        write_dataset(out, streams, metadata, made_from, finish)
    except UserError:
        bad_list.publish()
        raise
    counts = ", ".join(f"{count} {split}" for split, count in sorted(result.splits.items()))
    notes = {"bad": result.bad, "cut": result.excused, "kept with a note": result.noted}
    listed = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
    print(
        f"{out}: {counts}; {result.hours:.2f} hours of speech"
        + (f"; {listed}, see {bad_list.path}." if listed else ".")
    )
    if codec_name == UNKNOWN_CODEC:
        print("Which codec made these codes is not recorded; name it with --codec-name.")
    return result


def _example(row: dict, seen: set[str]) -> dict | Noted:
    """The row checked and complete. `seen` are the ids before it, to which its own is added."""
    try:
        row = {**row, "text": checked_text(row["text"]), "codes": checked_codes(row["codes"])}
    except ValueError as error:
        return Noted(row["id"], str(error))
    if row["id"] in seen:
        return Noted(row["id"], "the id of an earlier row")
    seen.add(row["id"])
    return {"speaker": "", "description": "", "language": "", **row}
