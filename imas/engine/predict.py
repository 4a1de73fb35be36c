"""Predictions of image files without ground truth: class numbers, overlays and confidence as pictures."""

from __future__ import annotations

import glob
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF
from tqdm import tqdm

from .. import distributed
from ..data.catalog import Catalog
from ..data.folder import images_below
from ..data.source import DataError, read_image
from ..strict import UserError
from .evaluate import evaluating
from .pictures import coloured
from .results import replacing
from .sliding import Predictor, labels_and_confidence

log = logging.getLogger("imas")

_KINDS = ("index", "overlay", "confidence")  # the folders of the outputs
_WRITERS = 2  # threads; as many finished images wait for them


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
    named = [Path(word).absolute() for word in words if Path(word).is_file()]
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
            name = (path.absolute() if base == shared else path).relative_to(base).with_suffix("")
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


class ImageFiles(Dataset):
    """Image files as (image (3, H, W) uint8, ""), or (None, what is wrong with the file)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return TF.pil_to_tensor(read_image(self.paths[index])), ""
        except DataError as error:
            return None, str(error)

    def __len__(self) -> int:
        return len(self.paths)


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
        workers: processes that read.

    Returns:
        What is wrong with the images that are left out, of all ranks.
    """
    mine = list(items[distributed.rank() :: distributed.world_size()])
    loader = DataLoader(ImageFiles([item.path for item in mine]), None, num_workers=workers, collate_fn=tuple)
    problems: list[str] = []
    waiting: deque[Future] = deque()

    def finish_one() -> None:
        problem = waiting.popleft().result()
        if problem:
            problems.append(problem)

    start = time.perf_counter()
    bar = tqdm(total=len(mine), unit="image", leave=False, dynamic_ncols=True, disable=not distributed.is_main())
    with bar, evaluating({"network": network}), ThreadPoolExecutor(_WRITERS) as pool:
        for item, (image, problem) in zip(mine, loader):
            if image is None:
                problems.append(problem)
            else:
                batch = normalise(image.unsqueeze(0).to(predictor.device))
                label, confidence = predictor(network, batch, labels_and_confidence)
                grey = confidence[0].mul_(255).round_().byte()
                waiting.append(pool.submit(_write, item, image, label[0].cpu(), grey.cpu(), catalog, ids, save_dir))
            if len(waiting) > _WRITERS:
                finish_one()
            bar.update()
        while waiting:
            finish_one()
    gathered = distributed.gather(problems)
    seconds = time.perf_counter() - start
    everything = [problem for part in gathered for problem in part]
    done = len(items) - len(everything)
    log.info("%d images in %.1f s, %.2f images/s: %s", done, seconds, done / seconds, save_dir)
    return everything


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
