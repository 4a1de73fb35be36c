"""SupOnly, the baseline: labeled images only, no teacher (spec, SupOnly)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..schema import Config, Wants
from .base import Labeled, Method, NewNetwork, Progress, Step, Supervised, Unlabeled


@dataclass(frozen=True)
class Options:
    """Section ``sup_only``."""

    strong_views: bool = False  # train on a strong view of each labeled crop as well


class SupOnly(Method):
    """Supervised training."""

    Options = Options

    def __init__(self, options: Options, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__(options, new_network, supervised)
        self.student = new_network()

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(labeled_strong=int(options.strong_views))

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        if config.options.strong_views and config.dataset.train.strong_aug is None:
            return {"dataset.train.strong_aug": "missing; sup_only.strong_views needs this section"}
        return {}

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        views = [labeled.image, *labeled.strong]
        loss = self.supervised(*self.student.coarse(torch.cat(views)), torch.cat([labeled.label] * len(views)))
        return Step(loss, {"loss_lb": loss.detach()})

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student}
