"""Batches, progress and small methods for the tests of steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import golden
import torch
from torch import Tensor

from imas.build import build_method, build_model, main_and_auxiliary
from imas.engine import precision
from imas.engine.optim import param_groups
from imas.methods import METHODS
from imas.methods.base import Labeled, Method, Progress, Step, Unlabeled
from imas.ops.losses import cross_entropy
from imas.schema import Config, Wants

NET = {
    "num_classes": 4,
    "encoder": {"type": "resnet18", "kwargs": {"width": 8, "replace_stride_with_dilation": [False, True, True]}},
    "decoder": {"kwargs": {"inner_planes": 8, "low_conv_planes": 4, "dilations": [1, 2, 3]}},
}
SUPERVISED = partial(main_and_auxiliary, cross_entropy, 0.4)


def progress(epoch: int = 0, iteration: int = 0, per_epoch: int = 5, seed: int = 0, epochs: int = 10) -> Progress:
    return Progress(epoch, epochs, iteration, per_epoch, torch.Generator().manual_seed(seed))


def small(name: str, net: dict = NET, **options: Any) -> Method:
    """A method by its name, with small networks that are fairly sure and differ from each other."""
    torch.manual_seed(0)
    if METHODS[name].trains_embedding:
        net = net | {"embedding": 8}
    method = METHODS[name](METHODS[name].Options(**options), partial(build_model, net), SUPERVISED).train()
    return unlike(method, 40)


def unlike(method: Method, sharpness: float) -> Method:
    with torch.no_grad():
        for network in method.networks().values():
            network.decoder.classifier[-1].weight.mul_(sharpness)
        for network in list(method.networks().values())[:-1]:
            for parameter in network.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return method


def batch_for(wants: Wants, size: int = 4, side: int = 33, classes: int = 4) -> tuple[Labeled, Unlabeled | None]:
    """Random images as a loader gives them to a method that wants these; the last rows of one image are padding."""

    def views(first: int, count: int) -> tuple[Tensor, ...]:
        return tuple(golden.randn(first + 10 * i, size, 3, side, side) for i in range(count))

    labeled = Labeled(
        golden.randn(1, size, 3, side, side),
        golden.randint(2, classes, size, side, side),
        views(5, wants.labeled_strong),
    )
    if not wants.unlabeled:
        return labeled, None
    valid = torch.ones(size, side, side, dtype=torch.bool)
    valid[0, -3:] = False
    label = golden.randint(6, classes, size, side, side) if wants.pseudo_label else None
    weak = golden.randn(3, size, 3, side, side)
    return labeled, Unlabeled(weak, views(4, wants.strong), valid, torch.arange(size), label)


def ready(config: Config, device: torch.device) -> tuple[Method, tuple[Labeled, Unlabeled | None]]:
    """The method of a configuration, whose networks differ and are fairly sure, and a batch for it."""
    torch.manual_seed(0)
    method = unlike(build_method(config).train(), 10).to(device)
    precision.prepare(method, config.trainer, device)
    labeled, unlabeled = batch_for(config.wants)
    return method, (on(labeled, device), None if unlabeled is None else on(unlabeled, device))


def on(batch: Any, device: torch.device) -> Any:
    """A batch on another device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple):
        moved = [on(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)
    return batch


def step_of(config: Config, device: torch.device, method: Method, batch: tuple[Labeled, Unlabeled | None]) -> Step:
    """The step, after its backward pass."""
    with precision.autocast(config.trainer, device):
        step = method(*batch, progress(2, 9, 4, seed=1))
    step.loss.backward()
    return step


def gradients(method: Method) -> Tensor:
    """Gradients of all that is trained, on the CPU."""
    return torch.cat([p.grad.flatten().cpu() for group in param_groups(method.trained()) for p in group["params"]])
