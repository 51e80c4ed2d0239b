"""One self-contained HTML page on a dataset, to look at before training on it."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from llasa_jax.data.batching import BatchShape, Source, batches
from llasa_jax.data.builder import read_metadata, split_sizes
from llasa_jax.data.records import open_utterances
from llasa_jax.errors import UserError
from llasa_jax.inspect import pictures
from llasa_jax.inspect.doctor import THOROUGH, check_scans
from llasa_jax.inspect.pictures import number, span
from llasa_jax.inspect.scan import Scan, repeated_codes, scan, suspicious_pace
from llasa_jax.speech.prompts import Prompter, Utterance
from llasa_jax.speech.vocab import CODES_PER_SECOND, NUM_CODES

ROWS_DRAWN, ROWS_MEASURED = 24, 192
MOST_BARS, MOST_LISTED, MOST_DOTS = 15, 12, 300

STYLE = Path(__file__).with_name("report.css").read_text()


def report(
    folder: str | os.PathLike,
    out: str | os.PathLike = "report.html",
    prompter: Prompter | None = None,
    max_length: int = 2048,
    sample: int = THOROUGH,
) -> Path:
    """Writes a page on all splits of the dataset in `folder` to `out`, and returns that.

    Looks at no more than `sample` records of a split; hours and clips are those of all. Lengths in
    tokens, and how well they pack into rows of `max_length`, need a `prompter`. Raises UserError if
    the folder is no whole dataset.
    """
    folder, out = Path(os.path.abspath(folder)), Path(out)
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
        *(
            []
            if prompter is None
            else [_packing(next(iter(records.values())), prompter, max_length)]
        ),
        *_pairs(records, scans),
        *_codes(scans),
        _repeats(scans),
        _dropped(folder.with_name(f"{folder.name}.bad.jsonl")),
    ]
    about = [f"codes of {metadata.get('codec', 'an unknown codec')}"]
    about += [
        f"{len(one.ids):,} of {one.size:,} clips of {split} looked at"
        for split, one in scans.items()
        if one.is_sample
    ]
    out.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(folder.name)}</title><style>{STYLE}</style>"
        f"<main><h1>{escape(folder.name)}</h1>"
        f'<p class="under">{escape(" · ".join(about))}</p>{_tiles(scans)}'
        f'<div class="cards">{"".join(cards)}</div></main></html>\n',
        encoding="utf-8",
    )
    return out


def _tiles(scans: dict[str, Scan]) -> str:
    every = list(scans.values())
    codes = np.concatenate([one.codes for one in every])
    tiles = {
        "of speech": span(sum(_hours(one).sum() for one in every) * 3600),
        "clips: "
        + ", ".join(f"{number(one.size)} {split}" for split, one in scans.items()): number(
            sum(one.size for one in every)
        ),
        "speakers named": number(len({s for one in every for s in one.speakers} - {""})),
        "languages named": number(len({s for one in every for s in one.languages} - {""})),
        "a clip, at the median": span(float(np.median(codes)) / CODES_PER_SECOND),
        f"of the {NUM_CODES:,} codes are used": (
            f"{(sum(one.usage for one in every) > 0).mean():.1%}"
        ),
    }
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="card tile"><b>{v}</b><span>{escape(k)}</span></div>'
            for k, v in tiles.items()
        )
        + "</div>"
    )


def _card(title: str, about: str, body: str, wide: bool = False) -> str:
    return (
        f'<section class="card{" wide" if wide else ""}">'
        f"<h2>{escape(title)}</h2><p>{about}</p>{body}</section>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    def cells(tag, row):
        return "".join(
            f"<{tag}{' class=n' if i in numeric else ''}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _hours(one: Scan) -> np.ndarray:
    """Each looked-at record's share of the split's hours."""
    return one.seconds / 3600 * (one.size / len(one.ids))


def _health(scans: dict[str, Scan], max_length: int) -> str:
    rows = [
        (
            f'<span class="chip {f.severity}">{f.severity}</span>',
            f'<span class="check">{f.check}</span>',
            escape(f.message),
            escape(f.fix),
            escape(", ".join(f.ids)),
        )
        for f in sorted(
            check_scans(scans, max_length), key=lambda f: ("bad", "warn", "ok").index(f.severity)
        )
    ]
    return _card(
        "Health",
        "What llasa-jax doctor finds in the records alone.",
        _table(("", "Check", "Finding", "What to do", "Clips"), rows),
        True,
    )


def _by(scans: dict[str, Scan], column: str, title: str, nameless: str) -> str:
    hours = Counter()
    for one in scans.values():
        for name, mine in zip(getattr(one, column), _hours(one), strict=True):
            hours[name or nameless] += mine
    top = hours.most_common(MOST_BARS)
    if rest := len(hours) - len(top):
        top.append((f"{rest} more", sum(hours.values()) - sum(value for _, value in top)))
    names, values = zip(*top, strict=True)
    about = f"{len(hours):,} in all, the largest has {values[0] / sum(values):.0%}."
    return _card(
        title, about, pictures.bars(names, values, [span(value * 3600) for value in values])
    )


def _lengths(scans: dict[str, Scan], max_length: int) -> list[str]:
    seconds = np.concatenate([one.seconds for one in scans.values()])
    about = (
        f"From {span(seconds.min())} to {span(seconds.max())}; {span(float(seconds.mean()))} on"
        " average."
    )
    cards = [_card("How long clips are", about, pictures.histogram(seconds, "seconds"))]
    if all(one.tokens is not None for one in scans.values()):
        tokens = np.concatenate([one.tokens[one.tokens >= 0] for one in scans.values()])
        beyond = int((tokens > max_length).sum())
        about = (
            f"Prompt and speech; {beyond:,} of {len(tokens):,} clips do not fit a row of"
            f" {max_length:,}."
        )
        if len(tokens):
            cards.append(
                _card(
                    "How many tokens they are",
                    about,
                    pictures.histogram(tokens, "tokens", max_length, f"a row: {max_length:,}"),
                )
            )
    return cards


def _packing(records: Sequence[Utterance], prompter: Prompter, max_length: int) -> str:
    rows = []
    for batch in batches(
        [Source(records, prompter)], BatchShape(1, 32, max_length), seed=0, repeat=False
    ):
        rows.extend(batch["segment_ids"].reshape(-1, max_length))
        if len(rows) >= ROWS_MEASURED:
            break
    rows = np.array([row for row in rows if row.any()])
    full, clips = (rows > 0).mean(), rows.max(1).sum()
    padded = (rows > 0).sum() / (clips * max_length)
    about = (
        f"Each block is a clip. Rows are {full:.1%} full; padded, with one clip a row,"
        f" {padded:.1%}: {full / padded:.1f} times the work."
    )
    return _card("Packed for training", about, pictures.packed_rows(rows[:ROWS_DRAWN]), True)


def _pairs(records: dict[str, Sequence[Utterance]], scans: dict[str, Scan]) -> list[str]:
    """Text against speech, and the pairs that stand out."""
    splits, odd, rows, start = list(scans.items()), [], [], 0
    for (split, one), many, few in zip(splits, *suspicious_pace(list(scans.values())), strict=True):
        pace = one.codes / np.maximum(one.text_bytes, 1)
        for row in (*many, *few):
            odd.append(
                (
                    start + int(row),
                    f"{one.ids[row]}: {one.text_bytes[row]} bytes, {span(float(one.seconds[row]))}",
                )
            )
        for row, what in [(many[i], "much speech") for i in np.argsort(-pace[many])] + [
            (few[i], "little speech") for i in np.argsort(pace[few])
        ]:
            if len(rows) < MOST_LISTED:
                text = records[split][int(one.indices[row])].text
                rows.append(
                    (
                        escape(one.ids[row]),
                        what,
                        span(float(one.seconds[row])),
                        escape(text[:160] + ("…" if len(text) > 160 else "")),
                    )
                )
        start += len(one.ids)
    x, y = (
        np.concatenate([getattr(one, name) for one in scans.values()])
        for name in ("text_bytes", "seconds")
    )
    about = (
        f"Long texts take long to say. {len(odd):,} pairs stand out, with far too much or too"
        " little speech for their text."
    )
    cards = [
        _card(
            "Text against speech",
            about,
            pictures.density(x, y, "bytes of text", "seconds of speech", odd[:MOST_DOTS]),
            True,
        )
    ]
    if rows:
        table = _table(("Clip", "Has", "Speech", "Text"), rows, (2,))
        cards.append(
            _card(
                "Suspicious pairs",
                f"The furthest out of {len(odd):,}; listen to them.",
                table,
                True,
            )
        )
    return cards


def _codes(scans: dict[str, Scan]) -> list[str]:
    usage = sum(one.usage for one in scans.values())
    total, used = int(usage.sum()), int((usage > 0).sum())
    about = (
        f"All {NUM_CODES:,} codes, read like a page, 16 a cell; the stronger, the more used."
        f" {NUM_CODES - used:,} are never used."
    )
    order = np.argsort(-usage, kind="stable")
    commonest = [
        (str(code), f"{usage[code]:,}", f"{usage[code] / total:.2%}") for code in order[:10]
    ]
    rarest = [
        (str(code), f"{usage[code]:,}", f"{usage[code] / total:.1g}")
        for code in order[:used][::-1][:10]
    ]
    head = ("Code", "Times", "Share")
    return [
        _card("The codebook", about, f'<div class="square">{pictures.codebook(usage)}</div>'),
        _card(
            "From common to rare",
            f"{total:,} codes; half of them are the {_half(usage):,} commonest.",
            pictures.ranks(usage),
        ),
        _card("The commonest codes", "Often those of silence.", _table(head, commonest, (1, 2))),
        _card(
            "The rarest codes",
            f"{int((usage == 1).sum()):,} are used once.",
            _table(head, rarest, (1, 2)),
        ),
    ]


def _half(usage: np.ndarray) -> int:
    return int(np.searchsorted(np.cumsum(np.sort(usage)[::-1]), usage.sum() / 2)) + 1


def _repeats(scans: dict[str, Scan]) -> str:
    splits = list(scans.items())
    groups = sorted(repeated_codes([one for _, one in splits]), key=len, reverse=True)
    if not groups:
        return _card("Duplicates", "No two clips have the same codes.", "")
    rows = []
    for group in groups[:MOST_LISTED]:
        texts = len({splits[at][1].text_digests[row] for at, row in group})
        where = ", ".join(sorted({splits[at][0] for at, _ in group}))
        ids = escape(", ".join(splits[at][1].ids[row] for at, row in group[:4])) + (
            " …" if len(group) > 4 else ""
        )
        rows.append((str(len(group)), str(texts), where, ids))
    about = (
        f"{len(groups):,} group{'s' if len(groups) > 1 else ''} of clips have the very same codes."
    )
    return _card("Duplicates", about, _table(("Clips", "Texts", "In", "Which"), rows, (0, 1)))


def _dropped(path: Path) -> str:
    if not path.is_file():
        return _card("Left out", "No clip was left out when the dataset was made.", "")
    lines = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    groups: dict[tuple[str, bool], list[str]] = {}
    for line in lines:
        # What differs from clip to clip, paths and numbers, is no part of the reason.
        reason = re.sub(r"\d[\d,.]*", "N", re.sub(r"\S*/\S+|'[^']*'", "…", line["reason"]))
        groups.setdefault((reason, line.get("kept", False)), []).append(line["id"])
    rows = [
        (
            f"{len(ids):,}",
            escape(reason) + (" (kept)" if kept else ""),
            escape(", ".join(ids[:3])) + (" …" if len(ids) > 3 else ""),
        )
        for (reason, kept), ids in sorted(groups.items(), key=lambda item: -len(item[1]))[
            :MOST_LISTED
        ]
    ]
    about = (
        f"{sum(not line.get('kept', False) for line in lines):,} clips, when the dataset was made;"
        f" {escape(path.name)} names them."
    )
    return _card("Left out", about, _table(("Clips", "Reason", "For example"), rows, (0,)))
