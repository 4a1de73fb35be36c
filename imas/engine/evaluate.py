"""Sliding-window evaluation: one evaluator for training and for ``eval.py`` (spec, Evaluation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import distributed
from ..data.catalog import catalog_of
from ..data.lists import Lists
from ..data.loaders import evaluation_batches, evaluation_loader
from ..data.normalise import Normalise
from ..ops.metrics import ConfusionMatrix
from ..schema import Config
from .sliding import Predictor, Protocol, window_bands


def predict_sliding(model: nn.Module, images: Tensor, crop: int) -> Tensor:
    """Softmax probabilities of overlapping windows, summed: (B, 3, H, W) normalised → (B, C, H, W) float32.

    Windows of ``crop`` × ``crop`` start at 0, stride, 2·stride, ... while inside the image, stride = int(crop·2/3);
    the last ones are cut short by the border. The model is used in the mode that it is in.

    Args:
        model: gives logits (B, C, h, w) of any window, or a tuple that begins with them.
        crop: window side in pixels, at least 2.
    """
    return torch.cat([band.clone() for band in window_bands(model, images, crop)], dim=-2)


@contextmanager
def evaluating(networks: dict[str, nn.Module]) -> Iterator[None]:
    """Networks in eval mode, and back in the mode that they were in."""
    modes = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval()
    yield
    for name, network in networks.items():
        network.train(modes[name])


@torch.no_grad()
def evaluate(
    networks: dict[str, nn.Module],
    loader: DataLoader,
    normalise: Callable[[Tensor], Tensor],
    predictor: Predictor,
    *,
    num_classes: int,
    ignore_index: int,
) -> dict[str, ConfusionMatrix]:
    """Confusion matrix of each network over all validation images of all ranks.

    Args:
        networks: by name; put into eval mode, and back into the mode that they were in.
        loader: this rank's images, of ``evaluation_loader``.
        normalise: uint8 images → network input.
    """
    device = predictor.device
    matrices = {name: ConfusionMatrix(num_classes, ignore_index, device) for name in networks}
    with evaluating(networks):
        for images, labels in evaluation_batches(loader):
            images = normalise(images.to(device, non_blocking=True))
            for name, network in networks.items():
                predicted = predictor(network, images)
                matrices[name].update(predicted, labels.to(predicted.device, non_blocking=True))
    for matrix in matrices.values():
        distributed.sum_over_ranks(matrix.counts)
    return matrices


class Evaluation:
    """``evaluate`` with everything that follows from a configuration: ``Evaluation(...)({"teacher": network})``.

    Args:
        protocol: default: the windows of the configuration.
        accumulate: see ``Predictor``.
    """

    def __init__(
        self,
        config: Config,
        lists: Lists,
        device: torch.device,
        protocol: Protocol | None = None,
        accumulate: str = "device",
    ) -> None:
        self.config = config
        self.protocol = protocol or Protocol(config.dataset.val.crop.size)
        self.predictor = Predictor(self.protocol, device, accumulate)
        self.catalog = catalog_of(config.dataset)
        self.normalise = Normalise(config.dataset.mean, config.dataset.std, device)
        self.loader = evaluation_loader(config, lists.val, distributed.rank(), distributed.world_size())

    def __call__(self, networks: dict[str, nn.Module]) -> dict[str, ConfusionMatrix]:
        return evaluate(
            networks,
            self.loader,
            self.normalise,
            self.predictor,
            num_classes=self.config.net.num_classes,
            ignore_index=self.config.dataset.ignore_label,
        )


def figures(matrix: ConfusionMatrix, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Everything that an evaluation counts, in percent, unrounded, ready for JSON.

    ``miou``, ``fwiou``, ``pixel_accuracy`` and ``mean_accuracy`` are numbers; ``iou``, ``accuracy`` and ``pixels`` (the
    share of the true pixels) are dicts by class name. None (null) for a class that the truth lacks, or where
    nothing was counted.
    """

    def percent(value: float) -> float | None:
        return None if math.isnan(value) else 100 * value

    means = {name: percent(getattr(matrix, name)) for name in ("miou", "fwiou", "pixel_accuracy", "mean_accuracy")}
    columns = {"iou": matrix.iou, "accuracy": matrix.accuracy, "pixels": matrix.frequency}
    return means | {
        name: dict(zip(class_names, map(percent, column.tolist()), strict=True)) for name, column in columns.items()
    }


def format_table(matrix: ConfusionMatrix, class_names: tuple[str, ...]) -> str:
    """IoU, accuracy and share of pixels of each class in percent, and their means, as aligned text. The mean weighted
    by frequency is the fwIoU and the pixel accuracy.
    """
    head = ["class", "IoU", "acc.", "pixels"]
    columns = [class_names, matrix.iou, matrix.accuracy, matrix.frequency]
    means = [
        ["mean", matrix.miou, matrix.mean_accuracy, ""],
        ["by frequency", matrix.fwiou, matrix.pixel_accuracy, ""],
    ]
    rows = [head, *zip(*(column.tolist() if isinstance(column, Tensor) else column for column in columns)), *means]
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"{row[0]:{width}}" + "".join(f"  {_percent(cell):>6}" for cell in row[1:]).rstrip() for row in rows
    )


def _percent(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "n/a" if value != value else f"{100 * value:.2f}"
