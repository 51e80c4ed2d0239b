"""One self-contained HTML page on a dataset, to look at before training on it."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from llasa_jax.data.batching import BatchShape, Source, batches
from llasa_jax.data.builder import read_metadata, split_sizes
from llasa_jax.data.records import open_utterances
from llasa_jax.errors import UserError
from llasa_jax.inspect.doctor import THOROUGH
from llasa_jax.inspect.record_checks import check_scans
from llasa_jax.inspect.scan import Scan, check_sample, repeated_codes, scan, suspicious_pace
from llasa_jax.pages import Card, pictures, render
from llasa_jax.pages.pictures import number, span
from llasa_jax.runtime import storage
from llasa_jax.runtime.files import explain, parse_json, read_text
from llasa_jax.runtime.storage import absolute, as_path
from llasa_jax.runtime.writing import write_whole
from llasa_jax.speech.prompts import Prompter, Utterance
from llasa_jax.speech.vocab import CODES_PER_SECOND, NUM_CODES

ROWS_DRAWN, ROWS_MEASURED = 24, 192
MOST_BARS, MOST_LISTED, MOST_DOTS = 15, 12, 300
MAX_LENGTH = 1_000_000  # tokens per row: rows beyond it would need gigabytes
BATCH_TOKENS = 2**21  # in a batch while packing is measured


def report(
    folder: str | os.PathLike,
    out: str | os.PathLike = "report.html",
    prompter: Prompter | None = None,
    max_length: int = 2048,
    sample: int = THOROUGH,
) -> Path:
    """Writes a page on all splits of the dataset in `folder` to the file `out`, and returns that.

    Looks at no more than `sample` records of a split; hours and clips are those of all. Lengths in
    tokens, and how well they pack into rows of `max_length`, need a `prompter`. Raises UserError if
    the folder is no whole dataset, or the page cannot be written.
    """
    check_sample(sample)
    if not 1 <= max_length <= MAX_LENGTH:
        raise UserError(
            f"the row length is {max_length} tokens; give 1 to {MAX_LENGTH:,} (--max-length)"
        )
    folder = absolute(folder)
    _check_writable(os.fspath(out))
    metadata = read_metadata(folder)
    records = {
        split: open_utterances(folder, split) for split, size in split_sizes(folder).items() if size
    }
    if not records:
        raise UserError(f"{folder}: every split is empty; make the dataset again.")
    # The split that is trained on comes first, for the doctor.
    records = dict(sorted(records.items(), key=lambda item: (item[0] != "train", item[0])))
    scans = {split: scan(rows, sample, prompter) for split, rows in records.items()}
    cards = [
        _health(scans, max_length),
        _by(scans, "speakers", "Hours by speaker", "no speaker named"),
        _by(scans, "languages", "Hours by language", "no language named"),
        *_lengths(scans, max_length),
    ]
    if prompter is not None:
        cards.append(_packing(next(iter(records.values())), prompter, max_length))
    cards += [
        *_pairs(records, scans),
        *_codes(scans),
        _repeats(scans),
        _dropped(folder.with_name(f"{folder.name}.bad.jsonl")),
    ]
    about = [f"codes of {metadata.get('codec', 'an unknown codec')}"]
    about += [
        f"{len(part.ids):,} of {part.size:,} clips of {split} looked at"
        for split, part in scans.items()
        if part.is_sample
    ]
    page = render(folder.name, about, _tiles(scans), cards)
    try:
        write_whole(as_path(out), page)
    except OSError as error:
        raise UserError(explain(error, out)) from error
    return as_path(out)


def _check_writable(out: str) -> None:
    """UserError where the page would find no folder, before the minutes that it takes to make."""
    path = as_path(out)
    storage.check_writable(path.parent)
    if not out or path.is_dir():
        raise UserError(f"--out is {out!r}; give the name of a file, as report.html")
    if not storage.is_remote(path) and not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder for the page; make it, or change --out")


def _tiles(scans: Mapping[str, Scan]) -> dict[str, str]:
    """What is below each of the large numbers, and the number."""
    parts = list(scans.values())
    codes = np.concatenate([part.codes for part in parts])
    sizes = ", ".join(f"{number(part.size)} {split}" for split, part in scans.items())
    return {
        "of speech": span(sum(_hours(part).sum() for part in parts) * 3600),
        f"clips: {sizes}": number(sum(part.size for part in parts)),
        "speakers named": number(len({name for part in parts for name in part.speakers} - {""})),
        "languages named": number(len({name for part in parts for name in part.languages} - {""})),
        "is the median clip": span(float(np.median(codes)) / CODES_PER_SECOND),
        f"of the {NUM_CODES:,} codes are used": f"{(_usage(scans) > 0).mean():.1%}",
    }


def _usage(scans: Mapping[str, Scan]) -> np.ndarray:
    """How often each code is used, int (65,536,)."""
    return np.sum([part.usage for part in scans.values()], axis=0)


def _hours(part: Scan) -> np.ndarray:
    """The hours of the split that each examined record stands for."""
    return part.seconds / 3600 * (part.size / len(part.ids))


def _health(scans: dict[str, Scan], max_length: int) -> Card:
    order = ("bad", "warn", "ok")
    found = sorted(check_scans(scans, max_length), key=lambda f: order.index(f.severity))
    return Card(
        "Health",
        "What llasa-jax doctor finds in the records alone.",
        head=("", "Check", "Finding", "What to do", "Clips"),
        rows=[(f.severity, f.check, f.message, f.fix, ", ".join(f.ids)) for f in found],
        wide=True,
    )


def _by(scans: Mapping[str, Scan], column: str, title: str, nameless: str) -> Card:
    hours: Counter[str] = Counter()
    for part in scans.values():
        for name, record_hours in zip(getattr(part, column), _hours(part), strict=True):
            hours[name or nameless] += record_hours
    top = hours.most_common(MOST_BARS)
    if rest := len(hours) - len(top):
        top.append((f"{rest} more", sum(hours.values()) - sum(value for _, value in top)))
    names, values = zip(*top, strict=True)
    about = f"{len(hours):,} in all, the largest has {values[0] / (sum(values) or 1):.0%}."
    labels = [span(value * 3600) for value in values]
    return Card(title, about, Markup(pictures.bars(names, values, labels)))


def _lengths(scans: Mapping[str, Scan], max_length: int) -> list[Card]:
    seconds = np.concatenate([part.seconds for part in scans.values()])
    about = (
        f"From {span(seconds.min())} to {span(seconds.max())}; {span(float(seconds.mean()))} on"
        " average."
    )
    picture = pictures.histogram(seconds, "seconds")
    cards = [Card("How long clips are", about, Markup(picture))]
    columns = [part.tokens for part in scans.values() if part.tokens is not None]
    tokens = np.concatenate(columns) if columns else np.zeros(0, np.int64)
    tokens = tokens[tokens >= 0]
    if len(tokens):
        beyond = int((tokens > max_length).sum())
        about = (
            f"Prompt and speech; {beyond:,} of {len(tokens):,} clips do not fit a row of"
            f" {max_length:,}."
        )
        picture = pictures.histogram(tokens, "tokens", max_length, f"a row: {max_length:,}")
        cards.append(Card("How many tokens they are", about, Markup(picture)))
    return cards


def _packing(records: Sequence[Utterance], prompter: Prompter, max_length: int) -> Card:
    found: list[np.ndarray] = []
    shape = BatchShape(1, max(1, min(32, BATCH_TOKENS // max_length)), max_length)
    for batch in batches([Source(records, prompter)], shape, seed=0, repeat=False):
        found.extend(row for row in batch["segment_ids"].reshape(-1, max_length) if row.any())
        if len(found) >= ROWS_MEASURED:
            break
    if not found:
        about = f"No clip fits a row of {max_length:,} tokens."
        return Card("Packed for training", about, wide=True)
    rows = np.array(found)
    full, clips = np.mean(rows > 0), rows.max(1).sum()
    padded = np.sum(rows > 0) / (clips * max_length)
    about = (
        f"Each block is a clip. Rows are {full:.1%} full; padded, with one clip a row,"
        f" {padded:.1%}: {full / padded:.1f} times the work."
    )
    picture = pictures.packed_rows(rows[:ROWS_DRAWN])
    return Card("Packed for training", about, Markup(picture), wide=True)


def _pairs(records: Mapping[str, Sequence[Utterance]], scans: Mapping[str, Scan]) -> list[Card]:
    """Text against speech, and the pairs that stand out."""
    odd: list[tuple[int, str]] = []
    rows: list[tuple[str, ...]] = []
    start = 0
    paces = zip(*suspicious_pace(list(scans.values())), strict=True)
    for (split, part), (many, few) in zip(scans.items(), paces, strict=True):
        pace = part.codes / np.maximum(part.text_bytes, 1)
        for row in (*many, *few):
            title = f"{part.ids[row]}: {part.text_bytes[row]} bytes, {span(part.seconds[row])}"
            odd.append((start + int(row), title))
        furthest = [(many[i], "much speech") for i in np.argsort(-pace[many])]
        furthest += [(few[i], "little speech") for i in np.argsort(pace[few])]
        for row, what in furthest[: MOST_LISTED - len(rows)]:
            text = records[split][int(part.indices[row])].text
            text = text[:160] + ("…" if len(text) > 160 else "")
            rows.append((part.ids[row], what, span(part.seconds[row]), text))
        start += len(part.ids)
    text_bytes = np.concatenate([part.text_bytes for part in scans.values()])
    seconds = np.concatenate([part.seconds for part in scans.values()])
    about = (
        f"Long texts take long to say. {len(odd):,} pairs stand out, with far too much or too"
        " little speech for their text."
    )
    picture = pictures.density(
        text_bytes, seconds, "bytes of text", "seconds of speech", odd[:MOST_DOTS]
    )
    cards = [Card("Text against speech", about, Markup(picture), wide=True)]
    if rows:
        about = f"The furthest out of {len(odd):,}; listen to them."
        head = ("Clip", "Has", "Speech", "Text")
        cards.append(Card("Suspicious pairs", about, Markup(), head, rows, (2,), wide=True))
    return cards


def _codes(scans: Mapping[str, Scan]) -> list[Card]:
    usage = _usage(scans)
    total, used = int(usage.sum()), int((usage > 0).sum())
    about = (
        f"All {NUM_CODES:,} codes, read like a page, 16 a cell; the stronger, the more used."
        f" {NUM_CODES - used:,} are never used."
    )
    square = Markup('<div class="square">{}</div>').format(Markup(pictures.codebook(usage)))
    cards = [Card("The codebook", about, square)]
    if not total:
        return cards
    order = np.argsort(-usage, kind="stable")
    half = int(np.searchsorted(np.cumsum(usage[order]), total / 2)) + 1
    common = [(str(c), f"{usage[c]:,}", f"{usage[c] / total:.2%}") for c in order[:10]]
    rare = [(str(c), f"{usage[c]:,}", f"{usage[c] / total:.1g}") for c in order[:used][::-1][:10]]
    head = ("Code", "Times", "Share")
    about = f"{total:,} codes; half of them are the {half:,} commonest."
    once = f"{int((usage == 1).sum()):,} are used once."
    return [
        *cards,
        Card("From common to rare", about, Markup(pictures.ranks(usage))),
        Card("The commonest codes", "Often those of silence.", Markup(), head, common, (1, 2)),
        Card("The rarest codes", once, Markup(), head, rare, (1, 2)),
    ]


def _repeats(scans: Mapping[str, Scan]) -> Card:
    splits = list(scans.items())
    groups = sorted(repeated_codes([part for _, part in splits]), key=len, reverse=True)
    if not groups:
        return Card("Duplicates", "No two clips have the same codes.")
    rows = []
    for group in groups[:MOST_LISTED]:
        texts = len({splits[at][1].text_digests[row] for at, row in group})
        where = ", ".join(sorted({splits[at][0] for at, _ in group}))
        ids = ", ".join(splits[at][1].ids[row] for at, row in group[:4])
        rows.append((str(len(group)), str(texts), where, ids + (" …" if len(group) > 4 else "")))
    plural = "groups of clips have" if len(groups) > 1 else "group of clips has"
    about = f"{len(groups):,} {plural} the same codes."
    head = ("Clips", "Texts", "In", "Which")
    return Card("Duplicates", about, Markup(), head, rows, (0, 1))


def _dropped(path: Path) -> Card:
    """What was left out when the dataset was made, by reason, from the list beside it."""
    if not path.is_file():
        return Card("Left out", "No clip was left out when the dataset was made.")
    groups: dict[tuple[str, bool], list[str]] = {}
    fix = "delete the list, and the report leaves it out"
    text = read_text(path, "the list of clips that were left out", fix=fix, limit=2**30)
    for at, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        noted = parse_json(line, f"{path}, line {at}", fix=fix)
        # What differs from clip to clip, paths and numbers, is no part of the reason.
        reason = re.sub(r"\S*/\S+|'[^']*'", "…", str(noted.get("reason", "no reason given")))
        reason = re.sub(r"\d[\d,.]*", "N", reason)
        kept = noted.get("kept") is True
        groups.setdefault((reason, kept), []).append(str(noted.get("id", "")))
    rows = [
        (
            f"{len(ids):,}",
            reason + (" (kept)" if kept else ""),
            ", ".join(ids[:3]) + (" …" if len(ids) > 3 else ""),
        )
        for (reason, kept), ids in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    count = sum(len(ids) for (_, kept), ids in groups.items() if not kept)
    about = f"{count:,} clips, when the dataset was made; {path.name} names them."
    head = ("Clips", "Reason", "For example")
    return Card("Left out", about, Markup(), head, rows[:MOST_LISTED], (0,))
