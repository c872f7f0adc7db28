"""Small charts as inline SVG; the page's CSS gives the colours, so they follow its themes."""

import math
from collections.abc import Mapping, Sequence

import markupsafe
import numpy as np

WIDTH, HEIGHT = 440, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 18, 36, 42
_MAX_POINTS = 200
_TICKS = 5
_APART = 36  # pixels between the labels of the x axis

Points = Sequence[tuple[float, float | None]]
Mark = tuple[float, str]  # where on an axis, and what is there in words


def line_chart(
    series: Mapping[str, Points],
    label: str,
    *,
    titles: tuple[str, str] = ("", ""),
    mark: Mark | None = None,
    limit: Mark | None = None,
) -> markupsafe.Markup:
    """One line a series, classes s0, s1, ... in their order; long series are averaged in bins of x.

    A y of None is left out. Without any point the chart is empty markup. titles: of the x and the
    y axis. mark: a vertical line at an x, left out where no point is that far; limit: a horizontal
    one at a y, which is always shown.
    """
    kept = {name: _averaged(points) for name, points in series.items()}
    x = np.concatenate([points[:, 0] for points in kept.values()] or [[]])
    y = np.concatenate([points[:, 1] for points in kept.values()] or [[]])
    if not x.size:
        return markupsafe.Markup()
    x_axis = _Axis.of(x, _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis.of(np.append(y, limit[0]) if limit else y, HEIGHT - _BOTTOM, _TOP)
    parts = _grid(x_axis, y_axis, _with_ends(x_axis, x), titles)
    for index, points in enumerate(kept.values()):
        path = " ".join(f"{x_axis.at(a):.1f},{y_axis.at(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="line s{index}" points="{path}"/>')
    if limit:
        parts += _limit(y_axis.at(limit[0]), limit[1])
    if mark and x.min() <= mark[0] <= x.max():
        parts += _mark(x_axis.at(mark[0]), mark[1])
    return _svg(parts, label)


def histogram(
    groups: Mapping[str, Sequence[float]],
    label: str,
    n_bins: int = 30,
    *,
    titles: tuple[str, str] = ("", ""),
) -> markupsafe.Markup:
    """Counts, classes s0, s1, ...: in every bin the bars of the groups stand side by side.

    Values beyond the 1st and the 99th percentile fall into the outer bars. titles: of the x and
    the y axis.
    """
    values = np.concatenate([np.asarray(group, np.float64) for group in groups.values()] or [[]])
    if not values.size:
        return markupsafe.Markup()
    low, high = np.percentile(values, (1, 99))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    edges = np.linspace(low, high, n_bins + 1)
    counts = [
        np.histogram(np.clip(group, edges[0], edges[-1]), bins=edges)[0]
        for group in groups.values()
    ]
    x_axis = _Axis(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis.of(np.array([0.0, max(c.max() for c in counts)]), HEIGHT - _BOTTOM, _TOP)
    parts = _grid(x_axis, y_axis, _with_ends(x_axis, edges[[0, -1]]), titles)
    wide = (x_axis.at(edges[1]) - x_axis.at(edges[0]) - 0.8) / len(counts)
    for index, count in enumerate(counts):
        for left, n in zip(edges[:-1], count, strict=True):
            if n:
                x, y = x_axis.at(left) + index * wide, y_axis.at(n)
                size = f'width="{wide:.1f}" height="{y_axis.at(0) - y:.1f}"'
                parts.append(f'<rect class="s{index}" x="{x:.1f}" y="{y:.1f}" {size}/>')
    if edges[0] < 0 < edges[-1]:
        zero = x_axis.at(0)
        ends = f'x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"'
        parts.append(f'<line class="zero" {ends}/>')
    return _svg(parts, label)


class _Axis:
    """A linear scale from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self._start, self._end = low, high, start, end

    @classmethod
    def of(cls, values: np.ndarray, start: float, end: float) -> "_Axis":
        low, high = float(values.min()), float(values.max())
        margin = 0.0 if high > low else max(abs(low) * 0.1, 0.5)
        return cls(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _averaged(points: Points) -> np.ndarray:
    """The points that have a finite y, [n, 2], averaged in at most _MAX_POINTS bins."""
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    array = np.array(finite, np.float64).reshape(-1, 2)
    if len(array) <= _MAX_POINTS:
        return array
    return np.array([part.mean(axis=0) for part in np.array_split(array, _MAX_POINTS)])


def _with_ends(axis: _Axis, values: np.ndarray) -> list[float]:
    """0 where it is inside, the ends of the data, and of the axis's own ticks those with room."""
    low, high = float(values.min()), float(values.max())
    found: list[float] = []
    for tick in ([0.0] if low < 0 < high else []) + [low, high] + axis.ticks():
        if low <= tick <= high and all(abs(axis.at(tick) - axis.at(t)) >= _APART for t in found):
            found.append(tick)
    return sorted(found)


def _grid(
    x_axis: _Axis, y_axis: _Axis, x_ticks: Sequence[float], titles: tuple[str, str]
) -> list[str]:
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(_LEFT - 6, y + 4, "end", _number(tick)))
    for tick in x_ticks:
        parts.append(_text(x_axis.at(tick), HEIGHT - _BOTTOM + 17, "middle", _number(tick)))
    x_title, y_title = titles
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, "middle", x_title))
    parts.append(_text(2, 12, "start", y_title))
    return [part for part in parts if part]


def _mark(x: float, words: str) -> list[str]:
    """A vertical line, its words above it."""
    beside = "start" if x < _LEFT + 50 else "end" if x > WIDTH - _RIGHT - 50 else "middle"
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{HEIGHT - _BOTTOM}"'
    return [f'<line class="mark" {ends}/>', _text(x, _TOP - 8, beside, words, "mark")]


def _limit(y: float, words: str) -> list[str]:
    """A horizontal line, its words above it or, at the top, below it."""
    ends = f'x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    below = y + 14 if y < _TOP + 32 else y - 5
    return [f'<line class="limit" {ends}/>', _text(WIDTH - _RIGHT, below, "end", words, "limit")]


def _text(x: float, y: float, anchor: str, words: str, name: str = "") -> str:
    if not words:
        return ""
    of_class = f' class="{name}"' if name else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text{of_class} {place}>{markupsafe.escape(words)}</text>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def _svg(parts: list[str], label: str) -> markupsafe.Markup:
    """Only numbers and escaped words stand in the parts; the label is escaped."""
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markupsafe.escape(label)}">'
    )
    return markupsafe.Markup(head + "".join(parts) + "</svg>")
