"""From logits to the class that a network predicts, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .counting import count
from .resize import full_size_blocks


class Prediction(NamedTuple):
    """The class that a network predicts at every pixel, and how sure it is."""

    label: Tensor  # (B, H, W) int64, class of the largest logit
    confidence: Tensor  # (B, H, W) float32 in (0, 1], its softmax probability

    def sure(self, threshold: float) -> Tensor:
        """The labels, 255 where the confidence is below the threshold."""
        return self.label.masked_fill(self.confidence < threshold, 255)


@torch.no_grad()
def predict(logits: Tensor, size: Sequence[int] | None = None) -> Prediction:
    """Label and confidence of every pixel (spec, step 4).

    The largest softmax probability is 1 / Σ exp(logit − max). No softmax is made, and no more than one image's logits
    are at full size at a time.

    Args:
        logits: (B, C, h, w).
        size: H, W that the logits are resized to; default: theirs.
    """
    prediction = _empty(logits, size)
    for i, rows, block in full_size_blocks(logits, prediction.label.shape[-2:]):
        highest, prediction.label[i, rows] = block.max(dim=0)
        prediction.confidence[i, rows] = (block - highest).exp_().sum(dim=0).reciprocal_()
    return prediction


@torch.no_grad()
def predict_scored(logits: Tensor, size: Sequence[int] | None = None) -> tuple[Prediction, Tensor]:
    """``predict``, and how sure the network is of each image as a whole (AugSeg; spec, step 5).

    The score is the mean over all pixels of c·(1 − e/ln C), with c the confidence and e the entropy of the softmax,
    e = ln Σ exp(z) − Σ z·exp(z) / Σ exp(z) for z = logit − max.

    Args:
        logits, size: as for ``predict``.

    Returns:
        The prediction, and (B,) float32 in [0, 1], 1 where it is sure of every pixel.
    """
    prediction = _empty(logits, size)
    score = torch.zeros(len(logits), device=logits.device)
    for i, rows, block in full_size_blocks(logits, prediction.label.shape[-2:]):
        highest, prediction.label[i, rows] = block.max(dim=0)
        block = block - highest
        weights = block.exp()
        total = weights.sum(dim=0)
        entropy = total.log() - weights.mul_(block).sum(dim=0) / total
        confidence = total.reciprocal_()
        prediction.confidence[i, rows] = confidence
        score[i] += (confidence * (1 - entropy / math.log(len(block)))).sum()
    return prediction, score / prediction.label[0].numel()


def _empty(logits: Tensor, size: Sequence[int] | None) -> Prediction:
    shape = (len(logits), *(size or logits.shape[-2:]))
    label = torch.empty(shape, dtype=torch.int64, device=logits.device)
    return Prediction(label, torch.empty(shape, device=logits.device))


def logged_shares(pseudo: Prediction, threshold: float, label: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Shares of all pixels of a batch by class, for the log, each (C,) float32.

    Args:
        label: (B, H, W) of the labeled images: see ``label_shares``.

    Returns:
        ``confident``: pseudo labels with ``confidence >= threshold``; ``predicted``: all of them, which sum to 1;
        ``labeled``: labels.
    """
    confident = pseudo.confidence >= threshold
    counts = count(torch.add(confident, pseudo.label, alpha=2), 2 * num_classes).sum(0)
    shares = counts.float().view(num_classes, 2) / confident.numel()
    return {"confident": shares[:, 1], "predicted": shares.sum(1), "labeled": label_shares(label, num_classes)}


def label_shares(label: Tensor, num_classes: int) -> Tensor:
    """(C,) float32: shares of all pixels of integer labels, 0..255; values from C on count as no class."""
    return count(label, num_classes).sum(0).float() / label.numel()
