"""HTML that loads nothing, with charts as SVG. Text from files is escaped here."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

# The six colours can be told apart by colour-blind readers too.
_STYLE = """
.c0 { --c: #0b6bb3 } .c1 { --c: #bd5400 } .c2 { --c: #3f2a2a } .c3 { --c: #9300fc } .c4 { --c: #2a0093 }
.c5 { --c: #936954 }
.d1 { stroke-dasharray: 5 3 } .d2 { stroke-dasharray: 1.5 2.5 } .d3 { stroke-dasharray: 9 3 2 3 }
body { margin: 0 auto; padding: 1.5rem 1rem; max-width: 76rem; color: #1d2126; font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0 } h2 { margin: 2.4rem 0 .7rem; font-size: 1.2rem } p { margin: .3rem 0 }
.run, .key { color: var(--c) } .run::before { content: "\\25A0  " }
.key { display: inline-block; margin-right: .8rem; font-size: .85rem } .key svg { display: inline; width: 2em }
.warning { padding: .3rem 1rem; background: #fff4dc }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.6rem 1.4rem }
figure { margin: 0 } figcaption { font-weight: 600 } .wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .n td, .n th + th { text-align: right }
.n td, .n thead th { white-space: nowrap }
th, td { padding: .22rem 1.2rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #dde1e6 }
img { display: block; max-width: 100% } pre { overflow-x: auto; font-size: .82rem }
svg { display: block; width: 100%; overflow: visible; font: 12px system-ui, sans-serif; fill: #626b76 }
.line { fill: none; stroke: var(--c); stroke-width: 1.6 } .dot { fill: var(--c) } .grid { stroke: #dde1e6 }
.band { fill: var(--c); opacity: .15 }
.best { fill: #fff; stroke: var(--c); stroke-width: 1.8 }
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


class Line(NamedTuple):
    """One curve of a chart; all values are finite."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "c0"  # c0 to c5 of the style sheet
    dash: int = 0
    name: str = ""
    best: bool = False  # mark the highest point
    band: Sequence[tuple[float, float]] = ()  # from where to where it reaches at each x


def document(title: str, sections: dict[str, str]) -> str:
    """A whole page, of the sections by heading that are not empty. Its policy forbids scripts, and loading anything."""
    parts = (f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections.items() if content)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"/>
<title>{escape(title)} – iMAS</title>
<style>{_STYLE}</style></head>
<body><h1>{escape(title)}</h1>{"".join(parts)}</body></html>
"""


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: bool = False) -> str:
    """A table that scrolls if it is too wide. The first cell of a row is its header; ``numbers``: align right."""
    body = "".join(f"<tr><th>{_cell(first)}</th>{_cells('td', others)}</tr>" for first, *others in rows)
    head = f"<thead><tr>{_cells('th', header)}</tr></thead>" if any(header) else ""
    return f'<div class="wide"><table class="{"n" * numbers}">{head}<tbody>{body}</tbody></table></div>'


def _cells(tag: str, values: Sequence[Any]) -> str:
    return "".join(f"<{tag}>{_cell(value)}</{tag}>" for value in values)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, Markup):
        return "–" if value is None else value
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def picture(path: Path, alt: str) -> str:
    """A PNG file inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}"/>'


def chart(title: str, lines: Sequence[Line], axis: str = "epoch") -> str:
    """A figure of at least one line over ``axis``, with a legend that holds the last value of each."""
    left, top, right, floor = 46, 10, 432, 179
    values = [y for line in lines for y in (*line.y, *sum(line.band, ()))]
    last = max(line.x[-1] for line in lines) or 1
    low, high = min(values), max(values)
    if math.isclose(low, high):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    ticks = _ticks(0.0 if 0 < low < high / 2 else low, high)

    def at(x: float, y: float) -> tuple[float, float]:
        up = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return round(left + x / last * (right - left), 1), round(floor - up * (floor - top), 1)

    keys, shapes = "", f'<text x="{right}" y="211" text-anchor="end">{axis}</text>'
    for tick in ticks:
        y = at(0, tick)[1]
        shapes += f'<path class="grid" d="M{left} {y}H{right}"/>'
        shapes += f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:.6g}</text>'
    for tick in (tick for tick in _ticks(0, last) if tick <= last and tick % 1 == 0):
        shapes += f'<text x="{at(tick, 0)[0]}" y="{floor + 16}" text-anchor="middle">{tick:.6g}</text>'
    for line in lines:
        kind, name = f'class="line {line.colour} d{line.dash % 4}"', escape(line.name)
        points = [*map(at, line.x, line.y)]
        x, y = points[line.y.index(max(line.y)) if line.best else -1]
        path = "L".join(f"{x} {y}" for x, y in points)
        lows, highs = ([at(x, ends[i]) for x, ends in zip(line.x, line.band)] for i in (0, 1))
        around = "L".join(f"{x} {y}" for x, y in (*lows, *highs[::-1]))
        shapes += f'<path class="band {line.colour}" d="M{around}Z"/>' if around else ""
        shapes += f'<path {kind} d="M{path}"><title>{name}</title></path>'
        shapes += f'<circle class="{"best" if line.best else "dot"} {line.colour}" cx="{x}" cy="{y}" r="3"/>'
        keys += f'<span class="key {line.colour}"><svg viewBox="0 0 24 8"><path {kind} d="M0 3H24"/></svg>'
        keys += f" {name} {line.y[-1]:.4g}</span>"
    title = escape(title)
    svg = f'<svg viewBox="0 0 440 215" role="img" aria-label="{title}">{shapes}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{keys}{svg}</figure>"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers around low to high."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= (high - low) / 5 * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
