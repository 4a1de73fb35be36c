"""What a run tells: log lines, CSV files and TensorBoard, all with the same names, by the main process alone."""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import distributed

METRICS = ("epoch", "loss_lb", "loss_ub", "miou_stu", "miou_tea", "best", "best-stu")
SCORES = ("epoch", "image", "score")


def start_logging(folder: Path | None = None) -> None:
    """Lines of the ``imas`` logger to the console and, with a folder, to ``train.log`` in it."""
    logger = logging.getLogger("imas")
    logger.propagate = False
    logger.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None and distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "train.log", encoding="utf-8"))
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


class RunLog:
    """The files of one run: ``metrics.csv``, ``scores.csv`` and ``tensorboard/`` in the log folder.

    Args:
        folder: the log folder.
        tensorboard: whether to write TensorBoard files.
        first_epoch: rows of this epoch and later ones, left by a run that was cut off, are dropped.
    """

    def __init__(self, folder: Path, tensorboard: bool, first_epoch: int) -> None:
        self.folder = folder
        self.active = distributed.is_main()
        self.writer = None
        if not self.active:
            return
        _keep_rows_before(folder / "metrics.csv", METRICS, first_epoch)
        _keep_rows_before(folder / "scores.csv", SCORES, first_epoch)
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

    def metrics(self, row: Mapping[str, Any]) -> None:
        """One row of ``metrics.csv``; what is missing stays empty."""
        if self.active:
            _append(self.folder / "metrics.csv", [[row.get(column, "") for column in METRICS]])

    def scores(self, rows: Iterable[tuple[int, str, float]]) -> None:
        """Rows of ``scores.csv``: epoch, image, score."""
        if self.active:
            _append(self.folder / "scores.csv", ([epoch, image, f"{score:.4f}"] for epoch, image, score in rows))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _append(path: Path, rows: Iterable[list]) -> None:
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _keep_rows_before(path: Path, columns: tuple[str, ...], epoch: int) -> None:
    """Rewrite a CSV whose first column is the epoch, or start it."""
    kept: list[list[str]] = []
    if path.is_file() and epoch > 0:
        with open(path, newline="", encoding="utf-8") as file:
            kept = [row for row in list(csv.reader(file))[1:] if row and int(row[0]) < epoch]
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(columns), *kept])
    os.replace(temporary, path)
