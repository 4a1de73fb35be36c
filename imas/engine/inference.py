"""Scores, pictures and labels of training images by trained networks, between two trainings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from .. import distributed
from ..data.catalog import catalog_of
from ..data.labels import label_path, open_labels, write_labels
from ..data.loaders import whole_images
from ..data.normalise import Normalise
from ..data.source import DataError, FileSource
from ..data.splits import digest
from ..errors import UserError
from ..files import replacing
from ..schema import Config
from .evaluate import write_json
from .interrupt import Interrupted, Interruption
from .log import read_rows, start_logging, write_rows
from .pictures import coloured, sheet

log = logging.getLogger("imas")

_MANIFEST = "manifest.json"

Measure = Callable[[Sequence[nn.Module], Tensor], float]


class Inference:
    """Scores, pictures and labels of training images, each made once, by all ranks together.

    Args:
        config: of the experiment, whose folders they go to.
    """

    def __init__(self, config: Config, device: torch.device, interruption: Interruption) -> None:
        self.config, self.device, self.interruption = config, device, interruption
        self.normalise = Normalise(config.dataset.mean, config.dataset.std, device)

    def images(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Training images at their own size: each name with its (1, 3, H, W) normalised image, on the device."""
        shown = None if distributed.is_main() else True  # None: on a terminal
        bar = {"unit": "image", "leave": False, "dynamic_ncols": True, "disable": shown}
        for name, image in zip(names, tqdm(whole_images(self.config, names), total=len(names), **bar)):
            if self.interruption.received is not None:
                raise Interrupted(f"at the image {name}")
            yield name, self.normalise(image.unsqueeze(0).to(self.device, non_blocking=True))

    @torch.no_grad()
    def score(
        self, stage: str, title: str, networks: Sequence[nn.Module], names: Sequence[str], measure: Measure
    ) -> dict[str, float]:
        """Score images once: ``log/STAGE/TITLE.csv``, largest first, equal ones in the order of the list.

        Args:
            measure: (networks, (1, 3, H, W) normalised image) → its score.

        Returns:
            Scores by name, in the order of the table.
        """
        start_logging(self.config.log_dir)
        folder = self.config.log_dir / stage
        table, manifest = folder / f"{title}.csv", _manifest(networks, names)
        if _read(folder) != manifest or not table.is_file():
            log.info("stage %s begins: %s of %d images", stage, title, len(names))
            mine = names[distributed.rank() :: distributed.world_size()]
            parts = distributed.gather({name: measure(networks, image) for name, image in self.images(mine)})
            scores = {name: score for part in parts for name, score in part.items()}
            if distributed.is_main():
                folder.mkdir(parents=True, exist_ok=True)
                ordered = sorted(names, key=lambda name: -scores[name])
                write_rows(table, ("image", title), ({"image": name, title: scores[name]} for name in ordered))
                write_json(folder / _MANIFEST, manifest)
            distributed.barrier()
        log.info("%s: %s", title, table)
        return {row["image"]: float(row[title]) for row in read_rows(table)}

    @torch.no_grad()
    def show(self, title: str, networks: Sequence[nn.Module], captions: Mapping[str, str]) -> None:
        """Draw what networks predict of some training images, once: ``log/TITLE.png``.

        Args:
            captions: by name of the image.
        """
        path, catalog = self.config.log_dir / f"{title}.png", catalog_of(self.config.dataset)
        if path.is_file() or not distributed.is_main():
            return
        rows = []
        for _, image in self.images(list(captions)):
            maps = [coloured(network(image)[0].argmax(dim=1)[0], catalog.palette) for network in networks]
            rows.append([TF.to_pil_image(self.normalise.inverse(image)[0].cpu()), *maps])
        titles = ["image", *(f"network {i}" for i in range(1, 1 + len(networks)))]
        picture = sheet(dict(zip(titles, map(list, zip(*rows)))), list(captions.values()), catalog)
        with replacing(path) as temporary:
            picture.save(temporary, "PNG")

    @torch.no_grad()
    def label(
        self,
        stage: str,
        network: nn.Module,
        names: Sequence[str],
        predict: Callable[[nn.Module, Tensor], Tensor],
        known: tuple[Path | None, Sequence[str]] = (None, ()),
    ) -> Path:
        """Label images once, as index PNGs: see ``data.labels``. A person may change them before they are used.

        They are written beside the folder that is returned, which is there when it is complete. All ranks write; a call
        that was cut off goes on where it was.

        Args:
            predict: (network, (1, 3, H, W) normalised image) → (1, H, W) class numbers.
            known: a folder of labels, and further images, whose labels are copied from there.

        Returns:
            The folder.

        Raises:
            UserError: the folder holds labels of another network, or of other images.
        """
        start_logging(self.config.log_dir)
        everything = [*known[1], *names]
        folder, manifest = self.config.snapshot_dir / stage / "labels", _manifest([network], everything)
        if folder.is_dir():
            if _read(folder) != manifest:
                raise UserError(
                    f"{folder}: its {_MANIFEST} is of another network or of other images than those of this run; "
                    "remove the folder to have it written anew, or name another one with --out"
                )
            log.info("stage %s is done: %s", stage, folder)
            return folder
        torn = folder.with_name(f"{folder.name}.part")
        if distributed.is_main():
            if torn.is_dir() and _read(torn) != manifest:
                shutil.rmtree(torn)
            torn.mkdir(parents=True, exist_ok=True)
            write_json(torn / _MANIFEST, manifest)
            log.info("stage %s begins: labels of %d images", stage, len(everything))
        distributed.barrier()
        whole, palette = open_labels(self.config.dataset, torn), catalog_of(self.config.dataset).palette
        mine = [name for name in everything[distributed.rank() :: distributed.world_size()] if not _has(whole, name)]
        copied = set(known[1])
        for name in mine:
            if name in copied:
                source, target = label_path(known[0], name), label_path(torn, name)
                if not source.is_file():
                    raise UserError(f"{source}: no such file; the label was written there, and is needed again")
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    shutil.copyfile(source, temporary)
        for name, image in self.images([name for name in mine if name not in copied]):
            write_labels(label_path(torn, name), predict(network, image)[0].byte().cpu().numpy(), palette)
        distributed.barrier()
        if distributed.is_main():
            os.replace(torn, folder)
        distributed.barrier()
        log.info("labels:       %s", folder)
        return folder


def _has(labels: FileSource, name: str) -> bool:
    """Whether a label is there and whole."""
    try:
        labels.mask(name)
    except DataError:
        return False
    return True


def _manifest(networks: Sequence[nn.Module], names: Sequence[str]) -> dict[str, Any]:
    """Which networks looked at which images: the digests of their weights and of the list."""

    def weights(network: nn.Module) -> str:
        words = hashlib.sha256()
        for name, tensor in network.state_dict().items():
            words.update(name.encode())
            words.update(tensor.cpu().contiguous().numpy().tobytes())
        return words.hexdigest()

    return {"networks": list(map(weights, networks)), "images": digest(names), "count": len(names)}


def _read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none, or no whole one."""
    try:
        return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
