"""Charts as inline SVG: lines over epochs with axes, bands, and labels at their ends; colour = run, dash = second role.

Colours are the classes of ``markup``; no line is known by its colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from .markup import COLOURS, Markup

_WIDTH, _HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 100, 10, 36  # margins; labels of lines stand in the right one
_GAP = 13  # between two labels
_APART = 7  # points of a line are shown where they are so far apart


class Line(NamedTuple):
    """One curve; ``role`` (student, teacher, ...) is said at its end, ``run`` in its tooltip."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    run: str = ""
    role: str = ""
    dashed: bool = False
    best: bool = False  # mark the highest point


class Band(NamedTuple):
    """The area between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int = 0


def line_chart(
    lines: Sequence[Line], bands: Sequence[Band] = (), *, title: str, epochs: tuple[int, int], zero: bool = False
) -> Markup:
    """An SVG of curves over epochs, all values finite, at least one point.

    Args:
        epochs: the first and the last one of the horizontal axis.
        title: what it shows, for readers who do not see it.
        zero: the vertical axis begins at 0.
    """
    first, last = epochs
    values = [y for line in lines for y in line.y] + [y for band in bands for y in (*band.low, *band.high)]
    ticks_x = _ticks(first, last, 6, whole=True)
    ticks_y = _ticks(min(0.0, *values) if zero else min(values), max(values), 5)
    low, high = min(ticks_y[0], *values), max(ticks_y[-1], *values)
    floor, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if last == first else (x - first) / (last - first)
        up = 0.5 if high == low else (y - low) / (high - low)
        return _LEFT + across * (end - _LEFT), floor - up * (floor - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks_y:
        y = at(first, tick)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{end}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in ticks_x:
        x = at(tick, low)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{_tick(tick)}</text>')
    parts.append(f'<text class="tick" x="{end}" y="{_HEIGHT - 4}" text-anchor="end">epoch</text>')
    parts += [_area(band, at) for band in bands]
    parts += [_curve(line, at) for line in lines]
    heights = _apart([at(line.x[-1], line.y[-1])[1] for line in lines], _TOP + 4, floor)
    for line, height in zip(lines, heights):
        label = f"{line.role} {number(line.y[-1])}".strip()
        style = f'class="end c{line.colour % COLOURS}"'
        parts.append(f'<text {style} x="{end + 8}" y="{height + 4:.1f}">{escape(label)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def sparkline(
    lines: Sequence[Line], bands: Sequence[Band] = (), *, title: str, epochs: tuple[int, int], high: float
) -> Markup:
    """A small SVG of curves between 0 and ``high``, without axes; dashed lines are drawn thin instead."""
    first, span = epochs[0], epochs[1] - epochs[0] or 1
    width, height = 160, 44

    def at(x: float, y: float) -> tuple[float, float]:
        return 2 + (x - first) / span * (width - 4), height - 2 - y / (high or 1) * (height - 6)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<path class="grid" d="M0 {height - 1}H{width}"/>')
    parts += [_area(band, at) for band in bands]
    for line in lines:
        points = [at(x, y) for x, y in zip(line.x, line.y)]
        kind = "line thin" if line.dashed else "line"
        parts.append(f'<path class="{kind} c{line.colour % COLOURS}" d="M{_path(points)}"/>')
        if len(points) == 1:
            parts.append(_dot(*points[0], "dot", line.colour))
    return Markup("".join([*parts, "</svg>"]))


def number(value: float) -> str:
    """Three significant digits, more where they stand before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if value and abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}"


def _curve(line: Line, at: Callable[[float, float], tuple[float, float]]) -> str:
    """Path, points where they are few, and the best one."""
    points = [at(x, y) for x, y in zip(line.x, line.y)]
    kind = "line dashed" if line.dashed else "line"
    name = " ".join(filter(None, (line.run, line.role)))
    parts = [f'<path class="{kind} c{line.colour % COLOURS}" d="M{_path(points)}"><title>{escape(name)}</title></path>']
    if points[-1][0] - points[0][0] >= _APART * (len(points) - 1):
        for (x, y), epoch, value in zip(points, line.x, line.y):
            parts.append(_dot(x, y, "dot", line.colour, 1.9, f"{name} epoch {_tick(epoch)}: {number(value)}"))
    if line.best:
        place = max(range(len(points)), key=lambda index: line.y[index])
        said = f"{name} best: {number(line.y[place])} after epoch {_tick(line.x[place])}"
        parts.append(_dot(*points[place], "best", line.colour, 4, said))
    return "".join(parts)


def _area(band: Band, at: Callable[[float, float], tuple[float, float]]) -> str:
    around = [at(x, y) for x, y in zip(band.x, band.high)] + [at(x, y) for x, y in zip(band.x, band.low)][::-1]
    return f'<path class="band c{band.colour % COLOURS}" d="M{_path(around)}Z"/>'


def _dot(x: float, y: float, kind: str, colour: int, radius: float = 1.9, said: str = "") -> str:
    circle = f'<circle class="{kind} c{colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
    return f"{circle}<title>{escape(said.strip())}</title></circle>"


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights near the wanted ones, in their order, a label's height apart where they fit between the ends."""
    gap = min(_GAP, (bottom - top) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    least = top
    for index in order:
        placed[index] = max(placed[index], least)
        least = placed[index] + gap
    most = bottom
    for index in reversed(order):
        placed[index] = min(placed[index], most)
        most = placed[index] - gap
    return placed


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """At most about ``count`` round numbers that span ``low`` to ``high``; ``whole``: integers within it."""
    if high == low and not whole:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / count or 1
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(1, round(step)) if whole else step
    start, stop = (math.ceil(low / step), math.floor(high / step)) if whole else (
        math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    )  # fmt: skip
    return [index * step for index in range(start, stop + 1)]


def _tick(value: float) -> str:
    return f"{value:.6g}"
