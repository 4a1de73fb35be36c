"""U2PL: pixels that the teacher is unsure of have no pseudo label, but serve as negatives of the classes that they can
hardly be (Wang et al., CVPR 2022). The rule is the paper's, not that of the release: see docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..models.deeplabv3plus import DeepLabV3Plus
from ..models.ema import update_teacher
from ..ops import contrast, mixing
from ..ops.losses import pixel_cross_entropy
from ..ops.pseudo import Prediction, logged_shares, predict
from ..schema import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, Config, Wants
from ..strict import option
from .base import Labeled, NewNetwork, Progress, Step, StudentTeacher, Supervised, Unlabeled

_PERCENT = (lambda value: 0 <= value <= 100, "a number between 0 and 100")
_IGNORED = 255  # in pseudo labels


@dataclass(frozen=True)
class Contrastive:
    """Section ``u2pl.contrastive``; defaults are those of the authors, but for the weight and the cap."""

    loss_weight: float = option(0.1, check=NOT_NEGATIVE)  # w_c
    low_rank: int = option(3, check=AT_LEAST_ONE)  # r_l
    high_rank: int = option(20, check=AT_LEAST_ONE)  # r_h
    current_class_threshold: float = option(0.3, check=FRACTION)  # δ_p
    current_class_negative_threshold: float = option(1.0, check=FRACTION)  # δ_n
    low_entropy_threshold: float = option(20.0, check=_PERCENT)  # α at the start, in percent
    negative_high_entropy: bool = True  # unlabeled negatives have high entropy; else any
    num_queries: int = option(256, check=AT_LEAST_ONE)  # M anchors a class
    num_negatives: int = option(50, check=AT_LEAST_ONE)  # K keys an anchor
    temperature: float = option(0.5, check=POSITIVE)
    capacity: int = option(30_000, check=AT_LEAST_ONE)  # keys in the bank of a class
    first_capacity: int = option(50_000, check=AT_LEAST_ONE)  # in that of class 0
    max_new_keys: int | None = option(1024, check=AT_LEAST_ONE)  # a class, process and step; null: all, as in the paper


@dataclass(frozen=True)
class Options:
    """Section ``u2pl``."""

    drop_percent: float = option(80.0, check=_PERCENT)  # of the pixels that are kept, at the start
    loss_weight: float = option(1.0, check=NOT_NEGATIVE)  # w_u
    use_cutmix: bool = True
    sup_only_epoch: int = option(0, check=NOT_NEGATIVE)  # E0, epochs of supervised warm-up
    ema_decay: float = option(0.99, check=FRACTION)  # upper bound of the teacher's decay
    contrastive: Contrastive = option(Contrastive)


class Pixels(NamedTuple):
    """A network's outputs for a batch of images, each (B, …, h, w) float32."""

    coarse: Tensor  # logits
    coarse_aux: Tensor | None
    embedding: Tensor


class Sure(NamedTuple):
    """The pixels of the mixed images, divided by entropy, each (B, H, W) bool."""

    kept: Tensor  # they have a pseudo label
    low: Tensor  # the lowest entropies, positives of their class
    high: Tensor  # the highest, negatives


class U2PL(StudentTeacher):
    """Student, and an EMA teacher whose BatchNorm has statistics of its own; both with a representation head."""

    Options = Options
    trains_embedding = True

    def __init__(self, options: Options, new_network: NewNetwork, supervised: Supervised) -> None:
        super().__init__(options, new_network, supervised)
        self.banks: list[Tensor] = []  # of each class, (N, D), the oldest key first; the same on all ranks

    @classmethod
    def wants(cls, options: Options) -> Wants:
        return Wants(unlabeled=True)

    @classmethod
    def check(cls, config: Config) -> dict[str, str]:
        options, classes, problems = config.options, config.net.num_classes, super().check(config)
        low, high = options.contrastive.low_rank, options.contrastive.high_rank
        if config.net.embedding is None:
            problems["net.embedding"] = "missing; u2pl compares representations of pixels, of this width (256)"
        if low >= classes:
            problems["u2pl.contrastive.low_rank"] = (
                f"expected fewer than the {classes} classes, got {low}: no unlabeled pixel would be a negative; with "
                "few classes, set it to 1"
            )
        elif high <= low:
            problems["u2pl.contrastive.high_rank"] = f"expected more than low_rank, {low}, got {high}"
        if options.sup_only_epoch and config.dataset.train.batch_size == 1 and not config.net.sync_bn:
            problems["dataset.train.batch_size"] = (
                "expected at least 2, got 1: BatchNorm cannot train on one image, as in u2pl.sup_only_epoch"
            )
        return problems

    def forward(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> Step:
        """One step. It waits for the device once, for the counts in ``contrast``."""
        if unlabeled is None:  # warm-up; every parameter has a part in the loss
            pixels = _pixels(self.student, labeled.image)
            loss = self.supervised(pixels.coarse, pixels.coarse_aux, labeled.label)
            return Step(loss + 0 * pixels.embedding.sum(), {"loss_lb": loss.detach()})

        # Step 3: the teacher's pseudo label; it is in eval mode. (Steps 1 and 2 are the engine's and after_step's.)
        label = self.predict_weak(unlabeled.weak)[0]

        # Step 4: CutMix. The student's one pass, and before it, for it leaves less behind, the teacher's of step 5.
        image, label = self.mix(unlabeled.weak, label, progress.generator)
        images, number = torch.cat([labeled.image, image]), len(labeled.image)
        taught = self.teach(images)
        pixels = _pixels(self.student, images)

        # Step 5: the supervised loss.
        loss_lb = self.supervised_first(pixels.coarse, pixels.coarse_aux, labeled.label)

        # Step 6: the unsupervised loss, of the pixels that are kept, times N/V.
        sure = self.divide(contrast.pixel_entropy(taught.coarse[number:], label.shape[-2:]), progress)
        target, kept = label.masked_fill(~sure.kept, _IGNORED), sure.kept.sum()
        total = pixel_cross_entropy(pixels.coarse[number:], target, _IGNORED).sum()
        loss_ub = self.options.loss_weight * reliable_mean(total, kept, label.numel())

        # Step 7: the contrastive loss.
        roles = self.roles(taught.coarse, labeled.label, label, sure)
        with torch.autocast(images.device.type, enabled=False):
            loss_contrastive = self.options.contrastive.loss_weight * self.contrast(
                pixels.embedding, taught.embedding, roles, progress.generator
            )

        pseudo = Prediction(label, sure.kept.float())
        scalars = {
            "loss_lb": loss_lb.detach(),
            "loss_ub": loss_ub.detach(),
            "loss_contrastive": loss_contrastive.detach(),
            "pseudo": kept / label.numel(),
            **logged_shares(pseudo, 0.5, labeled.label, self.student.num_classes),
        }
        return Step(loss_lb + loss_ub + loss_contrastive, scalars)  # step 8 is the engine's

    @torch.no_grad()
    def predict_weak(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's label of every pixel, (B, H, W) int64, and its logits before the last resize (step 3)."""
        coarse = self.teacher.coarse(weak, aux=False)[0]
        return predict(coarse, weak.shape[-2:]).label, coarse

    @torch.no_grad()
    def teach(self, images: Tensor) -> Pixels:
        """The teacher's pass in train mode, which moves its BatchNorm's statistics (step 5)."""
        self.teacher.train()
        pixels = _pixels(self.teacher, images)
        self.teacher.eval()
        return pixels

    def mix(self, image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and pseudo labels in which a box is the next image's; for half of the batches as they are (step 4)."""
        boxes = self.boxes(len(image), *label.shape[-2:], generator)
        if boxes is None:
            return image, label
        mask = mixing.box_mask(boxes.to(image.device, non_blocking=True), *label.shape[-2:])
        return mixing.put(image, image.roll(-1, 0), mask), mixing.put(label, label.roll(-1, 0), mask)

    def boxes(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor | None:
        """The boxes of CutMix, (B, 4) as ``mixing.half_boxes`` gives them; None for half of the batches."""
        if not self.options.use_cutmix or torch.rand((), generator=generator).item() >= 0.5:
            return None
        return mixing.half_boxes(batch, height, width, generator)

    def percents(self, progress: Progress) -> tuple[float, float]:
        """The share of pixels that are kept, which grows; that of positives, and of negatives, which vanishes."""
        left = 1 - progress.epoch / progress.epochs
        return 100 - (100 - self.options.drop_percent) * left, self.options.contrastive.low_entropy_threshold * left

    def divide(self, entropy: Tensor, progress: Progress) -> Sure:
        """Which pixels are sure, by (B, H, W) entropies."""
        drop, alpha = self.percents(progress)
        everywhere = torch.ones_like(entropy, dtype=torch.bool)
        limits = contrast.percentiles(entropy, everywhere, (drop, alpha, 100 - alpha))
        high = entropy >= limits[2] if self.options.contrastive.negative_high_entropy else everywhere
        return Sure(entropy < limits[0], entropy <= limits[1], high)

    def roles(self, coarse: Tensor, labeled: Tensor, pseudo: Tensor, sure: Sure) -> contrast.Roles:
        """The roles of all pixels at the size of the logits, first those of the labeled images.

        Args:
            coarse: the teacher's logits, of labeled and mixed images.
            labeled, pseudo: their labels, (B, H, W) int64.
        """
        options, size = self.options.contrastive, coarse.shape[-2:]
        given = labeled < coarse.shape[1]
        label, low, high = (
            contrast.shrink(torch.cat(both), size)
            for both in ((labeled, pseudo), (given, sure.low), (given, sure.high))
        )
        return contrast.roles(
            label,
            coarse.softmax(dim=1),
            low,
            high,
            len(labeled),
            (options.low_rank, options.high_rank),
            options.current_class_threshold,
            options.current_class_negative_threshold,
        )

    def contrast(self, student: Tensor, teacher: Tensor, roles: contrast.Roles, generator: torch.Generator) -> Tensor:
        """The contrastive loss, after the batch's keys have been pushed into the banks. All ranks call it together.

        Args:
            student, teacher: (B, D, h, w) representations; the student's carry the gradient.
            generator: on the CPU.
        """
        options, world = self.options.contrastive, distributed.world_size()
        student, teacher = (embedding.permute(0, 2, 3, 1).flatten(0, 2) for embedding in (student, teacher))
        generator = _on(student.device, generator)

        # The step's one wait for the device: how many pixels each class has in each role, on every rank.
        counts = torch.stack([mask.sum(1) for mask in roles])
        counts = distributed.concat(counts.unsqueeze(0), [1] * world).tolist()
        anchors, positives, negatives = counts[distributed.rank() if world > 1 else 0]
        self._push(teacher, roles.negatives, [each[2] for each in counts], negatives, generator)

        valid = [class_id for class_id, count in enumerate(positives) if count]
        used = [class_id for class_id in valid if anchors[class_id] and len(self.banks[class_id])]
        if len(valid) < 2 or not used:
            return 0 * student.sum()
        before = [0, *accumulate(anchors)]
        drawn, keys = [], []
        for class_id in used:
            drawn.append(self.draw(anchors[class_id], (options.num_queries,), generator) + before[class_id])
            shape = (options.num_queries, options.num_negatives)
            keys.append(self.draw(len(self.banks[class_id]), shape, generator))
        queries = student[contrast.places(roles.anchors, torch.cat(drawn))].split(options.num_queries)
        masks = torch.stack([roles.positives[class_id] for class_id in used]).float()
        centres = masks @ teacher / masks.sum(1, keepdim=True)
        losses = [
            contrast.info_nce(query, centre, self.banks[class_id][key], options.temperature)
            for query, centre, class_id, key in zip(queries, centres, used, keys, strict=True)
        ]
        return sum(losses) / len(valid)

    def _push(
        self, teacher: Tensor, mask: Tensor, counts: list[list[int]], own: list[int], generator: torch.Generator
    ) -> None:
        """Push the keys of all ranks into the banks.

        Args:
            teacher: (P, D) representations.
            mask: (C, P) bool, this rank's negatives of each class.
            counts: of them, on each rank; ``own`` on this one.
        """
        options, classes = self.options.contrastive, len(own)
        cap = max(map(max, counts)) if options.max_new_keys is None else options.max_new_keys
        chosen = [self.choose(count, cap, generator) + before for count, before in zip(own, accumulate(own, initial=0))]
        keys = teacher[contrast.places(mask, torch.cat(chosen))]
        lengths = [min(count, cap) for each in counts for count in each]
        totals = [sum(lengths[first : first + classes]) for first in range(0, len(lengths), classes)]
        parts = distributed.concat(keys, totals).split(lengths)
        if not self.banks:
            self.banks = [keys.new_empty(0, keys.shape[1])] * classes
        for class_id in range(classes):
            capacity = options.capacity if class_id else options.first_capacity
            self.banks[class_id] = contrast.push(self.banks[class_id], torch.cat(parts[class_id::classes]), capacity)

    def draw(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Numbers below the count, with replacement, on the generator's device."""
        return torch.randint(count, shape, generator=generator, device=generator.device)

    def choose(self, count: int, cap: int, generator: torch.Generator) -> Tensor:
        """At most ``cap`` different numbers below the count, in ascending order."""
        if count <= cap:
            return torch.arange(count, device=generator.device)
        return torch.randperm(count, generator=generator, device=generator.device)[:cap].sort().values

    def after_step(self, progress: Progress) -> dict[str, float]:
        """The teacher's update: parameters alone, except in warm-up. Through epoch E0 it is the student's (step 2)."""
        decay = self.decay(progress)
        update_teacher(self.teacher, self.student, decay, buffers=not self.needs_unlabeled(progress.epoch))
        return {"decay": decay, "keys": float(sum(map(len, self.banks)))}

    def get_extra_state(self) -> dict[str, Any]:
        return {"banks": self.banks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        device = next(self.parameters()).device
        self.banks = [bank.to(device) for bank in state["banks"]]

    def extra_bytes(self) -> int:
        width, options = self.student.decoder.representation[-1].out_channels, self.options.contrastive
        return 4 * width * (options.first_capacity + (self.student.num_classes - 1) * options.capacity)

    def look(self, labeled: Labeled, unlabeled: Unlabeled | None, progress: Progress) -> dict[str, Tensor]:
        """Entropies are of the eval mode here, without CutMix: a pass in train mode would change the teacher, and wait
        for the other ranks.
        """
        if unlabeled is None:
            return {}
        label, coarse = self.predict_weak(unlabeled.weak)
        sure = self.divide(contrast.pixel_entropy(coarse, label.shape[-2:]), progress)
        columns = {"weak view": unlabeled.weak}
        if self.options.use_cutmix:
            mask = mixing.half_boxes(len(label), *label.shape[-2:], progress.generator)
            mask = mixing.box_mask(mask.to(label.device), *label.shape[-2:])
            columns["CutMix view"] = mixing.put(unlabeled.weak, unlabeled.weak.roll(-1, 0), mask)
        return columns | {
            "pseudo label (grey: dropped)": label.masked_fill(~sure.kept, _IGNORED),
            "positives (red)": sure.low,
            "negatives (red)": sure.high,
        }


def _pixels(network: DeepLabV3Plus, images: Tensor) -> Pixels:
    x1, x3, x4 = network.encode(images)
    fused = network.fuse(x1, x4)
    return Pixels(network.classify(fused), network.auxiliary(x3), network.represent(fused))


def reliable_mean(total: Tensor, kept: Tensor, pixels: int) -> Tensor:
    """(N / V)·(total / V) with V pixels kept of N; 0 where none is."""
    kept = kept.clamp(min=1)
    return pixels / kept * (total / kept)


def _on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on the device, seeded by one on the CPU: what it draws needs no copy."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(torch.randint(2**62, (), generator=generator).item())
