"""Counting what a segmentation gets right."""

from __future__ import annotations

import torch
from torch import Tensor

from .counting import need_classes, within

_AT_ONCE = 2**18  # pixels that a CPU counts in one go: what they need stays in its cache


class ConfusionMatrix:
    """Pixel counts over a data set, from which every figure of an evaluation follows.

    ``counts`` is (C, C) int64 on the device: [true class, predicted class]. Pixels whose true class is
    ``ignore_index`` do not count. A class that never appears in the truth is *absent*: its IoU is NaN, and means run
    over the classes present in the truth.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add label maps.

        Args:
            prediction, target: integers of one shape, with classes in [0, C); target also ``ignore_index``, and where
                it has that, the prediction may be anything.

        Raises:
            ValueError: other shapes, types or values; then nothing is added.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}: one shape needed")
        for name, labels in (("prediction", prediction), ("target", target)):
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise ValueError(f"{name} must have an integer type, got {labels.dtype}")
        cells, counts = self.num_classes**2, torch.zeros_like(self.counts)
        at_once = _AT_ONCE if target.device.type == "cpu" else max(1, target.numel())
        for predicted, true in zip(prediction.flatten().split(at_once), target.flatten().split(at_once)):
            ignored = true == self.ignore_index
            index = (true.int() * self.num_classes).add_(predicted).masked_fill_(ignored, 0)
            # On CUDA this waits, as bincount does. Only where the quick look fails, labels are looked at one by one.
            if not (within(predicted, self.num_classes) and within(index, cells)):
                need_classes("prediction", predicted.masked_fill(ignored, 0), self.num_classes, self.ignore_index)
                need_classes("target", true.masked_fill(ignored, 0), self.num_classes, self.ignore_index)
            counts += torch.bincount(index.to(counts.device), minlength=cells).view_as(counts)
            counts[0, 0] -= ignored.sum().to(counts.device)  # they were counted there
        self.counts += counts

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
