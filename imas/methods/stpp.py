"""ST and ST++: self-training in stages, with labels on the disk (Yang et al., CVPR 2022; docs/methods.md).

ST trains a network on the labeled images, labels all others with it, and trains a new network on both. ST++ does so
twice, first with the images on which early and late networks of the first training agree best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import UserError
from ..ops.metrics import ConfusionMatrix
from ..ops.pseudo import label_shares, predict
from ..ops.resize import resize
from ..schema import POSITIVE, Config, Wants
from ..strict import option, replaced
from .base import Labeled, Progress, Step, Unlabeled
from .sup_only import SupOnly

if TYPE_CHECKING:
    from ..data.lists import Lists
    from ..engine.session import Session

_FEW = 200  # labeled images: fewer are seen twice in an epoch of the first training
_SHOWN = 4  # of the most and of the least reliable images


@dataclass(frozen=True)
class Options:
    """Section ``stpp``."""

    stages: Literal["st++", "st", "last"] = "st++"  # six, three; the last training alone, on labels from elsewhere
    labeler: Literal["best", "last"] = "best"  # which checkpoint of a training labels
    reliable_share: float = option(0.5, check=(lambda share: 0 < share < 1, "a number between 0 and 1"))
    scales: tuple[float, ...] = option(  # of an image that is labeled, each mirrored as well
        (0.5, 0.75, 1.0, 1.5, 2.0), check=(lambda scales: scales and all(map(POSITIVE[0], scales)), "numbers above 0")
    )


class STPP(SupOnly):
    """A training on labeled images and on strong views of others with pseudo labels: one loss over both."""

    Options = Options
    stages = True

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(unlabeled=True, strong=1, pseudo_label=True)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        options, given, problems = config.options, config.dataset.train.pseudo_labels, {}
        if options.stages == "last" and given is None:
            problems["dataset.train.pseudo_labels"] = (
                "missing; stpp.stages: last trains on labels from elsewhere, index PNGs in a folder named as the images"
            )
        if options.stages != "last" and given is not None:
            problems["dataset.train.pseudo_labels"] = (
                f"stpp.stages: {options.stages} writes its own labels; to train on these, say stpp.stages: last"
            )
        if options.stages == "st++" and config.trainer.epochs < 2:
            problems["trainer.epochs"] = "expected at least 2: stpp compares networks of several epochs"
        return problems

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        label = torch.cat([labeled.label, unlabeled.label])
        coarse, aux = self.student.coarse(torch.cat([labeled.image, trained_view(unlabeled)]))
        loss = self.supervised(coarse, aux, label)  # one mean over all valid pixels of both
        count, classes = len(labeled.image), self.student.num_classes
        with torch.no_grad():  # the two halves, for the log
            halves = [
                self.supervised(coarse[part], None if aux is None else aux[part], label[part])
                for part in (slice(count), slice(count, None))
            ]
        predicted = label_shares(unlabeled.label, classes)
        scalars = {
            "loss_lb": halves[0],
            "loss_ub": halves[1],
            "pseudo": predicted.sum(),
            "predicted": predicted,
            "labeled": label_shares(labeled.label, classes),
        }
        return Step(loss, scalars)

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        if unlabeled is None or unlabeled.label is None:
            return {}
        weak, view = unlabeled.weak, trained_view(unlabeled)
        predicted = predict(self.student.coarse(weak, aux=False)[0], view.shape[-2:]).label
        return {"weak": weak, "trained on": view, "pseudo label": unlabeled.label, "student": predicted}

    @classmethod
    def run(cls, session: Session) -> None:
        config, lists, options = session.config, session.lists, session.config.options
        plan = options.stages
        if plan == "last":
            cls.train_on_both(session, "", lists)
            return
        if plan == "st++" and int(options.reliable_share * len(lists.unlabeled)) == 0:
            raise UserError(
                f"stpp: none of the {len(lists.unlabeled)} unlabeled images would be selected as reliable "
                f"(stpp.reliable_share {options.reliable_share:g}); take more images, or stpp.stages: st"
            )

        def label(network: nn.Module, image: Tensor) -> Tensor:
            return summed_probabilities(network, image, options.scales).argmax(dim=1)

        def agreement(networks: Sequence[nn.Module], image: Tensor) -> float:
            return reliability([network(image)[0].argmax(dim=1) for network in networks], config.net.num_classes)

        # Stage 1: the labeled images alone.
        keep = checkpoint_epochs(config.trainer.epochs) if plan == "st++" else []
        alone = dataclasses.replace(lists, unlabeled=[])
        supervised = supervised_config(config, len(lists.labeled), distributed.world_size())
        first = session.fit("1-labeled", SupOnly, supervised, alone, keep=keep)
        labeler = session.network(SupOnly, first, options.labeler)
        if plan == "st":  # stages 2 and 3 of ST
            folder = session.inference.label("2-labels", labeler, lists.unlabeled, label)
            cls.train_on_both(session, "", lists, folder)
            return

        # Stage 2: reliability. The networks of the last epochs are compared with the one after the last epoch.
        networks = [session.network(SupOnly, first, epoch) for epoch in keep]
        scores = session.inference.score("2-reliability", "reliability", networks, lists.unlabeled, agreement)
        reliable, unreliable = select(scores, options.reliable_share)
        session.inference.show("reliability", networks, extremes(scores))

        # Stages 3 and 4: the reliable images get labels, and a new network trains on them.
        folder = session.inference.label("3-labels", labeler, reliable, label)
        second = cls.train_on_both(session, "4-reliable", dataclasses.replace(lists, unlabeled=reliable), folder)

        # Stages 5 and 6: that network labels the others, and the last network trains on all.
        labeler = session.network(cls, second, options.labeler)
        folder = session.inference.label("5-labels", labeler, unreliable, label, known=(folder, reliable))
        cls.train_on_both(session, "", lists, folder)

    @classmethod
    def train_on_both(cls, session: Session, stage: str, lists: Lists, folder: Path | None = None) -> Config:
        """A training on labeled and pseudo-labeled images; without a folder on the labels of the configuration."""
        counts = len(lists.labeled), len(lists.unlabeled)
        return session.fit(stage, cls, mixed_config(session.config, *counts, distributed.world_size(), folder), lists)


def trained_view(unlabeled: Unlabeled) -> Tensor:
    """The strong view; the weak one where no ``dataset.train.strong_aug`` is configured."""
    return unlabeled.strong[0] if unlabeled.strong else unlabeled.weak


def select(scores: dict[str, float], share: float) -> tuple[list[str], list[str]]:
    """Names of the reliable images, a share of all, rounded down, and of the others; largest scores first, equal ones
    in the order that they came in.
    """
    order = sorted(scores, key=lambda name: -scores[name])
    count = int(share * len(order))
    return order[:count], order[count:]


def extremes(scores: dict[str, float]) -> dict[str, str]:
    """Captions of the most and the least reliable images."""
    order = sum(select(scores, 0.5), [])
    chosen = dict.fromkeys(order[:_SHOWN], "most reliable") | dict.fromkeys(order[_SHOWN:][-_SHOWN:], "least reliable")
    return {name: f"{name}: {kind}, {scores[name]:.3f}" for name, kind in chosen.items()}


def first_length(labeled: int) -> int:
    """Images an epoch of the first training."""
    return labeled * (2 if labeled < _FEW else 1)


def mixed_length(labeled: int, unlabeled: int) -> int:
    """Images an epoch of a later training: the others, and the labeled ones, repeated until they are as many."""
    return labeled * -(-unlabeled // labeled) + unlabeled


def checkpoint_epochs(epochs: int) -> list[int]:
    """After which epochs, counted from 1, networks are kept to be compared: a third, two thirds and all."""
    return sorted({epochs // 3, 2 * epochs // 3, epochs} - {0})


def supervised_config(config: Config, labeled: int, world: int) -> Config:
    """The configuration of the first training: labeled images alone, as many a batch as of both kinds later."""
    batch, size = 2 * config.dataset.train.batch_size, config.dataset.train.epoch_size
    total = world * batch * config.trainer.accumulate
    size = 2 * size if size else whole_batches(first_length(labeled), total)
    reference, options = config.trainer.reference_batch, SupOnly.Options()
    values = {
        "dataset.train.batch_size": batch,
        "dataset.train.epoch_size": size,
        "dataset.train.strong_aug": None,
        "trainer.reference_batch": reference and 2 * reference,
        "method": "sup_only",
        "options": options,
        "wants": SupOnly.wants(options),
    }
    return replaced(config, values)


def mixed_config(config: Config, labeled: int, unlabeled: int, world: int, folder: Path | None) -> Config:
    """The configuration of a training on labeled and pseudo-labeled images, half a batch each: it is one of the last
    stage alone, on the labels of the folder; without one on those that the configuration names.
    """
    train = config.dataset.train
    total = world * train.batch_size * config.trainer.accumulate
    size = train.epoch_size or whole_batches(mixed_length(labeled, unlabeled) // 2, total)
    labels = train.pseudo_labels if folder is None else str(folder)
    values = {"dataset.train.epoch_size": size, "dataset.train.pseudo_labels": labels, "options.stages": "last"}
    return replaced(config, values)


def whole_batches(length: int, total: int) -> int:
    """Images of an epoch without its last short batch, at least one batch."""
    return max(total, length - length % total)


def mutual_miou(one: Tensor, other: Tensor, num_classes: int) -> float:
    """mIoU of two maps of class numbers, of one shape: the mean over the classes that either of them has."""
    matrix = ConfusionMatrix(num_classes, num_classes, one.device)
    matrix.update(one, other)
    there = matrix.union > 0
    return (matrix.intersection[there].double() / matrix.union[there]).mean().item()


def reliability(maps: Sequence[Tensor], num_classes: int) -> float:
    """Agreement of the early maps of an image with the last: the mean of their mIoU, in [0, 1]."""
    return sum(mutual_miou(each, maps[-1], num_classes) for each in maps[:-1]) / (len(maps) - 1)


def summed_probabilities(network: Callable[[Tensor], Any], image: Tensor, scales: Sequence[float]) -> Tensor:
    """(1, 3, H, W) normalised image → (1, C, H, W), softmax probabilities summed over the scales, each as it is and
    mirrored. Resized with aligned corners, to sizes that are rounded down, as in the release: unlike
    ``sliding.protocol_bands``.
    """
    size, total = image.shape[-2:], 0
    for scale in scales:
        scaled = resize(image, [max(1, int(side * scale)) for side in size])
        for mirrored in (False, True):
            probabilities = network(scaled.flip(-1) if mirrored else scaled)[0].softmax(dim=1)
            total = total + resize(probabilities.flip(-1) if mirrored else probabilities, size)
    return total
