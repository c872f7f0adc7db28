"""Small charts as inline SVG; the page's CSS gives the colours, so they follow its themes."""

import math
from collections.abc import Mapping, Sequence

import markupsafe
import numpy as np

WIDTH, HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 24
_MAX_POINTS = 200
_TICKS = 5

Points = Sequence[tuple[float, float | None]]


def line_chart(series: Mapping[str, Points], label: str) -> markupsafe.Markup:
    """One line a series, classes s0, s1, ... in their order; long series are averaged in bins of x.

    A y of None is left out. Without any point the chart is empty markup.
    """
    kept = {name: _averaged(points) for name, points in series.items()}
    x = np.concatenate([points[:, 0] for points in kept.values()] or [[]])
    y = np.concatenate([points[:, 1] for points in kept.values()] or [[]])
    if not x.size:
        return markupsafe.Markup()
    x_axis, y_axis = _Axis.of(x, _LEFT, WIDTH - _RIGHT), _Axis.of(y, HEIGHT - _BOTTOM, _TOP)
    parts = _grid(x_axis, y_axis)
    for index, points in enumerate(kept.values()):
        path = " ".join(f"{x_axis.at(a):.1f},{y_axis.at(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="line s{index}" points="{path}"/>')
    return _svg(parts, label)


def histogram(
    groups: Mapping[str, Sequence[float]], label: str, n_bins: int = 40
) -> markupsafe.Markup:
    """Overlaid counts, classes s0, s1, ...

    Values beyond the 1st and the 99th percentile fall into the outer bars.
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
    parts = _grid(x_axis, y_axis)
    for index, count in enumerate(counts):
        for left, right, n in zip(edges[:-1], edges[1:], count, strict=True):
            if n:
                x, y = x_axis.at(left), y_axis.at(n)
                size = f'width="{x_axis.at(right) - x - 0.6:.1f}" height="{y_axis.at(0) - y:.1f}"'
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


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_number(tick)}</text>'
        )
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def _svg(parts: list[str], label: str) -> markupsafe.Markup:
    """Only numbers stand in the parts; the label is escaped."""
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markupsafe.escape(label)}">'
    )
    return markupsafe.Markup(head + "".join(parts) + "</svg>")
