"""UniMatch: FixMatch with two strong views, and with features perturbed by dropout (V1; of V2 what suits a ResNet).

Step numbers are those of docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Labeled, Progress, Step, Unlabeled
from .fixmatch import FixMatch, mixed
from .fixmatch import Options as FixMatchOptions


@dataclass(frozen=True)
class Options(FixMatchOptions):
    """Section ``unimatch``. V2 has ``teacher`` and ``complementary_dropout``."""

    complementary_dropout: bool = False  # of the strong views (V2), else a perturbed copy of the weak view (V1)


class UniMatch(FixMatch):
    """Two strong views, each with boxes of its own, and dropout of whole channels between encoder and decoder."""

    Options: ClassVar[type] = Options
    strong_views: ClassVar[int] = 2

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        # Steps 1 and 2.
        own, theirs, boxes, strong = self.prepared(unlabeled, progress.generator)
        complementary, size = self.options.complementary_dropout, len(labeled.image)

        # Step 3: the labeled images, and the weak views where their labels or their perturbed copies are needed.
        images = [labeled.image]
        if own is None or not complementary:
            images.append(unlabeled.weak)
        x1, x3, x4 = self.student.encode(torch.cat(images))
        aux = self.student.auxiliary(x3)
        if complementary:
            coarse = self.student.classify(self.student.fuse(x1, x4))
        else:  # the decoder's BatchNorm sees clean and perturbed features together, the labeled ones among them
            low, high = self.perturbation(x1, x4, progress.generator)
            both = [torch.cat([x1, _scaled(x1, low)]), torch.cat([x4, _scaled(x4, high)])]
            coarse, perturbed = self.student.classify(self.student.fuse(*both)).chunk(2)

        # Step 4: both strong views in one pass.
        if complementary:
            x1, _, x4 = self.student.encode(torch.cat(strong))
            low, high = self.complement(x1, x4, progress.generator)
            of_strong = self.student.classify(self.student.fuse(_scaled(x1, low), _scaled(x4, high)))
        else:
            of_strong, _ = self.student.coarse(torch.cat(strong), aux=False)

        # Steps 5 to 9.
        own = own or self.target(coarse[size:], unlabeled)
        loss_lb = self.supervised_first(coarse, aux, labeled.label)
        losses = [
            self.consistency(logits, mixed(own, theirs, box))
            for logits, box in zip(of_strong.chunk(2), boxes, strict=True)
        ]
        loss_strong = sum(losses) / 2
        if complementary:
            return self.step(labeled, own, loss_lb, loss_strong)
        loss_perturbed = self.consistency(perturbed[size:], own)
        return self.step(labeled, own, loss_lb, (loss_strong + loss_perturbed) / 2, loss_perturbed=loss_perturbed)

    def perturbation(self, x1: Tensor, x4: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors 0 or 2 of the channels of x1 and x4, each (B, channels), drawn apart: Dropout2d with p = 0.5."""
        low, high = (2 * _coins(*features.shape[:2], generator) for features in (x1, x4))
        return low.to(x1.device, non_blocking=True), high.to(x4.device, non_blocking=True)

    def complement(self, x1: Tensor, x4: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors of the channels of x1 and x4 of both views, each (2B, channels). The release has encoders whose
        features share one mask; x1 and x4 of a ResNet have different channels, and a mask each.
        """
        images = len(x1) // 2
        order = torch.randperm(images, generator=generator)
        low, high = (
            complementary_factors(_coins(images, features.shape[1], generator), order) for features in (x1, x4)
        )
        return low.to(x1.device, non_blocking=True), high.to(x4.device, non_blocking=True)


def complementary_factors(kept: Tensor, order: Tensor) -> Tensor:
    """Factors of channels: the first view keeps what the second view loses, doubled (UniMatch-V2).

    Args:
        kept: (B, channels) 1 where the first view keeps a channel, 0 where the second does.
        order: (B,) permutation; its first ⌊B/2⌋ images keep all of their channels in both views, as they are.

    Returns:
        (2B, channels) of the batch [first view; second view].
    """
    undropped = torch.zeros(len(kept), 1, dtype=torch.bool)
    undropped[order[: len(kept) // 2]] = True
    return torch.cat([(2 * kept).masked_fill(undropped, 1), (2 - 2 * kept).masked_fill(undropped, 1)])


def _coins(images: int, channels: int, generator: torch.Generator) -> Tensor:
    """(images, channels) float32 of 0 and 1, each with probability 0.5."""
    return (torch.rand(images, channels, generator=generator) < 0.5).float()


def _scaled(features: Tensor, factors: Tensor) -> Tensor:
    return features * factors[:, :, None, None].to(features.dtype)
