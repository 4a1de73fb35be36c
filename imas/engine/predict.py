"""Predictions of image files without ground truth: class numbers, overlays and confidences as pictures."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF
from tqdm import tqdm

from .. import distributed
from ..data.catalog import catalog_of
from ..data.folder import below, is_image
from ..data.labels import index_picture
from ..data.normalise import Normalise
from ..data.source import DataError, read_image
from ..errors import UserError
from ..files import replacing
from ..models.modes import evaluating
from ..schema import Dataset
from .pictures import coloured
from .sliding import Predictor, labels_and_confidence

log = logging.getLogger("imas")

_KINDS = {"index": ".png", "overlay": ".jpg", "confidence": ".png"}  # folders of the outputs, and their suffixes
_WRITERS = 2  # threads
_SHOWN = 6  # names of files that are left out
_LARGEST_JPEG = 65_500  # pixels a side


def find_images(words: Sequence[str], save_dir: Path) -> tuple[dict[Path, Path], list[str]]:
    """Image files of folders (with their sub-folders), of glob patterns, or by name.

    Returns:
        Files by the path of their outputs, without suffix: as the image is named below the folder, below the part of
        a pattern that has no wildcard, or below the folder that all files given by name share. Outputs of an earlier
        run in ``save_dir`` are left out. And a sentence for each image that would have the outputs of another one.

    Raises:
        UserError: a word that matches no image.
    """
    folders = [os.path.dirname(os.path.abspath(word)) for word in words if os.path.isfile(word)]
    outputs = [save_dir.resolve() / kind for kind in _KINDS]
    found: dict[Path, Path] = {}
    problems, seen = [], set()
    for word in words:
        path = Path(word)
        if path.is_file():
            base, paths = Path(os.path.commonpath(folders)), [Path(os.path.abspath(path))]
        elif path.is_dir():
            names = below(path)
            others = [name for name in names if not is_image(name)]
            if others:
                shown = ", ".join(others[:_SHOWN]) + (" ..." if len(others) > _SHOWN else "")
                log.warning("%s: no images by their suffix, left out: %d files (%s)", path, len(others), shown)
            base, paths = path, [path / name for name in names if is_image(name)]
        else:
            base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            paths = [Path(match) for match in sorted(glob.glob(word, recursive=True)) if os.path.isfile(match)]
        paths = [path for path in paths if not any(path.resolve().is_relative_to(folder) for folder in outputs)]
        if not paths:
            kind = "folder without images" if Path(word).is_dir() else "no such file"
            raise UserError(f"--images {word}: {kind} (looked in {Path.cwd()}); expected a folder, a file or a pattern")
        for path in paths:
            name = path.relative_to(base).with_suffix("")
            if path.resolve() not in seen and found.setdefault(name, path) != path:
                problems.append(f"{path}: left out, since {found[name]} has the same outputs, {name}.png")
            seen.add(path.resolve())
    return found, problems


@torch.no_grad()
def predict_images(
    network: nn.Module,
    images: dict[Path, Path],
    predictor: Predictor,
    dataset: Dataset,
    save_dir: Path,
    ids: Sequence[int] | None = None,
    min_confidence: float = 0.0,
) -> list[str]:
    """Write predictions of image files at their own size, this rank's share of them.

    ``index/NAME.png`` has the class of every pixel, with the palette; ``overlay/NAME.jpg`` the image, half covered by
    the colours of the classes; ``confidence/NAME.png`` the mean probability of the class, 0..255 in grey for 0..1.

    Args:
        network: on the device of ``predictor``.
        images: files by the path of their outputs.
        dataset: the section of the configuration: normalisation, classes, workers.
        ids: numbers to write for the classes, in grey without a palette (``Catalog.test_ids``).
        min_confidence: pixels below it get the number 255 instead, and no colour.

    Returns:
        A sentence for each image without a prediction, of all ranks.
    """
    normalise, palette = Normalise(dataset.mean, dataset.std, predictor.device), catalog_of(dataset).palette
    mine, start = list(images.items())[distributed.rank() :: distributed.world_size()], time.perf_counter()
    loader = DataLoader([path for _, path in mine], None, collate_fn=_read, num_workers=dataset.workers)

    def write(name: Path, image: Tensor, label: Tensor, confidence: Tensor) -> str | None:
        unsure = confidence < min_confidence
        numbers = (label if ids is None else torch.tensor(ids)[label.int()].byte()).masked_fill(unsure, 255).numpy()
        index = index_picture(numbers, palette) if ids is None else Image.fromarray(numbers)
        label = label.masked_fill(unsure, 255)
        overlay = Image.blend(TF.to_pil_image(image), coloured(label, palette), 0.5)
        pictures = (index, overlay, Image.fromarray(confidence.mul(255).round().byte().numpy()))
        for picture, (kind, suffix) in zip(pictures, _KINDS.items()):
            suffix = suffix if max(picture.size) <= _LARGEST_JPEG else ".png"
            path = save_dir / kind / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with replacing(path) as temporary:
                    picture.save(temporary, "JPEG" if suffix == ".jpg" else "PNG", quality=92)
            except OSError as error:
                if error.errno is not None:  # of the disk, not of an encoder
                    raise
                return f"{images[name]}: its prediction cannot be written ({error})"
        return None

    bar = tqdm(loader, unit="image", leave=False, dynamic_ncols=True, disable=None if distributed.is_main() else True)
    outcomes = []
    with evaluating(network), ThreadPoolExecutor(_WRITERS) as pool:
        for (name, _), image in zip(mine, bar):
            if isinstance(image, str):
                outcomes.append(pool.submit(str, image))
                continue
            batch = normalise(image.unsqueeze(0).to(predictor.device))
            label, confidence = (part[0].cpu() for part in predictor(network, batch, labels_and_confidence))
            outcomes.append(pool.submit(write, name, image, label, confidence))
            if len(outcomes) > _WRITERS:  # images wait in memory until they are written
                outcomes[-1 - _WRITERS].result()
    found = distributed.gather([outcome.result() for outcome in outcomes])
    problems = list(filter(None, itertools.chain(*found)))
    seconds, done = time.perf_counter() - start, len(images) - len(problems)
    log.info("%d images in %.1f s, %.2f images/s: %s", done, seconds, done / seconds, save_dir)
    return problems


def _read(path: Path) -> Tensor | str:
    """(3, H, W) uint8, or a sentence about a file that cannot be read."""
    try:
        return TF.pil_to_tensor(read_image(path))
    except DataError as error:
        return str(error)
