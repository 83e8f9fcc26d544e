"""Self-contained SVG line and bar charts, readable in light and dark mode, and without mouse or scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

Series = Sequence[tuple[float, float]]
"""Points of a curve, x ascending."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 230, 52, 8, 8, 24
_MOST = 400  # maximum number of points per curve; longer ones are averaged in groups
_IN_TABLES = 6  # significant digits: runs that are compared may differ in the third decimal
_NOISY = 40  # curves of more points are drawn lightly, with their running mean


def line_chart(
    title: str,
    curves: Mapping[str, Series],
    note: str = "",
    x_name: str = "step",
    from_zero: bool = False,
    smooth: bool = True,
) -> str:
    """A card with curves over steps, a legend, and the values as a table for screen readers.

    Args:
        title: Title of the card.
        curves: Curves by name; empty ones are omitted, and without any the result is empty.
        note: Note below the title.
        x_name: Name of the x axis.
        from_zero: Whether the y axis always includes 0.
        smooth: Whether long curves are drawn with their running mean.

    >>> "loss" in line_chart("Loss", {"loss": [(1, 2.0), (2, 1.0)]}), line_chart("Loss", {"loss": []})
    (True, '')
    """
    drawn = {name: _thinned([p for p in points if math.isfinite(p[1])]) for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs, ys = ([point[i] for points in drawn.values() for point in points] for i in (0, 1))
    lowest = min(*ys, 0.0) if from_zero else min(ys)
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(lowest, max(ys), 5)
    low, high = min(y_ticks[0], lowest), max(y_ticks[-1], max(ys))
    place = _Scale((min(xs), max(xs)), (low, high))
    parts = [_axes(place, x_ticks, y_ticks, x_name)]
    for number, points in enumerate(drawn.values()):
        is_noisy = smooth and len(points) > _NOISY
        if is_noisy:
            parts.append(f'<path class="raw s{number % 8}" d="{place.path(points)}"/>')
        parts.append(f'<path class="line s{number % 8}" d="{place.path(_smooth(points) if is_noisy else points)}"/>')
        if len(points) <= _NOISY:
            parts += [
                f'<circle class="s{number % 8}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in place.all(points)
            ]
    said = ", ".join(f"{name} from {short(points[0][1])} to {short(points[-1][1])}" for name, points in drawn.items())
    data = escape(json.dumps({"x": place.x, "curves": [[name, points] for name, points in drawn.items()]}))
    svg = _svg(f"{title}: {said}", "".join(parts), f' data-chart="{data}"')
    return _card(title, note, _legend(list(drawn)), svg, _table(drawn, x_name))


def bar_chart(title: str, bars: Sequence[tuple[str, float]], note: str = "", axis: tuple[str, ...] = ()) -> str:
    """A card with a bar per value, which tooltips and a table list.

    Args:
        title: Title of the card.
        bars: Names and non-negative values; without any the result is empty.
        note: Note below the title.
        axis: Labels below the bars, spread evenly; by default the first and last names.
    """
    if not bars:
        return ""
    top = max(max(value for _, value in bars), 1e-30)
    y_ticks = ticks(0.0, top, 5)
    place = _Scale((0, len(bars)), (0.0, max(top, y_ticks[-1])))
    parts = [_axes(place, [], y_ticks, "")]
    step = place.at(1, 0)[0] - place.at(0, 0)[0]
    for number, (name, value) in enumerate(bars):
        x, y = place.at(number, value)
        tall = max(place.at(0, 0)[1] - y, 1.0 if value else 0.0)
        shape = f'x="{x + 1:.1f}" y="{y:.1f}" width="{max(1.0, step - 2):.1f}" height="{tall:.1f}" rx="2"'
        parts.append(f'<rect class="s0" {shape}><title>{escape(name)}: {short(value)}</title></rect>')
    names = axis or (bars[0][0], bars[-1][0]) if len(bars) > 1 else (bars[0][0],)
    for number, name in enumerate(names):
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * number / max(1, len(names) - 1)
        anchor = "start" if number == 0 else "end" if number == len(names) - 1 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{escape(name)}</text>')
    said = f"{title}: {len(bars)} bars, the highest {short(top)}"
    svg = _svg(said, "".join(parts))
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{short(value)}</td></tr>" for name, value in bars)
    return _card(title, note, "", svg, f"<details><summary>Values</summary><table>{rows}</table></details>")


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that span an interval.

    >>> ticks(0.13, 2.4, 5), ticks(3.0, 3.0, 5), ticks(1, 12, 6)
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [3.0], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(value: float, digits: int = 3) -> str:
    """A number in short, readable form.

    Args:
        value: The number.
        digits: Number of significant digits; at least all before the point are shown.

    >>> [short(x) for x in (0.0, 1234567.0, 12345, 0.00002, 0.1234, 5.5)]
    ['0', '1.23M', '12,345', '2e-05', '0.123', '5.5']
    >>> [short(x, digits=6) for x in (10.30264, 12345.678, 1234567.0)]
    ['10.3026', '12,345.7', '1.23457M']
    """
    size = abs(value)
    if size >= 1e6:
        power, unit = next((p, u) for p, u in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if size >= p)
        return f"{value / power:.{digits}g}{unit}"
    if size >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits - 1}g}" if size < 0.001 else f"{value:,.{digits}g}"


class _Scale:
    """Mapping from data to picture coordinates."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x = (x[0], x[1] if x[1] > x[0] else x[0] + 1)
        self.y = y if y[1] > y[0] else (y[0] - (abs(y[0]) or 1) / 2, y[0] + (abs(y[0]) or 1) / 2)

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def all(self, points: Series) -> list[tuple[float, float]]:
        return [self.at(*point) for point in points]

    def path(self, points: Series) -> str:
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in self.all(points))


def _axes(place: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str) -> str:
    parts = []
    digits = next((n for n in range(3, 12) if len({short(tick, n) for tick in y_ticks}) == len(y_ticks)), 12)
    for tick in y_ticks:
        y = place.at(place.x[0], tick)[1]
        parts.append(f'<path class="grid-line" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick, digits)}</text>')
    for tick in (tick for tick in x_ticks if place.x[0] <= tick <= place.x[1]):
        x = place.at(tick, place.y[0])[0]
        if x < _WIDTH - _RIGHT - 60:
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{short(tick)}</text>')
    if x_name:
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def _thinned(points: Series) -> list[tuple[float, float]]:
    size = -(-len(points) // _MOST)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]


def _smooth(points: Series) -> list[tuple[float, float]]:
    """The running mean over a twentieth of the curve."""
    reach = max(1, len(points) // 40)
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(points[i][0], math.fsum(y for _, y in own) / len(own)) for i, own in enumerate(windows)]


def _legend(names: Sequence[str]) -> str:
    keys = (f'<span><i class="s{number % 8}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{"".join(keys)}</p>'


def _table(curves: dict[str, list[tuple[float, float]]], x_name: str) -> str:
    chosen = sorted({x for points in curves.values() for x in (points[i][0] for i in _spread(len(points), 12))})
    by_x = {name: dict(points) for name, points in curves.items()}
    head = "".join(f"<th>{escape(name)}</th>" for name in curves)
    rows = ""
    for x in chosen:
        cells = "".join(f"<td>{short(of[x], _IN_TABLES) if x in of else '–'}</td>" for of in by_x.values())
        rows += f"<tr><td>{short(x, _IN_TABLES)}</td>{cells}</tr>"
    return f"<details><summary>Values</summary><table><tr><th>{escape(x_name)}</th>{head}</tr>{rows}</table></details>"


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(i * (count - 1) / max(1, min(most, count) - 1)) for i in range(min(most, count))})


def _svg(said: str, inner: str, more: str = "") -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said)}"{more}>{inner}</svg>'


def _card(title: str, note: str, legend: str, svg: str, table: str) -> str:
    said = f'<p class="dim note">{escape(note)}</p>' if note else ""
    return f'<section class="card chart"><h2>{escape(title)}</h2>{said}{legend}{svg}{table}</section>'
