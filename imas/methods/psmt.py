"""PS-MT: two teachers label the weak view, and disturb the student's features (Liu et al., CVPR 2022; spec psmt.md).

Letters: B images, H×W the crop, C classes, K×h×w the features between encoder and classifier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import distributed
from ..models.deeplabv3plus import DeepLabV3Plus
from ..models.ema import MeanOfLogits, update_teacher
from ..models.modes import evaluating
from ..ops import mixing
from ..ops.losses import pixel_cross_entropy
from ..ops.pseudo import Prediction, logged_shares, predict
from ..ops.resize import resize
from ..schema import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, Config, Scheduler, SchedulerKwargs, Wants
from ..strict import option, replaced
from .base import Labeled, Method, NewNetwork, Progress, Step, Supervised, Unlabeled

if TYPE_CHECKING:
    from ..data.lists import Lists
    from ..engine.session import Session


@dataclass(frozen=True)
class VAT:
    """The teachers' adversarial noise on the student's features (T-VAT)."""

    enabled: bool = True
    xi: float = option(0.1, check=POSITIVE)  # ξ, the step at which the teachers' disagreement is derived
    epsilon: float = option(2.0, check=NOT_NEGATIVE)  # ε, the norm of the noise in each image


@dataclass(frozen=True)
class Options:
    """Section ``psmt``."""

    warm_up: int = option(5, check=NOT_NEGATIVE)  # epochs on labeled images alone, before the others
    threshold: float = option(0.6, check=FRACTION)  # τ
    loss_weight: float = option(1.5, check=NOT_NEGATIVE)  # λ after the ramp-up
    ramp_up: int = option(12, check=NOT_NEGATIVE)  # epochs until λ is at its full value
    assist: int = option(7, check=AT_LEAST_ONE)  # largest logits of the other teacher that count
    ema_decay: float = option(0.996, check=FRACTION)
    cutmix: Literal["box", "three_boxes"] = "box"  # the release's rule on Pascal; that on Cityscapes
    vat: VAT = option(VAT)


class PSMT(Method):
    """A student and two teachers with weights of their own. In each epoch one teacher follows the student."""

    Options = Options
    stages = True

    def __init__(self, options: Options, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__(options, new_network, supervised)
        self.student = new_network()
        self.teacher1 = new_network().requires_grad_(False)
        self.teacher2 = new_network().requires_grad_(False)

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(unlabeled=True, strong=1, labeled_strong=1)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        options, train, problems = config.options, config.dataset.train, {}
        if train.strong_aug is None:
            problems["dataset.train.strong_aug"] = "missing; psmt trains on strong views (the release's: type: jitter)"
        if train.batch_size < 2:
            problems["dataset.train.batch_size"] = (
                "expected at least 2, got 1: labeled and unlabeled images go through a network apart from each other, "
                "and BatchNorm cannot train on one image"
            )
        if options.assist > config.net.num_classes:
            problems["psmt.assist"] = (
                f"expected at most the {config.net.num_classes} classes, got {options.assist}; the release takes a "
                "third of them"
            )
        if options.vat.enabled and config.trainer.tf32:
            problems["trainer.tf32"] = (
                "cannot be combined with psmt.vat, whose small step is lost in 10 bits of mantissa; set this to false, "
                "or psmt.vat.enabled"
            )
        return problems

    @classmethod
    def run(cls, session: Session) -> None:
        """Warm-up, then the stage that counts. The student goes on with its momentum."""
        options, lists, start = session.config.options, session.lists, None
        if options.warm_up:
            config = warm_up_config(session.config, lists)
            start = session.last(session.fit("warm_up", WarmUp, config, dataclasses.replace(lists, unlabeled=[])))
        session.fit("main", cls, start=start, momentum="student" if options.warm_up else None)

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        # Steps 2 to 4: the teachers' label of the weak view. Steps 1 and 5: the strong views.
        pseudo = self.pseudo_label(unlabeled.weak, progress)
        image, mixed = self.cutmix(unlabeled.strong[0], pseudo, progress.generator)

        # Step 6: two passes of their own, for the sake of BatchNorm's statistics.
        of_labeled, aux_of_labeled = self.disturbed(labeled.strong[0], progress.generator, aux=True)
        of_mixed, _ = self.disturbed(image, progress.generator)

        # Steps 7 to 9.
        loss_lb = self.supervised(of_labeled, aux_of_labeled, labeled.label)
        loss_ub = self.loss_weight(progress) * weighted_consistency(of_mixed, mixed, self.options.threshold)

        scalars = {
            "loss_lb": loss_lb.detach(),
            "loss_ub": loss_ub.detach(),
            "pseudo": (mixed.confidence >= self.options.threshold).float().mean(),
            **logged_shares(pseudo, self.options.threshold, labeled.label, self.student.num_classes),
        }
        return Step(loss_lb + loss_ub, scalars)  # step 10 is the engine's

    def teachers(self, progress: Progress) -> tuple[DeepLabV3Plus, DeepLabV3Plus]:
        """The active teacher of this epoch, and the other one. Epochs count from 0 here, from 1 in the spec."""
        return (self.teacher2, self.teacher1) if progress.epoch % 2 else (self.teacher1, self.teacher2)

    @torch.no_grad()
    def pseudo_label(self, weak: Tensor, progress: Progress) -> Prediction:
        """The teachers' joint label of the weak view, in the mode that they are in: in training their running
        statistics move with it. Logits are at full size for one image at a time.
        """
        active, other = (teacher.coarse(weak, aux=False)[0] for teacher in self.teachers(progress))
        size, predictions = weak.shape[-2:], []
        for pair in zip(active.split(1), other.split(1)):
            predictions.append(predict(ensemble(*(resize(logits, size) for logits in pair), self.options.assist)))
        return Prediction(*map(torch.cat, zip(*predictions)))

    def cutmix(self, strong: Tensor, pseudo: Prediction, generator: torch.Generator) -> tuple[Tensor, Prediction]:
        """The CutMix of strong views and its pseudo label (step 5). To paste labels and confidences is to paste logits,
        of which they are made pixel by pixel.
        """
        pastes = self.draw_pastes(strong, generator)

        def mixed(base: Tensor) -> Tensor:
            result = base
            for partner, mask in pastes:  # a later box covers an earlier one, and all take from the unmixed batch
                result = mixing.put(result, base[partner], mask)
            return result

        return mixed(strong), Prediction(mixed(pseudo.label), mixed(pseudo.confidence))

    def draw_pastes(self, images: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """The partner of each image, (B,) int64, and where it is pasted, (B, H, W) bool, for each box."""
        (batch, _, height, width), device = images.shape, images.device
        if self.options.cutmix == "box":
            side = mixing.beta_side(generator)
            masks = [mixing.cutmix_mask(batch, height, width, side, generator, border=8, device=device)]
            partners = [torch.randperm(batch, generator=generator)]
        else:
            draws = torch.rand(batch, 3, 4, generator=generator, dtype=torch.float64)
            masks = three_boxes(height, width, 0.25 + 0.25 * draws[..., 0], draws[..., 1], draws[..., 2:], device)
            partners = torch.randint(batch, (3, batch), generator=generator)
        return [(each.to(device, non_blocking=True), mask) for each, mask in zip(partners, masks, strict=True)]

    def disturbed(self, images: Tensor, generator: torch.Generator, aux: bool = False) -> tuple[Tensor, Tensor | None]:
        """The student's logits before the last resize, and those of its auxiliary head, of features that T-VAT has
        disturbed (step 6).
        """
        x1, x3, x4 = self.student.encode(images)
        fused, size = self.student.fuse(x1, x4), images.shape[-2:]
        aux_logits = self.student.auxiliary(x3) if aux else None
        if not self.options.vat.enabled:
            return self.student.classify(fused), aux_logits
        # In float32 also under autocast, the student's classifier, too: an entry of the noise is about a thousandth
        # of one of the features, and bfloat16 would keep half of it.
        classifiers = self.teacher1.decoder.classifier, self.teacher2.decoder.classifier
        with torch.autocast(images.device.type, enabled=False), evaluating(*classifiers):
            features = fused.float()
            decoders = [
                lambda each, teacher=teacher: resize(teacher.classify(each), size)
                for teacher in (self.teacher1, self.teacher2)
            ]
            start = self.draw_noise(features, generator)
            noise = adversarial_noise(features, decoders, start, self.options.vat.xi, self.options.vat.epsilon)
            return self.student.classify(features + noise), aux_logits

    def draw_noise(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in [−0.5, 0.5) in the shape of the features, drawn where they are: it is far too much for a CPU."""
        seed = torch.randint(2**62, (), generator=generator).item()
        own = torch.Generator(features.device).manual_seed(seed)
        return torch.rand(features.shape, generator=own, device=features.device) - 0.5

    def loss_weight(self, progress: Progress) -> float:
        """λ of this iteration (step 9)."""
        length = self.options.ramp_up * progress.iterations_per_epoch
        return ramp_up(self.options.loss_weight, progress.iteration, length)

    def after_step(self, progress: Progress) -> dict[str, float]:
        """Step 11: the active teacher follows, its running statistics as well."""
        active, _ = self.teachers(progress)
        update_teacher(active, self.student, self.options.ema_decay)
        return {"loss_weight": self.loss_weight(progress), "teacher": 1.0 if active is self.teacher1 else 2.0}

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "teacher1": self.teacher1, "teacher2": self.teacher2}

    def trained(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def scored(self) -> dict[str, nn.Module]:
        return {"mean": MeanOfLogits(self.teacher1, self.teacher2), **self.networks()}

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        if unlabeled is None:
            return {"strong view of labeled": labeled.strong[0]} if labeled.strong else {}
        pseudo, size = self.pseudo_label(unlabeled.weak, progress), unlabeled.weak.shape[-2:]
        torch.rand(1, generator=progress.generator)  # or the default seed would give four images themselves as partners
        image, mixed = self.cutmix(unlabeled.strong[0], pseudo, progress.generator)
        labels = {
            name: predict(network.coarse(unlabeled.weak, aux=False)[0], size).label
            for name, network in self.networks().items()
        }
        return {
            "weak view": unlabeled.weak,
            "strong view": unlabeled.strong[0],
            "pseudo label (grey: unsure)": pseudo.sure(self.options.threshold),
            "CutMix view": image,
            "its label": mixed.sure(self.options.threshold),
            **labels,
            "teachers (red: they differ)": labels["teacher1"] != labels["teacher2"],
        }


class WarmUp(PSMT):
    """The stage before: all three networks are trained, on labeled images alone, each by its own loss. The teachers see
    weak views, the student strong ones.
    """

    def __init__(self, options: Options, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__(options, new_network, supervised)
        self.requires_grad_(True)

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(labeled_strong=1)

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        views = {"student": labeled.strong[0], "teacher1": labeled.image, "teacher2": labeled.image}
        losses = {
            name: self.supervised(*network.coarse(views[name]), labeled.label)
            for name, network in self.networks().items()
        }
        scalars = {"loss_lb": losses["student"].detach()}
        scalars |= {f"loss_{name}": losses[name].detach() for name in ("teacher1", "teacher2")}
        return Step(sum(losses.values()), scalars)

    def after_step(self, progress: Progress) -> dict[str, float]:
        return {}

    def trained(self) -> dict[str, nn.Module]:
        return self.networks()


def warm_up_config(config: Config, lists: Lists) -> Config:
    """The configuration of the warm-up: its epochs at the constant base rate, each once over the labeled images, as far
    as they fill batches (those that do not come first in the next epoch); one evaluation at the end.
    """
    world, batch = distributed.world_size(), config.dataset.train.batch_size * config.trainer.accumulate
    batches, epochs = max(1, math.ceil(len(lists.labeled) / world) // batch), config.options.warm_up
    values = {
        "dataset.train.epoch_size": batches * batch * world,
        "trainer.epochs": epochs,
        "trainer.eval_every": epochs,
        "trainer.lr_scheduler": Scheduler("milestones", SchedulerKwargs(milestones=(epochs,))),  # one that never comes
    }
    return replaced(config, values)


def assisted(active: Tensor, other: Tensor, count: int) -> Tensor:
    """The active teacher's logits, but those of the other one in its own ``count`` largest classes of each pixel
    (step 3). As in the release, a logit of the other one that is exactly 0 does not count.

    Args:
        active, other: (B, C, H, W).
        count: at most C.
    """
    largest = torch.zeros_like(other, dtype=torch.bool).scatter_(1, other.topk(count, dim=1).indices, True)
    return torch.where(largest & (other != 0), other, active)


def ensemble(active: Tensor, other: Tensor, count: int) -> Tensor:
    """The logits that label the weak view: mean of the active teacher's and of the ``assisted`` ones (step 4)."""
    return 0.5 * active + 0.5 * assisted(active, other, count)


def weighted_consistency(logits: Tensor, pseudo: Prediction, threshold: float) -> Tensor:
    """Cross-entropy times confidence, summed over the pixels with ``confidence >= threshold`` and divided by their
    number (step 8); 0 where there is none.

    Args:
        logits: (B, C, h, w) of the student, before the last resize.
    """
    kept = pseudo.confidence >= threshold
    loss = pixel_cross_entropy(logits, pseudo.label) * pseudo.confidence
    return (loss * kept).sum() / kept.sum().clamp(min=1)


def ramp_up(weight: float, iteration: int, length: int) -> float:
    """λ in iteration k: from 0 to ``weight`` in ``length`` iterations, along half a cosine (step 9)."""
    if iteration >= length:
        return weight
    return weight * (1 - 0.5 * (math.cos(math.pi * iteration / length) + 1))


def adversarial_noise(
    features: Tensor, decoders: Sequence[Callable[[Tensor], Tensor]], start: Tensor, xi: float, epsilon: float
) -> Tensor:
    """The noise of norm ε that changes the mean logits of the decoders most (T-VAT, one power iteration).

    The release has ξ = 1e-6, at which the gradient is below the 1e-8 that its norm is divided by, and below float32's
    rounding: its noise is next to none. ξ = 0.1 gives the direction that is meant to four digits (docs/methods.md).

    Args:
        features: (B, K, h, w); no gradient reaches them.
        decoders: from features to logits at the crop's size, in eval mode.
        start: (B, K, h, w) random noise of any norm.

    Returns:
        (B, K, h, w) without a gradient.
    """

    def mean_logits(noisy: Tensor) -> Tensor:
        return sum(decoder(noisy) for decoder in decoders) / len(decoders)

    features = features.detach()
    with torch.no_grad():
        before = mean_logits(features).softmax(dim=1)
    direction = _normalised(start)
    with torch.enable_grad():
        direction.requires_grad_()
        after = mean_logits(features + xi * direction).log_softmax(dim=1)
        divergence = F.kl_div(after, before, reduction="batchmean")  # divided by B alone
        (gradient,) = torch.autograd.grad(divergence, direction)
    return epsilon * _normalised(gradient)


def _normalised(noise: Tensor) -> Tensor:
    """Each image's noise divided by its norm."""
    return noise / (noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-8)


def three_boxes(
    height: int,
    width: int,
    share: Tensor,
    exponent: Tensor,
    position: Tensor,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Three boxes in each image, by ``share_boxes`` with the width in the place of the height (CutMix, Cityscapes).

    Args:
        share, exponent: (B, 3) float64; the box is √(1/3)·share^exponent of the image wide.
        position: (B, 3, 2) float64: of the box's left side among all that are possible, and of its top.

    Returns:
        (B, H, W) bool for each box, in the order in which they are pasted.
    """
    return list(mixing.share_boxes(width, height, share, exponent, position, device).transpose(2, 3).unbind(1))
