"""Counting without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def count(values: Tensor, bins: int) -> Tensor:
    """How often each of 0 … bins − 1 occurs in each image; other values do not count.

    ``bincount`` would wait for a CUDA device. ``histc`` counts in float32, which is exact up to 2^24 pixels an image.

    Args:
        values: (B, …) integers.

    Returns:
        (B, bins) float64.
    """
    return torch.stack([image.histc(bins, min=-0.5, max=bins - 0.5) for image in values.float()]).double()
