"""UniMatch, V1 and V2: losses of given logits, factors of the complementary dropout, whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import golden
import torch
from torch import Tensor

from imas.build import build_model
from imas.methods.base import Labeled, Step, Unlabeled
from imas.methods.unimatch import Options, UniMatch, complementary_factors

from . import fixmatch
from .fixmatch import LATER, LOSSES, Given, box_mask, close, made, progress, recorded, supervised


def cases(content: dict) -> Iterator[tuple[str, dict]]:
    return fixmatch.cases(content)


def count(content: dict) -> int:
    return fixmatch.count(content)


def run(case: dict) -> None:
    (RUNNERS.get(case["kind"]) or fixmatch.RUNNERS[case["kind"]])(case)


def _boxes(case: dict) -> list[Tensor]:
    return [box_mask(case[key], case["size"]) for key in ("boxes1", "boxes2")]


def losses_case(case: dict) -> None:
    second, classes, expected = case["kind"] == "unimatch_v2_losses", case["classes"], case["expected"]
    names = ["labeled", "strong1", "strong2"] + ([] if second else ["perturbed", "weak"])
    logits = {name: made(case[f"{name}_logits"]).requires_grad_() for name in names}
    labeled, unlabeled, partner = fixmatch.given_batch(case, 2)
    both = torch.cat([logits["strong1"], logits["strong2"]])
    if second:
        passes = [logits["labeled"], both]
    else:
        unused = torch.zeros_like(logits["labeled"])
        joined = torch.cat([logits["labeled"], logits["weak"], unused, logits["perturbed"]])
        passes = [made(case["partner_logits"]), joined, both]
    options = Options(threshold=case["threshold"], teacher=second, complementary_dropout=second)
    method = UniMatch(options, lambda: Given(classes), supervised(case["criterion"])).train()
    method.student.logits = passes
    if second:
        method.teacher = Given(classes, [made(case["teacher_logits"])]).eval()
    else:
        method.partners = lambda unlabeled: partner
    method.boxes = lambda valid, generator: _boxes(case)
    losses, targets = recorded(method)
    step = method(labeled, unlabeled, progress())
    step.loss.backward()

    close(step.scalars["loss_lb"], expected["loss_lb"])
    parts = ["loss_strong1", "loss_strong2", *([] if second else ["loss_perturbed"])]
    for loss, part in zip(losses, parts, strict=True):
        close(loss, expected[part])
    close(step.loss, expected["loss"])
    close(step.scalars["pseudo"], expected["mask_ratio"])
    fixmatch.assert_targets(targets, expected, case["threshold"], classes)
    for name in names:
        if f"grad_{name}" in expected:
            golden.assert_recorded(logits[name].grad, expected[f"grad_{name}"], LOSSES)
    fixmatch.assert_calls(method, expected["calls"])
    if second:
        assert method.after_step(progress(iteration=1)) == {"decay": expected["decay_of_this_iteration"]}
    else:
        assert logits["weak"].grad.abs().sum() == expected["grad_weak_abs_sum"] == 0


def dropout_case(case: dict) -> None:
    kept, order, expected = (made(case["keep"]) < 0.5).float(), torch.tensor(case["order"]), case["expected"]
    factors = complementary_factors(kept, order)
    golden.assert_recorded(factors, expected["factor"], 0)
    undropped = (factors == 1).all(1).nonzero().flatten().tolist()
    images = case["images"]
    assert undropped == expected["undropped_images"] + [images + image for image in expected["undropped_images"]]


def step_case(case: dict) -> None:
    options = Options(threshold=case["threshold"])
    method = UniMatch(options, partial(build_model, case["net"]), supervised(case["criterion"]))
    method.boxes = lambda valid, generator: _boxes(case)
    losses, _ = recorded(method)
    strong = ["strong1", "strong2"]

    def before(number: int) -> tuple[Labeled, Unlabeled]:
        kept = [made(case[key].replace("{i}", str(number))) < 0.5 for key in ("keep_low", "keep_high")]
        method.perturbation = lambda x1, x4, generator: (2.0 * kept[0], 2.0 * kept[1])
        method.partners = lambda unlabeled: fixmatch.step_batch(case, number, "partner_", strong)
        return fixmatch.step_labeled(case, number), fixmatch.step_batch(case, number, "", strong)

    def after(step: Step, expected: dict) -> None:
        parts = ("loss_strong1", "loss_strong2", "loss_perturbed")
        for loss, part in zip(losses[-3:], parts, strict=True):
            close(loss, expected[part], LATER if len(losses) > 3 else LOSSES)

    fixmatch.whole_steps(case, method, before, after)


RUNNERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "unimatch_losses": losses_case,
    "unimatch_v2_losses": losses_case,
    "complementary_dropout": dropout_case,
    "unimatch_step": step_case,
}
