"""The views of each image that training and evaluation read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import functional as TF

from ..schema import StrongAug
from .source import DataError, Source
from .strong import cutout, strong_view
from .weak import Geometry, weak_view

_TRIES = 10  # at replacing a broken image
_CUTOUT = 0.5  # how often a strong view gets its box


class Draw(NamedTuple):
    """Which image to read, and the seed of its augmentation. Samplers give these out."""

    index: int
    seed: tuple[int, ...]


class _AugmentedSet(Dataset):
    """Views of images of a training list, with ``strong`` strong views of each crop, of the kind ``strong_aug``.

    ``skip`` puts another sample in the place of a broken one, with a message as ``skipped`` (else an empty text).
    ``labels`` gives pseudo labels of unlabeled images (``labels.open_labels``).
    """

    def __init__(
        self,
        source: Source,
        names: Sequence[str],
        geometry: Geometry,
        strong: int = 0,
        strong_aug: StrongAug | None = None,
        skip: bool = False,
        labels: Source | None = None,
    ) -> None:
        self.source, self.names, self.geometry, self.skip, self.labels = source, names, geometry, skip, labels
        self.strong, self.strong_aug = strong, strong_aug

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng = np.random.default_rng(draw.seed)
        if not self.skip:
            return self.sample(draw.index, rng)
        index, skipped = draw.index, ""
        for _ in range(_TRIES):
            try:
                return self.sample(index, rng) | {"skipped": skipped}
            except DataError as error:
                index, skipped = int(rng.integers(len(self.names))), str(error)
        raise DataError(f"{_TRIES} images in a row cannot be used, the last: {skipped}")

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError

    def strong_views(self, image: Image.Image, rng: np.random.Generator) -> list[Image.Image]:
        """Independent strong views of a crop."""
        return [strong_view(image, self.strong_aug, rng) for _ in range(self.strong)]


class LabeledSet(_AugmentedSet):
    """Labeled images: a dict of ``image`` (3, H, W) uint8, ``label`` (H, W) uint8 and ``strong``, a list of views like
    the image.
    """

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        image, mask = read_pair(self.source, self.names[index])
        image, mask, _ = weak_view(image, mask, rng, self.geometry)
        label = torch.from_numpy(np.array(mask))
        strong = [TF.pil_to_tensor(view) for view in self.strong_views(image, rng)]
        return {"image": TF.pil_to_tensor(image), "label": label, "strong": strong}


class UnlabeledSet(_AugmentedSet):
    """Unlabeled images, whose masks are never read: a dict of ``weak`` (3, H, W) uint8, ``strong``, a list of views of
    the same crop with its colours changed, ``real`` (height, width) at top left that is no padding, and ``index``; with
    pseudo labels ``label`` (H, W) uint8, which is the ignore label where ``strong_aug.cutout`` puts noise into a view.
    """

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        name = self.names[index]
        if self.labels is None:
            image, label = self.source.image(name), None
        else:
            image, label = read_pair(self.source, name, self.labels)
        image, label, real = weak_view(image, label, rng, self.geometry)
        weak, strong = TF.pil_to_tensor(image), self.strong_views(image, rng)
        if label is not None and strong and self.strong_aug.cutout:
            for number, view in enumerate(strong):
                if rng.random() < _CUTOUT:
                    strong[number], label = cutout(view, label, self.geometry.ignore_index, rng)
        sample = {"weak": weak, "strong": [TF.pil_to_tensor(view) for view in strong]}
        if label is not None:
            sample["label"] = torch.from_numpy(np.array(label))
        return sample | {"real": torch.tensor(real), "index": torch.tensor(index)}


class EvaluationSet(Dataset):
    """Whole images as they are: (image (3, H, W) uint8, label (H, W) uint8)."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self.source, self.names = source, names

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = read_pair(self.source, self.names[index])
        return TF.pil_to_tensor(image), torch.from_numpy(np.array(mask))

    def __len__(self) -> int:
        return len(self.names)


def read_pair(source: Source, name: str, labels: Source | None = None) -> tuple[Image.Image, Image.Image]:
    """Image and mask of a name, the mask from ``labels`` if given. DataError if they are of different sizes, or one
    cannot be used.
    """
    image, mask = source.image(name), (labels or source).mask(name)
    need_same_size(name, image.size, mask.size)
    return image, mask


def need_same_size(name: str, image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Raise ``DataError`` where an image and its mask, by (width, height), are of different sizes."""
    if image != mask:
        turned = ": is the image turned by its EXIF orientation, and the mask not?" if image == mask[::-1] else ""
        raise DataError(f"{name}: the image is {image[0]}×{image[1]} pixels, its mask {mask[0]}×{mask[1]}{turned}")


def stacked(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples as a batch. Images stay in Pillow's order of bytes, (H, W, 3), though their shape is (B, 3, H, W): to put
    them into another costs a worker more than all else that it does with a crop.
    """
    rows = [{name: _permuted(value, 1, 2, 0) for name, value in sample.items()} for sample in samples]
    return {name: _permuted(value, 0, 3, 1, 2) for name, value in default_collate(rows).items()}


def _permuted(value: Any, *order: int) -> Any:
    """A tensor of as many axes, or each of a list, with its axes in that order; all else as it is."""
    if isinstance(value, list):
        return [_permuted(each, *order) for each in value]
    return value.permute(order) if isinstance(value, Tensor) and value.dim() == len(order) else value
