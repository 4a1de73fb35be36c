"""HTML: a document that loads nothing, tables, pictures. What comes from files is escaped here."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from .records import Record

# Colours of runs are the classes c0, c1, ...: at least 25 apart in CIELAB, as simulated deficiencies see them too
# (Machado et al., 2009), and dark or light enough for text.
COLOURS = 6
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --quiet: #626b76; --rule: #dde1e6; --warn: #fff4dc }
.c0 { --c: #0b6bb3 } .c1 { --c: #bd5400 } .c2 { --c: #3f2a2a } .c3 { --c: #9300fc } .c4 { --c: #2a0093 }
.c5 { --c: #936954 }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7eb; --quiet: #98a2ae; --rule: #343a42; --warn: #3a3017 }
  .c0 { --c: #62b5f5 } .c1 { --c: #fc7e15 } .c2 { --c: #a8937e } .c3 { --c: #d2d2e7 } .c4 { --c: #e7a869 }
  .c5 { --c: #7e7efc }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere } h2 { margin: 2.4rem 0 .7rem; font-size: 1.2rem }
h3 { margin: 1.2rem 0 .4rem; font-size: 1rem; overflow-wrap: anywhere }
p { margin: .3rem 0 } .quiet, caption { color: var(--quiet) } caption { text-align: left; padding-bottom: .3rem }
.run { color: var(--c); overflow-wrap: anywhere }
.run::before { content: "\\25A0  " } thead .run { overflow-wrap: normal }
.warnings { margin: 1rem 0; padding: .7rem 1rem .7rem 2rem; background: var(--warn); border-radius: 6px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.6rem 1.4rem }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.1rem }
figure { margin: 0; min-width: 0; break-inside: avoid } figcaption { font-weight: 600; margin-bottom: .35rem }
.small figcaption { margin: 0; overflow-wrap: anywhere } .small p { margin: 0; font-size: .8rem }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .22rem 1.2rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { font-weight: 600 } td { overflow-wrap: anywhere; min-width: 6.5rem }
tbody th { overflow-wrap: anywhere; min-width: 8rem } thead th { vertical-align: bottom }
.n td, .n thead th:not(:first-child) { text-align: right; min-width: 0 } .n td { white-space: nowrap }
td svg { width: 120px; margin-left: auto }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 0 2rem }
img { display: block; max-width: 100%; height: auto; min-width: 38rem }
pre { overflow-x: auto; font-size: .82rem } details { margin: .4rem 0 } summary { cursor: pointer }
code { overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto; overflow: visible; font: 12px system-ui, sans-serif }
svg .line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round }
svg .thin { stroke-width: 1; opacity: .7 }
svg .dashed { stroke-dasharray: 5 3 }
svg .dot, svg .end { fill: var(--c) }
svg .best { fill: var(--paper); stroke: var(--c); stroke-width: 1.8 }
svg .band { fill: var(--c); opacity: .17 }
svg .grid { stroke: var(--rule); stroke-width: 1 }
svg .tick { fill: var(--quiet) }
@media (max-width: 40rem) { th, td { padding-right: .7rem } tbody th { min-width: 7.7rem } }
@media print { body { max-width: none; padding: 0; font-size: 11px } img { min-width: 0 } .wide { overflow: visible } }
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def document(title: str, body: str) -> str:
    """A whole page, valid as XML too. Its policy forbids scripts and every load."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str = "", numbers: bool = False) -> Markup:
    """A table, wider than the page if it must be; the first cell of a row is its header. Cells as by ``cell``.

    Args:
        numbers: all columns but the first hold numbers.
    """
    head = "".join(f'<th scope="col">{cell(value)}</th>' for value in header)
    body = "".join(
        f'<tr><th scope="row">{cell(first)}</th>{"".join(f"<td>{cell(value)}</td>" for value in others)}</tr>'
        for first, *others in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = ' class="n"' if numbers else ""
    return Markup(f'<div class="wide"><table{kind}>{caption}{head}<tbody>{body}</tbody></table></div>')


def cell(value: Any) -> str:
    """Markup as it is; a text, a number, a list or nothing as escaped text."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return "–"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def label(run: Record) -> Markup:
    """The run's name in its colour, where there are several; otherwise nothing."""
    if run.alone:
        return Markup("")
    return Markup(f'<span class="run c{run.place % COLOURS}">{escape(run.name)}</span>')


def heading(run: Record) -> str:
    """``label`` as a heading."""
    return "" if run.alone else f"<h3>{label(run)}</h3>"


def folded(summary: Any, content: str) -> Markup:
    """Content that opens by a click."""
    return Markup(f"<details><summary>{cell(summary)}</summary>{content}</details>")


def picture(path: Path, alt: str) -> Markup:
    """A picture file inside the page, or a sentence where it cannot be read."""
    try:
        with Image.open(path) as image:
            (width, height), kind = image.size, image.get_format_mimetype()
    except OSError as error:
        return Markup(f"<p>{escape(f'{path.name} cannot be read: {error}')}</p>")
    data = base64.b64encode(path.read_bytes()).decode()
    size = f'width="{width}" height="{height}"'
    return Markup(f'<div class="wide"><img {size} alt="{escape(alt)}" src="data:{kind};base64,{data}"/></div>')
