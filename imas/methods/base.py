"""The contract: what every method gets, what it returns, what the engine asks of it.

Letters: B images, H×W the crop, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..models.deeplabv3plus import DeepLabV3Plus
from ..models.ema import make_teacher, teacher_decay, update_teacher
from ..schema import Config, Wants

if TYPE_CHECKING:
    from ..engine.session import Session

NewNetwork = Callable[[], DeepLabV3Plus]
Supervised = Callable[[Tensor, Tensor | None, Tensor], Tensor]


class Labeled(NamedTuple):
    """Labeled images of one step, normalised, on the device."""

    image: Tensor  # (B, 3, H, W) weak view
    label: Tensor  # (B, H, W) int64, classes or the ignore index
    strong: tuple[Tensor, ...] = ()  # ``wants.labeled_strong`` strong views of the same crops, each (B, 3, H, W)


class Unlabeled(NamedTuple):
    """Unlabeled images of one step, normalised, on the device."""

    weak: Tensor  # (B, 3, H, W)
    strong: tuple[Tensor, ...]  # ``wants.strong`` views of the same crops; none without ``strong_aug``
    valid: Tensor  # (B, H, W) bool, False where the crop is padding
    index: Tensor  # (B,) int64, position of each image in its list
    label: Tensor | None = None  # (B, H, W) int64, pseudo label from a file (``wants.pseudo_label``)


class Progress(NamedTuple):
    """The place of a step in training. A step is a pure function of weights, batch and progress."""

    epoch: int
    epochs: int
    iteration: int  # from the start of training
    iterations_per_epoch: int
    generator: torch.Generator  # on the CPU, this rank's own for this iteration


class Step(NamedTuple):
    """The result of one step. Everything stays on the device; nothing here has waited for it."""

    loss: Tensor
    scalars: dict[str, Tensor]  # by name, detached: a number, or (C,) one for each class
    score: Tensor | None = None  # (B,) of the unlabeled images, for ``scores.csv``


class Method(nn.Module):
    """A module that owns the networks it trains with.

    The engine wraps the whole method in DistributedDataParallel: every trainable parameter must reach the loss in every
    step, and no state of one rank may hide in its buffers. Large state of its own goes through ``get_extra_state``.

    Args:
        options: the method's section of the YAML.
        new_network: makes a network: the same pretrained encoder each time, and a new random head.
        supervised: (logits, auxiliary logits or None, labels) → scalar, of (B, C, h, w) logits before the last resize
            (spec, Losses).
    """

    Options: ClassVar[type]  # a frozen dataclass: the keys of the section
    trains_embedding: ClassVar[bool] = False  # whether it needs ``net.embedding``
    stages: ClassVar[bool] = False  # whether ``run`` trains with other recipes than that of the experiment, too

    def __init__(self, options: Any, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__()
        self.options = options
        self.supervised = supervised

    def supervised_first(self, coarse: Tensor, coarse_aux: Tensor | None, label: Tensor) -> Tensor:
        """The supervised loss of a batch whose first images are the labeled ones."""
        number = len(label)
        return self.supervised(coarse[:number], None if coarse_aux is None else coarse_aux[:number], label)

    @classmethod
    def wants(cls, options: Any) -> Wants:
        """The parts of a batch that the method needs."""
        return Wants()

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        """Needs of this method that the configuration does not meet: dotted key → what is wrong."""
        return {}

    @classmethod
    def resolved(cls, config: Config) -> Any:
        """The options, with what follows from other sections in the place of None."""
        return config.options

    @classmethod
    def run(cls, session: Session) -> None:
        """The whole experiment. A method of several stages calls ``session.fit`` for each."""
        session.fit("", cls)

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        """One step; ``unlabeled`` is None where ``needs_unlabeled`` is False."""
        raise NotImplementedError

    def needs_unlabeled(self, epoch: int) -> bool:
        """Whether the steps of this epoch read unlabeled images."""
        return self.wants(self.options).unlabeled

    def after_step(self, progress: Progress) -> dict[str, float]:
        """Called after the optimiser's update. Returns numbers for the log that are known without the device."""
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """All networks by name: they are saved, and share memory layout and compilation."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Module]:
        """The networks that the optimiser updates."""
        return self.networks()

    def scored(self) -> dict[str, nn.Module]:
        """The networks to evaluate. The first selects the best checkpoint."""
        return self.networks()

    def extra_bytes(self) -> int:
        """The largest size of ``get_extra_state``."""
        return 0

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        """Views and labels of a batch in a step, as titled columns of pictures: (B, 3, H, W) float, normalised images;
        (B, H, W) integers, classes or 255; (B, H, W) bool, marked pixels; (B,) a number for each image.
        """
        return {}


class StudentTeacher(Method):
    """A student that is trained, and its moving average in eval mode; supervised warm-up comes first.

    Its options have ``sup_only_epoch`` and ``ema_decay``: see ``models.ema.teacher_decay``.
    """

    def __init__(self, options: Any, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__(options, new_network, supervised)
        self.student = new_network()
        self.teacher = make_teacher(self.student)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        epochs, warm_up = config.trainer.epochs, config.options.sup_only_epoch
        if warm_up < epochs:
            return {}
        problem = f"expected fewer than the {epochs} epochs, got {warm_up}: no epoch would use unlabeled images"
        return {f"{config.method}.sup_only_epoch": problem}

    def needs_unlabeled(self, epoch: int) -> bool:
        return epoch >= self.options.sup_only_epoch

    def decay(self, progress: Progress) -> float:
        """The decay of the teacher's update after this iteration."""
        now = progress.epoch, progress.iteration, progress.iterations_per_epoch
        return teacher_decay(*now, self.options.sup_only_epoch, self.options.ema_decay)

    def after_step(self, progress: Progress) -> dict[str, float]:
        """Step 11: the teacher's update."""
        decay = self.decay(progress)
        update_teacher(self.teacher, self.student, decay)
        return {"decay": decay}

    def networks(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, "student": self.student}

    def trained(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def train(self, mode: bool = True) -> StudentTeacher:
        super().train(mode)
        self.teacher.eval()
        return self
