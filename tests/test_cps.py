"""CPS: its needs, its labels, its masks, its weight decay, and the defects of the release that are mended."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from torch import Tensor

from imas import build_model, load_config
from imas.build import main_and_auxiliary
from imas.config import ConfigError
from imas.engine.optim import build_optimizer, param_groups
from imas.methods.base import Labeled, Progress, Unlabeled
from imas.methods.cps import CPS, Options
from imas.ops.losses import cross_entropy
from imas.ops.mixing import share_boxes, toggled
from imas.schema import Optimizer, OptimizerKwargs

TODAY = {
    "cps": {},
    "dataset": {"type": "shapes", "train": {"batch_size": 2}},
    "trainer": {"epochs": 3, "optimizer": {"kwargs": {"lr": 0.01}}},
    "net": TINY["net"],
}


def _method(**options: object) -> CPS:
    torch.manual_seed(0)
    supervised = partial(main_and_auxiliary, cross_entropy, 0.4)
    return CPS(Options(**options), partial(build_model, TINY["net"]), supervised).train()


def _batch(count: int = 3, side: int = 33) -> tuple[Labeled, Unlabeled, Progress]:
    generator = torch.Generator().manual_seed(1)
    image, weak = torch.randn(2, count, 3, side, side, generator=generator)
    label = torch.randint(0, 4, (count, side, side), generator=generator)
    valid = torch.ones_like(label, dtype=torch.bool)
    return Labeled(image, label), Unlabeled(weak, (), valid, torch.arange(count)), Progress(0, 1, 0, 1, generator)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_cutmix_needs_another_image_in_the_batch(accumulate: int, tmp_path: Path) -> None:
    """``accumulate`` does not help: each batch is mixed by itself. Above one image it works as for every method."""
    raw = copy.deepcopy(TODAY)
    raw["trainer"]["accumulate"] = accumulate
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load_config(path).method == "cps"
    with pytest.raises(ConfigError, match=r"dataset\.train\.batch_size: expected at least 2, got 1"):
        load_config(path, ["dataset.train.batch_size=1"])
    assert load_config(path, ["dataset.train.batch_size=1", "cps.use_cutmix=false"]).options == Options(1.0, False)


def test_networks_differ_by_their_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = _method()
    assert list(method.scored()) == ["student", "student2"]  # the first selects the best checkpoint
    first, second = (network.decoder.state_dict() for network in method.networks().values())
    weights = [name for name, tensor in first.items() if tensor.ndim == 4]
    assert weights and all(not torch.equal(first[name], second[name]) for name in weights)


def test_images_are_mixed_with_others() -> None:
    """In the release both unlabeled streams have the same images."""
    method, (_, unlabeled, progress) = _method(), _batch(4)
    second, mask = method.draw(unlabeled.weak, progress.generator)
    assert sorted(image.sum().item() for image in second) == sorted(image.sum().item() for image in unlabeled.weak)
    assert not any(torch.equal(a, b) for a, b in zip(second, unlabeled.weak, strict=True))
    assert mask.shape == (4, 33, 33) and 0.05 < mask.float().mean() < 0.5
    assert not torch.equal(mask[0], mask[1])  # drawn anew for every image


def test_labels_are_hard_of_the_other_network_and_of_every_pixel() -> None:
    """The loss by hand, from what the networks give in train mode."""
    labeled, unlabeled, progress = _batch()
    method = _method(loss_weight=3.0)
    again = copy.deepcopy(method)
    drawn = method.draw(unlabeled.weak, progress.generator)
    method.draw = lambda *_: drawn
    step = method(labeled, unlabeled, progress)

    second, mask = drawn
    mixed = torch.where(mask.unsqueeze(1), second, unlabeled.weak)
    outputs: list[list[Tensor]] = []
    for network in (again.student, again.student2):
        outputs.append([network(images)[0] for images in (unlabeled.weak, second, mixed, labeled.image)])
    labels = [torch.where(mask.unsqueeze(1), of[1], of[0]).argmax(1) for of in outputs]
    cross = [torch.nn.functional.cross_entropy(outputs[i][2], labels[1 - i]) for i in range(2)]
    torch.testing.assert_close(step.scalars["loss_ub"], 3 * (cross[0] + cross[1]).detach())
    of_labeled = [torch.nn.functional.cross_entropy(of[3], labeled.label).detach() for of in outputs]
    torch.testing.assert_close(step.scalars["loss_lb"], of_labeled[0])
    torch.testing.assert_close(step.scalars["loss_lb2"], of_labeled[1])
    for ours, theirs in zip(method.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)  # running statistics too
    assert method.student.encoder.bn1.num_batches_tracked == 4


@pytest.mark.parametrize("cutmix", [True, False])
def test_gradients_reach_both_networks_and_labels_carry_none(cutmix: bool) -> None:
    labeled, unlabeled, progress = _batch()
    method = _method(use_cutmix=cutmix)
    step = method(labeled, unlabeled, progress)
    step.loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert not any(scalar.requires_grad for scalar in step.scalars.values())
    assert method.student.encoder.bn1.num_batches_tracked == (4 if cutmix else 2)


def test_a_batch_without_a_valid_label_costs_nothing() -> None:
    labeled, unlabeled, progress = _batch()
    labeled = labeled._replace(label=torch.full_like(labeled.label, 255))
    step = _method()(labeled, unlabeled, progress)
    assert step.scalars["loss_lb"] == 0 and step.loss.isfinite()


def test_looking_leaves_the_running_statistics_alone() -> None:
    labeled, unlabeled, progress = _batch()
    method = _method()
    before = copy.deepcopy(method.state_dict())
    columns = method.look(labeled, unlabeled, progress)
    assert columns["student2"].shape == labeled.label.shape and method.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), method.state_dict().values(), strict=True))


def test_overlaps_are_toggled_back() -> None:
    """Two boxes of √(1/3)·√q = 5 of 10 pixels a side, one in the corner, one two pixels further."""
    q = (0.5 / math.sqrt(1 / 3)) ** 2
    share, exponent = torch.full((1, 2), q, dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64)
    position = torch.tensor([[[0.0, 0.0], [0.4, 0.4]]], dtype=torch.float64)
    mask = toggled(share_boxes(10, 10, share, exponent, position))[0]
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[:5, :5] = True
    expected[2:7, 2:7] ^= True
    assert torch.equal(mask, expected) and not mask[3, 3] and mask[0, 0] and mask[6, 6]


def test_weight_decay_of_convolutions_alone() -> None:
    method = _method()
    kwargs = OptimizerKwargs(0.1, 0.0, 0.5, "convolutions")
    groups = param_groups(method.trained(), kwargs.decay)
    optimizer = build_optimizer(groups, Optimizer(kwargs, head_lr_times=1.0))
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names) == 8 and "student2.heads.undecayed" in names
    assert {group["part"] for group in optimizer.param_groups} == {"encoder", "heads"}
    parameters = list(method.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, parameters, strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if old.ndim == 4 else 1.0))
