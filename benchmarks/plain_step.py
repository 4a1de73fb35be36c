"""The plain twin of the training step: straightforward code in the order of the spec, to measure and to check ours
against.

float32 and NCHW throughout. All logits, the auxiliary ones and those that earn no loss included, are resized to full
size; softmaxes are made whole; the score's pixels are counted in NumPy, row by row; OHEM sorts all pixels; SGD and EMA
go tensor by tensor. Draws are made as ours are, so that one generator gives both the same boxes.

Letters: B images, H×W the crop, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imas.ops import mixing
from imas.schema import Config


class Losses(NamedTuple):
    """What a step came to."""

    loss_lb: Tensor
    loss_ub: Tensor
    score: Tensor  # (B,)


class PlainStep:
    """iMAS's step with blending, CutMix and weights by the score, on a student and a teacher of its own.

    Args:
        clock: gives the context in which a part of the step runs, by the part's name.
    """

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, clock) -> None:
        self.config, self.student, self.teacher, self.clock = config, student.train(), teacher.eval(), clock
        kwargs = config.trainer.optimizer.kwargs
        self.optimizer = torch.optim.SGD(
            student.parameters(), kwargs.lr, kwargs.momentum, weight_decay=kwargs.weight_decay, foreach=False
        )

    def __call__(self, tensors: dict[str, Tensor], device: torch.device, decay: float, generator) -> Losses:
        """One update. ``tensors``: images, weak, strong as normalised float32; labels int64."""
        config, clock = self.config, self.clock
        threshold, classes = config.options.threshold, config.net.num_classes
        with clock("data"):
            x, labels, weak, strong = (tensors[name].to(device) for name in ("images", "labels", "weak", "strong"))
        with clock("weak predictions"), torch.no_grad():
            self.student.eval()
            logits_s, logits_t = self.student(weak)[0], self.teacher(weak)[0]
            self.student.train()
        with clock("score"):
            score = plain_score(logits_s, logits_t, threshold, classes)
        with clock("mixing"), torch.no_grad():
            confidence, label = torch.max(torch.softmax(logits_t, dim=1), dim=1)
            h = score.view(-1, 1, 1, 1)
            strong = h * strong + (1 - h) * weak
            mixed, mixed_label, mixed_confidence = self.cutmix(weak, label, confidence, score, generator)
        with clock("training forward"):
            size = len(x)
            logits, aux = self.student(torch.cat([x, weak, mixed, strong]))
        with clock("losses"):
            loss_lb = self.supervised(logits[:size], None if aux is None else aux[:size], labels)
            from_mixed = consistency(logits[2 * size : 3 * size], mixed_label, mixed_confidence, threshold, score)
            from_strong = consistency(logits[3 * size :], label, confidence, threshold, score)
            loss_ub = config.options.loss_weight * (from_mixed + from_strong) / 2
            loss = loss_lb + loss_ub
        with clock("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with clock("optimiser"):
            self.optimizer.step()
        with clock("EMA"), torch.no_grad():
            own, given = self.teacher.state_dict(), self.student.state_dict()
            for name, tensor in own.items():
                if tensor.is_floating_point():
                    tensor.copy_(decay * tensor + (1 - decay) * given[name])
                else:
                    tensor.copy_(given[name])
        return Losses(loss_lb.detach(), loss_ub.detach(), score)

    def cutmix(self, weak: Tensor, label: Tensor, confidence: Tensor, score: Tensor, generator):
        """Boxes of the partner, one image at a time. CutMix always fires: the largest step is measured."""
        torch.rand((), generator=generator)  # ours asks whether it fires
        low, high = self.config.options.use_cutmix_range
        side = mixing.box_side(low, high, 0.0, generator)
        batch, _, height, width = weak.shape
        boxes = mixing.cutmix_mask(batch, height, width, side, generator).to(weak.device)
        order = torch.sort(score, stable=True).indices.tolist()
        mixed, mixed_label, mixed_confidence = weak.clone(), label.clone(), confidence.clone()
        for easy, hard in zip(order, reversed(order)):
            box = boxes[easy]
            mixed[easy][:, box] = weak[hard][:, box]
            mixed_label[easy][box] = label[hard][box]
            mixed_confidence[easy][box] = confidence[hard][box]
        return mixed, mixed_label, mixed_confidence

    def supervised(self, logits: Tensor, aux: Tensor | None, labels: Tensor) -> Tensor:
        """The criterion of main and auxiliary logits."""
        criterion = self.config.criterion
        if criterion.type == "ohem":
            losses = [
                plain_ohem(z, labels, criterion.kwargs.thresh, criterion.kwargs.min_kept)
                for z in (logits, aux)
                if z is not None
            ]
        else:
            losses = [F.cross_entropy(z, labels, ignore_index=255) for z in (logits, aux) if z is not None]
        return losses[0] if aux is None else losses[0] + self.config.net.aux_loss.loss_weight * losses[1]


def consistency(logits: Tensor, label: Tensor, confidence: Tensor, threshold: float, score: Tensor) -> Tensor:
    """Cross-entropy of (B, C, H, W) against the confident pseudo labels, times the score, as the spec words it."""
    label = label.clone()
    label[confidence < threshold] = 255
    loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    return (loss.mean(dim=(1, 2)) * score).mean()


def plain_ohem(logits: Tensor, labels: Tensor, thresh: float, min_kept: int) -> Tensor:
    """OHEM by a whole softmax and a full sort: (B, C, H, W) logits, (B, H, W) labels → a scalar."""
    labels, probabilities = labels.flatten().clone(), torch.softmax(logits, dim=1)
    valid = labels != 255
    if valid.sum() >= min_kept:
        flat = probabilities.detach().transpose(0, 1).reshape(logits.shape[1], -1)
        p = flat[labels * valid, torch.arange(len(labels), device=labels.device)]
        p[~valid] = 1
        limit = thresh
        ordered, _ = torch.sort(p)
        limit = max(limit, ordered[min(len(p), min_kept) - 1].item())
        labels[p > limit] = 255
    return F.cross_entropy(logits, labels.view(logits.shape[0], *logits.shape[2:]), ignore_index=255)


def plain_score(student: Tensor, teacher: Tensor, threshold: float, classes: int) -> Tensor:
    """Version 1, weighted by class, without the background, from two (B, C, H, W) logits → (B,)."""
    with torch.no_grad():
        p_s, p_t = torch.softmax(student, dim=1), torch.softmax(teacher, dim=1)
        confidence_s, label_s = torch.max(p_s, dim=1)
        confidence_t, label_t = torch.max(p_t, dim=1)
        rho_s = (confidence_s >= threshold).float().mean(dim=(1, 2)).cpu().numpy()
        rho_t = (confidence_t >= threshold).float().mean(dim=(1, 2)).cpu().numpy()
    both, n_s, n_t = plain_counts(label_s, label_t, classes)
    scores = []
    for image in range(len(student)):
        union = n_s[image] + n_t[image] - both[image]
        iou = both[image] / np.maximum(union, 1)
        weighted = []
        for pixels in (n_t[image].copy(), n_s[image].copy()):
            pixels[0] = 0
            weighted.append((pixels / max(pixels.sum(), 1) * iou).sum())
        scores.append((rho_t[image] * weighted[0] + rho_s[image] * weighted[1]) / 2)
    return torch.tensor(np.array(scores), dtype=torch.float32, device=student.device)


def plain_counts(first: Tensor, second: Tensor, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class in both, in the first, in the second, each (B, C): in NumPy, a row of an image at a time."""
    counts = np.zeros((3, len(first), classes))
    for image, (rows_a, rows_b) in enumerate(zip(first.cpu().numpy(), second.cpu().numpy())):
        for a, b in zip(rows_a, rows_b):
            for number, values in enumerate((a[a == b], a, b)):
                counts[number, image] += np.histogram(values, bins=classes, range=(0, classes))[0]
    return counts[0], counts[1], counts[2]
