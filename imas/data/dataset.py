"""Lists of images, and the views of each image that training and evaluation read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from ..strict import UserError
from .strong import strong_view
from .weak import weak_view


class Source(Protocol):
    """What a data set needs to be read from: see ``source.py``."""

    def image(self, name: str) -> Image.Image: ...
    def mask(self, name: str) -> Image.Image: ...


class Draw(NamedTuple):
    """Which image to read, and the seed of its augmentation. Samplers give these out."""

    index: int
    seed: tuple[int, ...]


class Geometry(NamedTuple):
    """The weak augmentation's options: see ``weak.weak_view``."""

    base: int | tuple[int, int] | None
    scale: tuple[float, float] | None
    flip: bool
    crop: tuple[int, int] | None
    crop_type: str
    ignore_index: int


class LabeledSet(Dataset):
    """Augmented labeled images: a dict of ``images`` (3, H, W) uint8, ``labels`` (H, W) int64 and, with ``num_augs``,
    ``images_strong`` (3, H, W) uint8.
    """

    def __init__(self, source: Source, names: Sequence[str], geometry: Geometry, num_augs: int | None = None) -> None:
        self.source, self.names, self.geometry, self.num_augs = source, names, geometry, num_augs

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        rng = np.random.default_rng(draw.seed)
        name = self.names[draw.index]
        image, mask = _read_pair(self.source, name)
        image, mask = weak_view(image, mask, rng, **self.geometry._asdict())
        sample = {"images": TF.pil_to_tensor(image), "labels": _label_tensor(mask)}
        if self.num_augs is not None:
            sample["images_strong"] = TF.pil_to_tensor(strong_view(image, self.num_augs, rng))
        return sample


class UnlabeledSet(Dataset):
    """Views of unlabeled images, whose masks are never read: a dict of ``weak`` (3, H, W) uint8, ``index`` and, with
    ``num_augs``, ``strong``, the same crop with its colours changed.
    """

    def __init__(self, source: Source, names: Sequence[str], geometry: Geometry, num_augs: int | None = None) -> None:
        self.source, self.names, self.geometry, self.num_augs = source, names, geometry, num_augs

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        rng = np.random.default_rng(draw.seed)
        image, _ = weak_view(self.source.image(self.names[draw.index]), None, rng, **self.geometry._asdict())
        sample = {"weak": TF.pil_to_tensor(image), "index": torch.tensor(draw.index)}
        if self.num_augs is not None:
            sample["strong"] = TF.pil_to_tensor(strong_view(image, self.num_augs, rng))
        return sample


class EvaluationSet(Dataset):
    """Whole images as they are: (image (3, H, W) uint8, label (H, W) int64)."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self.source, self.names = source, names

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = _read_pair(self.source, self.names[index])
        return TF.pil_to_tensor(image), _label_tensor(mask)

    def __len__(self) -> int:
        return len(self.names)


def read_list(path: str | Path) -> list[str]:
    """The lines of a list file, one image each; empty lines are left out.

    Raises:
        UserError: a file that is missing or empty.
    """
    path = Path(path)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{path}: cannot read the list: {reason} (looked in {Path.cwd()})") from None
    if not names:
        raise UserError(f"{path}: the list is empty")
    return names


def _read_pair(source: Source, name: str) -> tuple[Image.Image, Image.Image]:
    image, mask = source.image(name), source.mask(name)
    if image.size != mask.size:
        raise UserError(
            f"{name}: the image is {image.width}×{image.height} pixels, its mask {mask.width}×{mask.height}"
        )
    return image, mask


def _label_tensor(mask: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(mask, dtype=np.int64))
