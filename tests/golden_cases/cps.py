"""CPS: losses of given logits, masks, whole steps of two small networks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imas import build_model
from imas.build import main_and_auxiliary
from imas.engine.optim import build_optimizer, param_groups
from imas.methods.base import Labeled, Progress, Unlabeled
from imas.methods.cps import CPS, Options
from imas.ops.losses import cross_entropy, ohem_cross_entropy
from imas.ops.mixing import share_boxes, toggled, toggled_mask
from imas.schema import Optimizer, OptimizerKwargs


def cases(content: dict) -> Iterator[tuple[str, dict]]:
    for i, case in enumerate(content["cases"]):
        yield f"{i}-{case['kind']}", case | {"networks": content["networks"]}


def count(content: dict) -> int:
    return len(content["cases"])


def run(case: dict) -> None:
    {"cps_losses": _losses, "cps_mask": _mask, "cps_mask_distribution": _distribution, "cps_step": _step}[case["kind"]](
        case
    )


class _Given(nn.Module):
    """A network that returns given logits, in the order of its calls, and notes them."""

    def __init__(self, number: int, classes: int, calls: list) -> None:
        super().__init__()
        self.number, self.num_classes, self.calls, self.queue = number, classes, calls, []

    def coarse(self, images: Tensor, aux: bool = True) -> tuple[Tensor, None]:
        assert self.training
        logits = self.queue.pop(0)
        assert len(logits) == len(images)
        self.calls.append([self.number, len(images), "grad" if torch.is_grad_enabled() else "no grad"])
        return logits, None


def _criterion(case: dict) -> Any:
    kwargs = {key: value for key, value in case["criterion"].items() if key != "type"}
    criterion = partial(ohem_cross_entropy, **kwargs) if case["criterion"]["type"] == "ohem" else cross_entropy
    return partial(main_and_auxiliary, criterion, 0.0)


def _mask_of(seed: int, count: int, size: list[int]) -> Tensor:
    rng = np.random.RandomState(seed)
    share, exponent, position = rng.uniform(0.25, 0.5, (count, 3)), rng.rand(count, 3), rng.rand(count, 3, 2)
    return toggled(share_boxes(*size, *map(torch.from_numpy, (share, exponent, position))))


def _method(case: dict, networks: list[nn.Module]) -> CPS:
    options = Options(loss_weight=case["cps_weight"], use_cutmix=case["cutmix"])
    return CPS(options, iter(networks).__next__, _criterion(case)).train()


def _unlabeled(weak: Tensor) -> Unlabeled:
    return Unlabeled(weak, (), torch.ones_like(weak[:, 0], dtype=torch.bool), torch.arange(len(weak)))


def _losses(case: dict) -> None:
    expected, calls, leaves = case["expected"], [], {}
    for key in case:
        if "_logits" in key:
            leaves[key] = golden.made(case[key]).requires_grad_()
    networks = [_Given(number, case["classes"], calls) for number in (1, 2)]
    order = ("first", "second", "mixed", "labeled") if case["cutmix"] else ("labeled", "unlabeled")
    for network in networks:
        network.queue = [leaves[f"{kind}_logits{network.number}"] for kind in order]
    method = _method(case, networks)
    label = golden.made(case["labels"])
    count = len(leaves["first_logits1" if case["cutmix"] else "unlabeled_logits1"])
    weak = torch.zeros(count, 3, *case["size"])
    if case["cutmix"]:
        mask = _mask_of(case["mask_seed"], count, case["size"])
        assert mask.float().mean().item() == pytest.approx(expected["mask_mean"], rel=1e-6)
        method.draw = lambda weak, generator: (weak, mask)
        of_mixed = method.mixed_labels

        def noted(network: nn.Module, *args: Tensor) -> Tensor:
            label = of_mixed(network, *args)
            counts = torch.bincount(label.flatten(), minlength=case["classes"])
            assert counts.tolist() == expected[f"target_counts{network.number}"]
            return label

        method.mixed_labels = noted
    step = method(
        Labeled(torch.zeros(len(label), 3, *case["size"]), label), _unlabeled(weak), Progress(0, 1, 0, 1, None)
    )
    if case["cutmix"]:
        assert calls == expected["calls"]
    else:
        assert sorted(calls) == sorted(expected["calls"])  # in an order that makes no difference
        targets = expected["target_counts1"]
        assert (step.scalars["predicted"] * sum(targets)).round().long().tolist() == targets
    step.loss.backward()
    assert step.loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert step.scalars["loss_lb"].item() == pytest.approx(expected["loss_lb1"], rel=1e-6)
    assert step.scalars["loss_lb2"].item() == pytest.approx(expected["loss_lb2"], rel=1e-6)
    assert step.scalars["loss_ub"].item() == pytest.approx(case["cps_weight"] * expected["loss_cps"], rel=1e-6)
    for key, record in expected.items():
        if key.startswith("grad_"):
            leaf = leaves[f"{key.removeprefix('grad_')[:-1]}_logits{key[-1]}"]
            golden.assert_recorded(leaf.grad, record, 1e-5)


def _mask(case: dict) -> None:
    height, width = case["size"]
    mask = _mask_of(case["mask_seed"], case["masks"], case["size"])
    assert mask.sum((1, 2)).tolist() == case["expected"]["ones"]
    numbers = torch.arange(height * width).view(height, width)
    assert (mask * numbers).sum((1, 2)).tolist() == case["expected"]["checksum"]


def _distribution(case: dict) -> None:
    """Our own draws, in portions, within four standard errors of both sides."""
    generator, expected = torch.Generator().manual_seed(0), case["expected"]
    height, width = case["size"]
    masks = torch.cat([toggled_mask(1000, height, width, generator) for _ in range(case["draws"] // 1000)])
    shares = masks.float().mean((1, 2))
    assert shares.mean().item() == pytest.approx(expected["share_mean"], abs=0.002)
    assert shares.std().item() == pytest.approx(expected["share_sd"], rel=0.05)
    assert shares.min() >= expected["share_min"] - 0.03 and shares.max() <= expected["share_max"] + 0.03
    assert masks[:, height // 2, width // 2].float().mean().item() == pytest.approx(expected["cover_centre"], abs=0.02)
    corner = masks[:, : height // 8, : width // 8].float().mean().item()
    assert corner == pytest.approx(expected["cover_corner_eighth"], abs=0.005)


def _step(case: dict) -> None:
    expected = case["expected"]
    networks = []
    for number in (1, 2):
        network = golden.fill(build_model(case["networks"][case["network"]]), salt=f"branch{number}:")
        with torch.no_grad():
            network.decoder.classifier[6].weight.mul_(case["classifier_times"])
        networks.append(network)
    method = _method(case, networks)
    kwargs = OptimizerKwargs(case["base_lr"], case["momentum"], case["weight_decay"], "convolutions")
    optimizer = build_optimizer(param_groups(method.trained(), kwargs.decay), Optimizer(kwargs, head_lr_times=1.0))
    for i, result in enumerate(expected["results"]):
        made = {key: golden.made(case[key].replace("{i}", str(i))) for key in ("images", "labels", "first")}
        if case["cutmix"]:
            second = golden.made(case["second"].replace("{i}", str(i)))
            mask = _mask_of(case["mask_seed"] + i, len(second), case["size"])
            method.draw = lambda weak, generator, drawn=(second, mask): drawn
        for group in optimizer.param_groups:
            group["lr"] = result["lr"]
        optimizer.zero_grad()
        step = method(Labeled(made["images"], made["labels"]), _unlabeled(made["first"]), Progress(0, 1, i, 1, None))
        step.loss.backward()
        optimizer.step()
        tolerance = 5e-3 if i else 1e-5
        assert step.loss.item() == pytest.approx(result["loss"], rel=tolerance)
        assert step.scalars["loss_lb"].item() == pytest.approx(result["loss_lb1"], rel=tolerance)
        assert step.scalars["loss_lb2"].item() == pytest.approx(result["loss_lb2"], rel=tolerance)
        loss_cps = step.scalars["loss_ub"].item() / case["cps_weight"]
        assert loss_cps == pytest.approx(result["loss_cps"], rel=tolerance)
    for number, network in enumerate(networks, 1):
        for name, record in expected[f"student{number}_after"].items():
            tensor = network.state_dict()[name]
            if name.endswith("num_batches_tracked"):
                assert tensor.item() == record
                continue
            magnitude = tensor.double().abs().sum().item()
            assert magnitude == pytest.approx(record["abs_sum"], rel=1e-4), name
            values = tensor.detach().flatten()[record["index"]]
            difference = (values - torch.tensor(record["value"])).abs().max().item()
            assert difference <= 2e-3 * max(map(abs, record["value"])), name
