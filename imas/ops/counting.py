"""Counting classes, and refusing what is none."""

from __future__ import annotations

import torch
from torch import Tensor


def count(values: Tensor, bins: int) -> Tensor:
    """How often each of 0 … bins − 1 occurs in each image; other values do not count. Waits for no device.

    ``bincount`` would wait for a CUDA device. ``histc`` counts in float32, which is exact up to 2^24 pixels an image.

    Args:
        values: (B, …) integers.

    Returns:
        (B, bins) float64.
    """
    return torch.stack([image.histc(bins, min=-0.5, max=bins - 0.5) for image in values.float()]).double()


def within(values: Tensor, bound: int) -> bool:
    """Whether all integers are in [0, ``bound``). Waits for a CUDA device."""
    if not values.numel():
        return True
    low, high = torch.stack(values.aminmax()).tolist()
    return low >= 0 and high < bound


def need_classes(name: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ``ValueError`` where integer labels, of which the ignored ones are replaced by a class, are not in
    [0, ``num_classes``). Waits for a CUDA device.
    """
    if not within(labels, num_classes):
        found = labels[(labels < 0) | (labels >= num_classes)][0].item()
        raise ValueError(
            f"{name} has the value {found}: expected classes from 0 to {num_classes - 1}, or {ignore_index} (ignored)"
        )
