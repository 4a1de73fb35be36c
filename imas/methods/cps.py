"""CPS: two networks that teach each other (Chen et al., CVPR 2021; with CutMix or without)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.modes import evaluating
from ..ops import mixing
from ..ops.losses import pixel_cross_entropy
from ..ops.pseudo import label_shares, predict
from ..schema import NOT_NEGATIVE, Config, Wants
from ..strict import option
from .base import Labeled, Method, NewNetwork, Progress, Step, Supervised, Unlabeled


@dataclass(frozen=True)
class Options:
    """Section ``cps``."""

    loss_weight: float = option(1.0, check=NOT_NEGATIVE)  # λ
    use_cutmix: bool = True


class CPS(Method):
    """Two networks with the same pretrained encoder and different heads; each learns the other's hard labels."""

    Options = Options

    def __init__(self, options: Options, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__(options, new_network, supervised)
        self.student = new_network()
        self.student2 = new_network()

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(unlabeled=True)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        batch = config.dataset.train.batch_size
        if config.options.use_cutmix and batch < 2:
            return {
                "dataset.train.batch_size": "expected at least 2, got 1: CutMix of cps mixes each unlabeled image with "
                "another one of its batch, and trainer.accumulate does not join batches; or set cps.use_cutmix to false"
            }
        return {}

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        networks, weak = (self.student, self.student2), unlabeled.weak
        if self.options.use_cutmix:
            # Steps 1 to 4: other images, masks, the mixed images and each network's labels of them.
            second, mask = self.draw(weak, progress.generator)
            mixed = mixing.put(weak, second, mask)
            labels = [self.mixed_labels(network, weak, second, mask) for network in networks]
            # Steps 5 and 6: separate forwards of the mixed and of the labeled images.
            taught = [network.coarse(mixed, aux=False)[0] for network in networks]
            coarse = [network.coarse(labeled.image) for network in networks]
        else:
            # Separate forwards of the labeled and of the unlabeled images; both take part.
            coarse = [network.coarse(labeled.image) for network in networks]
            of_weak = [network.coarse(weak, aux=False)[0] for network in networks]
            taught = [torch.cat([coarse[i][0], of_weak[i]]) for i in range(2)]
            labels = [predict(logits, weak.shape[-2:]).label for logits in taught]

        # Each network learns the other's labels, at every pixel.
        cross = [pixel_cross_entropy(taught[i], labels[1 - i]).mean() for i in range(2)]
        loss_ub = self.options.loss_weight * (cross[0] + cross[1])

        # Steps 6 and 7: the supervised loss of each, and the total.
        loss_lb = self.supervised(*coarse[0], labeled.label)
        loss_lb2 = self.supervised(*coarse[1], labeled.label)
        classes = self.student.num_classes
        scalars = {
            "loss_lb": loss_lb.detach(),
            "loss_lb2": loss_lb2.detach(),
            "loss_ub": loss_ub.detach(),
            "agreement": (labels[0] == labels[1]).float().mean(),
            "predicted": label_shares(labels[0], classes),
            "labeled": label_shares(labeled.label, classes),
        }
        return Step(loss_lb + loss_lb2 + loss_ub, scalars)

    def draw(self, weak: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw for CutMix: the second unlabeled images, and the masks, True where they are taken (step 1).

        The second images are those of the batch in another order, in which none keeps its place. The batch is shuffled,
        so that its next image is as good as any.
        """
        return weak.roll(1, 0), mixing.toggled_mask(len(weak), *weak.shape[-2:], generator, weak.device)

    @torch.no_grad()
    def mixed_labels(self, network: nn.Module, first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        """(B, H, W) labels of the mixed images, made of those of the images they are mixed from (steps 3 and 4).

        In train mode: both forwards use batch statistics, and BatchNorm's running statistics move.
        """
        size = mask.shape[-2:]
        of_first, of_second = (predict(network.coarse(images, aux=False)[0], size).label for images in (first, second))
        torch.clear_autocast_cache()  # torch 2.6 would train on weights that were cast here, without a gradient
        return mixing.put(of_first, of_second, mask)

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "student2": self.student2}

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        columns = {"weak view": unlabeled.weak}
        images = unlabeled.weak
        if self.options.use_cutmix:
            second, mask = self.draw(unlabeled.weak, progress.generator)
            columns["CutMix view"] = images = mixing.put(unlabeled.weak, second, mask)
        with evaluating(self), torch.no_grad():
            labels = [predict(network.coarse(images, aux=False)[0], images.shape[-2:]).label
                      for network in self.networks().values()]  # fmt: skip
        columns["student"], columns["student2"] = labels
        columns["agreement (red: they differ)"] = labels[0] != labels[1]
        return columns
