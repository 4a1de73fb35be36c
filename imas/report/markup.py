"""HTML: a document that loads nothing, tables, pictures. Text from files is escaped here."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

# c0, c1, ... are the colours of runs: at least 25 apart in CIELAB, also for colour-blind readers (Machado et al., 2009).
_STYLE = """
:root { --ink: #1d2126; --quiet: #626b76; --rule: #dde1e6 }
.c0 { --c: #0b6bb3 } .c1 { --c: #bd5400 } .c2 { --c: #3f2a2a } .c3 { --c: #9300fc } .c4 { --c: #2a0093 }
.c5 { --c: #936954 }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 2.4rem 0 .7rem; font-size: 1.2rem }
h3 { margin: 1.2rem 0 .4rem; font-size: 1rem } p { margin: .3rem 0 }
.quiet, caption, .tick { color: var(--quiet); fill: var(--quiet) } caption { text-align: left; padding-bottom: .3rem }
.run, .key { color: var(--c) } .run::before { content: "\\25A0  " }
.legend { margin: 0 0 .3rem; font-size: .85rem } .key { margin-right: .8rem }
.key::before { content: ""; display: inline-block; width: 1.5em; margin-right: .4em; vertical-align: .25em;
  border-top: 2px solid var(--c) }
.d1 { stroke-dasharray: 5 3 } .d2 { stroke-dasharray: 1.5 2.5 } .d3 { stroke-dasharray: 9 3 2 3 }
.d1::before { border-top-style: dashed } .d2::before { border-top-style: dotted } .d3::before { border-top-style: double }
.warnings { margin: 1rem 0; padding: .7rem 1rem .7rem 2rem; background: #fff4dc; border-radius: 6px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.6rem 1.4rem }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.1rem }
.small p { margin: 0; font-size: .8rem }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 0 2rem }
figure { margin: 0; min-width: 0; break-inside: avoid } figcaption { font-weight: 600 }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .22rem 1.2rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { font-weight: 600 } td { min-width: 6.5rem } tbody th { min-width: 8rem } thead th { vertical-align: bottom }
.n td, .n thead th:not(:first-child) { text-align: right; min-width: 0; white-space: nowrap }
td svg { width: 120px; margin-left: auto }
img { display: block; max-width: 100%; height: auto; min-width: 38rem }
pre { overflow-x: auto; font-size: .82rem } details { margin: .4rem 0 } summary { cursor: pointer }
svg { display: block; width: 100%; height: auto; overflow: visible; font: 12px system-ui, sans-serif }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round }
.dot { fill: var(--c) } .best { fill: #fff; stroke: var(--c); stroke-width: 1.8; stroke-dasharray: none }
.band { fill: var(--c); opacity: .17 } .grid { stroke: var(--rule) }
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def document(title: str, body: str) -> str:
    """A whole page. Its policy forbids scripts and loading anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str = "", numbers: bool = False) -> Markup:
    """A table that scrolls if it is too wide. The first cell of a row is its header; ``numbers``: align right."""
    head = "".join(f'<th scope="col">{_cell(value)}</th>' for value in header)
    body = "".join(
        f'<tr><th scope="row">{_cell(first)}</th>{"".join(f"<td>{_cell(value)}</td>" for value in others)}</tr>'
        for first, *others in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = ' class="n"' if numbers else ""
    return Markup(f'<div class="wide"><table{kind}>{caption}{head}<tbody>{body}</tbody></table></div>')


def _cell(value: Any) -> str:
    """Markup as it is; a text, number, list or None as escaped text."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return "–"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def folded(summary: str, content: str) -> str:
    """Content that opens with a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def picture(path: Path, alt: str) -> str:
    """A picture file inside the page, or a sentence if it cannot be read."""
    try:
        with Image.open(path) as image:
            (width, height), kind = image.size, image.get_format_mimetype()
    except OSError as error:
        return f"<p>{escape(f'{path.name} cannot be read: {error}')}</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    size = f'width="{width}" height="{height}"'
    return f'<div class="wide"><img {size} alt="{escape(alt)}" src="data:{kind};base64,{data}"/></div>'
