"""Warnings in plain words about what looks unhealthy in the curves of a run, each given once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..schema import Config

Row = dict[str, float]  # of training.csv

_EPOCHS, _ITERATIONS = 5, 50  # how long a state has to last, in both, before it is worth a warning
_LITTLE = 0.01
_DISAGREEMENT = 0.5
_WAITING = 0.3
_NONE = 0.05  # times the share that the labeled images have of a class
_FALL = 10  # points of mIoU
_ALIVE, _DEAD = 10, 0.5  # IoU in percent of a class before and after it died
_GENTLER = ("a lower trainer.optimizer.kwargs.lr", "more labeled images")
_LESS_UNLABELED = ("a longer .sup_only_epoch", "a lower .loss_weight")


class Health:
    """Looks at each epoch's row of ``training.csv``. A check whose columns a method does not log is left out.

    Args:
        length: iterations per epoch.
        selecting: the column with the mIoU of the network that selects the best checkpoint.
        rows: of earlier epochs, where a run is resumed; their warnings are not given again.
    """

    def __init__(
        self, config: Config, length: int, class_names: Sequence[str], selecting: str, rows: Sequence[Row] = ()
    ) -> None:
        self.config, self.class_names, self.selecting = config, class_names, selecting
        self.lasting = max(_EPOCHS, math.ceil(_ITERATIONS / length))  # epochs
        self.rows: list[Row] = []  # the last of them
        self.highest: Row = {}  # value of each column before the last row
        self.best_epoch, self.fallen_from = 0, -1  # and the best epoch of the last warning of a fall
        self.died, self.dead = "", False  # the first class to die, and when; whether any is dead now
        self.silent: set[str] = set()
        self.checks = [self._death, self._fall, self._waiting, self._no_score, self._full_score, self._disagreement]
        self.checks += [self._collapse, self._silence]
        for row in rows:
            self.look(row)

    def look(self, row: Row) -> list[str]:
        """Warnings about the run up to this row: what is wrong, and what may help."""
        self.rows = [*self.rows, row][-self.lasting :]
        warnings = [(check, warning) for check in self.checks if (warning := check())]
        again = self._death, self._fall, self._silence
        self.checks = [check for check in self.checks if check in again or check not in dict(warnings)]
        if row.get(self.selecting, -1) > self.highest.get(self.selecting, -1):
            self.best_epoch = int(row["epoch"])
            self.died = self.died if self.dead else ""
        self.highest |= {name: max(value, self.highest.get(name, value)) for name, value in row.items()}
        return [warning for _, warning in warnings]

    def _death(self) -> str | None:
        """At once, the first class to die on the validation images or in the pseudo labels; again where all have lived
        at a new best.
        """
        row, now = self.rows[-1], {}
        for name in self.class_names:
            iou, share = row.get(f"iou/{name}", _ALIVE), row.get(f"predicted/{name}", 1)
            best, labeled = self.highest.get(f"iou/{name}", 0), row.get(f"labeled/{name}", 0)
            if best > _ALIVE and iou < _DEAD:
                now[name] = f"{name}: IoU {iou:.1f} after {best:.1f}"
            elif best > _ALIVE and share < _LITTLE * labeled:
                now[name] = f"{name}: {100 * share:.2f} % of the pseudo labels, {100 * labeled:.1f} % of the labels"
        self.dead = bool(now)
        if now and not self.died:
            self.died = f"{', '.join(now)} in epoch {row['epoch']:.0f}"
            return f"first class to die: {self.died} ({'; '.join(now.values())}): {self._gentler()}"

    def _fall(self) -> str | None:
        """At once, and again after a new best."""
        best = self.highest.get(self.selecting, 0)
        now = self.rows[-1].get(self.selecting, best)
        died = f"; first class to die: {self.died}" if self.died else ""
        if now < best - _FALL and self.best_epoch != self.fallen_from:
            self.fallen_from = self.best_epoch
            return (
                f"mIoU has fallen to {now:.1f} from {best:.1f}, of which ckpt_best.pth is: {best - now:.1f} points "
                f"lost since the best epoch, {self.best_epoch}{died}: {self._gentler()}"
            )

    def _waiting(self) -> str | None:
        timed = [row for row in self.rows if "seconds" in row]  # a resumed run may find an epoch already done
        waited, passed = (sum(row[name] for row in timed) for name in ("seconds_waiting", "seconds"))
        if len(self.rows) == self.lasting and waited > _WAITING * passed:
            return (
                f"training waits for data {100 * waited / passed:.0f} % of the time: more dataset.workers (now "
                f"{self.config.dataset.workers}), dataset.cache: true or a faster disk may help"
            )

    def _no_score(self) -> str | None:
        name = "score" if "score" in self.rows[-1] else "pseudo"
        what = {"score": "the score", "pseudo": "the share of pixels that pass the threshold"}[name]
        if max(self._column(name), default=1) < _LITTLE:
            advice = self._advice("a lower .threshold", "a longer .sup_only_epoch", "more labeled images")
            return f"{what} has been 0 for {self.lasting} epochs, no unlabeled image counts: {advice}"

    def _full_score(self) -> str | None:
        if min(self._column("score"), default=0) > 1 - _LITTLE:
            return (
                f"the score has been 1 for {self.lasting} epochs, the networks are sure of everything: if "
                "log/views.png shows that they are right, a higher dataset.train.strong_aug.num_augs may help"
            )

    def _disagreement(self) -> str | None:
        agreement = self._column("agreement")
        if max(agreement, default=1) < _DISAGREEMENT:
            return (
                f"the networks have agreed on less than half of all pixels for {self.lasting} epochs "
                f"({100 * agreement[-1]:.0f} % in this one): "
                + self._advice("a lower trainer.optimizer.kwargs.lr", "a lower .ema_decay", "a lower .loss_weight")
            )

    def _collapse(self) -> str | None:
        """At least half of the classes have vanished, in the place of which there is another."""
        gained = {}
        for name in self.class_names:
            predicted, labeled = self._column(f"predicted/{name}"), self._column(f"labeled/{name}")
            if predicted and sum(labeled) > 0:
                gained[name] = sum(predicted) / sum(labeled)
        onto = max(gained, key=gained.__getitem__, default="")
        lost = [name for name in gained if name != onto and gained[name] < _NONE]
        if lost and 2 * len(lost) >= len(gained) - 1:
            return (
                f"pseudo labels have collapsed onto {onto}: of {', '.join(lost)} there has been less than "
                f"{100 * _NONE:.0f} % of what the labeled images hold, for {self.lasting} epochs: "
                f"{self._gentler()}"
            )

    def _silence(self) -> str | None:
        """Once for each class."""
        silent = {name for name in self.class_names if max(self._column(f"confident/{name}"), default=1) == 0}
        new = [name for name in self.class_names if name in silent - self.silent]
        self.silent |= silent
        if new:
            return (
                f"no pixel of {', '.join(new)} has passed the threshold for {self.lasting} epochs, so that the "
                "unsupervised loss cannot teach it: "
                + self._advice("a lower .threshold", "a longer .sup_only_epoch", "more labeled images of it")
            )

    def _column(self, name: str) -> list[float]:
        """The last values of a column, if every one of the last epochs has one; else none."""
        values = [row[name] for row in self.rows if name in row]
        return values if len(values) == self.lasting else []

    def _gentler(self) -> str:
        """Advice against wrong pseudo labels, or where there are none."""
        if "loss_ub" not in self.rows[-1]:
            return self._advice(*_GENTLER)
        return f"if log/views.png shows wrong pseudo labels, {self._advice(*_LESS_UNLABELED, *_GENTLER)}"

    def _advice(self, *hints: str) -> str:
        """Hints as words. One that ends in ``.KEY`` is for methods that have this option, and names its value."""
        section, words = self.config.method, []
        for start, dot, key in (hint.partition(" .") for hint in hints):
            value = getattr(self.config.options, key, None) if dot else None
            words += [start] if not dot else [] if value is None else [f"{start} {section}.{key} (now {value})"]
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))) + " may help"
