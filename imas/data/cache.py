"""Decoded images and masks in memory, once for all workers of a process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .source import DataError, FileSource

_THREADS = 8


class CachedSource:
    """A source that decodes the given images and masks once, and keeps them in one shared-memory tensor.

    DataLoader workers read from that same memory however they are started. What it costs is H·W·3 bytes an image and
    H·W a mask, held by every process that makes one, in /dev/shm: 5.8 GB for Pascal's training images, 18.7 GB for
    those of Cityscapes. Eight threads fill it.

    Files that cannot be read, and names that were not given, are left to the wrapped source when they are asked for.

    Args:
        source: what to read from.
        images, masks: names whose image, and whose mask, to keep.

    Raises:
        UserError: not enough shared memory, said before anything is decoded.
    """

    def __init__(self, source: FileSource, images: list[str], masks: list[str]) -> None:
        self.source = source
        self._kept: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}  # (kind, name) → first byte, shape
        wanted = [("image", name) for name in dict.fromkeys(images)] + [("mask", name) for name in dict.fromkeys(masks)]
        with ThreadPoolExecutor(_THREADS) as pool:
            ends = np.cumsum([0, *pool.map(self._bytes, wanted)], dtype=np.int64).tolist()
            self._memory = _shared(ends[-1])
            done = pool.map(self._keep, wanted, ends, ends[1:])
            for _ in tqdm(done, "decoding into memory", len(wanted), unit="image", disable=None):
                pass

    def image(self, name: str) -> Image.Image:
        """The RGB image of a name."""
        return self._read("image", name, self.source.image)

    def mask(self, name: str) -> Image.Image:
        """The mask of a name, mode L."""
        return self._read("mask", name, self.source.mask)

    def missing(self, names: list[str], masks: bool) -> list[Path]:
        """Files of these names that do not exist."""
        return self.source.missing(names, masks)

    def _read(self, kind: str, name: str, decode: Callable[[str], Image.Image]) -> Image.Image:
        if (kind, name) not in self._kept:
            return decode(name)
        start, shape = self._kept[kind, name]
        return Image.fromarray(self._memory[start : start + int(np.prod(shape))].numpy().reshape(shape))

    def _bytes(self, key: tuple[str, str]) -> int:
        """What a decoded file takes, by its header; 0 if that cannot be read."""
        kind, name = key
        channels, path = (3, 0) if kind == "image" else (1, 1)
        try:
            with Image.open(self.source.files(self.source.root, name)[path]) as image:
                return channels * image.width * image.height
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # as when the source opens it
            return 0

    def _keep(self, key: tuple[str, str], start: int, end: int) -> None:
        kind, name = key
        if start == end:
            return
        try:
            pixels = np.asarray(self.source.image(name) if kind == "image" else self.source.mask(name))
        except DataError:  # said when the image is drawn, where dataset.on_error decides
            return
        self._memory[start:end].numpy()[:] = pixels.reshape(-1)
        self._kept[key] = start, pixels.shape


def _shared(size: int) -> torch.Tensor:
    """(size,) uint8, not yet filled: memory that is shared before it is written to is taken once, not twice."""
    try:
        return torch.empty(size, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"dataset.cache: {size / 1e9:.1f} GB of shared memory cannot be had ({error}); "
            "make /dev/shm larger (of a container: --shm-size), or set dataset.cache to false"
        ) from None
