"""Charts as inline SVG: curves over epochs. The colour tells the run apart, dashes the curves of one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

_COLOURS, _DASHES = 6, 4  # classes c0.. and d0.. of the style sheet
_APART = 7  # points are shown if they are at least so far apart


class Line(NamedTuple):
    """One curve."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0
    name: str = ""
    best: bool = False  # mark the highest point

    @property
    def style(self) -> str:
        """Its classes in the style sheet."""
        return f"c{self.colour % _COLOURS} d{self.dash % _DASHES}"


class Band(NamedTuple):
    """The area between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int = 0


def figure(
    title: str, lines: Sequence[Line], bands: Sequence[Band] = (), *, epochs: tuple[int, int], zero: bool
) -> str:
    """A titled chart, with a legend that gives the last value of each line. Arguments as in ``chart``."""
    keys = (
        f'<span class="key {line.style}">{escape(f"{line.name} {number(line.y[-1])}".strip())}</span>' for line in lines
    )
    svg = chart(lines, bands, title=title, epochs=epochs, zero=zero)
    return f'<figure><figcaption>{escape(title)}</figcaption><p class="legend">{" ".join(keys)}</p>{svg}</figure>'


def chart(
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    title: str,
    epochs: tuple[int, int],
    zero: bool = False,
    small: bool = False,
) -> str:
    """An SVG of at least one line. All values are finite.

    Args:
        title: for readers who do not see the chart.
        epochs: the first and the last on the horizontal axis.
        zero: the vertical axis includes 0.
        small: draw a small chart without axes.
    """
    width, height, left, right, top, bottom = (160, 44, 2, 2, 4, 2) if small else (440, 215, 46, 8, 10, 36)
    values = [y for line in lines for y in line.y] + [y for band in bands for y in (*band.low, *band.high)]
    values += [0.0] if zero else []
    (first, last), low, high, floor, end = epochs, min(values), max(values), height - bottom, width - right
    if low == high:
        margin = abs(high) * 0.1 or 0.5
        low, high = low if zero else low - margin, high + margin
    ticks = _ticks(low, high, 5)
    if not small:
        low, high = ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return left + across * (end - left), floor - (y - low) / (high - low) * (floor - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    if small:
        parts.append(f'<path class="grid" d="M0 {height - 1}H{width}"/>')
    else:
        for tick in ticks:
            y = at(first, tick)[1]
            parts.append(f'<path class="grid" d="M{left} {y:.1f}H{end}"/>')
            parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
        for tick in _ticks(first, last, 6, whole=True):
            x = at(tick, low)[0]
            parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{tick}</text>')
        parts.append(f'<text class="tick" x="{end}" y="{height - 4}" text-anchor="end">epoch</text>')
    for band in bands:
        around = [at(*point) for point in (*zip(band.x, band.high), *reversed([*zip(band.x, band.low)]))]
        parts.append(f'<path class="band c{band.colour % _COLOURS}" d="M{_path(around)}Z"/>')
    for line in lines:
        points = [at(x, y) for x, y in zip(line.x, line.y)]
        parts.append(f'<path class="line {line.style}" d="M{_path(points)}"><title>{escape(line.name)}</title></path>')
        best = max(range(len(points)), key=lambda i: line.y[i]) if line.best else None
        sparse = points[-1][0] - points[0][0] >= _APART * (len(points) - 1)
        for i in range(len(points)) if sparse else {best} - {None}:
            kind, radius = ("best", 4) if i == best else ("dot", 1.9)
            text = f"{line.name} {'best: ' if i == best else ''}{number(line.y[i])} in epoch {line.x[i]}".strip()
            circle = (
                f'<circle class="{kind} {line.style}" cx="{points[i][0]:.1f}" cy="{points[i][1]:.1f}" r="{radius}">'
            )
            parts.append(f"{circle}<title>{escape(text)}</title></circle>")
    return "".join([*parts, "</svg>"])


def number(value: float) -> str:
    """A number with three significant digits; more only for integers above 100."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if value and abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}"


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About ``count`` round numbers: just around low to high, or the whole numbers within."""
    rough = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = round(step)
        return list(range(-(-int(low) // step) * step, int(high) + 1, step))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
