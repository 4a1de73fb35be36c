"""From the size of the network's logits to that of the image, as much at a time as is good for the device.

Letters: B images, H×W their size, h×w the size of the logits, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2**18  # logits that a CPU's cache holds beside what is made of them


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear with aligned corners, as every resize in the network. (B, K, h, w) → (B, K, \\*size)."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=True)


def rows_of(logits: Tensor) -> Iterator[slice]:
    """The rows of an image's (C, H, W) logits, in blocks: as many as a CPU's cache holds, elsewhere all of them."""
    classes, height, width = logits.shape
    step = max(1, _BLOCK // (classes * width)) if logits.device.type == "cpu" else height
    for top in range(0, height, step):
        yield slice(top, top + step)
