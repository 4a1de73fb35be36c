"""One experiment as stages, each in folders of its own and done once: one trains a method on its lists, another scores
or labels images with networks of an earlier one.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from .. import distributed
from ..data.catalog import catalog_of
from ..data.check import unusable
from ..data.labels import label_path, open_labels, write_labels
from ..data.lists import Lists
from ..data.loaders import whole_images
from ..data.normalise import Normalise
from ..data.source import DataError, FileSource
from ..data.splits import digest
from ..errors import UserError
from ..files import replacing
from ..methods.base import Method
from ..schema import Config
from . import checkpoint
from .fit import fit
from .interrupt import Interrupted, Interruption
from .log import start_logging
from .pictures import coloured, sheet
from .precision import prepare_network

log = logging.getLogger("imas")

_DONE = "done"  # the file that marks a finished stage, beside its checkpoints; it tells the seed
_MANIFEST = "manifest.json"
_TORN = "{}.part"  # a folder of labels that is not complete

Measure = Callable[[Sequence[nn.Module], Tensor], float]


class Session:
    """What a method's ``run`` trains with.

    Args:
        config: of the experiment.
        lists: its images.
        build: (config, method class, whether to load pretrained encoders) → method.
        finish: called with the configuration of each stage that has ended, on the main process.
        interruption: whether to stop.
        resume: ``auto``, ``never`` or a checkpoint file: see ``checkpoint.find_checkpoint``.
    """

    def __init__(
        self,
        config: Config,
        lists: Lists,
        *,
        seed: int,
        device: torch.device,
        build: Callable[[Config, type[Method], bool], Method],
        finish: Callable[[Config], None],
        resume: str,
        interruption: Interruption,
    ) -> None:
        self.config, self.lists, self.seed, self.device = config, lists, seed, device
        self.build, self.finish, self.resume = build, finish, resume
        self.normalise = Normalise(config.dataset.mean, config.dataset.std, device)
        self.interruption = interruption

    def fit(
        self,
        stage: str,
        kind: type[Method],
        config: Config | None = None,
        lists: Lists | None = None,
        start: Path | None = None,
        momentum: str | None = None,
        keep: Collection[int] = (),
    ) -> Config:
        """Train one stage, or what is left of it; a stage that is done is skipped.

        Args:
            stage: its name and the name of its folders below those of checkpoints and logs; "" for a method without
                stages, whose folders those are.
            kind: the method class that is trained.
            config: of this stage, where it differs from the experiment's.
            lists: of this stage, where they differ.
            start: a checkpoint whose networks the stage starts from.
            momentum: a network whose momentum goes on from there, too. The stage trains it alone.
            keep: numbers of epochs, from 1, whose networks stay (``checkpoint.kept``).

        Returns:
            The stage's configuration, whose ``snapshot_dir`` has its checkpoints.

        Raises:
            UserError: the stage was trained with another seed; pseudo labels that are missing or do not fit.
        """
        config, lists = config or self.config, lists or self.lists
        config = dataclasses.replace(config, stage=stage, wants=kind.wants(config.options))
        mark = config.snapshot_dir / _DONE
        found = checkpoint.find_checkpoint(config.snapshot_dir, self._resume(config))
        if stage and mark.is_file():
            self._same_seed(mark)
            log.info("stage %s is done: %s", stage, config.snapshot_dir)
            return config
        if stage and distributed.any_rank(self.interruption.asked(0), self.device):
            raise Interrupted(f"before stage {stage}")
        self._check_labels(config, lists)
        start = start or (None if config.trainer.start_from is None else Path(config.trainer.start_from))
        torch.manual_seed(self.seed)
        method = self.build(config, kind, found is None and start is None)
        if found is None and start is not None:
            checkpoint.start_from(method.networks(), start)
        start_logging(config.log_dir)
        if stage:
            log.info("stage %s begins", stage)
        fit(
            method.to(self.device),
            config,
            lists,
            seed=self.seed,
            device=self.device,
            interruption=self.interruption,
            resumed_from=found,
            by_hand=self.resume not in ("auto", "never"),
            momentum=None if found is not None or momentum is None else (start, momentum),
            keep=keep,
        )
        if distributed.is_main():
            self.finish(config)
            if stage:
                mark.write_text(str(self.seed), encoding="utf-8")
        distributed.barrier()  # the next stage reads what this one has written
        return config

    def last(self, config: Config) -> Path:
        """The last checkpoint of a stage that is done, by the configuration that ``fit`` gave."""
        return config.snapshot_dir / checkpoint.LAST

    def _resume(self, config: Config) -> str:
        """A checkpoint file resumes the stage that it belongs to; the other stages go on by themselves."""
        if self.resume in ("auto", "never"):
            return self.resume
        folder, own = Path(self.resume).resolve().parent, config.snapshot_dir.resolve()
        another = folder != own and (config.stage or folder.is_relative_to(own))
        return "auto" if another else self.resume

    def _same_seed(self, mark: Path) -> None:
        seed = mark.read_text(encoding="utf-8")
        if seed != str(self.seed):
            raise UserError(
                f"{mark.parent}: was trained with the seed {seed}, this run has {self.seed}. Continue it with its own "
                "seed, or name another folder with --out"
            )

    def _check_labels(self, config: Config, lists: Lists) -> None:
        """See that each unlabeled image of a stage has a pseudo label that fits, if it reads such."""
        folders = (each.dataset.train.pseudo_labels for each in (config, self.config))
        if not config.wants.pseudo_label or len(set(folders)) == 1:  # those of the experiment were looked at before
            return
        mine = Lists([], lists.unlabeled[distributed.rank() :: distributed.world_size()], [])
        if problems := sum(distributed.gather(unusable(config, mine)), []):
            raise UserError("\n".join(problems))

    def network(self, kind: type[Method], stage: Config, which: str | int) -> nn.Module:
        """A network of a stage that has been trained, on the device, in eval mode.

        Args:
            kind: the method class that was trained; the network is the one that it selects the best checkpoint by.
            stage: what ``fit`` returned.
            which: ``best`` (the last if no evaluation gave a figure), ``last``, or an epoch of ``keep``.

        Raises:
            UserError: see ``checkpoint.read`` and ``checkpoint.load_network``.
        """
        file = {"best": checkpoint.BEST, "last": checkpoint.LAST}.get(which) or checkpoint.kept(which)
        if which == "best" and not (stage.snapshot_dir / file).is_file():
            file = checkpoint.LAST
        path = stage.snapshot_dir / file
        name, network = next(iter(self.build(self.config, kind, False).scored().items()))
        checkpoint.load_network(network, name, checkpoint.read(path), path)
        prepare_network(network, self.config.trainer)
        return network.to(self.device).eval()

    def images(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Training images at their own size: each name with its (1, 3, H, W) normalised image, on the device."""
        shown = None if distributed.is_main() else True  # None: on a terminal
        bar = {"unit": "image", "leave": False, "dynamic_ncols": True, "disable": shown}
        for name, image in zip(names, tqdm(whole_images(self.config, names), total=len(names), **bar)):
            if self.interruption.received is not None:
                raise Interrupted(f"at the image {name}")
            yield name, self.normalise(image.unsqueeze(0).to(self.device))

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
                with replacing(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                    rows = sorted(((name, scores[name]) for name in names), key=lambda row: -row[1])
                    csv.writer(file).writerows([("image", title), *rows])
                _write(folder, manifest)
            distributed.barrier()
        log.info("%s: %s", title, table)
        with open(table, newline="", encoding="utf-8") as file:
            return {name: float(score) for name, score in list(csv.reader(file))[1:]}

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
        titles = ["image", *(f"network {number}" for number in range(1, 1 + len(networks)))]
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
                    f"{folder}: its {_MANIFEST} tells of another network or of other images than those of this run; "
                    "remove the folder to have it written anew, or name another one with --out"
                )
            log.info("stage %s is done: %s", stage, folder)
            return folder
        torn = folder.with_name(_TORN.format(folder.name))
        if distributed.is_main():
            if torn.is_dir() and _read(torn) != manifest:
                shutil.rmtree(torn)
            torn.mkdir(parents=True, exist_ok=True)
            _write(torn, manifest)
            log.info("stage %s begins: labels of %d images", stage, len(everything))
        distributed.barrier()
        whole, palette = open_labels(self.config.dataset, torn), catalog_of(self.config.dataset).palette
        mine = [name for name in everything[distributed.rank() :: distributed.world_size()] if not _has(whole, name)]
        copied = set(known[1])
        for name in filter(copied.__contains__, mine):
            _copy(label_path(known[0], name), label_path(torn, name))
        for name, image in self.images([name for name in mine if name not in copied]):
            write_labels(label_path(torn, name), predict(network, image)[0].byte().cpu().numpy(), palette)
        distributed.barrier()
        if distributed.is_main():
            os.replace(torn, folder)
        distributed.barrier()
        log.info("labels:       %s", folder)
        return folder


def _copy(path: Path, target: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the label was written there, and is needed again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(path, temporary)


def _has(labels: FileSource, name: str) -> bool:
    """Whether a label is there and whole."""
    try:
        labels.mask(name)
    except DataError:
        return False
    return True


def _manifest(networks: Sequence[nn.Module], names: Sequence[str]) -> dict[str, Any]:
    """Which networks looked at which images: the digests of their weights and of the list."""
    return {"networks": [_digest(network) for network in networks], "images": digest(names), "count": len(names)}


def _digest(network: nn.Module) -> str:
    words = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        words.update(name.encode())
        words.update(tensor.cpu().contiguous().numpy().tobytes())
    return words.hexdigest()


def _read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none, or no whole one."""
    try:
        return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    with replacing(folder / _MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
