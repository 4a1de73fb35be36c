"""Counting what a segmentation gets right."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_AT_ONCE = 2**18  # pixels that are counted in one go: what they need stays in a CPU's cache
_BOUNDARY = 0.02  # of an image's diagonal: how far from another class a boundary reaches
_BEYOND = -1  # no label: that of pixels beyond the image's border, and of those that do not count


class ConfusionMatrix:
    """Pixel counts over a data set, from which every figure of an evaluation follows.

    ``counts`` is (C, C) int64: [true class, predicted class]. Pixels whose true class is ``ignore_index`` do not
    count. A class that appears in neither truth nor prediction, or never in the truth, is *absent*: its IoU is NaN,
    and means run over the classes present in the truth.

    Args:
        num_classes: C.
        ignore_index: label of pixels to leave out.
        device: where the counts live.
        boundary: count near boundaries, too, as ``boundary``; needs label maps (..., H, W).
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
        boundary: bool = False,
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.boundary = BoundaryIoU(num_classes, ignore_index, device) if boundary else None

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add label maps of one shape, integer, with classes in [0, C) (target: or ``ignore_index``)."""
        if prediction.shape != target.shape:
            raise ValueError(f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}: one shape needed")
        cells = self.num_classes**2
        for predicted, true in zip(prediction.flatten().split(_AT_ONCE), target.flatten().split(_AT_ONCE)):
            index = (true.int() * self.num_classes).add_(predicted).masked_fill_(true == self.ignore_index, cells)
            counts = torch.bincount(index.to(self.counts.device), minlength=cells + 1)[:cells]
            self.counts += counts.view_as(self.counts)
        if self.boundary is not None:
            self.boundary.update(prediction, target)

    @property
    def intersection(self) -> Tensor:
        """(C,) int64."""
        return self.counts.diagonal()

    @property
    def target(self) -> Tensor:
        """(C,) int64, true pixels of each class."""
        return self.counts.sum(1)

    @property
    def union(self) -> Tensor:
        """(C,) int64."""
        return self.counts.sum(0) + self.counts.sum(1) - self.intersection

    @property
    def iou(self) -> Tensor:
        """(C,) float64 in [0, 1]; NaN for a class absent from the truth."""
        return self._over(self.union)

    @property
    def accuracy(self) -> Tensor:
        """(C,) float64, share of each class's true pixels that were found; NaN for an absent class."""
        return self._over(self.target)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes present in the truth, in [0, 1]; NaN if nothing was counted."""
        return self.iou.nanmean().item()

    @property
    def frequency(self) -> Tensor:
        """(C,) float64, share of each class in the valid true pixels, in [0, 1]."""
        return self.target.double() / self.counts.sum()

    @property
    def fwiou(self) -> float:
        """Frequency-weighted IoU: mean of ``iou`` weighted by ``frequency``, in [0, 1] (Long et al., CVPR 2015)."""
        return (self.frequency * self.iou.nan_to_num()).sum().item()

    @property
    def mean_accuracy(self) -> float:
        """Mean over present classes of ``accuracy``."""
        return self.accuracy.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        """Share of all valid pixels that were right."""
        return (self.intersection.sum().double() / self.counts.sum()).item()

    def _over(self, divisor: Tensor) -> Tensor:
        ratio = self.intersection.double() / divisor
        return ratio.masked_fill(self.target == 0, float("nan"))


class BoundaryIoU:
    """IoU near the boundaries of classes alone (Cheng et al., CVPR 2021), counted over a data set.

    Of each class's true and predicted pixels those count that are near another class, an ignored pixel or the image's
    border: within 2 % of the image's diagonal, along rows and columns. Ignored pixels are taken out of truth and
    prediction alike. ``matrix`` has one class more than the data: pixels that are near no boundary.
    """

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device | str) -> None:
        self.ignore_index = ignore_index
        self.matrix = ConfusionMatrix(num_classes + 1, _BEYOND, device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add label maps (..., H, W), as those of ``ConfusionMatrix.update``."""
        ignored = target == self.ignore_index
        pair = (labels.masked_fill(ignored, self.ignore_index) for labels in (prediction, target))
        predicted, true = map(self._boundaries, pair)
        self.matrix.update(predicted, true.masked_fill_(ignored, _BEYOND))

    @property
    def iou(self) -> Tensor:
        """(C,) float64 in [0, 1]; NaN for a class absent from the truth."""
        return self.matrix.iou[:-1]

    @property
    def mean(self) -> float:
        """Mean over the classes present in the truth."""
        return self.iou.nanmean().item()

    def _boundaries(self, labels: Tensor) -> Tensor:
        """Labels where the square of side 2 · radius + 1 around a pixel has several; elsewhere the last class."""
        radius = max(1, round(_BOUNDARY * math.hypot(*labels.shape[-2:])))
        padded = F.pad(labels.short(), (radius,) * 4, value=_BEYOND)
        inside = _over_squares(torch.minimum, padded, radius) == _over_squares(torch.maximum, padded, radius)
        return labels.int().masked_fill_(inside, self.matrix.num_classes - 1)


def _over_squares(extreme: Callable[[Tensor, Tensor], Tensor], values: Tensor, radius: int) -> Tensor:
    """(B, H + 2 · radius, W + 2 · radius) → (B, H, W), the extreme value in each square of side 2 · radius + 1."""
    for axis in (-2, -1):
        length = 1  # of the line over which ``values`` are extreme by now
        while length < 2 * radius + 1:
            step = min(length, 2 * radius + 1 - length)
            count = values.shape[axis] - step
            values = extreme(values.narrow(axis, 0, count), values.narrow(axis, step, count))
            length += step
    return values
