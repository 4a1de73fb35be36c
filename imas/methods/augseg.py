"""AugSeg: strong views of random strength, and CutMix that carries labeled patches into unsure images (Zhao et al.,
CVPR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import mixing
from ..ops.losses import consistency_loss
from ..ops.pseudo import Prediction, logged_shares, predict_scored
from ..schema import FRACTION, NOT_NEGATIVE, Config, Wants
from ..strict import option
from .base import Labeled, Progress, Step, StudentTeacher, Unlabeled

_IGNORED = 255  # in pseudo labels


@dataclass(frozen=True)
class Options:
    """Section ``augseg``."""

    threshold: float = option(0.95, check=FRACTION)  # τ
    loss_weight: float = option(1.0, check=NOT_NEGATIVE)
    use_cutmix: bool = True  # the mixing needs both, as in the authors' files
    use_cutmix_adaptive: bool = True
    use_cutmix_trigger_prob: float = option(1.0, check=FRACTION)
    extra_weak: bool = False  # the weak views take part in the student's forward, for BatchNorm's statistics
    sup_only_epoch: int = option(0, check=NOT_NEGATIVE)  # epochs of supervised warm-up
    ema_decay: float = option(0.999, check=FRACTION)  # upper bound of the teacher's decay


class Draws(NamedTuple):
    """Random numbers of the mixing of one batch, on its device."""

    partner: Tensor  # (B,) int64, a permutation: whose patches, labeled and unlabeled, each image takes
    labeled_box: Tensor  # (B, H, W) bool
    unlabeled_box: Tensor  # (B, H, W) bool
    uniform: Tensor  # (B,) in [0, 1)


class Mixed(NamedTuple):
    """Unlabeled images as the student sees them."""

    image: Tensor  # (B, 3, H, W)
    pseudo: Prediction  # its label may be 255, from labeled patches
    injected: Tensor  # (B,) bool, whether the image's candidate has a labeled patch


class AugSeg(StudentTeacher):
    """Student and EMA teacher; the less the teacher is sure of an image, the more often it gets a labeled patch."""

    Options = Options

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(unlabeled=True, strong=1)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        problems = super().check(config)
        if config.dataset.train.strong_aug is None:
            problems["dataset.train.strong_aug"] = (
                "missing; augseg trains on strong views: {type: narrow_pool, num_augs: 3, random_number: true}"
            )
        return problems

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        if unlabeled is None:  # step 3, warm-up
            loss = self.supervised(*self.student.coarse(labeled.image), labeled.label)
            return Step(loss, {"loss_lb": loss.detach()})

        # Steps 4 and 5: the teacher's pseudo label, and how sure it is of each image.
        pseudo, score = self.predict_weak(unlabeled.weak)

        # Step 6: the strong views with patches of labeled and of unlabeled images.
        mixed = self.mix(labeled, unlabeled.strong[0], pseudo, score, progress.generator)

        # Step 7: one pass.
        views = [unlabeled.weak, mixed.image] if self.options.extra_weak else [mixed.image]
        coarse, coarse_aux = self.student.coarse(torch.cat([labeled.image, *views]))
        of_mixed = coarse[-len(mixed.image) :]

        # Step 8: the supervised loss.
        loss_lb = self.supervised_first(coarse, coarse_aux, labeled.label)

        # Step 9: the unsupervised loss, a mean over all pixels, also those that are dropped.
        label, confidence = mixed.pseudo
        loss_ub = self.options.loss_weight * consistency_loss(of_mixed, label, confidence, self.options.threshold)

        kept = (confidence >= self.options.threshold) & (label != _IGNORED)
        scalars = {
            "loss_lb": loss_lb.detach(),
            "loss_ub": loss_ub.detach(),
            "pseudo": kept.float().mean(),
            "score": score.mean(),
            "score_std": score.std(correction=0),
            "injected": mixed.injected.float().mean(),
            **logged_shares(pseudo, self.options.threshold, labeled.label, self.student.num_classes),
        }
        return Step(loss_lb + loss_ub, scalars, score)  # step 10 is the engine's

    @torch.no_grad()
    def predict_weak(self, weak: Tensor) -> tuple[Prediction, Tensor]:
        """The teacher's prediction of the weak views, in eval mode, and the score of each image (steps 4 and 5)."""
        return predict_scored(self.teacher.coarse(weak, aux=False)[0], weak.shape[-2:])

    def mix(
        self,
        labeled: Labeled,
        strong: Tensor,
        pseudo: Prediction,
        score: Tensor,
        generator: torch.Generator,
        *,
        always: bool = False,
    ) -> Mixed:
        """The adaptive label-injecting CutMix; the strong views as they are where it does not fire (step 6).

        Args:
            strong: (B, 3, H, W); ``labeled`` has as many images of this size.
            score: (B,) in [0, 1].
            always: mix also where chance would not.
        """
        options = self.options
        fires = torch.rand((), generator=generator).item() < options.use_cutmix_trigger_prob or always
        if not (fires and options.use_cutmix and options.use_cutmix_adaptive):
            return Mixed(strong, pseudo, torch.zeros_like(score, dtype=torch.bool))
        partner, labeled_box, unlabeled_box, uniform = self.draw(strong, generator)

        # 6c: candidates, in which an image may have a patch of its partner's labeled image.
        injected = uniform > score
        box = labeled_box & injected.view(-1, 1, 1)
        label = labeled.label.masked_fill(labeled.label >= self.student.num_classes, _IGNORED)
        candidate = [
            mixing.put(strong, labeled.image[partner], box),
            mixing.put(pseudo.label, label[partner], box),
            pseudo.confidence.masked_fill(box, 1.0),
        ]
        # 6d: the images themselves, in which a patch is of the partner's candidate.
        image, label, confidence = (
            mixing.put(base, source[partner], unlabeled_box)
            for base, source in zip((strong, *pseudo), candidate, strict=True)
        )
        return Mixed(image, Prediction(label, confidence), injected)

    def draw(self, strong: Tensor, generator: torch.Generator) -> Draws:
        """Draw for the mixing (steps 6a and 6b): labeled patches are small, unlabeled ones large."""
        batch, _, height, width = strong.shape
        partner = torch.randperm(batch, generator=generator)
        boxes = [
            mixing.cutmix_mask(
                batch, height, width, mixing.beta_side(generator, *of), generator, border=8, device=strong.device
            )
            for of in ((8.0, 2.0), (4.0, 4.0))
        ]
        uniform = torch.rand(batch, generator=generator)
        partner, uniform = (drawn.to(strong.device, non_blocking=True) for drawn in (partner, uniform))
        return Draws(partner, *boxes, uniform)

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        if unlabeled is None:
            return {}
        pseudo, score = self.predict_weak(unlabeled.weak)
        mixed = self.mix(labeled, unlabeled.strong[0], pseudo, score, progress.generator, always=True)
        return {
            "weak view": unlabeled.weak,
            "strong view": unlabeled.strong[0],
            "mixed view": mixed.image,
            "pseudo label (grey: unsure)": mixed.pseudo.sure(self.options.threshold),
            "score": score,
        }
