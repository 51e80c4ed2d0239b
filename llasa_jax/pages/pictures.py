"""A page's pictures, as inline SVG. Colours are classes, so that the page's style sheet turns
them for a dark room.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

LEVELS = 8  # shades of a density


def number(value: float) -> str:
    """12,345 as "12.3k": what fits beside a bar."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if suffix == "k" else size)
            return f"{scaled:.1f}".removesuffix(".0") + suffix
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


def span(seconds: float) -> str:
    """A length of time: 4.2 s, 12 min, 3.4 h, 1,234 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def bars(
    names: Sequence[str], values: Sequence[float], labels: Sequence[str], width: int = 520
) -> str:
    """Horizontal bars, one below another, each with its name before and its label behind it."""
    left, step, most = 130, 24, max(values)
    parts = []
    for i, (name, value, label) in enumerate(zip(names, values, labels, strict=True)):
        y, long = i * step, max(2.0, (width - left - 80) * value / most)
        short = name if len(name) <= 20 else name[:19] + "…"
        parts.append(
            f'<g><title>{escape(name)}: {escape(label)}</title><text class="name" x="{left - 10}"'
            f' y="{y + 16}">{escape(short)}</text><path class="mark"'
            f' d="{_bar(left, y + 4, long, 16)}"/><text class="value" x="{left + long + 8:.1f}"'
            f' y="{y + 16}">{escape(label)}</text></g>'
        )
    return _svg(width, len(values) * step + 4, parts)


def histogram(
    values: np.ndarray,
    unit: str,
    limit: float | None = None,
    limit_name: str = "",
    width: int = 520,
    height: int = 220,
) -> str:
    """Counts of values in even bins, with the median marked, and `limit` where it is in sight. What
    lies far out is in the last bin.
    """
    end = float(
        max(
            np.quantile(values, 0.998),
            values.max() if values.max() < 1.5 * np.quantile(values, 0.998) else 0,
            1e-9,
        )
    )
    ticks = _ticks(end * 1.02)
    end = ticks[-1]
    counts, edges = np.histogram(np.minimum(values, end), bins=40, range=(0, end))
    left, right, top, bottom = 44, 12, 24, 34
    x_of = _scale(0, end, left, width - right)
    heights = _ticks(counts.max(), 3)
    y_of = _scale(0, heights[-1], height - bottom, top)
    parts = _grid(heights, y_of, left, width - right) + _foot(
        ticks, x_of, height - bottom, unit, width - right
    )
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if count:
            y, x = y_of(count), x_of(low) + 1
            title = (
                f"<title>{number(low)} to {number(high)} {escape(unit)}: {count:,} clips</title>"
            )
            wide, tall = x_of(high) - x_of(low) - 2, y_of(0) - y
            parts.append(f'<path class="mark" d="{_column(x, y, wide, tall)}">{title}</path>')
    median = float(np.median(values))
    parts += _flag(x_of(median), top, height - bottom, f"median {number(round(median, 1))}", "note")
    if limit is not None and limit <= end:
        parts += _flag(x_of(limit), top, height - bottom, limit_name, "alarm", lower=16)
    return _svg(width, height, parts)


def density(
    x: np.ndarray,
    y: np.ndarray,
    x_unit: str,
    y_unit: str,
    odd: Sequence[tuple[int, str]],
    width: int = 1080,
    height: int = 380,
) -> str:
    """Where pairs (x, y) lie thick, and each of `odd`, (row, title), as a dot of its own."""
    left, right, top, bottom = 52, 16, 12, 34
    x_ticks, y_ticks = (
        _ticks(
            max(float(np.quantile(v, 0.999)) * 1.05, *(float(v[row]) for row, _ in odd), 1e-9), 6
        )
        for v in (x, y)
    )
    x_of, y_of = (
        _scale(0, x_ticks[-1], left, width - right),
        _scale(0, y_ticks[-1], height - bottom, top),
    )
    columns, rows = 100, 36
    counts, _, _ = np.histogram2d(
        x, y, bins=(columns, rows), range=((0, x_ticks[-1]), (0, y_ticks[-1]))
    )
    wide, tall = (width - left - right) / columns, (height - top - bottom) / rows
    parts = _grid(y_ticks, y_of, left, width - right) + _foot(
        x_ticks, x_of, height - bottom, x_unit, width - right
    )
    parts.append(f'<text class="unit" x="{left + 6}" y="{top + 10}">{escape(y_unit)}</text>')
    parts += _shades(counts.T[::-1], left, top, wide, tall, 0.8)
    for row, title in odd:
        parts.append(
            f'<circle class="odd" cx="{x_of(x[row]):.1f}" cy="{y_of(y[row]):.1f}"'
            f' r="4.5"><title>{escape(title)}</title></circle>'
        )
    return _svg(width, height, parts)


def course(
    points: Sequence[tuple[str, float, float, float]],
    unit: str,
    limit: float | None = None,
    width: int = 520,
    height: int = 220,
) -> str:
    """A line through (name, value, low, high), in the band from low to high; `limit` is what can be
    reached. Points lie apart as their names do, where those are numbers.
    """
    left, right, top, bottom = 52, 24, 12, 34
    named = all(name.isdigit() for name, *_ in points)
    places = [float(point[0]) if named else float(at) for at, point in enumerate(points)]
    ends = [value for _, *values in points for value in values] + ([] if limit is None else [limit])
    margin = (max(ends) - min(ends)) * 0.05 or 0.5
    low, high = min(ends) - margin, max(ends) + margin
    if min(ends) >= 0:
        low = max(low, 0.0)
    x_of = _scale(places[0], places[-1], left + 12, width - right)
    y_of = _scale(low, high, height - bottom, top)
    parts = _grid([float(tick) for tick in np.linspace(low, high, 5)], y_of, left, width - right)
    feet = dict(zip(places, (name for name, *_ in points), strict=True))
    for at in np.unique(np.linspace(0, len(places) - 1, min(8, len(places))).astype(int)):
        x = x_of(places[at])
        parts.append(
            f'<text class="tick mid" x="{x:.1f}" y="{height - bottom + 16}">'
            f"{escape(feet[places[at]])}</text>"
        )
    parts.append(
        f'<text class="unit end" x="{width - right}" y="{height - bottom + 31}">{escape(unit)}'
        "</text>"
    )

    def line(values: Sequence[float], at: Sequence[float]) -> list[str]:
        return [f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(at, values, strict=True)]

    _, means, lows, highs = zip(*points, strict=True)
    band = " ".join([*line(highs, places), *line(lows[::-1], places[::-1])])
    parts.append(f'<polygon class="band" points="{band}"/>')
    parts.append(f'<polyline class="curve" points="{" ".join(line(means, places))}"/>')
    for x, (name, mean, lowest, highest) in zip(places, points, strict=True):
        title = f"{escape(name)}: {mean:.3g} [{lowest:.3g}, {highest:.3g}]"
        parts.append(
            f'<circle class="mark" cx="{x_of(x):.1f}" cy="{y_of(mean):.1f}" r="4">'
            f"<title>{title}</title></circle>"
        )
    if limit is not None:
        y = y_of(limit)
        parts.append(
            f'<line class="note" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="note" x="{left + 4}" y="{y - 5:.1f}">ceiling</text>'
        )
    return _svg(width, height, parts)


def packed_rows(segment_ids: np.ndarray, width: int = 1080) -> str:
    """Rows of a batch, int (rows, length), as they are trained on: each clip a block, the padding
    at the end bare.
    """
    step, parts = 13, []
    scale = width / segment_ids.shape[1]
    for i, row in enumerate(segment_ids):
        parts.append(
            f'<rect class="track" x="0" y="{i * step}" width="{width}" height="9" rx="2"/>'
        )
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
        for start, end in zip(edges, edges[1:], strict=False):
            if row[start]:
                title = f"<title>{end - start} tokens</title>"
                x, long, shade = (
                    start * scale,
                    (end - start) * scale - 2,
                    "mark" if row[start] % 2 else "mark pale",
                )
                parts.append(
                    f'<rect class="{shade}" x="{x:.1f}" y="{i * step}" width="{long:.1f}"'
                    f' height="9" rx="2">{title}</rect>'
                )
    return _svg(width, len(segment_ids) * step, parts)


def codebook(usage: np.ndarray, size: int = 512) -> str:
    """All codes as a square, read like a page: each cell 16 codes, the stronger the more often
    used.
    """
    cells = usage.reshape(64, 64, -1).sum(-1)
    return _svg(size, size, _shades(cells, 0, 0, size / 64, size / 64, 0.6))


def ranks(usage: np.ndarray, width: int = 520, height: int = 400) -> str:
    """How often the codes are used, from the commonest to the rarest, both axes logarithmic."""
    counts = np.sort(usage[usage > 0])[::-1]
    left, right, top, bottom = 52, 16, 12, 34
    tens = [10**power for power in range(int(np.ceil(np.log10(max(counts[0], 10)))) + 1)]
    x_log, y_log = (
        _scale(0, np.log10(len(usage)), left, width - right),
        _scale(0, np.log10(tens[-1]), height - bottom, top),
    )
    parts = _grid(tens, lambda value: y_log(np.log10(value)), left, width - right)
    parts += _foot(
        [10**i for i in range(5)],
        lambda value: x_log(np.log10(value)),
        height - bottom,
        "rank",
        width - right,
    )
    at = np.unique(np.round(np.geomspace(1, len(counts), 160)).astype(int))
    points = " ".join(
        f"{x_log(np.log10(rank)):.1f},{y_log(np.log10(counts[rank - 1])):.1f}" for rank in at
    )
    parts.append(
        f'<polyline class="curve" points="{points}"/><text class="unit" x="{left + 6}"'
        f' y="{top + 10}">times used</text>'
    )
    return _svg(width, height, parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (end - start) * (value - low) / (high - low or 1)


def _ticks(end: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to at least `end`."""
    raw = end / about
    size = 10 ** np.floor(np.log10(raw))
    step = size * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    return [float(step * i) for i in range(int(np.ceil(end / step - 1e-9)) + 1)]


def _grid(ticks: Sequence[float], y_of, left: float, right: float) -> list[str]:
    return [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        f'<text class="tick end" x="{left - 8}" y="{y_of(tick) + 4:.1f}">{number(tick)}</text>'
        for tick in ticks
    ]


def _foot(ticks: Sequence[float], x_of, y: float, unit: str, right: float) -> list[str]:
    labels = [
        f'<text class="tick mid" x="{x_of(tick):.1f}" y="{y + 16}">{number(tick)}</text>'
        for tick in ticks
    ]
    return [*labels, f'<text class="unit end" x="{right}" y="{y + 31}">{escape(unit)}</text>']


def _flag(x: float, top: float, bottom: float, text: str, kind: str, lower: float = 0) -> list[str]:
    """A labelled vertical line through a histogram; `lower` makes room for another label."""
    side, at = ("end", x - 6) if x > 350 else ("", x + 6)
    line = f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 14}" y2="{bottom}"/>'
    return [
        line,
        f'<text class="{kind} {side}" x="{at:.1f}" y="{top - 5 + lower}">{escape(text)}</text>',
    ]


def _shades(
    values: np.ndarray, left: float, top: float, wide: float, tall: float, gap: float
) -> list[str]:
    """A cell for every value above 0, in `LEVELS` strengths of the one colour: a path for each,
    which is small.
    """
    most = np.quantile(values[values > 0], 0.99) if (values > 0).any() else 1
    level = np.where(
        values > 0, np.clip(np.ceil(np.sqrt(np.minimum(values / most, 1)) * LEVELS), 1, LEVELS), 0
    )
    parts = []
    for strength in range(1, LEVELS + 1):
        cells = "".join(
            f"M{left + column * wide:.1f}"
            f" {top + row * tall:.1f}h{wide - gap:.1f}v{tall - gap:.1f}h-{wide - gap:.1f}z"
            for row, column in zip(*np.nonzero(level == strength), strict=True)
        )
        parts.append(
            f'<path class="mark" fill-opacity="{strength / LEVELS:.3f}" d="{cells}"/>'
            if cells
            else ""
        )
    return parts


def _bar(x: float, y: float, long: float, tall: float) -> str:
    """A bar with its end rounded, its start not."""
    r = min(4.0, long)
    return (
        f"M{x} {y}h{long - r:.1f}a{r} {r} 0 0 1 {r} {r}v{tall - 2 * r}a{r} {r} 0 0 1 -{r}"
        f" {r}h-{long - r:.1f}z"
    )


def _column(x: float, y: float, wide: float, tall: float) -> str:
    r = min(3.0, wide / 2, tall)
    top = (
        f"a{r:.1f} {r:.1f} 0 0 1 {r:.1f} -{r:.1f}h{wide - 2 * r:.1f}a{r:.1f} {r:.1f} 0 0 1 {r:.1f}"
        f" {r:.1f}"
    )
    return f"M{x:.1f} {y + tall:.1f}v-{tall - r:.1f}{top}v{tall - r:.1f}z"
