"""The files of a comparison: ``table.md``, ``table.csv``, ``table.json``, ``table.tex`` and ``compare.html``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..engine.log import write_rows
from ..files import replacing
from ..report.markup import Line, Markup, chart, document
from ..report.markup import table as html_table
from .runs import run_folder
from .table import MISSING, Run, Section, latex, markdown, rows_of, sections


def write(out: Path, result: dict[str, Any], runs: Sequence[Run]) -> str:
    """Write all files, and give the text of ``table.md``.

    Args:
        result: of ``table.analyse``.
    """
    tables = sections(result)
    head = [f"- {name}: {text}" for name, text in result["header"].items()]
    notes = [f"- {note}" for note in result["notes"]]
    parts = ["# Methods × seeds", "\n".join(head)]
    for section in tables:
        parts += [f"## {section.title}", markdown(section)]
        parts += ["\n".join(notes)] if section is tables[0] and notes else []
    texts = {"table.md": "\n\n".join(parts) + "\n", "table.tex": latex(tables[0], result["notes"])}
    texts["table.json"] = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    texts["compare.html"] = _page(out, result, runs, tables)
    for name, text in texts.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    rows = [{key: MISSING if value is None else value for key, value in row.items()} for row in rows_of(result)]
    write_rows(out / "table.csv", dict.fromkeys(key for row in rows for key in row), rows)
    return texts["table.md"]


def _page(out: Path, result: dict[str, Any], runs: Sequence[Run], tables: Sequence[Section]) -> str:
    arms, seeds = list(result["arms"]), result["seeds"]
    there = {(run.arm, run.seed) for run in runs}
    links = [[arm, *(_link(out, arm, seed) if (arm, seed) in there else MISSING for seed in seeds)] for arm in arms]
    first, *others = (html_table(section.head, section.rows, True) for section in tables)
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in result["notes"])
    contents = {
        "Conditions": html_table(["", ""], result["header"].items()),
        tables[0].title: first + notes,
        "Curves": f'<div style="max-width: 46rem">{_curves(arms, runs)}</div>',
        **{section.title: content for section, content in zip(tables[1:], others)},
        "Runs": html_table(["method", *(f"seed {seed}" for seed in seeds)], links),
    }
    return document("Methods × seeds", contents)


def _link(out: Path, arm: str, seed: int) -> Markup:
    pages = sorted(run_folder(out, arm, seed).glob("log/**/report.html"), key=lambda path: len(path.parts))
    page = quote(pages[0].relative_to(out).as_posix()) if pages else ""
    return Markup(f'<a href="{page}">page</a>' if pages else "finished")


def _curves(arms: Sequence[str], runs: Sequence[Run]) -> str:
    """Mean mIoU over seeds of each arm's selecting network, with a band of one standard deviation."""
    lines = []
    for i, arm in enumerate(arms):
        curves = [next(iter(run.curves.values())) for run in runs if run.arm == arm]
        values: dict[int, list[float]] = {}
        for x, y in (point for curve in curves for point in zip(*curve)):
            values.setdefault(x, []).append(y)
        whole = sorted(x for x, each in values.items() if len(each) == len(curves))
        means = [statistics.mean(values[x]) for x in whole]
        widths = [statistics.stdev(values[x]) if len(curves) > 1 else 0.0 for x in whole]
        band = [(max(0.0, mean - width), min(100.0, mean + width)) for mean, width in zip(means, widths)]
        if whole:
            lines.append(Line(whole, means, f"c{i % 6}", i // 6, arm, False, band))
    title = "mIoU in percent of the selecting network: mean over seeds, and one standard deviation to each side"
    return chart(title, lines, "iteration") if lines else ""
