"""HTML that loads nothing, and charts in it as SVG. Text from files is escaped here."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

# Colours c0 to c5 are those of runs, also for colour-blind readers; dashes d0 to d3 are those of the curves of one run.
_STYLE = """
.c0 { --c: #0b6bb3 } .c1 { --c: #bd5400 } .c2 { --c: #3f2a2a } .c3 { --c: #9300fc } .c4 { --c: #2a0093 }
.c5 { --c: #936954 }
.d1 { stroke-dasharray: 5 3 } .d2 { stroke-dasharray: 1.5 2.5 } .d3 { stroke-dasharray: 9 3 2 3 }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: #fff; color: #1d2126;
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 2.4rem 0 .7rem; font-size: 1.2rem } h3:empty { display: none }
p { margin: .3rem 0 } .quiet, caption, .tick { color: #626b76; fill: #626b76 } caption { text-align: left }
.run, .key { color: var(--c) } .run::before { content: "\\25A0  " }
.key { display: inline-block; margin-right: .8rem; font-size: .85rem } .key svg { display: inline; width: 2em }
.warnings { margin: 1rem 0; padding: .7rem 1rem .7rem 2rem; background: #fff4dc; border-radius: 6px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.6rem 1.4rem }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.1rem; font-size: .8rem }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 0 2rem }
figure { margin: 0; min-width: 0; break-inside: avoid } figcaption { font-weight: 600; font-size: 15px }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .22rem 1.2rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #dde1e6 }
td { min-width: 6.5rem } tbody th { min-width: 8rem } .pair tbody th { min-width: 11rem }
td svg { width: 120px; margin-left: auto }
.n td, .n thead th:not(:first-child) { text-align: right; min-width: 0; white-space: nowrap }
img { display: block; max-width: 100%; height: auto; min-width: 38rem } pre { overflow-x: auto; font-size: .82rem }
svg { display: block; width: 100%; height: auto; overflow: visible; font: 12px system-ui, sans-serif }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round } .dot { fill: var(--c) }
.best { fill: #fff; stroke: var(--c); stroke-width: 1.8 }
.band { fill: var(--c); opacity: .17 } .grid { stroke: #dde1e6 }
"""
_APART = 7  # points of a line are shown if they are so far apart


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


class Line(NamedTuple):
    """One curve of a chart, and areas in its colour, each between two rows of values."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "c0"  # c0 to c5 of the style sheet
    dash: int = 0
    name: str = ""
    best: bool = False  # mark the highest point
    areas: Sequence[tuple[Sequence[float], Sequence[float]]] = ()


def document(title: str, body: str) -> str:
    """A whole page. Its policy forbids scripts, and loading anything."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(title)}</title>
<style>{_STYLE}</style></head>
<body>{body}</body></html>
"""


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str = "", numbers: bool = False) -> Markup:
    """A table that scrolls if it is too wide. The first cell of a row is its header; ``numbers``: align right."""
    head = "".join(f'<th scope="col">{_cell(value)}</th>' for value in header)
    body = "".join(
        f'<tr><th scope="row">{_cell(first)}</th>{"".join(f"<td>{_cell(value)}</td>" for value in others)}</tr>'
        for first, *others in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    caption, kind = f"<caption>{escape(caption)}</caption>" if caption else "", ' class="n"' if numbers else ""
    return Markup(f'<div class="wide"><table{kind}>{caption}{head}<tbody>{body}</tbody></table></div>')


def _cell(value: Any) -> str:
    if value is None or isinstance(value, Markup):
        return "–" if value is None else value
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def picture(path: Path, alt: str) -> str:
    """A picture file inside the page, or a sentence if it cannot be read."""
    try:
        with Image.open(path) as image:
            kind, size = image.get_format_mimetype(), 'width="{}" height="{}"'.format(*image.size)
    except OSError as error:
        return f"<p>{escape(f'{path.name} cannot be read: {error}')}</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img {size} alt="{escape(alt)}" src="data:{kind};base64,{data}"/></div>'


def legend(lines: Sequence[Line]) -> str:
    """A sample of each line, its name and its last value."""
    keys = ""
    for line in lines:
        sample = f'<path class="line {line.colour} d{line.dash % 4}" d="M0 3H24"/>'
        text = f"{escape(line.name)} {number(line.y[-1])}"
        keys += f'<span class="key {line.colour}"><svg viewBox="0 0 24 8">{sample}</svg> {text}</span>'
    return keys


def chart(
    lines: Sequence[Line], *, title: str, epochs: tuple[int, int], include: Sequence[float] = (), small: bool = False
) -> str:
    """An SVG of at least one line over epochs. All values are finite.

    Args:
        title: for readers who do not see the chart.
        epochs: the first and the last on the horizontal axis.
        include: values that the vertical axis reaches in any case.
        small: without axes.
    """
    left, top, right, floor, width, height = (2, 4, 158, 42, 160, 44) if small else (46, 10, 432, 179, 440, 215)
    values = [*include, *(y for line in lines for row in (line.y, *sum(line.areas, ())) for y in row)]
    (first, last), low, high = epochs, min(values), max(values)
    if low == high:
        margin = abs(high) * 0.1 or 0.5
        low, high = low if include else low - margin, high + margin
    ticks = _ticks(low, high, 5)
    if not small:
        low, high = ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return left + across * (right - left), floor - (y - low) / (high - low) * (floor - top)

    def path(xs: Iterable[float], ys: Iterable[float]) -> str:
        return "M" + "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in zip(xs, ys))

    def text(x: float, y: float, anchor: str, content: str) -> str:
        return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    if small:
        parts.append(f'<path class="grid" d="M0 {height - 1}H{width}"/>')
    else:
        parts += [f'<path class="grid" d="M{left} {at(0, tick)[1]:.1f}H{right}"/>' for tick in ticks]
        parts += [text(left - 6, at(0, tick)[1] + 4, "end", f"{tick:.6g}") for tick in ticks]
        whole = [tick for tick in _ticks(first, last, 6, 1.0) if first <= tick <= last]
        parts += [text(at(tick, low)[0], floor + 16, "middle", f"{tick:.6g}") for tick in whole]
        parts.append(text(right, height - 4, "end", "epoch"))
    for line in lines:
        for below, above in line.areas:
            around = path([*line.x, *reversed(line.x)], [*above, *reversed(below)])
            parts.append(f'<path class="band {line.colour}" d="{around}Z"/>')
    for line in lines:
        name, best = escape(line.name), line.y.index(max(line.y)) if line.best else None
        parts.append(
            f'<path class="line {line.colour} d{line.dash % 4}" d="{path(line.x, line.y)}"><title>{name}</title></path>'
        )
        sparse = at(line.x[-1], 0)[0] - at(line.x[0], 0)[0] >= _APART * (len(line.x) - 1)
        for i, (x, y) in enumerate(zip(line.x, line.y)):
            if sparse or i == best:
                kind, radius, mark = ("best", 4, " best:") if i == best else ("dot", 1.9, "")
                place = 'cx="{:.1f}" cy="{:.1f}"'.format(*at(x, y))
                said = f"<title>{name}{mark} {number(y)} in epoch {x}</title>"
                parts.append(f'<circle class="{kind} {line.colour}" {place} r="{radius}">{said}</circle>')
    return "".join([*parts, "</svg>"])


def number(value: float) -> str:
    """A number with three significant digits, or more before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """About ``count`` round numbers around low to high, at least ``least`` apart."""
    rough = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
