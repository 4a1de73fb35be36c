"""FixMatch: losses of given logits, boxes, whole steps. Shared with UniMatch: a network that gives what it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imas.build import build_model, main_and_auxiliary
from imas.engine.optim import build_optimizer, param_groups
from imas.methods.base import Labeled, Method, Progress, Step, Unlabeled
from imas.methods.fixmatch import FixMatch, Options, Target
from imas.models.deeplabv3plus import DeepLabV3Plus
from imas.ops import mixing
from imas.ops.losses import cross_entropy, ohem_cross_entropy
from imas.schema import Optimizer, OptimizerKwargs

LOSSES = 1e-5  # relative; measured 2e-7
LATER = 5e-3  # losses of a whole step after the first: rounding of the one before


def cases(content: dict) -> Iterator[tuple[str, dict]]:
    for number, case in enumerate(content["cases"]):
        yield f"{number}-{case['kind']}", case | {"net": content["networks"].get(case.get("network"))}


def count(content: dict) -> int:
    return len(content["cases"])


def run(case: dict) -> None:
    RUNNERS[case["kind"]](case)


class Given(nn.Module):
    """A network whose logits are given, call by call; the calls are noted."""

    coarse = DeepLabV3Plus.coarse

    def __init__(self, classes: int, logits: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.num_classes, self.logits, self.calls = classes, list(logits), []
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(["train" if self.training else "eval", len(images), _grad()])
        return images, images, images

    def fuse(self, x1: Tensor, x4: Tensor) -> Tensor:
        return x1

    def classify(self, fused: Tensor) -> Tensor:
        logits = self.logits.pop(0)
        assert len(logits) == len(fused)
        return logits

    def auxiliary(self, x3: Tensor) -> None:
        return None


def _grad() -> str:
    return "grad" if torch.is_grad_enabled() else "no grad"


def supervised(criterion: dict) -> Callable:
    """The supervised loss of a case."""
    kwargs = {key: value for key, value in criterion.items() if key != "type"}
    return partial(
        main_and_auxiliary, partial({"ce": cross_entropy, "ohem": ohem_cross_entropy}[criterion["type"]], **kwargs), 0.0
    )


def valid_mask(sizes: Sequence[Sequence[int]], size: Sequence[int]) -> Tensor:
    """(B, H, W) bool, True where row < height and column < width."""
    mask = torch.zeros(len(sizes), *size, dtype=torch.bool)
    for image, (height, width) in zip(mask, sizes):
        image[:height, :width] = True
    return mask


def box_mask(boxes: Sequence[Sequence[int] | None], size: Sequence[int]) -> Tensor:
    """(B, H, W) bool, True in [top, left, height, width]."""
    mask = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for image, box in zip(mask, boxes):
        if box is not None:
            top, left, height, width = box
            image[top : top + height, left : left + width] = True
    return mask


def progress(epoch: int = 0, iteration: int = 0, per_epoch: int = 8) -> Progress:
    return Progress(epoch, 2, iteration, per_epoch, torch.Generator().manual_seed(0))


def given_batch(case: dict, views: int) -> tuple[Labeled, Unlabeled, Unlabeled | None]:
    """A labeled and an unlabeled batch, and the partners, of images that no network looks at."""
    size, labels = case["size"], made(case["labels"])
    valid = valid_mask(case["valid"], size)
    images = torch.zeros(len(valid), 3, *size)
    unlabeled = Unlabeled(images, (images,) * views, valid, torch.arange(len(valid)))
    partner = None
    if "partner_valid" in case:
        partner = unlabeled._replace(valid=valid_mask(case["partner_valid"], size))
    return Labeled(torch.zeros(len(labels), 3, *size), labels), unlabeled, partner


def made(recipe: str) -> Tensor:
    return golden.made(recipe)


def recorded(method: FixMatch) -> tuple[list[Tensor], list[Target]]:
    """Lists that fill with each consistency loss of the method's next steps, and its target."""
    losses, targets, consistency = [], [], method.consistency

    def note(coarse: Tensor, target: Target) -> Tensor:
        targets.append(target)
        losses.append(consistency(coarse, target))
        return losses[-1]

    method.consistency = note
    return losses, targets


def close(value: Tensor | float, expected: float, tolerance: float = LOSSES) -> None:
    assert float(torch.as_tensor(value).detach()) == pytest.approx(expected, rel=tolerance, abs=1e-9)


def assert_targets(targets: list[Target], expected: dict, threshold: float, classes: int) -> None:
    """Numbers of real and of kept pixels, and of pixels of each class with padding, of each view."""
    lists = isinstance(expected["valid_pixels"], list)
    valid, kept, counts = (
        expected[key] if lists else [expected[key]] for key in ("valid_pixels", "kept_pixels", "target_counts")
    )
    assert [int(target.valid.sum()) for target in targets] == valid
    assert [int(((target.confidence >= threshold) & target.valid).sum()) for target in targets] == kept
    assert [target.label.flatten().bincount(minlength=classes).tolist() for target in targets] == counts


def losses_case(case: dict) -> None:
    """Losses and gradients of given logits; with a teacher it is the EMA flavour."""
    teacher, classes, expected = "teacher_logits" in case, case["classes"], case["expected"]
    labeled_logits, strong = (made(case[key]).requires_grad_() for key in ("labeled_logits", "strong_logits"))
    labeled, unlabeled, partner = given_batch(case, 1)
    if teacher:
        passes = [torch.cat([labeled_logits, strong])]
    else:
        weak = made(case["weak_logits"]).requires_grad_()
        passes = [made(case["partner_logits"]), torch.cat([labeled_logits, weak]), strong]
    options = Options(threshold=case["threshold"], teacher=teacher)
    method = FixMatch(options, lambda: Given(classes), supervised(case["criterion"])).train()
    method.student.logits = passes
    if teacher:
        method.teacher = Given(classes, [made(case["teacher_logits"])]).eval()
    else:
        method.partners = lambda unlabeled: partner
    method.boxes = lambda valid, generator: [box_mask(case["boxes"], case["size"])]
    losses, targets = recorded(method)
    step = method(labeled, unlabeled, progress())
    step.loss.backward()

    close(step.scalars["loss_lb"], expected["loss_lb"])
    close(losses[0], expected["loss_strong"])
    close(step.loss, expected["loss"])
    close(step.scalars["pseudo"], expected["mask_ratio"])
    assert_targets(targets, expected, case["threshold"], classes)
    golden.assert_recorded(labeled_logits.grad, expected["grad_labeled"], LOSSES)
    golden.assert_recorded(strong.grad, expected["grad_strong"], LOSSES)
    assert_calls(method, expected["calls"])
    if teacher:
        assert method.after_step(progress(iteration=1)) == {"decay": expected["decay_of_this_iteration"]}
    else:
        assert weak.grad.abs().sum() == expected["grad_weak_abs_sum"] == 0


def assert_calls(method: FixMatch, expected: list[list]) -> None:
    """Mode, batch size and gradient of each pass, the student's and the teacher's in their order."""
    for name in ("teacher", "student"):
        network = getattr(method, name)
        named = [call[1:] for call in expected if call[0] == name]
        calls = named if method.teacher is not None else expected
        assert network is None or network.calls == [call[:3] for call in calls], name


def box_case(case: dict) -> None:
    side, random = case["side"], np.random.RandomState(case["seed"])

    def draws() -> Iterator[float]:
        yield (random.uniform(0.02, 0.4) - 0.02) / 0.38
        while True:
            yield (random.uniform(0.3, 1 / 0.3) - 0.3) / (1 / 0.3 - 0.3)
            yield (random.randint(0, side) + 0.5) / side
            yield (random.randint(0, side) + 0.5) / side

    stream = draws()
    box = mixing.area_box(side, side, lambda: next(stream))
    assert list(box) == case["expected"]["box"]
    assert box[2] * box[3] == case["expected"]["area"]


def box_distribution_case(case: dict) -> None:
    """As many boxes as the release drew, within four standard errors."""
    side, expected, generator = case["side"], case["expected"], torch.Generator().manual_seed(case["seed"])
    has_box = mixing.area_mask(4000, 16, 16, generator).any(2).any(1).double().mean()
    assert abs(has_box - expected["boxes_per_draw"]) < 0.035
    stream = iter(torch.rand(10**6, generator=generator, dtype=torch.float64).tolist())
    boxes = [mixing.area_box(side, side, lambda: next(stream)) for _ in range(case["draws"] // 2)]
    top, left, height, width = np.array(boxes).T
    area, bottom, right, eighth = height * width / side**2, top + height, left + width, side // 8

    def covered(start: np.ndarray, stop: np.ndarray, first: int, last: int) -> np.ndarray:
        """Share of [first, last) that each box covers."""
        return np.clip(np.minimum(stop, last) - np.maximum(start, first), 0, None) / (last - first)

    middle = side // 2
    rows, columns = covered(top, bottom, 0, eighth), covered(left, right, 0, eighth)
    centre = covered(top, bottom, middle, middle + 1) * covered(left, right, middle, middle + 1)
    found = {
        "area_mean": (area.mean(), 0.0045),
        "area_sd": (area.std(), 0.0045),
        "height_mean": ((height / side).mean(), 0.01),
        "width_mean": ((width / side).mean(), 0.01),
        "log_ratio_mean": (np.log(height / width).mean(), 0.025),
        "taller_than_wide": ((height > width).mean(), 0.02),
        "cover_centre": (centre.mean(), 0.02),
        "cover_corner_eighth": ((rows * columns).mean(), 0.005),
        "cover_top_eighth": ((rows * width / side).mean(), 0.01),
        "cover_left_eighth": ((columns * height / side).mean(), 0.01),
        "area_min": (area.min(), 0.001),
        "area_max": (area.max(), 0.005),
        "height_min": ((height / side).min(), 0.02),
        "height_max": ((height / side).max(), 0.02),
        "width_min": ((width / side).min(), 0.02),
        "width_max": ((width / side).max(), 0.05),
    }
    for name, (value, tolerance) in found.items():
        assert abs(value - expected[name]) < tolerance, (name, value, expected[name])
    assert found.keys() | {"boxes_per_draw"} == expected.keys()


def whole_steps(
    case: dict, method: Method, before: Callable[[int], tuple[Labeled, Unlabeled]], after: Callable[[Step, dict], None]
) -> None:
    """The iterations of a case with the recorded rates, and the weights after the last.

    Args:
        before: number of the iteration → its batch.
        after: checks the losses of a step against those expected.
    """
    method.train()
    networks = method.networks()
    for network in networks.values():
        golden.fill(network)
        with torch.no_grad():
            network.decoder.classifier[6].weight.mul_(case["classifier_times"])
    kwargs = OptimizerKwargs(case["base_lr"], case["momentum"], case["weight_decay"])
    options = Optimizer(kwargs, head_lr_times=case["head_lr_times"])
    optimizer = build_optimizer(param_groups(method.trained()), options)
    for number in range(case["iterations"]):
        expected = case["expected"]["results"][number]
        for group, rate in zip(optimizer.param_groups, expected["lr"], strict=True):
            group["lr"] = rate
        now = progress(case["epoch"], case["epoch"] * case["iterations_per_epoch"] + number)
        step = method(*before(number), now)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        rates = method.after_step(now)
        tolerance = LATER if number else LOSSES
        close(step.loss, expected["loss"], tolerance)
        close(step.scalars["loss_lb"], expected["loss_lb"], tolerance)
        close(step.scalars["pseudo"], expected["mask_ratio"], tolerance)
        after(step, expected)
        assert rates.get("decay") == pytest.approx(expected.get("decay"))
    for name, network in networks.items():
        state = network.state_dict()
        for key, record in case["expected"][f"{name}_after"].items():
            if isinstance(record, int):
                assert state[key] == record, key
            else:
                golden.assert_recorded(state[key], record, 2e-3)
                magnitude = state[key].double().abs().sum().item()
                assert magnitude == pytest.approx(record["abs_sum"], rel=1e-4), key


def step_batch(case: dict, number: int, prefix: str, strong: Sequence[str]) -> Unlabeled:
    """The unlabeled batch of an iteration, or its partners, rebuilt from the recipes."""

    def tensor(key: str) -> Tensor:
        return made(case[prefix + key].replace("{i}", str(number)))

    valid = valid_mask(case[prefix + "valid"], case["size"])
    return Unlabeled(tensor("weak"), tuple(map(tensor, strong)), valid, torch.arange(len(valid)))


def step_labeled(case: dict, number: int) -> Labeled:
    return Labeled(*(made(case[key].replace("{i}", str(number))) for key in ("images", "labels")))


def step_case(case: dict) -> None:
    teacher = case["kind"] == "fixmatch_ema_step"
    options = Options(threshold=case["threshold"], teacher=teacher)
    method = FixMatch(options, partial(build_model, case["net"]), supervised(case["criterion"]))
    method.boxes = lambda valid, generator: [box_mask(case["boxes"], case["size"])]
    losses, _ = recorded(method)

    def before(number: int) -> tuple[Labeled, Unlabeled]:
        if not teacher:
            method.partners = lambda unlabeled: step_batch(case, number, "partner_", ["strong"])
        return step_labeled(case, number), step_batch(case, number, "", ["strong"])

    def after(step: Step, expected: dict) -> None:
        close(losses[-1], expected["loss_strong"], LATER if len(losses) > 1 else LOSSES)

    whole_steps(case, method, before, after)


RUNNERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "fixmatch_losses": losses_case,
    "fixmatch_ema_losses": losses_case,
    "box": box_case,
    "box_distribution": box_distribution_case,
    "fixmatch_step": step_case,
    "fixmatch_ema_step": step_case,
}
