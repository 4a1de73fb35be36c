"""Predictions of images of any size: by windows, mirrored, resized, in memory that does not grow with the height.

Maps come as *bands*: tensors (B, C, h, W) of some full-width rows, from the top to the bottom of the image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

log = logging.getLogger("imas")


class Protocol(NamedTuple):
    """The way images are predicted. Every reported mIoU names it."""

    window: int | None  # side in pixels, at least 2; None: one window as large as the image
    flip: bool = False  # average with the mirrored image
    scales: tuple[float, ...] = (1.0,)  # average over the image in these sizes

    @property
    def stride(self) -> int | None:
        return None if self.window is None else int(self.window * 2 / 3)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return {"window": self.window, "stride": self.stride, "flip": self.flip, "scales": list(self.scales)}

    def __str__(self) -> str:
        text = "whole images" if self.window is None else f"windows of {self.window}, stride {self.stride}"
        text += ", flip" if self.flip else ""
        return text + ("" if self.scales == (1.0,) else ", scales" + "".join(f" {scale:g}" for scale in self.scales))


@torch.no_grad()
def window_bands(model: Callable[[Tensor], Any], images: Tensor, crop: int | None) -> Iterator[Tensor]:
    """Softmax probabilities of overlapping windows, summed: (B, 3, H, W) normalised → bands (B, C, h, W) float32.

    The windows are those of ``evaluate.predict_sliding``; without ``crop`` it is one, as large as the image. Rows that
    no further window touches make a band, which is valid until the next one is asked for. So the sum takes
    min(crop, H) · W · C numbers of memory, on the device of ``images``.

    Args:
        model: gives logits (B, C, h, w) of any window, or a tuple that begins with them, on any device.
    """
    height, width = images.shape[-2:]
    stride = Protocol(crop).stride or max(height, width)
    crop = crop or stride
    total: Tensor | None = None
    for top in range(0, height, stride):
        bottom = min(top + crop, height)
        for left in range(0, width, stride):
            output = model(images[..., top:bottom, left : left + crop])
            logits = output[0] if isinstance(output, tuple) else output
            probabilities = logits.float().softmax(dim=1).to(images.device)
            if total is None:
                total = probabilities.new_zeros(len(images), probabilities.shape[1], bottom, width)
            total[..., : bottom - top, left : left + crop] += probabilities
            del output, logits, probabilities  # or they would use memory while the next window is predicted
        done = min(stride, height - top)
        yield total[..., :done, :]
        kept = bottom - top - done  # at most ``done``, since windows overlap by no more than a stride
        total[..., :kept, :] = total[..., done : done + kept, :]
        total[..., kept:, :] = 0


def protocol_bands(model: Callable[[Tensor], Any], images: Tensor, protocol: Protocol) -> Iterator[Tensor]:
    """Bands as of ``window_bands``, of all views of a protocol: the largest of a pixel's C numbers is its class,
    divided by their sum it is the mean probability of that class.

    A view is the image in one of the scales: side lengths round(scale · side), bilinear with antialiasing, as training
    resizes; with ``flip`` each scale once more, mirrored. Every view is divided by the number of windows over each
    pixel, mirrored back, resized back to H × W (bilinear, half-pixel centres), and all are averaged. Each view keeps an
    image and a band of its own in memory.
    """
    if protocol.scales == (1.0,) and not protocol.flip:
        yield from window_bands(model, images, protocol.window)
        return
    mirrored = (False, True) if protocol.flip else (False,)
    for bands in zip(*(_view(model, images, protocol, scale, flip) for scale in protocol.scales for flip in mirrored)):
        yield sum(bands) / len(bands)


@torch.no_grad()
def _view(model: Callable, images: Tensor, protocol: Protocol, scale: float, flip: bool) -> Iterator[Tensor]:
    """Mean probabilities of one view, resized to the image, in bands of ``protocol.stride`` rows."""
    height, width = images.shape[-2:]
    rows, columns = (max(1, round(scale * side)) for side in (height, width))
    stride = protocol.stride or height
    if (rows, columns) != (height, width):
        images = F.interpolate(images, (rows, columns), mode="bilinear", antialias=True)
    bands = window_bands(model, images.flip(-1) if flip else images, protocol.window)
    held, first = images[:, :0, :0], 0  # rows of the view in the image's width, and the number of the first of them
    for top in range(0, height, stride):
        # As F.interpolate, which needs the whole map at once.
        position = (torch.arange(top, min(top + stride, height)) + 0.5) * (rows / height) - 0.5
        position = position.clamp(0, rows - 1)
        above, below = position.long(), position.ceil().long()
        while first + held.shape[-2] <= below[-1]:
            band = next(bands)
            band = band / band.sum(dim=1, keepdim=True)
            band = F.interpolate(band.flip(-1) if flip else band, (band.shape[-2], width), mode="bilinear")
            held = torch.cat([held, band], dim=-2) if held.numel() else band
        held, first = held[..., int(above[0]) - first :, :], int(above[0])
        upper, lower = (held.index_select(-2, (row - first).to(held.device)) for row in (above, below))
        yield upper.lerp_(lower, (position - above).view(-1, 1).to(held.device))


def labels(bands: Iterator[Tensor]) -> Tensor:
    """The likeliest class of every pixel: (B, H, W) uint8."""
    return torch.cat([band.max(dim=1).indices.byte() for band in bands], dim=-2)  # max: 3 times argmax's speed on CPUs


def labels_and_confidence(bands: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """The likeliest class of every pixel, (B, H, W) uint8, and its mean probability, float32 in [0, 1]."""
    pairs = []
    for band in bands:
        largest, classes = band.max(dim=1)
        pairs.append((classes.byte(), largest / band.sum(dim=1)))
    classes, confidence = (torch.cat(parts, dim=-2) for parts in zip(*pairs))
    return classes, confidence


class Predictor:
    """Predicts by a protocol, with networks on ``device``, which may be too small for a whole image: probabilities of
    such images are summed on the CPU, with ``accumulate="cpu"`` those of all images.
    """

    def __init__(self, protocol: Protocol, device: torch.device, accumulate: str = "device") -> None:
        self.protocol, self.device, self.accumulate = protocol, device, accumulate
        self._warned = False

    def __call__(self, network: nn.Module, images: Tensor, reduce: Callable[[Iterator[Tensor]], Any] = labels) -> Any:
        """``reduce`` of the bands that the network gives of normalised images (B, 3, H, W).

        Raises:
            UserError: the device is too small for a single window.
        """
        for on_device in (True, False) if self.accumulate == "device" else (False,):
            try:
                placed = images.to(self.device if on_device else "cpu")
                return reduce(protocol_bands(lambda window: network(window.to(self.device)), placed, self.protocol))
            except torch.OutOfMemoryError:
                placed = None
            if on_device and not self._warned:
                size = f"{images.shape[-1]}×{images.shape[-2]}"
                log.warning("%s pixels are too many for %s: such images are summed on the CPU", size, self.device)
                self._warned = True
        raise UserError(
            f"{self.device} is too small for a window of {len(images)} image(s) ({self.protocol}): take smaller "
            "windows (--set dataset.val.crop.size=N) or fewer images at once (--set dataset.val.batch_size=1)"
        )
