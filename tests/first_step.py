"""A first step of a small method with an experiment's options, for the tests of what options change."""

from __future__ import annotations

import golden
import torch
from torch import Tensor

from imas.build import build_method
from imas.engine import precision
from imas.methods.base import Batch, Method, Progress, Step
from imas.schema import Config


def ready(config: Config, device: torch.device) -> tuple[Method, Batch]:
    """The method, whose networks differ and are fairly sure, and a batch for it."""
    torch.manual_seed(0)
    method = build_method(config).train()
    with torch.no_grad():
        method.student.decoder.classifier[-1].weight.mul_(10)
        for parameter in method.teacher.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    method.to(device)
    precision.prepare(method, config.trainer, device)
    images = [golden.randn(seed, 4, 3, 33, 33).to(device) for seed in range(3)]
    labels, index = golden.randint(5, 4, 4, 33, 33).to(device), torch.arange(4, device=device)
    return method, Batch(images[0], labels, weak=images[1], strong=images[2], index=index)


def step_of(config: Config, device: torch.device, method: Method, batch: Batch) -> Step:
    """The step, after its backward pass."""
    with precision.autocast(config.trainer, device):
        step = method(batch, Progress(2, 9, 4, torch.Generator().manual_seed(1)))
    step.loss.backward()
    return step


def gradients(method: Method) -> Tensor:
    """Of all the student's parameters, on the CPU."""
    return torch.cat([parameter.grad.flatten().cpu() for parameter in method.student.parameters()])
