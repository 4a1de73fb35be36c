"""How hard an unlabeled image is for the model as it is now (paper, section 3.2; spec, The score).

The paper calls γ "hardness"; the authors' code computes, and this package calls the **score**, the opposite:
h in [0, 1], where 1 is easy (student and teacher agree and are sure) and 0 is hard. The authors confirmed that
Eq. 8 of the paper has the direction the wrong way round.

Letters: B images, H×W their size, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .counting import count
from .pseudo import Prediction, predict


class Hardness(NamedTuple):
    """Scores of a batch, each (B,) float32 in [0, 1]."""

    score: Tensor  # h: 1 easy, 0 hard
    student_confident: Tensor  # ρ_s: share of pixels where the student is sure
    teacher_confident: Tensor  # ρ_t


def hardness_scores(
    student_logits: Tensor,
    teacher_logits: Tensor,
    threshold: float,
    *,
    class_weighted: bool = True,
    ignore_background: bool = True,
    version: int = 1,
) -> Hardness:
    """Score each image by the agreement of student and teacher (paper, Eq. 4-7; spec, The score).

    Args:
        student_logits, teacher_logits: (B, C, H, W) of the same weak views.
        threshold: τ in [0, 1]; a pixel is confident where its largest softmax probability is >= τ.
        class_weighted: weight each class's IoU by its share of pixels; otherwise the plain mean.
        ignore_background: leave class 0 out of the weights (of the weighted form only).
        version: 1, h = (ρ_t·wIoU_t + ρ_s·wIoU_s) / 2; 2, the same sum divided by ρ_t + ρ_s (0 where both are 0).

    Raises:
        ValueError: shapes that differ, or a version other than 1 and 2.
    """
    if student_logits.ndim != 4 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must be (B, C, H, W) of one shape, "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    return score_predictions(
        predict(student_logits),
        predict(teacher_logits),
        student_logits.shape[1],
        threshold,
        class_weighted=class_weighted,
        ignore_background=ignore_background,
        version=version,
    )


def score_predictions(
    student: Prediction,
    teacher: Prediction,
    num_classes: int,
    threshold: float,
    *,
    class_weighted: bool = True,
    ignore_background: bool = True,
    version: int = 1,
) -> Hardness:
    """``hardness_scores`` for callers that have predicted labels and confidences already."""
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    rho_s = (student.confidence >= threshold).float().mean(dim=(1, 2))
    rho_t = (teacher.confidence >= threshold).float().mean(dim=(1, 2))

    pairs = torch.add(teacher.label, student.label, alpha=num_classes)
    joint = count(pairs, num_classes**2).view(-1, num_classes, num_classes)  # pixels: [image, student's, teacher's]
    n_s, n_t = joint.sum(2), joint.sum(1)
    both = joint.diagonal(dim1=1, dim2=2)
    union = n_s + n_t - both
    iou = both / union.clamp(min=1)  # 0 for a class that neither predicts; its weight is 0, too

    if class_weighted:
        if ignore_background:
            n_s[:, 0] = 0
            n_t[:, 0] = 0
        weights = (pixels / pixels.sum(1, keepdim=True).clamp(min=1) for pixels in (n_s, n_t))
        wiou_s, wiou_t = ((weight * iou).sum(1).float() for weight in weights)
    else:
        wiou_s = wiou_t = (iou.sum(1) / (union > 0).sum(1)).float()

    total = rho_t * wiou_t + rho_s * wiou_s
    divisor = 2.0 if version == 1 else rho_t + rho_s
    score = torch.where(rho_t + rho_s > 0, total / divisor, torch.zeros_like(total))
    return Hardness(score, rho_s, rho_t)
