"""Which pixels are sure and which are not, and the contrastive loss between their classes (U2PL, CVPR 2022).

Letters: B images, H×W their size, h×w that of logits and representations, C classes, P = B·h·w pixels in the order of
images, rows and columns, D the width of a representation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .resize import full_size_blocks


@torch.no_grad()
def pixel_entropy(logits: Tensor, size: Sequence[int]) -> Tensor:
    """−Σ p·ln(p + 1e-10) of each pixel's softmax at full size: (B, C, h, w) → (B, \\*size) float32."""
    entropy = torch.empty((len(logits), *size), device=logits.device)
    for i, rows, block in full_size_blocks(logits, size):
        p = block.softmax(dim=0)
        entropy[i, rows] = -(p * (p + 1e-10).log()).sum(dim=0)
    return entropy


def percentiles(values: Tensor, valid: Tensor, percents: Sequence[float]) -> Tensor:
    """Percentiles of the valid values, interpolated linearly in float64; nothing waits for the device.

    Args:
        values: float32 of any shape, finite.
        valid: bool of the same shape. Where nothing is, the results are infinite or NaN.
        percents: each in [0, 100].

    Returns:
        (len(percents),) float32.
    """
    ordered = values.masked_fill(~valid, torch.inf).flatten().sort().values
    last = (valid.sum() - 1).clamp(min=0)
    position = torch.stack([last.double() * (percent / 100) for percent in percents])
    below = position.long()
    low, high = ordered[below].double(), ordered[torch.minimum(below + 1, last)].double()
    return (low + (high - low) * (position - below)).float()


def shrink(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, W) → (B, \\*size) by the nearest neighbour: index floor(i·H/h)."""
    rows, columns = (
        torch.arange(new, device=pixels.device) * old // new for old, new in zip(pixels.shape[-2:], size, strict=True)
    )
    return pixels[:, rows.unsqueeze(1), columns]


class Roles(NamedTuple):
    """What pixels are to each class in the contrastive loss, each (C, P) bool."""

    anchors: Tensor  # the student's representation is drawn towards the class
    positives: Tensor  # the mean of the teacher's representations is the class
    negatives: Tensor  # the teacher's representation is a key of what the class is not


def roles(
    label: Tensor,
    probability: Tensor,
    low: Tensor,
    high: Tensor,
    labeled: int,
    ranks: tuple[int, int],
    anchor_above: float,
    negative_below: float,
) -> Roles:
    """Roles by label, entropy and the rank of a class at a pixel: its place, from 0, in descending probability.

    Args:
        label: (B, h, w) int64; no class from C on.
        probability: (B, C, h, w) of the teacher.
        low, high: (B, h, w) bool: entropy among the lowest, among the highest; of labeled images: there is a label.
        labeled: how many images, the first ones, are labeled.
        ranks: r_l, r_h. A labeled pixel of another class is a negative where the class has a rank below r_l, an
            unlabeled one of high entropy where r_l <= rank < r_h.
        anchor_above: δ_p, the least probability of an anchor's class.
        negative_below: δ_n, the probability that a negative has less of.
    """
    classes = torch.arange(probability.shape[1], device=label.device).view(-1, 1, 1, 1)
    order = probability.argsort(dim=1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, classes.transpose(0, 1).expand_as(order)).transpose(0, 1)
    probability = probability.transpose(0, 1)
    of_class = label == classes
    positives = of_class & low
    near, first = rank < ranks[0], torch.arange(len(label), device=label.device).view(-1, 1, 1) < labeled
    unlike = torch.where(first, ~of_class & near, ~near & (rank < ranks[1]))
    negatives = unlike & high & (probability < negative_below)
    return Roles(*(mask.flatten(1) for mask in (positives & (probability > anchor_above), positives, negatives)))


def places(mask: Tensor, numbers: Tensor) -> Tensor:
    """Where a mask's true entries with these numbers are: in its columns, if its rows are counted through.

    Args:
        mask: (C, P) bool.
        numbers: (N,) int64, each from 0 and below the count of true entries.

    Returns:
        (N,) int64 in [0, P).
    """
    return torch.searchsorted(mask.flatten().cumsum(0), numbers + 1) % mask.shape[1]


def push(bank: Tensor, keys: Tensor, capacity: int) -> Tensor:
    """The newest ``capacity`` rows of (N, D) and (K, D), the newest last, in storage of their own."""
    keys = keys[-capacity:]
    return torch.cat([bank[max(0, len(bank) + len(keys) - capacity) :], keys])


def info_nce(anchors: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each anchor's cosine similarities with the positive as the truth, averaged over M anchors.

    Args:
        anchors: (M, D). positive: (D,). negatives: (M, K, D).
    """
    keys = torch.cat([positive.expand(len(anchors), 1, -1), negatives], dim=1)
    similarity = F.cosine_similarity(anchors.unsqueeze(1), keys, dim=2) / temperature
    return (similarity.logsumexp(dim=1) - similarity[:, 0]).mean()
