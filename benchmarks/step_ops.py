"""Score, its counting and OHEM at the size of Cityscapes crops, ours against the plain twin's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imas.ops.hardness import count_pairs, hardness_scores
from imas.ops.losses import ohem_cross_entropy
from imas.ops.resize import resize

from . import plain_step
from .clock import Clock

TWIN, FAITHFUL = "plain twin", "ours"
TOLERANCE = 1e-4


def compare_ops(device: torch.device, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Score, its counting, and OHEM forward and backward on (4, 19, 769, 769) logits: seconds by op and way."""
    generator = torch.Generator().manual_seed(2)
    size, classes, threshold = (769, 769), 19, 0.7
    coarse = 4 * torch.randn(4, classes, 25, 25, generator=generator)
    student = resize(coarse, size).to(device)
    teacher = student + torch.randn(student.shape, generator=generator).to(device)
    labels = torch.where(torch.rand(4, *size, generator=generator) < 0.8, resize(coarse, size).argmax(1), 0).to(device)
    labels[:, :40] = 255
    label_s, label_t = student.argmax(1), teacher.argmax(1)

    def ohem(function: Callable[..., Tensor]) -> Tensor:
        logits = teacher.requires_grad_()
        logits.grad = None
        loss = function(logits, labels, 0.7, 100_000)
        loss.backward()
        return torch.stack([loss.detach(), logits.grad.abs().sum()])

    def counts() -> Tensor:
        both, n_s, n_t = plain_step.plain_counts(label_s, label_t, classes)
        return torch.tensor([both.sum(), n_s.sum(), n_t.sum()])

    def pairs() -> Tensor:
        joint = count_pairs(label_s, label_t, classes)
        return torch.stack([joint.diagonal(dim1=1, dim2=2).sum(), joint.sum(), joint.sum()])

    ops: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "score": (
            lambda: plain_step.plain_score(student, teacher.detach(), threshold, classes),
            lambda: hardness_scores(student, teacher.detach(), threshold).score,
        ),
        "counting": (counts, pairs),
        "ohem": (lambda: ohem(plain_step.plain_ohem), lambda: ohem(ohem_cross_entropy)),
    }
    clock = Clock(device)
    seconds: dict[str, dict[str, list[float]]] = {name: {TWIN: [], FAITHFUL: []} for name in ops}
    for name, (plain, ours) in ops.items():
        torch.testing.assert_close(ours().float().cpu(), plain().float().cpu(), atol=1e-6, rtol=TOLERANCE)
        for repeat in range(repeats):
            for way, function in [(TWIN, plain), (FAITHFUL, ours)][:: 1 if repeat % 2 else -1]:
                seconds[name][way].append(clock.measure(function, False)[0]["all"])
    return seconds
