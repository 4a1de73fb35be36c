"""Sliding-window evaluation: one evaluator for training and for ``eval.py`` (spec, Evaluation)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import distributed
from ..data.catalog import catalog_of
from ..data.lists import Lists
from ..data.loaders import evaluation_batches, evaluation_loader
from ..data.normalise import Normalise
from ..files import replacing
from ..models.modes import evaluating
from ..ops.metrics import ConfusionMatrix
from ..schema import Config
from .interrupt import Interrupted
from .log import write_rows
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


@torch.no_grad()
def evaluate(
    networks: dict[str, nn.Module],
    loader: DataLoader,
    normalise: Callable[[Tensor], Tensor],
    predictor: Predictor,
    *,
    num_classes: int,
    ignore_index: int,
    stop: Callable[[], bool] | None = None,
) -> dict[str, ConfusionMatrix]:
    """Confusion matrix of each network over all validation images of all ranks.

    Args:
        networks: by name; put into eval mode, and back into the mode that they were in.
        loader: this rank's images, of ``evaluation_loader``.
        normalise: uint8 images → network input.
        stop: asked after each batch, whether to stop here.

    Raises:
        Interrupted: on all ranks, where any was to stop.
    """
    stopped = False
    matrices = {name: ConfusionMatrix(num_classes, ignore_index, predictor.device) for name in networks}
    with evaluating(*networks.values()):
        for images, labels in evaluation_batches(loader):
            images = normalise(images.to(predictor.device, non_blocking=True))
            for name, network in networks.items():
                predicted = predictor(network, images)
                matrices[name].update(predicted, labels.to(predicted.device, non_blocking=True))
            if stop is not None and stop():
                stopped = True
                break
    if stop is not None and distributed.any_rank(stopped, predictor.device):
        raise Interrupted("in an evaluation")
    for matrix in matrices.values():
        distributed.sum_over_ranks(matrix.counts)
    return matrices


class Evaluation:
    """``evaluate`` with all that follows from a configuration, whose windows are the default protocol."""

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

    def __call__(
        self, networks: dict[str, nn.Module], stop: Callable[[], bool] | None = None
    ) -> dict[str, ConfusionMatrix]:
        labels = {"num_classes": self.config.net.num_classes, "ignore_index": self.config.dataset.ignore_label}
        return evaluate(networks, self.loader, self.normalise, self.predictor, **labels, stop=stop)


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


def _rows(figures: dict[str, Any]) -> list[list]:
    """Name, IoU, accuracy and share of pixels of each class, then the means of the first two. The mean weighted by
    frequency is the fwIoU and the pixel accuracy.
    """
    rows = [[name, *(figures[column][name] for column in ("iou", "accuracy", "pixels"))] for name in figures["iou"]]
    rows.append(["mean", figures["miou"], figures["mean_accuracy"], ""])
    return [*rows, ["by frequency", figures["fwiou"], figures["pixel_accuracy"], ""]]


def format_table(matrix: ConfusionMatrix, class_names: tuple[str, ...]) -> str:
    """IoU, accuracy and share of pixels of each class in percent, and their means, as aligned text."""

    def text(value: float | str | None) -> str:
        return value if isinstance(value, str) else "n/a" if value is None else f"{value:.2f}"

    rows = [["class", "IoU", "acc.", "pixels"], *_rows(figures(matrix, class_names))]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:{width}}" + "".join(f"  {text(cell):>6}" for cell in row[1:]).rstrip() for row in rows)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, protocol: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write a row for each class and each mean, in percent, unrounded; what does not exist stays empty.

    Every row repeats the protocol, so that several files can be joined. ``figures``: of the function ``figures``.
    """
    protocol = protocol | {"scales": " ".join(map(str, protocol["scales"]))}
    columns = ("class", "iou", "accuracy", "pixels")
    write_rows(path, (*protocol, *columns), (protocol | dict(zip(columns, row)) for row in _rows(figures)))
