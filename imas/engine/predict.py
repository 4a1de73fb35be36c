"""Predictions of image files without ground truth: class numbers, overlays and confidence as pictures."""

from __future__ import annotations

import glob
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
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
_WRITERS = 2  # threads; as many predicted images wait for them


class Incomplete(UserError):
    """Some images have no prediction; all others do."""

    status = 1


class Item(NamedTuple):
    """An image file, and what its outputs are called below their folders, without the suffix."""

    path: Path
    name: Path


def find_images(words: Sequence[str], save_dir: Path) -> tuple[list[Item], list[str]]:
    """Image files of folders (with their sub-folders), of glob patterns, or by name.

    Outputs are called as their images are, below the folder, below the part of a pattern that has no wildcard, or below
    the folder that all files given by name share. Outputs of an earlier run are no images.

    Returns:
        The images, and what is wrong with others: they would have the outputs of an image before them.

    Raises:
        UserError: a word that stands for no image.
    """
    named = [Path(os.path.abspath(word)) for word in words if Path(word).is_file()]
    shared = Path(os.path.commonpath([path.parent for path in named])) if named else None
    outputs = [save_dir.resolve() / kind for kind in _KINDS]
    items: dict[Path, Item] = {}
    problems, seen = [], set()
    for word in words:
        base = shared if Path(word).is_file() else Path(word) if Path(word).is_dir() else _before_wildcard(word)
        paths = [path for path in _paths(word) if not any(path.resolve().is_relative_to(folder) for folder in outputs)]
        if not paths:
            kind = "folder without images" if Path(word).is_dir() else "no such file"
            raise UserError(f"--images {word}: {kind} (looked in {Path.cwd()}); expected a folder, a file or a pattern")
        for path in paths:
            name = (Path(os.path.abspath(path)) if base == shared else path).relative_to(base).with_suffix("")
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            if name in items:
                problems.append(f"{path}: left out, since {items[name].path} has the same outputs, {name}.png")
            else:
                items[name] = Item(path, name)
    return list(items.values()), problems


def _paths(word: str) -> list[Path]:
    path = Path(word)
    if path.is_dir():
        return [path / name for name in images_below(path)]
    if path.is_file():
        return [path]
    return [Path(found) for found in sorted(glob.glob(word, recursive=True)) if Path(found).is_file()]


def _before_wildcard(word: str) -> Path:
    parts = Path(word).parts
    first = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:first])


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
        ids: numbers to write for the classes, in grey without a palette (``Catalog.test_ids``).
        workers: images that are read ahead, each by a thread.

    Returns:
        What is wrong with the images that are left out, of all ranks.
    """
    mine = items[distributed.rank() :: distributed.world_size()]
    workers = max(1, workers)
    problems: list[str] = []
    start = time.perf_counter()
    bar = tqdm(total=len(mine), unit="image", leave=False, dynamic_ncols=True, disable=not distributed.is_main())

    def predicted(images: Iterator[Tensor | str]) -> Iterator[tuple[Item, Tensor, Tensor, Tensor]]:
        for item, image in zip(mine, images):
            if isinstance(image, str):
                problems.append(image)
            else:
                batch = normalise(image.unsqueeze(0).to(predictor.device))
                label, confidence = predictor(network, batch, labels_and_confidence)
                yield item, image, label[0].cpu(), confidence[0].mul_(255).round_().byte().cpu()
            bar.update()

    with bar, evaluating({"network": network}), ThreadPoolExecutor(workers + _WRITERS) as pool:
        results = predicted(_ahead(pool, _read, mine, workers))
        for problem in _ahead(pool, lambda result: _write(*result, catalog, ids, save_dir), results, _WRITERS):
            problems += [problem] if problem else []
    problems = [problem for part in distributed.gather(problems) for problem in part]
    seconds, done = time.perf_counter() - start, len(items) - len(problems)
    log.info("%d images in %.1f s, %.2f images/s: %s", done, seconds, done / seconds, save_dir)
    return problems


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], inputs: Iterable[Any], count: int
) -> Iterator[Any]:
    """``map(function, inputs)`` in threads, at most ``count`` results ahead."""
    waiting: deque[Future] = deque()
    for one in inputs:
        waiting.append(pool.submit(function, one))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(item: Item) -> Tensor | str:
    """(3, H, W) uint8, or what is wrong with the file."""
    try:
        return TF.pil_to_tensor(read_image(item.path))
    except DataError as error:
        return str(error)


def _write(
    item: Item,
    image: Tensor,
    label: Tensor,
    confidence: Tensor,
    catalog: Catalog,
    ids: Sequence[int] | None,
    save_dir: Path,
) -> str | None:
    """The three pictures of an image; what is wrong, if a picture cannot be of this kind."""
    if ids is None:
        index = Image.fromarray(label.numpy())
        index.putpalette([value for colour in catalog.palette for value in colour])
    else:
        index = Image.fromarray(torch.tensor(ids, dtype=torch.uint8)[label.int()].numpy())
    overlay = Image.blend(TF.to_pil_image(image), coloured(label.int(), catalog.palette), 0.5)
    try:
        _save(index, save_dir / "index" / f"{item.name}.png", "PNG")
        _save(Image.fromarray(confidence.numpy()), save_dir / "confidence" / f"{item.name}.png", "PNG")
        _save(overlay, save_dir / "overlay" / f"{item.name}.jpg", "JPEG", quality=92)
    except OSError as error:
        if error.errno is not None:  # of the disk, not of an encoder
            raise
        return f"{item.path}: its prediction cannot be written ({error})"
    return None


def _save(picture: Image.Image, path: Path, kind: str, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, kind, **options)
