"""Whether a run goes well, in words: what an experienced eye would read off the curves, each thing said once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..schema import Config

Row = dict[str, float]  # of training.csv

_EPOCHS, _ITERATIONS = 5, 50  # something is told when it has lasted for both
_LITTLE = 0.01
_DISAGREEMENT = 0.5
_WAITING = 0.3
_MANY, _FEW, _NONE = 2.0, 0.4, 0.05  # times what the labeled images hold of a class
_FALL = 10  # points of mIoU
_SHARES = ("confident", "predicted", "labeled")


class Health:
    """Looks at every epoch's row of ``training.csv``.

    Args:
        length: iterations per epoch.
        rows: of earlier epochs, where a run goes on; what they gave rise to has been told.
    """

    def __init__(self, config: Config, length: int, class_names: Sequence[str], rows: Sequence[Row] = ()) -> None:
        self.config, self.class_names = config, class_names
        self.lasting = max(_EPOCHS, math.ceil(_ITERATIONS / length))  # epochs
        self.rows: list[Row] = []
        self.told: set[str] = set()
        self._needed = {"score", "agreement", *(f"{kind}/{name}" for kind in _SHARES for name in class_names)}
        for row in rows:
            self.look(row)

    def look(self, row: Row) -> list[str]:
        """Warnings, each a sentence on what is the matter and one on what to try; those told before are left out."""
        self.rows = [*self.rows, row][-self.lasting :]
        found = self._fall()
        if len(self.rows) == self.lasting:
            found |= self._waiting()
            if all(self._needed <= each.keys() for each in self.rows):
                found |= self._score() | self._agreement() | self._collapse() | self._silent_classes()
        new = {kind: warning for kind, warning in found.items() if kind not in self.told}
        self.told |= new.keys()
        return list(new.values())

    def _mean(self, name: str) -> float:
        return sum(row[name] for row in self.rows) / len(self.rows)

    def _fall(self) -> dict[str, str]:
        row = self.rows[-1]
        name = "miou_tea" if "miou_tea" in row else "miou_stu"
        if name not in row or row[name] >= row["best"] - _FALL:
            return {}
        return {
            "fall": f"mIoU has fallen to {row[name]:.1f} from {row['best']:.1f}, of which ckpt_best.pth is: if "
            "pseudo labels have led astray (log/views.png), a longer trainer.sup_only_epoch, a lower "
            "trainer.unsupervised.loss_weight or learning rate may help"
        }

    def _waiting(self) -> dict[str, str]:
        timed = [row for row in self.rows if "seconds" in row]  # not an epoch of which a resumed run found all done
        waited, passed = (sum(row[name] for row in timed) for name in ("seconds_waiting", "seconds"))
        if waited <= _WAITING * passed:
            return {}
        workers = self.config.dataset.workers
        return {
            "waiting": f"training waits for data {100 * waited / passed:.0f} % of the time: more dataset.workers (now "
            f"{workers}), dataset.cache: true or a faster disk may help"
        }

    def _score(self) -> dict[str, str]:
        scores = [row["score"] for row in self.rows]
        if max(scores) < _LITTLE:
            return {
                "score 0": f"the score has been 0 for {self.lasting} epochs, no unlabeled image counts: "
                f"{self._lower_threshold()} or a longer trainer.sup_only_epoch may help"
            }
        if min(scores) > 1 - _LITTLE:
            return {
                "score 1": f"the score has been 1 for {self.lasting} epochs, student and teacher are sure of "
                "everything: see in log/views.png whether they are right; if so, strong_aug.num_augs could be higher"
            }
        return {}

    def _agreement(self) -> dict[str, str]:
        agreement = [row["agreement"] for row in self.rows]
        if max(agreement) >= _DISAGREEMENT:
            return {}
        return {
            "divergence": f"student and teacher have agreed on less than half of all pixels for {self.lasting} epochs "
            f"({100 * agreement[-1]:.0f} % in this one): a lower trainer.optimizer.kwargs.lr, a lower net.ema_decay or "
            "a lower trainer.unsupervised.loss_weight may help"
        }

    def _collapse(self) -> dict[str, str]:
        """A class has taken the place of at least half of the others, by what the labeled images hold of them: all of
        it, or much of it where the class itself has become much more.
        """
        gained = {}
        for name in self.class_names:
            labeled = self._mean(f"labeled/{name}")
            if labeled > 0:
                gained[name] = self._mean(f"predicted/{name}") / labeled
        if not gained:
            return {}
        onto = max(gained, key=gained.__getitem__)
        share = _FEW if gained[onto] > _MANY else _NONE
        lost = [name for name in gained if name != onto and gained[name] < share]
        if not lost or 2 * len(lost) < len(gained) - 1:
            return {}
        return {
            "collapse": f"pseudo labels have collapsed onto {onto}: of {', '.join(lost)} there has been less than "
            f"{100 * share:.0f} % of what the labeled images hold, for {self.lasting} epochs. A longer "
            "trainer.sup_only_epoch, a lower trainer.unsupervised.loss_weight or learning rate, or more labeled "
            "images may help"
        }

    def _silent_classes(self) -> dict[str, str]:
        silent = [name for name in self.class_names if all(row[f"confident/{name}"] == 0 for row in self.rows)]
        new = [name for name in silent if f"silent {name}" not in self.told]
        if not new:
            return {}
        self.told |= {f"silent {name}" for name in new}
        return {
            f"silent {new}": f"no pixel of {', '.join(new)} has passed the threshold for {self.lasting} epochs, so "
            f"that the unsupervised loss cannot teach it: {self._lower_threshold()}, a longer "
            "trainer.sup_only_epoch or more labeled images of it may help"
        }

    def _lower_threshold(self) -> str:
        return f"a lower trainer.unsupervised.threshold (now {self.config.trainer.unsupervised.threshold:g})"
