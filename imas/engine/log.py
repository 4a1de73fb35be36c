"""Log lines, CSV files and TensorBoard of a run, by the main process alone."""

from __future__ import annotations

import csv
import itertools
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import distributed
from ..errors import UserError
from ..files import replacing

log = logging.getLogger("imas")

METRICS = ("epoch", "loss_lb", "loss_ub", "miou_stu", "miou_tea", "best", "best-stu")


def start_logging(folder: Path | None = None) -> None:
    """Lines of the ``imas`` logger to the console and, with a folder, to ``train.log`` in it."""
    log.propagate = False
    log.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    if folder is not None and distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        log.handlers.append(logging.FileHandler(folder / "train.log", encoding="utf-8"))
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))


def set_aside(root: Path, stage: str) -> None:
    """Move what an earlier run has left, so that a new run overwrites nothing: ``log/STAGE`` and TensorBoard's files to
    ``log_before_1/STAGE``, or the next free number. ``train.log`` and ``run.yaml``, which are only added to, stay.

    Args:
        root: the folder of ``log/``.
    """
    folder = root / "log" / stage
    if not (folder / "metrics.csv").is_file() or not read_rows(folder / "metrics.csv"):
        return
    numbered = (root / f"log_before_{number}" / stage for number in itertools.count(1))
    aside = next(path for path in numbered if not (path / "metrics.csv").exists())
    aside.mkdir(parents=True, exist_ok=True)
    patterns = ("*.csv", "*.png", "*.json", "*.html", "config.yaml")
    boards = (root / stage).glob("events.out.tfevents.*")
    for path in [*itertools.chain(*map(folder.glob, patterns)), *boards]:
        path.rename(aside / path.name)
    log.warning("%s: an earlier run has left its logs here; they are in %s now", folder, aside)


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
    """The CSV files of one run in the log folder, and ``writer``, TensorBoard's.

    Args:
        folder: the log folder.
        board: folder of the TensorBoard files, whose path is the run's name there. None, and other ranks: no writer.
        first_epoch: rows of this epoch and later ones, left by a run that was cut off, are dropped.
        columns: further columns of ``metrics.csv``.
        updates: updates done before; what a run that was cut off has written to TensorBoard of later ones is hidden.
    """

    def __init__(
        self, folder: Path, board: Path | None, first_epoch: int, columns: Iterable[str] = (), updates: int = 0
    ) -> None:
        self.folder, self.active, self.writer = folder, distributed.is_main(), None
        self.columns = tuple(dict.fromkeys((*METRICS, *columns)))
        self.rows: list[dict[str, float]] = []  # of training.csv
        if not self.active:
            return

        def kept(name: str) -> list[dict[str, str]]:
            path = folder / f"{name}.csv"
            rows = read_rows(path) if path.is_file() and first_epoch > 0 else []
            return [row for row in rows if float(row["epoch"]) < first_epoch]

        for name, columns in (
            ("metrics", self.columns),
            ("scores", ("epoch", "image", "score")),
            ("warnings", ("epoch", "warning")),
        ):
            write_rows(folder / f"{name}.csv", columns, kept(name))
        self.rows = [{name: float(cell) for name, cell in row.items() if cell} for row in kept("training")]
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.writer = SummaryWriter(str(board), purge_step=updates + 1)

    def scalars(self, values: Mapping[str, float], updates: int) -> None:
        """TensorBoard scalars by tag, after this many updates."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, updates)

    def training(self, row: Mapping[str, float]) -> None:
        """One row of ``training.csv``, whose columns are all names that any epoch has brought."""
        self.rows.append(dict(row))
        if self.active:
            write_rows(
                self.folder / "training.csv", dict.fromkeys(name for row in self.rows for name in row), self.rows
            )

    def warn(self, epoch: int, warning: str) -> None:
        """A log line and a row of ``warnings.csv``."""
        log.warning("%s", warning)
        self._append("warnings", [[epoch, warning]])

    def metrics(self, row: Mapping[str, Any]) -> None:
        """One row of ``metrics.csv``; what is missing stays empty."""
        self._append("metrics", [[row.get(column, "") for column in self.columns]])

    def scores(self, rows: Iterable[tuple[int, str, float]]) -> None:
        """Rows of ``scores.csv``: epoch, image, score."""
        self._append("scores", ([epoch, image, f"{score:.4f}"] for epoch, image, score in rows))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _append(self, name: str, rows: Iterable[list]) -> None:
        if self.active:
            with open(self.folder / f"{name}.csv", "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)


def tag(column: str) -> str:
    """The TensorBoard tag of a column of ``training.csv`` that a step gives. TensorBoard makes a group of cards of what
    is before the first slash, in alphabetical order, and opens two of them.
    """
    if column.partition("_")[0] in ("lr", "seconds"):
        return column.replace("lr_", "lr/").replace("seconds", "time/seconds")
    return f"train_classes/{column}" if "/" in column else f"train/{column}"


def one_line(values: Mapping[str, float]) -> str:
    """Columns of a step for a log line: losses, share of pixels that pass, score, rate of the encoder, pace."""
    words = [f"{name} {value:.3g}" for name, value in values.items() if name.startswith("loss")]
    words += [f"pseudo {100 * values['pseudo']:.0f} %"] if "pseudo" in values else []
    words += [f"score {values['score']:.2f}"] if "score" in values else []
    words += [f"lr {value:.2g}" for name, value in values.items() if name in ("lr", "lr_encoder")]
    waiting = 100 * values["seconds_waiting"] / values["seconds"]
    return ", ".join([*words, f"{values['seconds']:.3g} s/it", f"waits {waiting:.0f} %"])


def spoken(seconds: float) -> str:
    """A stretch of time as a person reads it."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60}h{minutes % 60:02}"


def last_scores(folder: Path) -> dict[str, tuple[int, float]]:
    """Epoch and value of the last score of each image in the ``scores.csv`` of a log folder."""
    return {row["image"]: (int(row["epoch"]), float(row["score"])) for row in read_rows(folder / "scores.csv")}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file of these columns, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
