"""What a run tells: log lines, CSV files and TensorBoard, all with the same names, by the main process alone."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import distributed
from ..errors import UserError
from ..files import replacing

log = logging.getLogger("imas")

METRICS = ("epoch", "loss_lb", "loss_ub", "miou_stu", "miou_tea", "best", "best-stu")
SCORES = ("epoch", "image", "score")
WARNINGS = ("epoch", "warning")


def start_logging(folder: Path | None = None) -> None:
    """Lines of the ``imas`` logger to the console and, with a folder, to ``train.log`` in it."""
    log.propagate = False
    log.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None and distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "train.log", encoding="utf-8"))
    for handler in log.handlers[:]:
        log.removeHandler(handler)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


def need_tensorboard() -> None:
    """Raise ``UserError`` where TensorBoard cannot be imported."""
    try:
        import torch.utils.tensorboard  # noqa: F401  takes a second
    except Exception as error:  # a protobuf that does not fit raises a TypeError
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"saver.use_tb: TensorBoard cannot be imported ({type(error).__name__}: {reason}); "
            "install it anew (pip install tensorboard), or set saver.use_tb: false"
        ) from None


class RunLog:
    """The CSV files of one run, and ``tensorboard/``, in the log folder.

    Args:
        folder: the log folder.
        tensorboard: whether to write TensorBoard files.
        first_epoch: rows of this epoch and later ones, left by a run that was cut off, are dropped.
        columns: further columns of ``metrics.csv``.
    """

    def __init__(self, folder: Path, tensorboard: bool, first_epoch: int, columns: Iterable[str] = ()) -> None:
        self.folder = folder
        self.columns = tuple(dict.fromkeys((*METRICS, *columns)))
        self.active = distributed.is_main()
        self.writer = None
        self.rows: list[dict[str, float]] = []  # of training.csv
        if not self.active:
            return
        for name, columns in (("metrics", self.columns), ("scores", SCORES), ("warnings", WARNINGS)):
            _keep_rows_before(folder / f"{name}.csv", columns, first_epoch)
        self.rows = [row for row in _read_numbers(folder / "training.csv") if row["epoch"] < first_epoch]
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.writer = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """TensorBoard scalars."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, iteration)

    def image(self, name: str, picture: Any, iteration: int) -> None:
        """A TensorBoard picture, (3, H, W) uint8."""
        if self.writer is not None:
            self.writer.add_image(name, picture, iteration)

    def histogram(self, name: str, values: list[float], iteration: int) -> None:
        """A TensorBoard histogram."""
        if self.writer is not None:
            self.writer.add_histogram(name, np.asarray(values), iteration)

    def training(self, row: Mapping[str, float]) -> None:
        """One row of ``training.csv``, whose columns are all names that any epoch has brought."""
        self.rows.append(dict(row))
        if self.active:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            _write(
                self.folder / "training.csv", [columns, *([row.get(name, "") for name in columns] for row in self.rows)]
            )

    def warn(self, epoch: int, warning: str) -> None:
        """A log line and a row of ``warnings.csv``."""
        log.warning("%s", warning)
        if self.active:
            _append(self.folder / "warnings.csv", [[epoch, warning]])

    def metrics(self, row: Mapping[str, Any]) -> None:
        """One row of ``metrics.csv``; what is missing stays empty."""
        if self.active:
            _append(self.folder / "metrics.csv", [[row.get(column, "") for column in self.columns]])

    def scores(self, rows: Iterable[tuple[int, str, float]]) -> None:
        """Rows of ``scores.csv``: epoch, image, score."""
        if self.active:
            _append(self.folder / "scores.csv", ([epoch, image, f"{score:.4f}"] for epoch, image, score in rows))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def last_scores(folder: Path) -> dict[str, tuple[int, float]]:
    """Epoch and value of the last score of each image in the ``scores.csv`` of a log folder."""
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        return {row["image"]: (int(row["epoch"]), float(row["score"])) for row in csv.DictReader(file)}


def _append(path: Path, rows: Iterable[list]) -> None:
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _keep_rows_before(path: Path, columns: tuple[str, ...], epoch: int) -> None:
    """Rewrite a CSV whose first column is the epoch, or start it."""
    kept: list[list[str]] = []
    if path.is_file() and epoch > 0:
        with open(path, newline="", encoding="utf-8") as file:
            kept = [row for row in list(csv.reader(file))[1:] if row and int(row[0]) < epoch]
    _write(path, [list(columns), *kept])


def _read_numbers(path: Path) -> list[dict[str, float]]:
    """Rows of a CSV of numbers, empty cells left out; none without the file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _write(path: Path, rows: list[list]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
