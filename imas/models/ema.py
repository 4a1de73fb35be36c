"""Teachers: exponential moving averages of the student (paper, section 3.1; spec, Teacher), and several as one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student with its own storage, in eval mode, without gradients."""
    teacher = copy.deepcopy(student)
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, buffers: bool = True) -> None:
    """θ_t ← decay·θ_t + (1 − decay)·θ_s for parameters and floating-point buffers; integer buffers are copied.

    Args:
        decay: in [0, 1]; 0 makes the teacher equal to the student.
        buffers: False leaves the teacher its own (U2PL).
    """
    pairs = list(zip(_state(teacher, buffers), _state(student, buffers), strict=True))
    averaged, copied = (
        [pair for pair in pairs if pair[0].is_floating_point() == floating] for floating in (True, False)
    )
    torch._foreach_lerp_(*map(list, zip(*averaged)), weight=1 - decay)
    if copied:
        torch._foreach_copy_(*map(list, zip(*copied)))


def _state(module: nn.Module, buffers: bool) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *(module.buffers() if buffers else ()))]


def teacher_decay(
    epoch: int, iteration: int, iterations_per_epoch: int, sup_only_epoch: int = 0, ema_decay: float = 0.996
) -> float:
    """The decay d of the teacher's update after one iteration (spec, Teacher).

    d = 0 while ``epoch <= sup_only_epoch``: during the whole first semi-supervised epoch the teacher *is* the
    student after its last step. Afterwards d = min(1 − 1/(k + 1), ema_decay) with k the iterations since the
    start of epoch ``sup_only_epoch``.

    Args:
        epoch: counted from 0.
        iteration: counted from 0 at the start of training, over all epochs.
    """
    if epoch <= sup_only_epoch:
        return 0.0
    k = iteration - sup_only_epoch * iterations_per_epoch
    return min(1 - 1 / (k + 1), ema_decay)


class MeanOfLogits(nn.Module):
    """Networks of which the mean logits count. It has no state of its own, and is made where it is needed.

    Args:
        networks: each gives a tuple that begins with its logits, all of one shape.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, 3, H, W) normalised images → (logits (B, C, H, W), None), as from a single network."""
        return sum(network(images)[0] for network in self.networks) / len(self.networks), None
