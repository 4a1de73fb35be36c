"""FixMatch with CutMix, as the repositories of UniMatch and UniMatch-V2 have it.

Step numbers are those of docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..models.deeplabv3plus import DeepLabV3Plus
from ..models.ema import make_teacher, update_teacher
from ..models.modes import evaluating
from ..ops import mixing
from ..ops.losses import valid_consistency_loss
from ..ops.pseudo import Prediction, logged_shares, predict
from ..schema import FRACTION, Config, Wants
from ..strict import option
from .base import Labeled, Method, NewNetwork, Progress, Step, Supervised, Unlabeled


@dataclass(frozen=True)
class Options:
    """Section ``fixmatch``."""

    threshold: float = option(0.95, check=FRACTION)  # τ; 0 keeps all pixels but padding
    teacher: bool = False  # labels of an EMA teacher (UniMatch-V2's flavour), else of the student
    ema_decay: float = option(0.996, check=FRACTION)  # upper bound of the teacher's decay


class Target(NamedTuple):
    """The labels that the student learns on a view."""

    label: Tensor  # (B, H, W) int64
    confidence: Tensor  # (B, H, W) float32
    valid: Tensor  # (B, H, W) bool, False where the view is padding


class FixMatch(Method):
    """Labels of the weak view teach the student on a strong view, into which a box of another image is pasted."""

    Options: ClassVar[type] = Options
    strong_views: ClassVar[int] = 1

    def __init__(self, options: Options, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__(options, new_network, supervised)
        self.student = new_network()
        self.teacher = make_teacher(self.student) if options.teacher else None

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(unlabeled=True, strong=cls.strong_views)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        problems, train = {}, config.dataset.train
        if train.strong_aug is None:
            problems["dataset.train.strong_aug"] = f"missing; {config.method} trains on strong views: {{type: jitter}}"
        if train.batch_size < 2:
            problems["dataset.train.batch_size"] = (
                f"expected at least 2, got {train.batch_size}: {config.method} pastes boxes of other images of a batch"
            )
        return problems

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        # Steps 1 and 2.
        own, theirs, boxes, (strong,) = self.prepared(unlabeled, progress.generator)

        # Steps 3 to 5. Without a teacher the weak views are in the batch for clean statistics of BatchNorm, and their
        # labels are those of this very pass.
        size = len(labeled.image)
        if own is None:
            coarse, aux = self.student.coarse(torch.cat([labeled.image, unlabeled.weak]))
            of_strong, _ = self.student.coarse(strong, aux=False)
            own = self.target(coarse[size:], unlabeled)
        else:
            coarse, aux = self.student.coarse(torch.cat([labeled.image, strong]))
            of_strong = coarse[size:]

        # Steps 6 to 8.
        loss_lb = self.supervised_first(coarse, aux, labeled.label)
        loss_ub = self.consistency(of_strong, mixed(own, theirs, boxes[0]))
        return self.step(labeled, own, loss_lb, loss_ub)

    def prepared(
        self, unlabeled: Unlabeled, generator: torch.Generator
    ) -> tuple[Target | None, Target, list[Tensor], list[Tensor]]:
        """Boxes, mixed images and targets, before the student's pass (steps 1 and 2).

        Returns:
            Targets of the weak views, if the teacher gives them; those of their partners; for each strong view the
            boxes, and the images with their partners inside.
        """
        partner = self.partners(unlabeled)
        boxes = self.boxes(unlabeled.valid, generator)
        strong = [mixing.put(*views) for views in zip(unlabeled.strong, partner.strong, boxes, strict=True)]
        if self.teacher is None:
            return None, self.predicted(self.student, partner), boxes, strong
        own = self.predicted(self.teacher, unlabeled)
        return own, Target(*(values.flip(0) for values in own)), boxes, strong

    def partners(self, unlabeled: Unlabeled) -> Unlabeled:
        """The batch that patches come from: the same in reverse. The middle image of an odd one is its own partner."""
        strong = tuple(view.flip(0) for view in unlabeled.strong)
        return Unlabeled(unlabeled.weak.flip(0), strong, unlabeled.valid.flip(0), unlabeled.index.flip(0))

    def boxes(self, valid: Tensor, generator: torch.Generator) -> list[Tensor]:
        """For each strong view (B, H, W) bool, a box in half of the images."""
        return [mixing.area_mask(*valid.shape, generator, device=valid.device) for _ in range(self.strong_views)]

    @torch.no_grad()
    def predicted(self, network: DeepLabV3Plus, unlabeled: Unlabeled) -> Target:
        """The target of the weak views by a network in eval mode."""
        with evaluating(network):
            coarse, _ = network.coarse(unlabeled.weak, aux=False)
        torch.clear_autocast_cache()  # torch 2.6 would train on weights that were cast here, without a gradient
        return self.target(coarse, unlabeled)

    def target(self, coarse: Tensor, unlabeled: Unlabeled) -> Target:
        """The target that logits of the weak views give; no gradient flows into it."""
        return Target(*predict(coarse, unlabeled.valid.shape[-2:]), unlabeled.valid)

    def consistency(self, coarse: Tensor, target: Target) -> Tensor:
        """Steps 8 and 9, of (B, C, h, w) logits before the last resize."""
        return valid_consistency_loss(coarse, target.label, target.confidence, self.options.threshold, target.valid)

    def step(self, labeled: Labeled, own: Target, loss_lb: Tensor, loss_ub: Tensor, **more: Tensor) -> Step:
        """Step 10, and the scalars of step 11. Padding counts as no class."""
        classes, threshold = self.student.num_classes, self.options.threshold
        passing = ((own.confidence >= threshold) & own.valid).sum() / own.valid.sum().clamp(min=1)
        real = Prediction(own.label.masked_fill(~own.valid, classes), own.confidence)
        scalars = {"loss_lb": loss_lb, "loss_ub": loss_ub, **more, "pseudo": passing}
        scalars |= logged_shares(real, threshold, labeled.label, classes)
        return Step((loss_lb + loss_ub) / 2, {name: value.detach() for name, value in scalars.items()})

    def after_step(self, progress: Progress) -> dict[str, float]:
        if self.teacher is None:
            return {}
        decay = min(1 - 1 / (progress.iteration + 1), self.options.ema_decay)
        update_teacher(self.teacher, self.student, decay)
        return {"decay": decay}

    def networks(self) -> dict[str, nn.Module]:
        return ({} if self.teacher is None else {"teacher": self.teacher}) | self.trained()

    def trained(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        """The pseudo labels are those of eval mode, so that a look changes no statistics of BatchNorm."""
        own, theirs, boxes, strong = self.prepared(unlabeled, progress.generator)
        own = own or self.predicted(self.student, unlabeled)
        columns = {"weak view": unlabeled.weak, "pseudo label (grey: unsure)": self._sure(own)}
        for i, (image, box) in enumerate(zip(strong, boxes, strict=True), 1):
            which = f" {i}" if len(strong) > 1 else ""
            columns[f"CutMix view{which}"] = image
            columns[f"its label{which}"] = self._sure(mixed(own, theirs, box))
        return columns

    def _sure(self, target: Target) -> Tensor:
        takes_part = (target.confidence >= self.options.threshold) & target.valid
        return target.label.masked_fill(~takes_part, 255)

    def train(self, mode: bool = True) -> FixMatch:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def mixed(own: Target, theirs: Target, box: Tensor) -> Target:
    """The target of a view: the partner's inside the box (step 6)."""
    return Target(*(mixing.put(*values, box) for values in zip(own, theirs)))
