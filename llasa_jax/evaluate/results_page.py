"""The page of an evaluation, on which one reads and listens: one file, without anything outside."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from markupsafe import Markup

from llasa_jax.evaluate.results import CEILING, column
from llasa_jax.evaluate.texts import Item
from llasa_jax.pages import Card, pictures, render
from llasa_jax.runtime.writing import write_whole
from llasa_jax.speech.audio import read_audio

WORST, LISTENED = 20, 8  # clips of the last checkpoint; texts that all checkpoints speak
MOST_AUDIO = 24_000_000  # bytes of sound in a page
MOST_PICTURES = 8
SHARES = {"wer", "cer", "stopped"}  # shown in percent
EXPLAINED = {
    "wer": "word errors (characters where there are no spaces)",
    "cer": "character errors",
    "similarity": "likeness to the voice that it should have, -1 to 1",
    "dnsmos": "DNSMOS, overall quality, 1 to 5",
    "dnsmos_signal": "DNSMOS, the speech, 1 to 5",
    "dnsmos_background": "DNSMOS, the background, 1 to 5",
    "dnsmos_p808": "DNSMOS P.808, 1 to 5",
    "utmos": "UTMOS, naturalness, 1 to 5",
    "stopped": "stopped by itself",
    "longest_pause": "longest pause, seconds",
    "head": "silence before the speech, seconds",
    "tail": "silence after the speech, seconds",
    "silence": "share of the time without speech",
    "tail_noise": "level of what follows the speech, as a share of the speech's",
    "pace": "codes per letter",
    "pace_off": "doublings of the pace off the recordings'",
    "seconds": "length, seconds",
}


def write_page(
    path: Path, results: dict, rows: Sequence[dict], items: Sequence[Item], folder: Path
) -> None:
    """Writes the page of `results` (see `results.summarise`), made of `rows` whose clips lie in
    `folder`. OSError where it cannot be written.
    """
    settings, tables = results["settings"], results["checkpoints"]
    spoken = [table["checkpoint"] for table in tables if table["checkpoint"] != CEILING]
    sounds = _Sounds(folder)
    cards = [_table(results), *_courses(results), _comparisons(results)]
    if spoken:
        last = [row for row in rows if row["checkpoint"] == spoken[-1]]
        cards += [_worst(results, last, items, sounds), *_distributions(results, last)]
        cards.append(_side_by_side(rows, [CEILING, *spoken], items, sounds))
    about = [f"{len(items):,} texts of {settings.get('texts', '')}"]
    about += [f"{name}: {settings[name]}" for name in ("codec", "language") if settings.get(name)]
    tiles = {
        f"{EXPLAINED.get(name, name)}, {spoken[-1]}": _shown(name, value["mean"])
        for name, value in (tables[-1]["numbers"].items() if spoken else ())
        if name in results["higher_is_better"] and value["clips"]
    }
    name = f"{settings.get('model', 'Evaluation')}"
    write_whole(path, render(name, about, dict(list(tiles.items())[:6]), cards))


class _Sounds:
    """Audio elements, as long as there is room in the page."""

    def __init__(self, folder: Path):
        self._folder, self._left = folder, MOST_AUDIO

    def of(self, row: dict | None) -> str:
        if row is None or not row.get("clip"):
            return "no speech"
        path = self._folder / row["clip"]
        if not path.is_file():
            return f"{row['clip']} is gone"
        sound = io.BytesIO()
        # What every browser plays.
        soundfile.write(sound, read_audio(path), 16_000, format="MP3")
        data = base64.b64encode(sound.getvalue()).decode()
        if len(data) > self._left:
            return row["clip"]
        self._left -= len(data)
        return Markup(
            '<audio controls preload="none" src="data:audio/mpeg;base64,{}"></audio>'
        ).format(data)


def _shown(number: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if number in SHARES else f"{value:.3g}"


def _interval(number: str, values: dict) -> str:
    shown = _shown(number, values["mean"])
    if values["low"] is None:
        return shown
    return f"{shown} [{_shown(number, values['low'])}, {_shown(number, values['high'])}]"


def _table(results: dict) -> Card:
    tables = results["checkpoints"]
    numbers = list(dict.fromkeys(name for table in tables for name in table["numbers"]))
    better = {True: " ↑", False: " ↓", None: ""}
    directed = results["higher_is_better"]
    rows = [
        (
            EXPLAINED.get(name, name) + better[directed.get(name)],
            *(_interval(name, table["numbers"][name]) for table in tables),
        )
        for name in numbers
    ]
    return Card(
        "Numbers",
        "Means over clips with 95% bootstrap intervals; ↑ higher is better, ↓ lower."
        + (
            " The ceiling is the codec's resynthesis of the recordings."
            if tables and tables[0]["checkpoint"] == CEILING
            else ""
        ),
        head=("", *(table["checkpoint"] for table in tables)),
        rows=rows,
        numeric=range(1, len(tables) + 1),
        wide=True,
    )


def _courses(results: dict) -> list[Card]:
    """How numbers change from checkpoint to checkpoint."""
    spoken = [table for table in results["checkpoints"] if table["checkpoint"] != CEILING]
    ceilings = {
        name: values["mean"]
        for table in results["checkpoints"]
        if table["checkpoint"] == CEILING
        for name, values in table["numbers"].items()
    }
    cards = []
    for name in results["higher_is_better"] if len(spoken) > 1 else ():
        points = [
            (table["checkpoint"], *(table["numbers"][name][key] for key in ("mean", "low", "high")))
            for table in spoken
            if table["numbers"][name]["low"] is not None
        ]
        if len(points) > 1:
            picture = pictures.course(points, "checkpoint", ceilings.get(name))
            cards.append(Card(f"{EXPLAINED.get(name, name)}", "By checkpoint.", Markup(picture)))
    return cards[:MOST_PICTURES]


def _comparisons(results: dict) -> Card:
    rows = []
    for each in results["comparisons"]:
        higher = results["higher_is_better"][each["number"]]
        verdict = "no difference found"
        if each["p"] < 0.05:
            verdict = "better" if (each["mean"] > 0) == higher else "worse"
        name = each["number"]
        rows.append(
            (
                EXPLAINED.get(name, name),
                f"{each['from']} → {each['to']}",
                _interval(name, each),
                f"{each['p']:.3f}",
                verdict,
            )
        )
    about = (
        "Mean differences over the same texts with 95% bootstrap intervals, and p of a permutation"
        " test of the pairs. One comparison in twenty looks like a difference by chance."
        if rows
        else "Give several checkpoints to compare them."
    )
    head = ("", "Checkpoints", "Difference", "p", "")
    return Card("Comparisons", about, head=head, rows=rows, numeric=(2, 3), wide=True)


def _worst(results: dict, rows: Sequence[dict], items: Sequence[Item], sounds: _Sounds) -> Card:
    """The clips of the last checkpoint that the first number finds worst."""
    number = next(iter(results["higher_is_better"]))
    higher = results["higher_is_better"][number]
    values = column(rows, number)
    # Without a number, as where nothing was said, is worst of all.
    order = np.argsort(
        np.where(np.isnan(values), -np.inf, values if higher else -values), kind="stable"
    )[:WORST]
    listed = []
    for row in (rows[at] for at in order):
        others = ", ".join(
            f"{name} {_shown(name, row[name])}"
            for name in results["higher_is_better"]
            if name != number and row.get(name) is not None
        )
        listed.append(
            (
                row["id"],
                items[row["item"]].text,
                row["transcript"],
                _shown(number, row.get(number)),
                sounds.of(row),
                others,
            )
        )
    return Card(
        "Worst clips",
        f"Of {rows[0]['checkpoint']}, by {EXPLAINED.get(number, number)}.",
        head=("Text", "", "Recognised as", number, "Speech", "Also"),
        rows=listed,
        numeric=(3,),
        wide=True,
    )


def _distributions(results: dict, rows: Sequence[dict]) -> list[Card]:
    cards = []
    for name in results["higher_is_better"]:
        values = column(rows, name)
        values = values[~np.isnan(values)]
        if len(values) > 1 and name != "stopped" and values.min() >= 0 and values.max() > 0:
            picture = Markup(pictures.histogram(values, EXPLAINED.get(name, name)))
            cards.append(Card(name, f"Of {rows[0]['checkpoint']}, clip by clip.", picture))
    return cards[:MOST_PICTURES]


def _side_by_side(
    rows: Sequence[dict], checkpoints: Sequence[str], items: Sequence[Item], sounds: _Sounds
) -> Card:
    """The same texts by all checkpoints, evenly spread over the list."""
    by_place = {(row["checkpoint"], row["item"]): row for row in rows}
    there = [name for name in checkpoints if any(name == key[0] for key in by_place)]
    # The page has room for some: the first and the last are the ones to compare.
    there = there if len(there) <= 6 else [*there[:2], *there[-4:]]
    chosen = np.unique(np.linspace(0, len(items) - 1, min(LISTENED, len(items))).astype(int))
    return Card(
        "Side by side",
        "The same texts by every checkpoint.",
        head=("Text", *there),
        rows=[
            (items[at].text, *(sounds.of(by_place.get((name, int(at)))) for name in there))
            for at in chosen
        ],
        wide=True,
    )
