"""iMAS: supervision that follows each unlabeled image's score (paper, section 3; spec, One training step)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.deeplabv3plus import DeepLabV3Plus
from ..models.ema import make_teacher, teacher_decay, update_teacher
from ..ops import mixing
from ..ops.hardness import score_predictions
from ..ops.losses import consistency_loss
from ..ops.pseudo import Prediction, class_shares, label_shares, predict
from ..schema import HardnessAware, Unsupervised
from .base import Batch, Criterion, Method, Mixed, Progress, Step, Views


class IMAS(Method):
    """Student and EMA teacher; the score h of an image steers its augmentation and weighs its loss.

    Args:
        unsupervised: the section ``trainer.unsupervised``.
        hardness: the section ``dataset.train.hardness_aware``; None scores and logs, but lets the score decide
            nothing.
        sup_only_epoch: epochs of supervised warm-up.
        ema_decay: upper bound of the teacher's decay.
    """

    def __init__(
        self,
        student: DeepLabV3Plus,
        criterion: Criterion,
        aux_weight: float,
        *,
        unsupervised: Unsupervised,
        hardness: HardnessAware | None,
        sup_only_epoch: int,
        ema_decay: float,
    ) -> None:
        super().__init__(student, criterion, aux_weight)
        self.teacher = make_teacher(student)
        self.unsupervised = unsupervised
        self.hardness = hardness
        self.sup_only_epoch = sup_only_epoch
        self.ema_decay = ema_decay

    def forward(self, batch: Batch, progress: Progress) -> Step:
        if not self.needs_unlabeled(progress.epoch):
            loss = self.supervised_loss(*self.student.coarse(batch.images), batch.labels)
            return Step(loss, {"loss_lb": loss.detach()})

        student, teacher, pseudo, hardness, strong, mixed = self.views(batch.weak, batch.strong, progress.generator)

        # The weak views earn no loss; BatchNorm is to see them.
        views = [batch.images, batch.weak]
        if mixed is not None:
            views.append(mixed.images)
        if strong is not None:
            views.append(strong)
        elif mixed is None:
            views.append(batch.weak)
        coarse, coarse_aux = self.student.coarse(torch.cat(views))
        labeled, _, *unlabeled = coarse.split([len(view) for view in views])
        labeled_aux = None if coarse_aux is None else coarse_aux[: len(batch.images)]
        loss_lb = self.supervised_loss(labeled, labeled_aux, batch.labels)

        targets = ([] if mixed is None else [mixed.pseudo]) + ([pseudo] if strong is not None or mixed is None else [])
        weight = hardness.score if self.hardness is not None and self.hardness.weight_loss else None
        losses = [self.consistency(logits, target, weight) for logits, target in zip(unlabeled, targets, strict=True)]
        loss_ub = self.unsupervised.loss_weight * sum(losses) / len(losses)

        confident, predicted = class_shares(pseudo, self.unsupervised.threshold, self.student.num_classes)
        scalars = {
            "loss_lb": loss_lb.detach(),
            "loss_ub": loss_ub.detach(),
            "pseudo": hardness.student_confident.mean(),
            "pseudo_teacher": hardness.teacher_confident.mean(),
            "score": hardness.score.mean(),
            "score_std": hardness.score.std(correction=0),
            "agreement": (student.label == teacher.label).float().mean(),
            "confident": confident,
            "predicted": predicted,
            "labeled": label_shares(batch.labels, self.student.num_classes),
        }
        return Step(loss_lb + loss_ub, scalars, hardness.score)

    def views(
        self, weak: Tensor, strong: Tensor | None, generator: torch.Generator, *, always_mix: bool = False
    ) -> Views:
        """Predictions and score of the weak views, and what follows from them (spec, steps 2 to 6).

        Args:
            always_mix: make the CutMix view, whether or not it would fire.
        """
        student, teacher = self.predict_weak(weak)
        flags = self.hardness or HardnessAware()
        hardness = score_predictions(
            student,
            teacher,
            self.student.num_classes,
            self.unsupervised.threshold,
            class_weighted=flags.class_weighted,
            ignore_background=flags.ignore_background,
            version=flags.version,
        )
        pseudo = teacher if self.unsupervised.teacher_pseudo else student
        blended = self.blend(weak, strong, hardness.score, generator)
        mixed = self.cutmix(weak, pseudo, hardness.score, generator, always=always_mix)
        return Views(student, teacher, pseudo, hardness, blended, mixed)

    @torch.no_grad()
    def predict_weak(self, weak: Tensor) -> tuple[Prediction, Prediction]:
        """Student's and teacher's predictions of the weak views, both in eval mode (spec, step 2)."""
        size = weak.shape[-2:]
        self.student.eval()
        student = predict(self.student.coarse(weak, aux=False)[0], size)
        self.student.train()
        teacher = predict(self.teacher.coarse(weak, aux=False)[0], size)
        torch.clear_autocast_cache()  # torch 2.6 would train on weights that were cast here, without a gradient
        return student, teacher

    def blend(self, weak: Tensor, strong: Tensor | None, score: Tensor, generator: torch.Generator) -> Tensor | None:
        """The strong view, as strong as the score allows (spec, step 5); None where none is configured."""
        if strong is None or self.hardness is None:
            return strong
        if self.hardness.blend:
            return mixing.adaptive_blend(strong, weak, score)
        return mixing.random_choice(strong, weak, score, generator)

    def cutmix(
        self, weak: Tensor, pseudo: Prediction, score: Tensor, generator: torch.Generator, *, always: bool = False
    ) -> Mixed | None:
        """The CutMix view of the weak views with its labels and confidences, or None if it does not fire (step 6)."""
        options, flags = self.unsupervised, self.hardness or HardnessAware()
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
        mask = mixing.cutmix_mask(batch, height, width, side, generator, border=border).to(
            weak.device, non_blocking=True
        )
        if self.hardness is None or options.use_cutmix_beta:
            partner = torch.randperm(batch, generator=generator).to(weak.device, non_blocking=True)
        else:
            partner = mixing.cutmix_partners(score)
        label = mixing.paste(pseudo.label, partner, mask)
        confidence = mixing.paste(pseudo.confidence, partner, mask)
        return Mixed(mixing.paste(weak, partner, mask), Prediction(label, confidence))

    def consistency(self, coarse: Tensor, pseudo: Prediction, weight: Tensor | None) -> Tensor:
        """Consistency loss of (B, C, h, w) logits before the last resize (spec, step 9)."""
        return consistency_loss(coarse, pseudo.label, pseudo.confidence, self.unsupervised.threshold, weight)

    def needs_unlabeled(self, epoch: int) -> bool:
        return epoch >= self.sup_only_epoch

    def after_step(self, progress: Progress) -> None:
        update_teacher(self.teacher, self.student, self.rates(progress)["decay"])

    def rates(self, progress: Progress) -> dict[str, float]:
        decay = teacher_decay(
            progress.epoch, progress.iteration, progress.iterations_per_epoch, self.sup_only_epoch, self.ema_decay
        )
        return {"decay": decay}

    def networks(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, "student": self.student}

    def train(self, mode: bool = True) -> IMAS:
        super().train(mode)
        self.teacher.eval()
        return self
