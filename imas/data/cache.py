"""Decoded images and masks in memory, once for all workers of a process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .source import DataError, FileSource, upright_size


class CachedSource:
    """A source that decodes the given images and masks once, and keeps them in one shared-memory tensor.

    DataLoader workers read from that same memory however they are started. What it costs is H·W·3 bytes an image and
    H·W a mask, held by every process that makes one, in /dev/shm: 5.8 GB for Pascal's training images, 18.7 GB for
    those of Cityscapes. Files that cannot be read, and names that were not given, are left to the wrapped source when
    they are asked for.

    Args:
        images, masks: names whose image, and whose mask, to keep.

    Raises:
        UserError: not enough shared memory, before anything is decoded.
    """

    def __init__(self, source: FileSource, images: list[str], masks: list[str]) -> None:
        self.source = source
        self._kept: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}  # (kind, name) → first byte, shape
        wanted = dict.fromkeys([("image", name) for name in images] + [("mask", name) for name in masks])
        with ThreadPoolExecutor(8) as pool:
            ends = np.cumsum([0, *pool.map(self._bytes, wanted)], dtype=np.int64).tolist()
            try:  # memory that is shared before it is written to is taken once, not twice
                self._memory = torch.empty(ends[-1], dtype=torch.uint8).share_memory_()
            except RuntimeError as error:
                raise UserError(
                    f"dataset.cache: {ends[-1] / 1e9:.1f} GB of shared memory cannot be had ({error}); "
                    "make /dev/shm larger (of a container: --shm-size), or set dataset.cache to false"
                ) from None
            done = pool.map(self._keep, wanted, ends, ends[1:])
            list(tqdm(done, "decoding into memory", len(wanted), unit="image", disable=None))

    def image(self, name: str) -> Image.Image:
        return self._read("image", name)

    def mask(self, name: str) -> Image.Image:
        return self._read("mask", name)

    def _read(self, kind: str, name: str) -> Image.Image:
        if (kind, name) not in self._kept:
            return getattr(self.source, kind)(name)
        start, shape = self._kept[kind, name]
        return Image.fromarray(self._memory[start : start + int(np.prod(shape))].numpy().reshape(shape))

    def _bytes(self, key: tuple[str, str]) -> int:
        """What a decoded file takes, by its header; 0 if that cannot be read."""
        kind, name = key
        try:
            image, mask = self.source.paths(name)
            width, height = upright_size(image if kind == "image" else mask)
        except DataError:
            return 0
        return width * height * (3 if kind == "image" else 1)

    def _keep(self, key: tuple[str, str], start: int, end: int) -> None:
        if start == end:
            return
        kind, name = key
        try:
            pixels = np.asarray(getattr(self.source, kind)(name))
        except DataError:  # raised again when the image is drawn, where dataset.on_error decides
            return
        self._memory[start:end].numpy()[:] = pixels.reshape(-1)
        self._kept[key] = start, pixels.shape
