"""Predictions of image files without ground truth: class numbers, overlays and confidences as pictures."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF
from tqdm import tqdm

from .. import distributed
from ..data.catalog import Catalog
from ..data.folder import images_below
from ..data.source import DataError, read_image
from ..errors import UserError
from ..files import replacing
from .evaluate import evaluating
from .pictures import coloured
from .sliding import Predictor, labels_and_confidence

log = logging.getLogger("imas")

_KINDS = ("index", "overlay", "confidence")  # the folders of the outputs
_WRITERS = 2  # threads


class Incomplete(UserError):
    """Some images have no prediction; all others do."""

    status = 1


class Item(NamedTuple):
    """An image file, and the path of its outputs below their folders, without the suffix."""

    path: Path
    name: Path


def find_images(words: Sequence[str], save_dir: Path) -> tuple[list[Item], list[str]]:
    """Image files of folders (with their sub-folders), of glob patterns, or by name.

    Outputs are named as their images are, below the folder, below the part of a pattern that has no wildcard, or below
    the folder that all files given by name share. Outputs of an earlier run in ``save_dir`` are left out.

    Returns:
        The images, and a sentence for each image that is left out because another one has the same outputs.

    Raises:
        UserError: a word that matches no image.
    """
    folders = [os.path.dirname(os.path.abspath(word)) for word in words if os.path.isfile(word)]
    shared = Path(os.path.commonpath(folders)) if folders else Path()
    outputs = [save_dir.resolve() / kind for kind in _KINDS]
    items: dict[Path, Item] = {}
    problems, seen = [], set()
    for word in words:
        base, paths = _expand(word, shared)
        paths = [path for path in paths if not any(path.resolve().is_relative_to(folder) for folder in outputs)]
        if not paths:
            kind = "folder without images" if Path(word).is_dir() else "no such file"
            raise UserError(f"--images {word}: {kind} (looked in {Path.cwd()}); expected a folder, a file or a pattern")
        for path in paths:
            name = path.relative_to(base).with_suffix("")
            if name in items and path.resolve() not in seen:
                problems.append(f"{path}: left out, since {items[name].path} has the same outputs, {name}.png")
            elif path.resolve() not in seen:
                items[name] = Item(path, name)
            seen.add(path.resolve())
    return list(items.values()), problems


def _expand(word: str, shared: Path) -> tuple[Path, list[Path]]:
    """The files that a word names, and the folder below which their outputs are named."""
    path = Path(word)
    if path.is_file():
        return shared, [Path(os.path.abspath(path))]
    if path.is_dir():
        return path, [path / name for name in images_below(path)]
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    return base, [Path(match) for match in sorted(glob.glob(word, recursive=True)) if os.path.isfile(match)]


def predict_images(
    network: nn.Module,
    items: Sequence[Item],
    predictor: Predictor,
    normalise: Callable[[Tensor], Tensor],
    catalog: Catalog,
    save_dir: Path,
    *,
    ids: Sequence[int] | None = None,
    workers: int = 0,
) -> list[str]:
    """Write predictions of image files at their own size, this rank's share of them.

    ``index/NAME.png`` has the class of every pixel, with the palette; ``overlay/NAME.jpg`` the image, half covered by
    the colours of the classes; ``confidence/NAME.png`` the mean probability of the class, 0..255 in grey for 0..1.

    Args:
        network: on the device of ``predictor``.
        ids: numbers to write for the classes, in grey without a palette (``catalog.CITYSCAPES_IDS``).
        workers: processes that read images ahead.

    Returns:
        A sentence for each image without a prediction, of all ranks.
    """
    mine, start = items[distributed.rank() :: distributed.world_size()], time.perf_counter()
    images = DataLoader(mine, batch_size=None, collate_fn=_read, num_workers=workers)
    images = tqdm(images, unit="image", leave=False, dynamic_ncols=True, disable=not distributed.is_main())
    write = partial(_write, palette=catalog.palette, ids=ids, save_dir=save_dir)
    outcomes: list[Future] = []  # each the sentence about an image, or None
    with evaluating({"network": network}), ThreadPoolExecutor(_WRITERS) as pool:
        for item, image in zip(mine, images):
            if isinstance(image, str):
                outcomes.append(pool.submit(str, image))
                continue
            batch = normalise(image.unsqueeze(0).to(predictor.device))
            label, confidence = predictor(network, batch, labels_and_confidence)
            confidence = confidence[0].mul_(255).round_().byte().cpu()
            outcomes.append(pool.submit(write, item, image, label[0].cpu(), confidence))
            if len(outcomes) > _WRITERS:  # images wait in memory until they are written
                outcomes[-1 - _WRITERS].result()
    found = distributed.gather([outcome.result() for outcome in outcomes])
    problems = list(filter(None, itertools.chain(*found)))
    seconds, done = time.perf_counter() - start, len(items) - len(problems)
    log.info("%d images in %.1f s, %.2f images/s: %s", done, seconds, done / seconds, save_dir)
    return problems


def _read(item: Item) -> Tensor | str:
    """(3, H, W) uint8, or a sentence about a file that cannot be read."""
    try:
        return TF.pil_to_tensor(read_image(item.path))
    except DataError as error:
        return str(error)


def _write(
    item: Item,
    image: Tensor,
    label: Tensor,
    confidence: Tensor,
    *,
    palette: Sequence[tuple[int, int, int]],
    ids: Sequence[int] | None,
    save_dir: Path,
) -> str | None:
    """Write the three pictures of an image; a sentence if it is too large for a format."""
    index = Image.fromarray(label.numpy() if ids is None else torch.tensor(ids, dtype=torch.uint8)[label.int()].numpy())
    if ids is None:
        index.putpalette(list(itertools.chain(*palette)))
    overlay = Image.blend(TF.to_pil_image(image), coloured(label.int(), palette), 0.5)
    pictures = (index, "png", {}), (overlay, "jpg", {"quality": 92}), (Image.fromarray(confidence.numpy()), "png", {})
    try:
        for kind, (picture, suffix, options) in zip(_KINDS, pictures):
            path = save_dir / kind / f"{item.name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                picture.save(temporary, "JPEG" if suffix == "jpg" else "PNG", **options)
    except OSError as error:
        if error.errno is not None:  # of the disk, not of an encoder
            raise
        return f"{item.path}: its prediction cannot be written ({error})"
    return None
