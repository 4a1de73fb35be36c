"""iMAS: supervision that follows each unlabeled image's score (paper, section 3; spec, One training step)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.modes import evaluating
from ..ops import mixing
from ..ops.hardness import Hardness, score_predictions
from ..ops.losses import consistency_loss
from ..ops.pseudo import Prediction, logged_shares, predict
from ..schema import FRACTION, NOT_NEGATIVE, Config, Wants
from ..strict import option, replaced
from .base import Labeled, Progress, Step, StudentTeacher, Unlabeled


def _ordered(pair: Any) -> Any:
    numbers = isinstance(pair, list) and all(type(value) in (int, float) for value in pair)
    return sorted(pair) if numbers else pair


@dataclass(frozen=True)
class HardnessOptions:
    """Uses of the score (spec, The score; steps 5 and 6)."""

    version: int = option(1, check=(lambda version: version in (1, 2), "1 or 2"))
    weight_loss: bool = True
    class_weighted: bool = True
    ignore_background: bool | None = None  # class 0 does not count; default: true, with own data false
    trigger_cutmix: bool = False
    blend: bool = False
    scale_box: bool = False
    gaussian_box: bool = False


@dataclass(frozen=True)
class Options:
    """Section ``imas``. Without ``hardness`` the images are scored, and the score decides nothing."""

    threshold: float = option(0.95, check=FRACTION)  # τ
    loss_weight: float = option(1.0, check=NOT_NEGATIVE)
    teacher_pseudo: bool = True  # pseudo labels of the teacher, else of the student
    use_cutmix: bool = False
    use_cutmix_beta: bool = False
    use_cutmix_range: tuple[float, float] = option(
        (0.1, 0.9),
        convert=_ordered,
        check=(lambda pair: 0 < pair[0] <= pair[1] <= 1, "[low, high] with 0 < low <= high <= 1"),
    )
    use_cutmix_trigger_prob: float = option(1.0, check=FRACTION)
    sup_only_epoch: int = option(0, check=NOT_NEGATIVE)  # epochs of supervised warm-up
    ema_decay: float = option(0.996, check=FRACTION)  # upper bound of the teacher's decay
    hardness: HardnessOptions | None = None


class Mixed(NamedTuple):
    """The CutMix view and its pseudo label."""

    image: Tensor  # (B, 3, H, W)
    pseudo: Prediction


class Views(NamedTuple):
    """Unlabeled images, predicted, scored and augmented for the student (spec, steps 2 to 6)."""

    student: Prediction  # of the weak views
    teacher: Prediction  # likewise
    hardness: Hardness
    pseudo: Prediction  # the pseudo label of weak and strong views
    strong: Tensor | None  # (B, 3, H, W), blended; None without ``strong_aug``
    mixed: Mixed | None  # None where CutMix does not fire


class IMAS(StudentTeacher):
    """Student and EMA teacher; the score h of an image steers its augmentation and weighs its loss."""

    Options = Options

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(unlabeled=True, strong=1)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        options, problems = config.options, super().check(config)
        if options.hardness is not None and options.hardness.scale_box and options.hardness.gaussian_box:
            problems["imas.hardness.gaussian_box"] = "cannot be combined with scale_box"
        return problems

    @classmethod
    def resolved(cls, config: Config) -> Options:
        """Class 0 of own data is a class like any other: ground or sky."""
        hardness = config.options.hardness
        if hardness is None or hardness.ignore_background is not None:
            return config.options
        return replaced(config.options, {"hardness.ignore_background": config.dataset.folder is None})

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        if unlabeled is None:  # warm-up
            loss = self.supervised(*self.student.coarse(labeled.image), labeled.label)
            return Step(loss, {"loss_lb": loss.detach()})

        # Steps 2 to 6: predictions, score, pseudo label, blended strong view, CutMix view.
        views = self.views(unlabeled, progress.generator)
        student, teacher, hardness, pseudo, strong, mixed = views

        # What the student trains on, and what it should predict there. Without any such view, the weak views once more.
        train_on = [] if mixed is None else [mixed]
        if strong is not None:
            train_on.append(Mixed(strong, pseudo))
        if not train_on:
            train_on.append(Mixed(unlabeled.weak, pseudo))

        # Step 7: one pass. The weak views contribute no loss; they are there for BatchNorm's statistics.
        batch = [labeled.image, unlabeled.weak, *(view.image for view in train_on)]
        coarse, coarse_aux = self.student.coarse(torch.cat(batch))
        _, _, *of_views = coarse.split([len(images) for images in batch])

        # Step 8: the supervised loss.
        loss_lb = self.supervised_first(coarse, coarse_aux, labeled.label)

        # Step 9: the consistency loss, weighted by the score of the base image.
        weight = hardness.score if self.options.hardness is not None and self.options.hardness.weight_loss else None
        losses = [
            self.consistency(logits, view.pseudo, weight) for logits, view in zip(of_views, train_on, strict=True)
        ]
        loss_ub = self.options.loss_weight * sum(losses) / len(losses)

        scalars = {
            "loss_lb": loss_lb.detach(),
            "loss_ub": loss_ub.detach(),
            "pseudo": hardness.student_confident.mean(),
            "pseudo_teacher": hardness.teacher_confident.mean(),
            "score": hardness.score.mean(),
            "score_std": hardness.score.std(correction=0),
            "agreement": (student.label == teacher.label).float().mean(),
            **logged_shares(pseudo, self.options.threshold, labeled.label, self.student.num_classes),
        }
        return Step(loss_lb + loss_ub, scalars, hardness.score)  # step 10 is the engine's

    def views(self, unlabeled: Unlabeled, generator: torch.Generator, *, always_mix: bool = False) -> Views:
        """Predictions and score of the weak views, and what follows from them (spec, steps 2 to 6).

        Args:
            always_mix: make the CutMix view also where chance would not.
        """
        student, teacher = self.predict_weak(unlabeled.weak)
        flags = self.options.hardness or HardnessOptions()
        hardness = score_predictions(
            student,
            teacher,
            self.student.num_classes,
            self.options.threshold,
            class_weighted=flags.class_weighted,
            ignore_background=flags.ignore_background is not False,
            version=flags.version,
        )
        pseudo = teacher if self.options.teacher_pseudo else student
        strong = self.blend(unlabeled, hardness.score, generator)
        mixed = self.cutmix(unlabeled.weak, pseudo, hardness.score, generator, always=always_mix)
        return Views(student, teacher, hardness, pseudo, strong, mixed)

    @torch.no_grad()
    def predict_weak(self, weak: Tensor) -> tuple[Prediction, Prediction]:
        """Student's and teacher's predictions of the weak views, both in eval mode (spec, steps 2 and 4)."""
        size = weak.shape[-2:]
        with evaluating(self.student):
            student = predict(self.student.coarse(weak, aux=False)[0], size)
        teacher = predict(self.teacher.coarse(weak, aux=False)[0], size)
        torch.clear_autocast_cache()  # torch 2.6 would train on weights that were cast here, without a gradient
        return student, teacher

    def blend(self, unlabeled: Unlabeled, score: Tensor, generator: torch.Generator) -> Tensor | None:
        """The strong view, as strong as the score allows (spec, step 5); None where none is configured."""
        if not unlabeled.strong:
            return None
        if self.options.hardness is None:
            return unlabeled.strong[0]
        if self.options.hardness.blend:
            return mixing.adaptive_blend(unlabeled.strong[0], unlabeled.weak, score)
        return mixing.random_choice(unlabeled.strong[0], unlabeled.weak, score, generator)

    def cutmix(
        self, weak: Tensor, pseudo: Prediction, score: Tensor, generator: torch.Generator, *, always: bool = False
    ) -> Mixed | None:
        """The CutMix view of the weak views with its labels and confidences, or None if it does not fire (step 6)."""
        options, flags = self.options, self.options.hardness or HardnessOptions()
        if not options.use_cutmix:
            return None
        uses_mean = flags.trigger_cutmix or flags.scale_box or flags.gaussian_box
        mean_score = score.mean().item() if uses_mean else 0.0  # the step's one wait for the device
        probability = mean_score if flags.trigger_cutmix else options.use_cutmix_trigger_prob
        if torch.rand((), generator=generator).item() >= probability and not always:
            return None

        batch, _, height, width = weak.shape
        if options.use_cutmix_beta:
            side, border = mixing.beta_side(generator), 8
        else:
            low, high = options.use_cutmix_range
            side, border = mixing.box_side(
                low, high, mean_score, generator, scaled_by_score=flags.scale_box, gaussian=flags.gaussian_box
            ), 16  # fmt: skip
        mask = mixing.cutmix_mask(batch, height, width, side, generator, border=border, device=weak.device)
        if options.hardness is None or options.use_cutmix_beta:
            partner = torch.randperm(batch, generator=generator).to(weak.device, non_blocking=True)
        else:
            partner = mixing.cutmix_partners(score)
        image, *of_pseudo = (mixing.paste(each, partner, mask) for each in (weak, *pseudo))
        return Mixed(image, Prediction(*of_pseudo))

    def consistency(self, coarse: Tensor, pseudo: Prediction, weight: Tensor | None) -> Tensor:
        """Consistency loss of (B, C, h, w) logits before the last resize (spec, step 9)."""
        return consistency_loss(coarse, pseudo.label, pseudo.confidence, self.options.threshold, weight)

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        if unlabeled is None:
            return {}
        student, teacher, hardness, pseudo, strong, mixed = self.views(unlabeled, progress.generator, always_mix=True)
        columns = {"weak view": unlabeled.weak}
        if strong is not None:
            columns["strong view"] = strong
        if mixed is not None:
            columns["CutMix view"] = mixed.image
        columns["pseudo label (grey: unsure)"] = pseudo.sure(self.options.threshold)
        columns["student"] = student.label
        columns["agreement (red: they differ)"] = student.label != teacher.label
        columns["score"] = hardness.score
        return columns
