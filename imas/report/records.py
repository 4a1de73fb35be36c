"""What a run left in its log folder, read without asking more of it than ``metrics.csv``."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ..errors import UserError

_SCORES = ("epoch", "image", "score")


class Curve(NamedTuple):
    """One column over the epochs in which it has a finite value."""

    epochs: list[int]
    values: list[float]


class Scores(NamedTuple):
    """Every row of ``scores.csv``, in its order: three arrays of one length, and the names that ``image`` counts."""

    epoch: np.ndarray  # int
    image: np.ndarray  # int, of names
    score: np.ndarray  # float, 1 easy, 0 hard
    names: list[str]


@dataclass(frozen=True)
class Record:
    """One run."""

    folder: Path  # the log folder
    name: str  # short, and another one for every run that is read with it
    place: int  # among them, from 0; it decides the colour
    alone: bool  # whether it is the only one
    curves: dict[str, Curve]  # by column of metrics.csv and training.csv; those without any value are not here
    epochs: int  # epochs done
    scores: Scores
    warnings: list[tuple[str, str]]  # (epoch, sentence)
    evaluation: dict  # evaluation.json
    recipe: dict  # config.yaml
    starts: list[dict]  # run.yaml


def read_records(runs: Sequence[Path]) -> list[Record]:
    """The runs of folders that hold ``log/``, or of log folders.

    Raises:
        UserError: a folder without a run, a run that comes twice, or a file that is none of ours.
    """
    folders = [_log_folder(run) for run in runs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: this run is named twice")
    alone = len(folders) == 1
    return [_read(folder, name, place, alone) for place, (folder, name) in enumerate(zip(folders, _names(folders)))]


def _log_folder(run: Path) -> Path:
    for folder in (run / "log", run):
        if (folder / "metrics.csv").is_file():
            return folder.resolve()
    raise UserError(
        f"{run}: no log/metrics.csv there, so no run; expected the folder of a YAML that was trained, or its log folder"
    )


def _names(folders: list[Path]) -> list[str]:
    """The end of each path, as long as it must be for no other to end so."""
    paths = [(folder.parent if folder.name == "log" else folder).parts for folder in folders]
    names = []
    for place, path in enumerate(paths):
        others = paths[:place] + paths[place + 1 :]
        depths = range(1, len(path) + 1)
        depth = next((depth for depth in depths if all(other[-depth:] != path[-depth:] for other in others)), None)
        names.append("/".join(path[-depth:]) if depth else str(folders[place]))  # a and a/log may both hold a run
    return names


def _read(folder: Path, name: str, place: int, alone: bool) -> Record:
    metrics, training = _epochs(folder / "metrics.csv"), _epochs(folder / "training.csv")
    return Record(
        folder=folder,
        name=name,
        place=place,
        alone=alone,
        curves={**_curves(metrics), **_curves(training)},
        epochs=max((row["epoch"] for row in metrics), default=-1) + 1,
        scores=_scores(folder / "scores.csv"),
        warnings=[(row["epoch"], row["warning"]) for row in _rows(folder / "warnings.csv", "epoch", "warning")],
        evaluation=_evaluation(folder / "evaluation.json"),
        recipe=_yaml(folder / "config.yaml", dict),
        starts=_yaml(folder / "run.yaml", list),
    )


def _rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file that has these columns; none without the file. A last row that is cut short is left out."""
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path}: expected a CSV file with the columns {', '.join(columns)}; no {missing[0]} there")
        for row in reader:
            if None not in row and None not in row.values():
                yield row


def _epochs(path: Path) -> list[dict[str, Any]]:
    """Rows of numbers, ``epoch`` a whole one; cells without a finite number are left out."""
    rows = []
    for row in _rows(path, "epoch"):
        numbers = {name: _number(path, cell) for name, cell in row.items() if cell}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if "epoch" in finite:
            rows.append({**finite, "epoch": int(finite["epoch"])})
    return rows


def _number(path: Path, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise UserError(f"{path}: expected numbers, got {cell[:80]!r}") from None


def _curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    columns = dict.fromkeys(name for row in rows for name in row if name != "epoch")
    return {
        name: Curve(*map(list, zip(*((row["epoch"], row[name]) for row in rows if name in row)))) for name in columns
    }


def _scores(path: Path) -> Scores:
    numbers: dict[str, int] = {}
    rows = [
        (_number(path, row["epoch"]), numbers.setdefault(row["image"], len(numbers)), _number(path, row["score"]))
        for row in _rows(path, *_SCORES)
    ]
    table = np.array(rows, dtype=float).reshape(-1, 3)
    epoch, image, score = table[np.isfinite(table).all(1)].T
    return Scores(epoch.astype(int), image.astype(int), score, list(numbers))


def _evaluation(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("networks"), dict):
        raise UserError(f"{path}: expected the evaluation of a run, with protocol and networks")
    return content


def _yaml(path: Path, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, kind) or (kind is list and not all(isinstance(start, dict) for start in content)):
        raise UserError(f"{path}: expected a {'list of starts' if kind is list else 'recipe'}")
    return content
