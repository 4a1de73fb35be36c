"""Reads the log folder of a run. Every file may be missing but ``metrics.csv``, its own or that of a stage."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import UserError
from ..legacy import COLUMNS

NETWORK_NAMES = {column.removeprefix("miou_"): name for name, column in COLUMNS.items()}


class Curve(NamedTuple):
    """Finite values, and the epoch of each."""

    epochs: list[int]
    values: list[float]


@dataclass(frozen=True)
class Record:
    """One run, or one stage of a run."""

    folder: Path  # the log folder
    name: str  # short, and different for all runs on one page
    colour: str  # its class in the style sheet
    label: str  # the name, or nothing if this is the only run on the page
    epochs: int  # epochs done
    curves: dict[str, Curve]  # by column of metrics.csv and training.csv; columns without a value are left out
    warnings: list[tuple[str, str]]  # (epoch, sentence)
    evaluation: dict  # evaluation.json
    recipe: dict  # config.yaml
    starts: list[dict]  # run.yaml
    stages: list[Record]  # log/<stage>/, in the order in which they were trained

    @property
    def mious(self) -> dict[str, Curve]:
        """mIoU in percent by network."""
        columns = {column.removeprefix("miou_"): column for column in self.curves if column.startswith("miou_")}
        return {NETWORK_NAMES.get(name, name): self.curves[column] for name, column in columns.items()}


def read_records(runs: Sequence[Path]) -> list[Record]:
    """Read the runs in folders that contain ``log/``, or in log folders."""
    logs = [_log_folder(run) for run in runs]
    if twice := [log for log in logs if logs.count(log) > 1]:
        raise UserError(f"{twice[0]}: this run is named twice")
    folders = [log.parent if log.name == "log" else log for log in logs]
    common = os.path.commonpath(folders if len(runs) > 1 else [folders[0].parent])
    names = [folder.relative_to(common).as_posix() for folder in folders]
    return [_read(log, name, f"c{i % 6}", name * (len(runs) > 1)) for i, (log, name) in enumerate(zip(logs, names))]


def _log_folder(run: Path) -> Path:
    for folder in (run / "log", run):
        if (folder / "metrics.csv").is_file() or any(folder.glob("*/metrics.csv")):
            return folder.resolve()
    raise UserError(f"{run}: no log/metrics.csv there, so no run; expected the folder of a run, or its log folder")


def _read(log: Path, name: str, colour: str = "c0", label: str = "") -> Record:
    curves: dict[str, Curve] = {}
    for path in (log / "metrics.csv", log / "training.csv"):
        curves |= _curves(path)
    epochs = curves.pop("epoch", Curve([-1], [])).epochs[-1] + 1
    warnings = [(row["epoch"], row["warning"]) for row in _rows(log / "warnings.csv", "epoch", "warning")]
    kinds = {"evaluation.json": dict, "config.yaml": dict, "run.yaml": list}
    contents = [_load(log / file, kind) for file, kind in kinds.items()]
    stages = sorted(log.glob("*/metrics.csv"), key=lambda path: (path.stat().st_mtime, path))
    stages = [_read(path.parent, path.parent.name) for path in stages]
    return Record(log, name, colour, label, epochs, curves, warnings, *contents, stages)


def _rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with these columns; none if there is no file. A row that is cut short is left out."""
    if path.is_file():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            if missing := set(columns).difference(reader.fieldnames or []):
                raise UserError(f"{path}: expected a CSV file with the columns {', '.join(columns)}; no {min(missing)}")
            yield from (row for row in reader if None not in row and None not in row.values())


def _curves(path: Path) -> dict[str, Curve]:
    """Curves by column; cells that are empty or not finite are left out."""
    curves: dict[str, Curve] = {}
    for row in _rows(path, "epoch"):
        for name, cell in row.items():
            try:
                epoch, value = float(row["epoch"] or "nan"), float(cell or "nan")
            except ValueError:
                where = f"{name} in epoch {row['epoch']}"
                raise UserError(f"{path}: expected numbers, got {cell[:80]!r} for {where}") from None
            if math.isfinite(epoch) and math.isfinite(value):
                curve = curves.setdefault(name, Curve([], []))
                curve.epochs.append(int(epoch))
                curve.values.append(value)
    return curves


def _load(path: Path, kind: type) -> Any:
    """The mapping, or list of mappings, in a JSON or YAML file; an empty one if there is no file."""
    if not path.is_file():
        return kind()
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, kind) or (kind is list and not all(isinstance(start, dict) for start in content)):
        raise UserError(f"{path}: expected {'a list of starts' if kind is list else 'a mapping'}, as a run writes it")
    return content
