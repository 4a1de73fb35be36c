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
    if tuple(features.shape[-2:]) == (1, 1):  # the sum of its gradient is exact, which bilinear's is not in bfloat16
        return features.expand(-1, -1, *size)
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=True)


def full_size_blocks(logits: Tensor, size: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
    """(B, C, h, w) logits resized an image at a time: (image, rows, float32 logits of these rows, (C, rows, W)).

    As many rows at a time as a CPU's cache holds, elsewhere all of an image.
    """
    for i in range(len(logits)):
        full = resize(logits[i : i + 1].float(), size)[0]
        classes, height, width = full.shape
        step = max(1, _BLOCK // (classes * width)) if full.device.type == "cpu" else height
        for top in range(0, height, step):
            rows = slice(top, top + step)
            yield i, rows, full[:, rows]
