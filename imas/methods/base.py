"""What every method is to the engine.

Letters: B images, H×W the crop, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.deeplabv3plus import DeepLabV3Plus
from ..ops.hardness import Hardness
from ..ops.pseudo import Prediction

Criterion = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """Normalised images and labels of one step, on one device. What the method did not ask for is None."""

    images: Tensor  # (B, 3, H, W) labeled
    labels: Tensor  # (B, H, W) int64, classes or the ignore index
    images_strong: Tensor | None = None  # (B, 3, H, W) strong view of the labeled crops
    weak: Tensor | None = None  # (B, 3, H, W) unlabeled
    strong: Tensor | None = None  # (B, 3, H, W) strong view of the same crops
    index: Tensor | None = None  # (B,) int64, position of each unlabeled image in its list


class Progress(NamedTuple):
    """Where training stands. A step is a pure function of weights, batch and progress."""

    epoch: int
    iteration: int  # from the start of training
    iterations_per_epoch: int
    generator: torch.Generator  # on the CPU, this rank's own for this iteration


class Step(NamedTuple):
    """What one step gives back. Everything stays on the device; nothing here has waited for it."""

    loss: Tensor
    scalars: dict[str, Tensor]  # by name: a number, or (C,) one for each class
    score: Tensor | None = None  # (B,) of the unlabeled images


class Mixed(NamedTuple):
    """The CutMix view and what it should be predicted as."""

    images: Tensor  # (B, 3, H, W)
    pseudo: Prediction


class Views(NamedTuple):
    """What becomes of unlabeled images before the student trains on them."""

    student: Prediction  # of the weak views
    teacher: Prediction | None  # likewise
    pseudo: Prediction  # what the strong views should be predicted as
    hardness: Hardness | None
    strong: Tensor | None  # (B, 3, H, W) as it is trained on
    mixed: Mixed | None


class Method(nn.Module):
    """A module that owns its student and whatever else it trains with.

    The engine wraps the whole method in DistributedDataParallel: a method never sees a rank, every trainable
    parameter must reach the loss in every step, and no state of one rank may hide in its buffers.

    Args:
        student: the network that is trained.
        criterion: (logits, labels) → scalar, the supervised loss; resizes the logits to the labels.
        aux_weight: of the auxiliary head's loss.
    """

    def __init__(self, student: DeepLabV3Plus, criterion: Criterion, aux_weight: float) -> None:
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.aux_weight = aux_weight

    def forward(self, batch: Batch, progress: Progress) -> Step:
        raise NotImplementedError

    def needs_unlabeled(self, epoch: int) -> bool:
        """Whether steps of this epoch read unlabeled images."""
        return False

    def views(
        self, weak: Tensor, strong: Tensor | None, generator: torch.Generator, *, always_mix: bool = False
    ) -> Views | None:
        """What a step would make of unlabeled images, to be looked at; None in a method without such.

        Args:
            weak, strong: as in ``Batch``.
            always_mix: make the mixed view also where chance would not.
        """
        return None

    def after_step(self, progress: Progress) -> None:
        """Called after the optimiser's update."""

    def rates(self, progress: Progress) -> dict[str, float]:
        """What else is to be logged of this iteration, known without a look at the device."""
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """The networks to evaluate and save, by name. The first selects the best checkpoint."""
        return {"student": self.student}

    def param_groups(self) -> list[dict]:
        """The student's parameters as two groups named ``encoder`` and ``heads``."""
        encoder = list(self.student.encoder.parameters())
        known = {id(parameter) for parameter in encoder}
        heads = [parameter for parameter in self.student.parameters() if id(parameter) not in known]
        return [{"name": "encoder", "params": encoder}, {"name": "heads", "params": heads}]

    def supervised_loss(self, coarse: Tensor, coarse_aux: Tensor | None, labels: Tensor) -> Tensor:
        """Criterion of main and auxiliary logits, (B, C, h, w) before the last resize (spec, Losses)."""
        loss = self.criterion(coarse, labels)
        if coarse_aux is not None:
            loss = loss + self.aux_weight * self.criterion(coarse_aux, labels)
        return loss
