"""Supervised and unsupervised losses (paper, Eq. 2, 3 and 10; spec, Losses).

Letters: B images, H×W their size, h×w the size of the logits, which are resized to H×W, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .counting import need_classes
from .resize import resize


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of every pixel, 0 where it is ignored.

    One image's logits at a time are at full size, in the forward and in the backward pass, which computes them again.

    Args:
        logits: (B, C, h, w), floating point.
        target: (B, H, W) int64, classes or ``ignore_index``.

    Returns:
        (B, H, W) float32.

    Raises:
        ValueError: other shapes or types; on a CPU also other values (CUDA would have to be waited for).
    """
    _need_labels(logits, target, ignore_index)
    images = zip(logits.float().split(1), target.split(1))
    keep = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_cross_entropy_at_full_size, *image, ignore_index, **keep) for image in images])


def _cross_entropy_at_full_size(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    full = resize(logits, target.shape[-2:])
    return F.cross_entropy(full, target, reduction="none", ignore_index=ignore_index)


def _need_labels(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    if logits.ndim != 4 or target.ndim != 3 or len(logits) != len(target):
        raise ValueError(
            "logits must be (B, C, h, w) and target (B, H, W) of the same B, "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if not logits.is_floating_point() or target.dtype != torch.int64:
        raise ValueError(f"logits must be floating point and target int64, got {logits.dtype} and {target.dtype}")
    if target.device.type == "cpu":
        need_classes("target", target.masked_fill(target == ignore_index, 0), logits.shape[1], ignore_index)


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0 where there is none.

    Args:
        logits: (B, C, h, w).
        target: (B, H, W) int64, classes or ``ignore_index``.
    """
    total = pixel_cross_entropy(logits, target, ignore_index).sum()
    return total / (target != ignore_index).sum().clamp(min=1)


def ohem_cross_entropy(
    logits: Tensor, target: Tensor, thresh: float = 0.7, min_kept: int = 100_000, ignore_index: int = 255
) -> Tensor:
    """Cross-entropy over the hard pixels of the whole batch (online hard example mining; spec, Losses).

    With p the probability of the true class (1 for an ignored pixel) and q the ``min_kept``-th smallest p, the
    valid pixels with p <= max(q, thresh) are kept. With fewer than ``min_kept`` valid pixels all of them are.

    Args:
        logits: (B, C, h, w), floating point.
        target: (B, H, W) int64, classes or ``ignore_index``.
        thresh: in [0, 1].
        min_kept: at least 1, over the batch.

    Returns:
        A scalar; 0 for a batch without a valid pixel.

    Raises:
        ValueError: as ``pixel_cross_entropy``.
    """
    loss = pixel_cross_entropy(logits, target, ignore_index)
    p = loss.detach().neg().exp()
    valid = target != ignore_index
    hard = (p <= _limit(p.flatten(), thresh, min_kept)) | (valid.sum() < min_kept)
    kept = valid & hard
    return (loss * kept).sum() / kept.sum().clamp(min=1)


def _limit(p: Tensor, thresh: float, min_kept: int) -> Tensor:
    """max(q, thresh), q the ``min_kept``-th smallest of p or the largest."""
    number = min(min_kept, p.numel())
    if p.device.type != "cpu":  # always selecting costs less there than waiting for a count
        return p.topk(number, largest=False, sorted=False).values.max().clamp(min=thresh)
    if (p <= thresh).sum() >= number:
        return p.new_tensor(thresh)
    return p.kthvalue(number).values


def consistency_loss(
    logits: Tensor, pseudo_label: Tensor, confidence: Tensor, threshold: float, score: Tensor | None = None
) -> Tensor:
    """Cross-entropy against confident pseudo labels, weighted by image (paper, Eq. 10; spec, Losses).

    Pixels with ``confidence >= threshold`` take part; the mean runs over **all** H·W pixels of an image, is
    multiplied by the image's score, and averaged over the batch. No argument is modified.

    Args:
        logits: (B, C, h, w) of the student, floating point.
        pseudo_label: (B, H, W) int64, classes or 255, which costs nothing.
        confidence: (B, H, W) in [0, 1], floating point.
        threshold: τ in [0, 1].
        score: (B,) in [0, 1], floating point, or None for no weights.

    Raises:
        ValueError: other shapes or types; see ``pixel_cross_entropy``.
    """
    for name, weights, shape in (
        ("confidence", confidence, pseudo_label.shape),
        ("score", score, pseudo_label.shape[:1]),
    ):
        if weights is not None and (weights.shape != shape or not weights.is_floating_point()):
            raise ValueError(
                f"{name} must be {tuple(shape)} and floating point, got {tuple(weights.shape)} {weights.dtype}"
            )
    pixel_loss = pixel_cross_entropy(logits, pseudo_label)
    image_loss = (pixel_loss * (confidence >= threshold)).mean(dim=(1, 2))
    return (image_loss if score is None else score * image_loss).mean()


def valid_consistency_loss(
    logits: Tensor, pseudo_label: Tensor, confidence: Tensor, threshold: float, valid: Tensor
) -> Tensor:
    """Cross-entropy against confident pseudo labels, summed and divided by the number of all valid pixels of the batch,
    confident or not (FixMatch, UniMatch); 0 where there is none.

    Args:
        logits, pseudo_label, confidence, threshold: see ``consistency_loss``.
        valid: (B, H, W) bool, False where it is padding.
    """
    pixel_loss = pixel_cross_entropy(logits, pseudo_label)
    return (pixel_loss * ((confidence >= threshold) & valid)).sum() / valid.sum().clamp(min=1)
