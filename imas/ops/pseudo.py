"""From logits to what a network says and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .counting import count
from .resize import resize, rows_of


class Prediction(NamedTuple):
    """What a network says of every pixel, and how sure it is."""

    label: Tensor  # (B, H, W) int64, class of the largest logit
    confidence: Tensor  # (B, H, W) float32 in (0, 1], its softmax probability


@torch.no_grad()
def predict(logits: Tensor, size: Sequence[int] | None = None) -> Prediction:
    """Label and confidence of every pixel (spec, step 4).

    The largest softmax probability is 1 / Σ exp(logit − max). No softmax is made, and no more than one image's logits
    are at full size at a time.

    Args:
        logits: (B, C, h, w).
        size: H, W that the logits are resized to; default: theirs.
    """
    size = tuple(size or logits.shape[-2:])
    label = torch.empty((len(logits), *size), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(label.shape, device=logits.device)
    for number in range(len(logits)):
        full = resize(logits[number : number + 1].float(), size)[0]
        for rows in rows_of(full):
            highest, label[number, rows] = full[:, rows].max(dim=0)
            confidence[number, rows] = (full[:, rows] - highest).exp_().sum(dim=0).reciprocal_()
    return Prediction(label, confidence)


def class_shares(prediction: Prediction, threshold: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Which classes the pseudo labels are of, and which take part in the loss.

    Returns:
        Shares of all pixels of the batch, each (C,) float32: with this label and ``confidence >= threshold``; with this
        label. The latter sum to 1.
    """
    confident = prediction.confidence >= threshold
    counts = count(torch.add(confident, prediction.label, alpha=2), 2 * num_classes).sum(0)
    shares = counts.float().view(num_classes, 2) / confident.numel()
    return shares[:, 1], shares.sum(1)


def label_shares(label: Tensor, num_classes: int) -> Tensor:
    """(C,) float32: shares of all pixels of integer labels, 0..255; values from C on count as no class."""
    return count(label, num_classes).sum(0).float() / label.numel()
