"""What runs of several methods and seeds come to: means, paired differences with their intervals, tables as text."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from ..report.records import Curve
from ..strict import dotted

_WHICH = ("last", "best")  # epoch
MISSING = "×"  # in the cell of a run that is not there
COSTS: dict[str, tuple[str, str]] = {  # title and format
    "iterations": ("iterations", ",.0f"),
    "hours": ("hours", ".2f"),
    "seconds": ("seconds an iteration", ".3f"),
    "memory_mib": ("peak memory, MiB", ",.0f"),
    "parameters": ("parameters", ",.0f"),
}
_LATEX = {sign: f"\\{sign}" for sign in "#$%&_{}"} | {"−": "$-$", "±": "$\\pm$", "×": "$\\times$", "†": "$\\dagger$"}
_LATEX |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
_ESCAPES = str.maketrans(_LATEX)


class Run(NamedTuple):
    """A finished run."""

    arm: str  # its name in the table
    seed: int
    curves: dict[str, Curve]  # mIoU in percent over iterations, of each scored network; the selecting one comes first
    iou: dict[str, float | None]  # of each class, of the selecting network after the last epoch, in percent
    cost: dict[str, float]  # by the names of COSTS
    facts: dict[str, str]  # shown above the table
    identity: dict[str, Any]  # what runs of one seed have to share, by dotted key


class Section(NamedTuple):
    """A table as text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def t95(freedom: int) -> float:
    """The quantile of Student's t that 95 % of all values lie within, on both sides of 0; ``freedom`` from 1 on.

    The probability is a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom))
    for _ in range(60):
        angle = (low + high) / 2
        term = math.cos(angle) if freedom % 2 else 1.0
        total = term if freedom > 1 else 0.0
        for power in range(3 if freedom % 2 else 2, freedom - 1, 2):
            term *= math.cos(angle) ** 2 * (power - 1) / power
            total += term
        inside = math.sin(angle) * total
        if freedom % 2:
            inside = 2 / math.pi * (angle + inside)
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def difference(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> dict[str, Any] | None:
    """The mean of ``ours`` minus ``theirs`` over the seeds that both have, with its 95 % interval; None without such a
    seed. One seed has no interval, and ``separable`` is None.
    """
    pairs = [(value, theirs.get(seed)) for seed, value in ours.items()]
    gains = [one - other for one, other in pairs if one is not None and other is not None]
    if not gains:
        return None
    mean, low, high = statistics.mean(gains), None, None
    if len(gains) > 1:
        half = t95(len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
        low, high = mean - half, mean + half
    separable = None if low is None else not low <= 0 <= high
    return {"mean": mean, "low": low, "high": high, "separable": separable, "seeds": len(gains)}


def misfits(identities: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[str]:
    """What runs of one seed do not share, a line each, from what (arm, seed) have to share."""
    lines: dict[str, list[str]] = defaultdict(list)  # seeds of each
    keys = dict.fromkeys(key for identity in identities.values() for key in identity)
    for seed in dict.fromkeys(seed for _, seed in identities):
        for key in keys:
            arms = defaultdict(list)
            for (arm, own), identity in identities.items():
                if own == seed:
                    arms[str(identity.get(key))].append(arm)
            if len(arms) > 1:
                text = ", ".join(f"{value} ({', '.join(names)})" for value, names in arms.items())
                lines[f"{key}: {text}"].append(str(seed))
    return [f"{line}; seed {', '.join(seeds)}" for line, seeds in lines.items()]


def analyse(runs: Sequence[Run], arms: Sequence[str], seeds: Sequence[int], baseline: str | None) -> dict[str, Any]:
    """Everything that the tables hold, ready for JSON, unrounded.

    Args:
        arms: names of all methods, those without a finished run as well.
        seeds: of all methods.
        baseline: the arm that the others are compared with.
    """
    there = {(run.arm, run.seed): run for run in runs}
    entries: dict[str, dict[str, Any]] = {}
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        entry: dict[str, Any] = {"networks": {}, "difference": {}, "order": False}
        for network in own[0].curves if own else [MISSING]:
            values = {seed: there[arm, seed].curves[network].values for seed in seeds if (arm, seed) in there}
            last = {seed: values[seed][-1] if seed in values else None for seed in seeds}
            best = {seed: max(values[seed]) if seed in values else None for seed in seeds}
            entry["networks"][network] = {"last": _figure(last), "best": _figure(best)}
        entry["cost"] = {key: _mean(run.cost.get(key) for run in own) for key in COSTS}
        classes = dict.fromkeys(name for run in own for name in run.iou)
        entry["iou"] = {name: _figure({run.seed: run.iou.get(name) for run in own}) for name in classes}
        entries[arm] = entry
    selected = {arm: next(iter(entry["networks"].values())) for arm, entry in entries.items()}
    for arm in arms if baseline else ():
        for which in _WHICH if arm != baseline else ():
            ours, theirs = (selected[name][which]["seeds"] for name in (arm, baseline))
            entries[arm]["difference"][which] = difference(ours, theirs)
    notes = _notes(selected, seeds, baseline)
    for one, other in combinations(arms, 2):
        gaps = [difference(*(selected[name][which]["seeds"] for name in (one, other))) for which in _WHICH]
        if None not in gaps and math.prod(gap["mean"] for gap in gaps) < 0:
            entries[one]["order"] = entries[other]["order"] = True
            last, best = (_signed(gap["mean"]) for gap in gaps)
            text = f"† last and best order {one} and {other} differently: {one} minus {other} is"
            notes.append(f"{text} {last} last, {best} best")
    header = {key: spread({(run.arm, run.seed): run.facts[key] for run in runs}) for key in runs[0].facts}
    return {"header": header, "seeds": [*seeds], "baseline": baseline, "arms": entries, "notes": notes}


def _notes(selected: dict[str, dict], seeds: Sequence[int], baseline: str | None) -> list[str]:
    notes = []
    for arm, figures in selected.items():
        gone = [str(seed) for seed, value in figures["last"]["seeds"].items() if value is None]
        if gone:
            notes.append(f"{MISSING} no finished run of {arm} with seed {', '.join(gone)}")
    if len(seeds) == 1:
        notes.append("one seed: no standard deviation and no interval, so nothing here is more than one draw")
    if baseline is None:
        notes.append("no --baseline was named: no differences")
    return notes


def _figure(values: dict[int, float | None]) -> dict[str, Any]:
    there = [value for value in values.values() if value is not None]
    return {"mean": _mean(there), "sd": statistics.stdev(there) if len(there) > 1 else None, "seeds": values}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def spread(values: Mapping[tuple[str, int], str]) -> str:
    """The texts of (arm, seed) as one: alone where all share it, else with the seeds, arms or runs that have it."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    for form in ("seed {1}", "{0}", "{0} {1}"):
        pairs = dict.fromkeys((text, form.format(*run)) for run, text in values.items())
        if len({label for _, label in pairs}) == len(pairs):  # each has one text
            break
    texts = dict.fromkeys(text for text, _ in pairs)
    return "; ".join(f"{text} ({', '.join(label for each, label in pairs if each == text)})" for text in texts)


def sections(result: dict[str, Any]) -> list[Section]:
    """The tables of what ``analyse`` gave."""
    seeds, baseline, arms = result["seeds"], result["baseline"], result["arms"]
    head = ["method", "network"]
    for which in _WHICH:
        head += [which, f"{which} minus {baseline}"] if baseline else [which]
    head += [f"{which} by seed ({', '.join(map(str, seeds))})" for which in _WHICH]
    rows = []
    for arm, entry in arms.items():
        name, gains = arm + " †" * entry["order"], entry["difference"]
        for network, figures in entry["networks"].items():
            cells = []
            for which in _WHICH:
                gain = _gain(gains.get(which)) if name and arm != baseline else ""
                cells += [summary(figures[which]), gain] if baseline else [summary(figures[which])]
            rows.append([name, network, *cells, *(_by_seed(figures[which]) for which in _WHICH)])
            name = ""
    found = [Section("mIoU in percent, mean ± standard deviation over seeds", head, rows)]
    rows = []
    for arm, entry in arms.items():
        costs = [(entry["cost"][key], form) for key, (_, form) in COSTS.items()]
        rows.append([arm, *(MISSING if value is None else format(value, form) for value, form in costs)])
    titles = [title for title, _ in COSTS.values()]
    found.append(Section("What it costs, means over seeds", ["method", *titles], rows))
    classes = dict.fromkeys(name for entry in arms.values() for name in entry["iou"])
    rows = [[name, *(summary(entry["iou"].get(name)) for entry in arms.values())] for name in classes]
    title = "IoU of each class after the last epoch, in percent, mean ± standard deviation over seeds"
    return [*found, Section(title, ["class", *arms], rows)]


def summary(figure: dict[str, Any] | None) -> str:
    """``mean ± standard deviation``, the mean alone of one seed."""
    if figure is None or figure["mean"] is None:
        return MISSING
    return f"{figure['mean']:.2f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.2f}")


def _by_seed(figure: dict[str, Any]) -> str:
    return ", ".join(MISSING if value is None else f"{value:.2f}" for value in figure["seeds"].values())


def _gain(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return MISSING
    if gain["low"] is None:
        return _signed(gain["mean"]) + " (one seed: no interval)"
    interval = f"{_signed(gain['mean'])} [{_signed(gain['low'])}, {_signed(gain['high'])}]"
    return interval + ("" if gain["separable"] else " not separable")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def markdown(section: Section) -> str:
    """A table of Markdown, which a page of the documentation takes as it is."""
    lines = [section.head, ["---"] * len(section.head), *section.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def latex(section: Section, notes: Sequence[str]) -> str:
    """A ``tabular`` without packages, and its notes below it."""
    lines = [" & ".join(cell.translate(_ESCAPES) for cell in line) + r" \\" for line in (section.head, *section.rows)]
    body = "\n".join([r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"])
    below = "".join(f"\n\\par {note.translate(_ESCAPES)}" for note in notes)
    return f"\\begin{{tabular}}{{{'l' * len(section.head)}}}\n{body}\n\\end{{tabular}}{below}\n"


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of what ``analyse`` gave for a CSV file, unrounded: a row for each network."""
    rows = []
    for arm, entry in result["arms"].items():
        more = {f"{which}_minus_baseline": gain for which, gain in entry["difference"].items() if gain}
        for network, figures in entry["networks"].items():
            rows.append({"method": arm, "network": network} | dotted(figures | more | entry["cost"]))
            more = {}
    return rows
