"""From stored pixels to what a network reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalise:
    """uint8 images → float32 (image/255 − mean) / std, on the device of the images (ToTensor and Normalize).

    Args:
        mean, std: of red, green, blue, in units of 0..1; where a mean is above 1, both are in units of 0..255.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        unit = 255.0 if max(mean) > 1 else 1.0
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1) / unit
        self.std = torch.tensor(std, device=device).view(3, 1, 1) / unit

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, in any order of memory → (B, 3, H, W) float32, contiguous."""
        return images.contiguous().float().div_(255).sub_(self.mean).div_(self.std)

    def inverse(self, images: Tensor) -> Tensor:
        """The pictures again: (B, 3, H, W) float32 → uint8."""
        return (images * self.std + self.mean).mul(255).round().clamp(0, 255).to(torch.uint8)
