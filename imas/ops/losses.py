"""Supervised and unsupervised losses (paper, Eq. 2, 3 and 10; spec, Losses).

Letters: B images, H×W their size, C classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0 where there is none.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) int64, classes or ``ignore_index``.
    """
    total = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp(min=1)


def ohem_cross_entropy(
    logits: Tensor, target: Tensor, thresh: float = 0.7, min_kept: int = 100_000, ignore_index: int = 255
) -> Tensor:
    """Cross-entropy over the hard pixels of the whole batch (online hard example mining; spec, Losses).

    With p the probability of the true class (1 for an ignored pixel) and q the ``min_kept``-th smallest p, the
    valid pixels with p <= max(q, thresh) are kept. With fewer than ``min_kept`` valid pixels all of them are.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) int64, classes or ``ignore_index``.
        thresh: in [0, 1].
        min_kept: at least 1, over the batch.

    Returns:
        A scalar; 0 for a batch without a valid pixel.
    """
    loss = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="none")  # ignored: 0
    p = loss.detach().neg().exp().flatten()
    q = p.kthvalue(min(min_kept, p.numel())).values
    valid = target != ignore_index
    hard = (p <= q.clamp(min=thresh)).view_as(valid) | (valid.sum() < min_kept)
    kept = valid & hard
    return (loss * kept).sum() / kept.sum().clamp(min=1)


def consistency_loss(
    logits: Tensor, pseudo_label: Tensor, confidence: Tensor, threshold: float, score: Tensor | None = None
) -> Tensor:
    """Cross-entropy against confident pseudo labels, weighted by image (paper, Eq. 10; spec, Losses).

    Pixels with ``confidence >= threshold`` take part; the mean runs over **all** H·W pixels of an image, is
    multiplied by the image's score, and averaged over the batch. No argument is modified.

    Args:
        logits: (B, C, H, W) of the student.
        pseudo_label: (B, H, W) int64.
        confidence: (B, H, W) in [0, 1].
        threshold: τ in [0, 1].
        score: (B,) in [0, 1], or None for no weights.
    """
    pixel_loss = F.cross_entropy(logits.float(), pseudo_label, reduction="none")
    image_loss = (pixel_loss * (confidence >= threshold)).mean(dim=(1, 2))
    return (image_loss if score is None else score * image_loss).mean()
