"""From logits to what a network says and how sure it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """What a network says of every pixel, and how sure it is."""

    label: Tensor  # (B, H, W) int64, class of the largest logit
    confidence: Tensor  # (B, H, W) float32 in (0, 1], its softmax probability


def predict(logits: Tensor) -> Prediction:
    """Label and confidence of every pixel (spec, step 4).

    The largest softmax probability is exp(max − logsumexp): no (B, C, H, W) softmax is made.

    Args:
        logits: (B, C, H, W).
    """
    logits = logits.float()
    highest, label = logits.max(dim=1)
    return Prediction(label, (highest - logits.logsumexp(dim=1)).exp())


def class_shares(prediction: Prediction, threshold: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Which classes the pseudo labels are of, and which take part in the loss.

    Returns:
        Shares of all pixels of the batch, each (C,) float32: with this label and ``confidence >= threshold``; with this
        label. The latter sum to 1.
    """
    confident = prediction.confidence >= threshold
    counts = torch.bincount((2 * prediction.label + confident).flatten(), minlength=2 * num_classes)
    shares = counts.view(num_classes, 2) / confident.numel()
    return shares[:, 1], shares.sum(1)


def label_shares(label: Tensor, num_classes: int) -> Tensor:
    """(C,) float32: shares of all pixels of integer labels, 0..255; values from C on count as no class."""
    return torch.bincount(label.flatten(), minlength=256)[:num_classes] / label.numel()
