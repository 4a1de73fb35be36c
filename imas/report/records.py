"""Reads the log folder of a run. Every file in it may be missing but ``metrics.csv``."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..strict import UserError

NETWORK_NAMES = {"stu": "student", "tea": "teacher"}  # short names in column names; all others are names already


class Curve(NamedTuple):
    """Finite values, and the epoch of each."""

    epochs: list[int]
    values: list[float]


@dataclass(frozen=True)
class Record:
    """One run, or one stage of a run."""

    folder: Path  # the log folder
    name: str  # short, and different for all runs on one page
    place: int  # among the runs on the page, from 0; it decides the colour
    alone: bool  # the only run on the page
    curves: dict[str, Curve]  # by column of metrics.csv and training.csv; columns without a value are left out
    epochs: int  # epochs done
    scores: dict[str, Curve]  # by image
    warnings: list[tuple[str, str]]  # (epoch, sentence)
    evaluation: dict  # evaluation.json
    recipe: dict  # config.yaml
    starts: list[dict]  # run.yaml
    stages: list[Record]  # log/<stage>/, in the order of training

    @property
    def miou(self) -> dict[str, Curve]:
        """mIoU in percent by network. The first network selects the best checkpoint."""
        curves = {column[5:]: curve for column, curve in self.curves.items() if column.startswith("miou_")}
        highest = {name: max(curve.values) for name, curve in curves.items()}
        best = self.curves["best"].values[-1] if "best" in self.curves else max(highest.values(), default=0.0)
        order = sorted(curves, key=lambda name: abs(highest[name] - best))
        return {NETWORK_NAMES.get(name, name): curves[name] for name in order}


def read_records(runs: Sequence[Path]) -> list[Record]:
    """Read the runs in folders that contain ``log/``, or in log folders.

    Raises:
        UserError: a folder without a run, a run that is given twice, or a file of another format.
    """
    folders = [_log_folder(run) for run in runs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: this run is named twice")
    return [_read(folder, name, i, len(folders) == 1) for i, (folder, name) in enumerate(zip(folders, _names(folders)))]


def _log_folder(run: Path) -> Path:
    for folder in (run / "log", run):
        if (folder / "metrics.csv").is_file() or any(folder.glob("*/metrics.csv")):
            return folder.resolve()
    raise UserError(f"{run}: no log/metrics.csv there, so no run; expected the folder of a run, or its log folder")


def _names(folders: list[Path]) -> list[str]:
    """The last parts of each path, as many as make it different from the others."""
    paths = [(folder.parent if folder.name == "log" else folder).parts for folder in folders]
    names = []
    for i, path in enumerate(paths):
        others = paths[:i] + paths[i + 1 :]
        depths = range(1, len(path) + 1)
        depth = next((depth for depth in depths if all(other[-depth:] != path[-depth:] for other in others)), None)
        names.append("/".join(path[-depth:]) if depth else str(folders[i]))  # both a and a/log may contain a run
    return names


def _read(folder: Path, name: str, place: int, alone: bool) -> Record:
    curves = _curves(folder / "metrics.csv")
    done = curves.get("epoch", Curve([], []))
    curves |= _curves(folder / "training.csv")
    curves.pop("epoch", None)
    stages = sorted(folder.glob("*/metrics.csv"), key=lambda path: (path.stat().st_mtime, path))
    scores = (
        (row["image"], row["epoch"], row["score"]) for row in _rows(folder / "scores.csv", "epoch", "image", "score")
    )
    return Record(
        folder=folder,
        name=name,
        place=place,
        alone=alone,
        curves=curves,
        epochs=max(done.epochs, default=-1) + 1,
        scores=_collect(folder / "scores.csv", scores),
        warnings=[(row["epoch"], row["warning"]) for row in _rows(folder / "warnings.csv", "epoch", "warning")],
        evaluation=_load(folder / "evaluation.json", dict),
        recipe=_load(folder / "config.yaml", dict),
        starts=_load(folder / "run.yaml", list),
        stages=[_read(path.parent, path.parent.name, 0, True) for path in stages],
    )


def _rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with these columns; none if there is no file. A row that is cut short is left out."""
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if missing := [column for column in columns if column not in (reader.fieldnames or [])]:
            raise UserError(f"{path}: expected a CSV file with the columns {', '.join(columns)}; no {missing[0]} there")
        yield from (row for row in reader if None not in row and None not in row.values())


def _curves(path: Path) -> dict[str, Curve]:
    return _collect(path, ((name, row["epoch"], cell) for row in _rows(path, "epoch") for name, cell in row.items()))


def _collect(path: Path, cells: Iterable[tuple[str, str, str]]) -> dict[str, Curve]:
    """Curves by name of (name, epoch, value); cells that are empty or not finite are left out."""
    curves: dict[str, Curve] = {}
    for name, *pair in cells:
        try:
            epoch, value = (float(cell or "nan") for cell in pair)
        except ValueError:
            raise UserError(f"{path}: expected numbers, got {pair[1][:80]!r} in the column {name}") from None
        if math.isfinite(epoch) and math.isfinite(value):
            curve = curves.setdefault(name, Curve([], []))
            curve.epochs.append(int(epoch))
            curve.values.append(value)
    return curves


def _load(path: Path, kind: type) -> Any:
    """The dict, or list of dicts, in a JSON or YAML file; an empty one if there is no file."""
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
