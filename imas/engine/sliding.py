"""What a network says of images of any size: by windows, mirrored, resized, in memory that does not grow with height.

Maps come as *bands*: tensors (B, C, h, W) of some full-width rows, from the top to the bottom of the image.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

log = logging.getLogger("imas")


class Protocol(NamedTuple):
    """How images are predicted. It stands beside every mIoU."""

    window: int | None  # side in pixels, at least 2; None: one window as large as the image
    flip: bool = False  # average with the mirrored image
    scales: tuple[float, ...] = (1.0,)  # average over the image in these sizes

    @property
    def stride(self) -> int | None:
        """Pixels from window to window."""
        return None if self.window is None else int(self.window * 2 / 3)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return {"window": self.window, "stride": self.stride, "flip": self.flip, "scales": list(self.scales)}

    def __str__(self) -> str:
        words = ["whole images" if self.window is None else f"windows of {self.window}, stride {self.stride}"]
        words += ["flip"] if self.flip else []
        words += [f"scales {' '.join(f'{scale:g}' for scale in self.scales)}"] if self.scales != (1.0,) else []
        return ", ".join(words)


@torch.no_grad()
def window_bands(model: Callable[[Tensor], Any], images: Tensor, crop: int | None) -> Iterator[Tensor]:
    """Softmax probabilities of overlapping windows, summed: (B, 3, H, W) normalised → bands (B, C, h, W) float32.

    Windows of ``crop`` × ``crop`` start at 0, stride, 2·stride, ... while inside the image, stride = int(crop·2/3);
    the last ones are cut short by the border. Rows that no further window touches make a band, which is valid until
    the next one is asked for: in memory are min(crop, H) · W · C numbers, whatever H is, and what one window needs.

    Args:
        model: gives logits (B, C, h, w) of any window, or a tuple that begins with them, on any device. The sum lies
            on the device of ``images``.
        crop: window side in pixels, at least 2; None for one window as large as the image.
    """
    height, width = images.shape[-2:]
    crop, stride = (max(height, width),) * 2 if crop is None else (crop, int(crop * 2 / 3))
    total: Tensor | None = None
    for top in range(0, height, stride):
        bottom = min(top + crop, height)
        for left in range(0, width, stride):
            probabilities = _softmax(model(images[..., top:bottom, left : left + crop])).to(images.device)
            if total is None:
                total = probabilities.new_zeros(len(images), probabilities.shape[1], bottom, width)
            total[..., : bottom - top, left : left + crop] += probabilities
            del probabilities  # which else stays while the next window is predicted
        done = min(stride, height - top)
        yield total[..., :done, :]
        kept = bottom - top - done  # at most ``done``, since windows overlap by no more than a stride
        total[..., :kept, :] = total[..., done : done + kept, :]
        total[..., kept:, :] = 0


def _softmax(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).float().softmax(dim=1)


def protocol_bands(model: Callable[[Tensor], Any], images: Tensor, protocol: Protocol) -> Iterator[Tensor]:
    """Bands as ``window_bands`` has them, of all views of a protocol: the largest of a pixel's C numbers is its class,
    divided by their sum it is the mean probability of that class.

    A view is the image in one of the scales: side lengths round(scale · side), bilinear with antialiasing, as training
    resizes; with ``flip`` each scale once more, mirrored. Every view is divided by the number of windows over each
    pixel, mirrored back, resized back to H × W (bilinear, half-pixel centres), and all are averaged. Each view keeps an
    image and a band of its own in memory.
    """
    if protocol.scales == (1.0,) and not protocol.flip:
        return window_bands(model, images, protocol.window)
    mirrored = (False, True) if protocol.flip else (False,)
    return _mean([_view(model, images, protocol.window, scale, flip) for scale in protocol.scales for flip in mirrored])


@torch.no_grad()
def _view(
    model: Callable[[Tensor], Any], images: Tensor, crop: int | None, scale: float, flip: bool
) -> Iterator[Tensor]:
    size = images.shape[-2:]
    scaled = tuple(max(1, round(scale * side)) for side in size)
    if scaled != size:
        images = F.interpolate(images, scaled, mode="bilinear", antialias=True)
    bands = window_bands(model, images.flip(-1) if flip else images, crop)
    means = (band / band.sum(dim=1, keepdim=True) for band in bands)
    straight = (band.flip(-1) for band in means) if flip else means
    return straight if scaled == size else _resized(straight, scaled[0], size)


def _resized(bands: Iterator[Tensor], rows: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """``F.interpolate(map, size, mode="bilinear")`` of a map of so many rows that comes in bands."""
    height, width = size
    position = ((torch.arange(height) + 0.5) * rows / height - 0.5).clamp(0, rows - 1)
    above = position.long()
    below = (above + 1).clamp(max=rows - 1)
    share = (position - above).view(-1, 1)
    first = done = 0  # row of the source that ``waiting`` begins with; rows of the result that have been given
    waiting: Tensor | None = None
    for band in bands:
        band = F.interpolate(band, (band.shape[-2], width), mode="bilinear")
        waiting = band if waiting is None else torch.cat([waiting, band], dim=-2)
        ready = int((below < first + waiting.shape[-2]).sum())
        if ready > done:
            pair = ((row[done:ready] - first).to(band.device) for row in (above, below))
            upper, lower = (waiting.index_select(-2, index) for index in pair)
            yield upper.lerp_(lower, share[done:ready].to(band.device))
        if ready < height:
            passed = min(int(above[ready]) - first, waiting.shape[-2])
            waiting, first, done = waiting[..., passed:, :], first + passed, ready


def _mean(maps: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    """The mean of maps whose bands have different heights."""
    waiting = [next(bands) for bands in maps]
    while waiting[0] is not None:
        rows = min(band.shape[-2] for band in waiting)
        yield sum(band[..., :rows, :] for band in waiting) / len(waiting)
        rest = [band[..., rows:, :] for band in waiting]
        waiting = [band if band.shape[-2] else next(bands, None) for band, bands in zip(rest, maps)]


def labels(bands: Iterator[Tensor]) -> Tensor:
    """The likeliest class of every pixel: (B, H, W) uint8."""
    return torch.cat([band.max(dim=1).indices.byte() for band in bands], dim=-2)  # max: 3 times argmax's speed on CPUs


def labels_and_confidence(bands: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """The likeliest class of every pixel, (B, H, W) uint8, and its mean probability, float32 in [0, 1]."""
    classes, confidences = zip(*map(_class_and_confidence, bands))
    return torch.cat(classes, dim=-2), torch.cat(confidences, dim=-2)


def _class_and_confidence(band: Tensor) -> tuple[Tensor, Tensor]:
    largest, number = band.max(dim=1)
    return number.byte(), largest / band.sum(dim=1)


class Predictor:
    """Predicts by a protocol, with the image and its sum of probabilities where they fit.

    Args:
        device: of the networks.
        accumulate: ``device``: there, too, but on the CPU for images for which the device is too small; or ``cpu``.
    """

    def __init__(self, protocol: Protocol, device: torch.device, accumulate: str = "device") -> None:
        self.protocol, self.device, self.accumulate = protocol, device, accumulate
        self._said = False

    def __call__(self, network: nn.Module, images: Tensor, reduce: Callable[[Iterator[Tensor]], Any] = labels) -> Any:
        """``reduce`` of the bands that the network gives of normalised images (B, 3, H, W).

        Raises:
            UserError: the device is too small for a single window.
        """

        def on(place: torch.device | str) -> Any:
            bands = protocol_bands(lambda window: network(window.to(self.device)), images.to(place), self.protocol)
            return reduce(bands)

        if self.accumulate == "device":
            with contextlib.suppress(torch.OutOfMemoryError):
                return on(self.device)
            self._say_once(images)
        try:
            return on("cpu")
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.device} is too small for a window of {len(images)} image(s) ({self.protocol}): take smaller "
                "windows (--set dataset.val.crop.size=N) or fewer images at once (--set dataset.val.batch_size=1)"
            ) from None

    def _say_once(self, images: Tensor) -> None:
        if not self._said:
            height, width = images.shape[-2:]
            log.warning(
                "%d×%d pixels are too many for %s: such images are summed on the CPU", width, height, self.device
            )
            self._said = True
