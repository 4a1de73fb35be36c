"""PS-MT: figures of the authors' release (058cdc3), both of its halves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from unittest import mock

import golden
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imas import build_model
from imas.engine.optim import build_optimizer, learning_rate, param_groups
from imas.methods import psmt
from imas.methods.base import Labeled, Progress, Unlabeled
from imas.methods.psmt import PSMT, VAT, Options
from imas.ops import mixing
from imas.ops.losses import cross_entropy
from imas.ops.pseudo import predict
from imas.ops.resize import resize
from imas.schema import Optimizer, OptimizerKwargs, Scheduler

STEP_TOLERANCE = (1e-5, 2e-4, 5e-3, 5e-2)  # of each iteration


def cases(content: dict[str, list]) -> Iterator[tuple[str, Any]]:
    """(id, (kind, case)) for all that the file holds."""
    for kind, found in content.items():
        for number, case in enumerate(found):
            yield f"{kind}{number}", (kind, case)


def count(content: dict[str, list]) -> int:
    return sum(map(len, content.values()))


def run(case: tuple[str, dict]) -> None:
    kind, figures = case
    _RUN[kind](figures)


def _loss(case: dict) -> None:
    student = golden.made(case["student"]).requires_grad_()
    pseudo = predict(golden.made(case["ensemble"]))
    passing = (pseudo.confidence >= case["threshold"]).float().mean().item()
    assert passing == pytest.approx(case["passing_share"], abs=1e-6)
    loss = psmt.weighted_consistency(student, pseudo, case["threshold"])
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    loss.backward()
    if case["loss"]:
        golden.assert_recorded(student.grad, case["grad"], 1e-6)
    else:
        assert not student.grad.any()


def _made(recipe: str) -> Tensor:
    """``golden.made`` with what a recipe changes afterwards: ``[:, 10:] -= 50`` or ``0 where rand(...) < 0.1``."""
    recipe, _, change = recipe.partition("; ")
    tensor = golden.made(recipe)
    if " -= " in change:
        assert change == "[:, 10:] -= 50", change
        tensor[:, 10:] -= 50
    elif change:
        draw, _, share = change.removeprefix("0 where ").partition(" < ")
        tensor[golden.made(draw.replace("same shape", str([*tensor.shape])[1:-1])) < float(share)] = 0
    return tensor


def _assist(case: dict) -> None:
    active, other = _made(case["active"]), _made(case["other"])
    assisted, ensemble = psmt.assisted(active, other, 7), psmt.ensemble(active, other, 7)
    golden.assert_recorded(assisted, case["assisted"], 1e-6)
    golden.assert_recorded(ensemble, case["ensemble"], 1e-6)
    assert (assisted == other).sum().item() == case["entries_from_other"]
    pseudo = predict(ensemble)
    assert pseudo.label.flatten().bincount(minlength=case["num_classes"]).tolist() == case["label_counts"]
    golden.assert_recorded(pseudo.confidence, case["confidence"], 1e-5)


def _ramp_up(case: dict) -> None:
    length = case["epochs"] * case["iterations_per_epoch"]
    values = [psmt.ramp_up(case["weight"], iteration, length) for iteration in case["iteration"]]
    assert values == pytest.approx(case["value"], rel=1e-9, abs=1e-15)


def _learning_rate(case: dict) -> None:
    per_epoch = case["iterations_per_epoch"]
    total = case["epochs"] * per_epoch
    rates = [learning_rate(Scheduler(), case["base"], iteration, total, per_epoch) for iteration in range(total)]
    assert rates == pytest.approx(case["value"], rel=1e-12)


def _method(cutmix: str, vat: VAT | None = None, networks: list | None = None, **options: Any) -> PSMT:
    options = Options(cutmix=cutmix, vat=vat or VAT(enabled=False), **options)
    networks = iter(networks or [nn.Identity() for _ in range(3)])
    return PSMT(options, lambda: next(networks), lambda main, aux, label: cross_entropy(main, label))


def _boxes(boxes: list[list[int]], height: int, width: int) -> Tensor:
    """Masks of boxes [top, bottom, left, right]."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(masks, boxes):
        mask[top:bottom, left:right] = True
    return masks


def _cutmix(case: dict) -> None:
    images, logits = golden.made(case["images"]), golden.made(case["logits"])
    batch, _, height, width = images.shape
    method = _method("box" if "lambda" in case else "three_boxes")
    boxes, partner = case["boxes_top_bottom_left_right"], torch.tensor(case["partner"])
    if "lambda" in case:
        rows, columns = (torch.tensor(case[key]) for key in ("centre_row", "centre_column"))
        with (
            mock.patch.object(mixing, "beta_side", return_value=math.sqrt(1 - case["lambda"])),
            mock.patch("torch.randint", side_effect=[rows, columns]),
            mock.patch("torch.randperm", return_value=partner),
        ):
            pastes = method.draw_pastes(images, None)
        expected = [_boxes(boxes, height, width)]
    else:
        area, aspect, position = (
            torch.tensor(case[key], dtype=torch.float64) for key in ("area", "aspect_draw", "position_draw_column_row")
        )
        draws = torch.cat([(area - 0.25).unsqueeze(2) / 0.25, aspect.unsqueeze(2), position], dim=2)
        with mock.patch("torch.rand", return_value=draws), mock.patch("torch.randint", return_value=partner):
            pastes = method.draw_pastes(images, None)
        expected = [_boxes([boxes[image][box] for image in range(batch)], height, width) for box in range(3)]
    for (_, mask), box in zip(pastes, expected, strict=True):
        assert torch.equal(mask, box)
    method.draw_pastes = lambda images, generator: pastes
    image, pseudo = method.cutmix(images, predict(logits), None)
    golden.assert_recorded(image, case["mixed_images"], 1e-6)
    mixed = _pasted(logits, pastes)
    golden.assert_recorded(mixed, case["mixed_logits"], 1e-6)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(pseudo, predict(mixed)))


def _pasted(logits: Tensor, pastes: list[tuple[Tensor, Tensor]]) -> Tensor:
    result = logits
    for partner, mask in pastes:
        result = mixing.put(result, logits[partner], mask)
    return result


def _decoder(seed: int, channels: int, hidden: int, classes: int, dtype: torch.dtype) -> nn.Sequential:
    decoder = nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
        nn.Conv2d(hidden, classes, 1),
    )  # fmt: skip
    first, norm, _, last = decoder
    with torch.no_grad():
        first.weight.copy_(golden.randn(seed, *first.weight.shape) * math.sqrt(2 / (9 * channels)))
        norm.weight.copy_(1 + 0.1 * golden.randn(seed + 1, hidden))
        norm.bias.copy_(0.1 * golden.randn(seed + 2, hidden))
        norm.running_mean.copy_(0.1 * golden.randn(seed + 3, hidden))
        norm.running_var.copy_(1 + 0.1 * golden.randn(seed + 4, hidden).abs())
        last.weight.copy_(golden.randn(seed + 5, classes, hidden, 1, 1) * math.sqrt(2 / hidden))
        last.bias.copy_(0.1 * golden.randn(seed + 6, classes))
    return decoder.to(dtype)


def _tvat(case: dict) -> None:
    dtype, seed, classes = getattr(torch, case["dtype"]), case["seed"], case["num_classes"]
    shape, size, tolerance = case["features"], case["size"], 1e-6 if case["dtype"] == "float64" else 1e-4
    features = F.leaky_relu(golden.randn(seed, *shape).to(dtype), 0.01).requires_grad_()
    start = golden.rand(case["noise_seed"], *shape).to(dtype) - 0.5
    decoders = [_decoder(seed + 100 * i, shape[1], case["hidden"], classes, dtype) for i in (1, 2, 3)]
    student = decoders.pop()
    to_size = [lambda f, decoder=decoder: resize(decoder.eval()(f), size) for decoder in decoders]
    noise = psmt.adversarial_noise(features, to_size, start, case["xi"], case["eps"])
    golden.assert_recorded(noise, case["r"], tolerance)
    assert noise.flatten(1).norm(dim=1).tolist() == pytest.approx(case["r_norm_by_image"], rel=tolerance)
    assert features.grad is None and all(weight.grad is None for each in decoders for weight in each.parameters())
    logits = resize(student.train()(features + noise), size)
    golden.assert_recorded(logits, case["student_logits"], tolerance)
    loss = F.cross_entropy(logits, golden.randint(case["target_seed"], classes, shape[0], *size))
    assert loss.item() == pytest.approx(case["student_loss"], rel=tolerance)
    loss.backward()
    golden.assert_recorded(features.grad, case["grad_features"], tolerance)
    golden.assert_recorded(student[0].weight.grad, case["grad_first_convolution"], tolerance)
    golden.assert_recorded(student[1].running_mean, case["student_running_mean_after"], tolerance)


def _networks(classes: int, gain: float) -> list[nn.Module]:
    """Student and both teachers."""
    net = {
        "num_classes": classes,
        "encoder": {
            "type": "resnet18",
            "kwargs": {"width": 16, "deep_stem": False, "replace_stride_with_dilation": [False, False, True]},
        },
        "decoder": {"kwargs": {"inner_planes": 256, "low_conv_planes": 48, "dilations": [1, 2, 3]}},
    }
    student = golden.fill(build_model(net), gain=gain)
    networks = [student]
    for salt in ("teacher1:", "teacher2:"):
        teacher = golden.fill(deepcopy(student), salt, gain)
        with torch.no_grad():
            for ours, theirs in zip(teacher.state_dict().values(), student.state_dict().values()):
                if ours.is_floating_point():
                    ours.copy_(0.1 * ours + 0.9 * theirs)
        networks.append(teacher)
    return networks


def _assert_state(network: nn.Module, records: dict, tolerance: float, by_value: float) -> None:
    state = network.state_dict()
    for name, record in records.items():
        if name == "all_parameters_abs_sum":
            found = sum(parameter.double().abs().sum().item() for parameter in network.parameters())
            assert found == pytest.approx(record, rel=tolerance)
        elif isinstance(record, dict):
            magnitude = state[name].double().abs().sum().item()
            assert magnitude == pytest.approx(record["abs_sum"], rel=tolerance), name
            values = state[name].flatten()[record["index"]]
            difference = (values - torch.tensor(record["value"])).abs().max().item()
            assert difference <= by_value * max(map(abs, record["value"])), name


def _teacher_update(case: dict) -> None:
    student, *teachers = _networks(21, 8)
    counts = case["num_batches_tracked_before"]
    for network, key in zip((student, *teachers), ("student", "teacher1", "teacher2")):
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(counts[key])
    method = _method("box", networks=[student, *teachers], ema_decay=case["keep_rate"])
    for iteration in range(case["updates"]):
        method.after_step(Progress(0, 1, iteration, case["updates"], None))
    # Its counter of batches is an average in the release and a copy here; nothing reads it.
    for network, records in ((method.teacher1, case["teacher1"]), (method.teacher2, case["teacher2"])):
        _assert_state(network, records, 1e-6, 1e-6)
    assert method.teacher2.state_dict()["decoder.classifier.1.num_batches_tracked"] == counts["teacher2"]


def _picture(seed: int, batch: int, side: int) -> Tensor:
    coarse = golden.randn(seed, batch, 3, 9, 9)
    return 2 * resize(coarse, (side, side)) + 0.3 * golden.randn(seed + 500, batch, 3, side, side)


def _labels(seed: int, batch: int, side: int, classes: int) -> Tensor:
    cells = -(-side // 16)
    label = torch.stack(
        [
            golden.randint(seed + 10 * b, classes, cells, cells)
            .repeat_interleave(16, 0)
            .repeat_interleave(16, 1)[:side, :side]
            for b in range(batch)
        ]
    )
    return label.masked_fill(golden.rand(seed + 500, batch, side, side) < 0.05, 255)


def _step(case: dict) -> None:
    """Four iterations in two epochs. Rounding grows up to fifty times in each: the same functions in float64 are as far
    from the release's figures as in float32 (up to 1e-4, 2e-3 and 2e-2 in the last three).
    """
    seed, batch, side, per_epoch = case["seed"], case["batch"], case["crop"], case["iterations_per_epoch"]
    networks = _networks(case["num_classes"], case["classifier_gain"])
    vat = VAT(case["xi"] > 0, case["xi"] or 0.1, case["eps"])
    options = {"threshold": case["threshold"], "loss_weight": case["unsupervised_weight"]}
    options |= {"ramp_up": case["ramp_up_epochs"], "ema_decay": case["keep_rate"]}
    method = _method("box", vat, networks, **options).train()
    kwargs = OptimizerKwargs(case["lr"], case["momentum"], case["weight_decay"], "convolutions")
    groups = param_groups(method.trained(), kwargs.decay)
    optimizer = build_optimizer(groups, Optimizer(kwargs, head_lr_times=1.0))
    disturbed = method.disturbed
    for i, figures in enumerate(case["iterations"]):
        tolerance = STEP_TOLERANCE[i]
        weak = _picture(seed + 4000 + i, batch, side)
        strong = 1.2 * weak + 0.2 * golden.randn(seed + 6000 + i, batch, 3, side, side)
        labeled = Labeled(
            weak, _labels(seed + 3000 + i, batch, side, case["num_classes"]), (_picture(seed + 1000 + i, batch, side),)
        )
        boxes, partner = figures["boxes_top_bottom_left_right"], torch.tensor(figures["partner"])
        if partner.dim() == 1:
            pastes = [(partner, _boxes(boxes, side, side))]
        else:
            pastes = [
                (partner[k], _boxes([of_image[k] for of_image in boxes], side, side)) for k in range(len(partner))
            ]
        method.draw_pastes = lambda images, generator, pastes=pastes: pastes
        seeds, logits, ensembles = iter((seed + 700 + 2 * i, seed + 701 + 2 * i)), [], []
        method.draw_noise = lambda f, generator, seeds=seeds: golden.rand(next(seeds), *f.shape) - 0.5

        def noted(images: Tensor, *rest: Any, logits: list = logits, **named: Any) -> tuple[Tensor, Tensor | None]:
            result = disturbed(images, *rest, **named)
            logits.append(resize(result[0].detach(), images.shape[-2:]))
            return result

        def kept(*arguments: Any, ensembles: list = ensembles, ensemble: Any = psmt.ensemble) -> Tensor:
            ensembles.append(ensemble(*arguments))
            return ensembles[-1]

        method.disturbed = noted
        progress = Progress(i // per_epoch, case["epochs"], i, per_epoch, torch.Generator())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(Scheduler(), group["base_lr"], i, case["epochs"] * per_epoch, per_epoch)
            assert group["lr"] == pytest.approx(figures["learning_rate"], rel=1e-12)
        with mock.patch.object(psmt, "ensemble", kept):
            step = method(labeled, Unlabeled(weak, (strong,), torch.ones(1), torch.arange(batch)), progress)
        assert method.loss_weight(progress) == pytest.approx(figures["weight"], rel=1e-9)
        assert step.scalars["loss_lb"].item() == pytest.approx(figures["loss_supervised"], rel=tolerance)
        after_weight = figures["loss_unsupervised_after_weight"]
        assert step.scalars["loss_ub"].item() == pytest.approx(after_weight, rel=tolerance)
        assert step.loss.item() == pytest.approx(figures["total"], rel=tolerance)
        assert step.scalars["pseudo"].item() == pytest.approx(figures["passing_share"], abs=5e-4)
        pairs = [(_pasted(torch.cat(ensembles), pastes), "mixed_ensemble")]
        pairs += zip(logits, ("student_logits_labeled", "student_logits_unlabeled"), strict=True)
        for tensor, key in pairs:
            if i == 0:
                golden.assert_recorded(tensor, figures[key], 1e-4)
            else:
                assert tensor.double().abs().sum().item() == pytest.approx(figures[key]["abs_sum"], rel=tolerance)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        rates = method.after_step(progress)
        assert rates["teacher"] == figures["active_teacher"]
    _assert_state(method.student, case["student_after"], 2e-3, 1e-2)
    for name in ("teacher1", "teacher2"):
        _assert_state(getattr(method, name), case[f"{name}_after"], 1e-4, 1e-4)


_RUN = {
    "loss": _loss,
    "assist": _assist,
    "ramp_up": _ramp_up,
    "learning_rate": _learning_rate,
    "cutmix": _cutmix,
    "tvat": _tvat,
    "teacher_update": _teacher_update,
    "step": _step,
}
