"""U2PL's figures. ``paper`` ones hold in full; of ``release`` ones all that its defects leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn

from imas.build import main_and_auxiliary
from imas.engine.optim import poly_lr
from imas.methods import u2pl
from imas.methods.base import Labeled, Progress, Unlabeled
from imas.methods.u2pl import U2PL, Contrastive, Options, reliable_mean
from imas.models.deeplabv3plus import Decoder, DeepLabV3Plus
from imas.ops import contrast
from imas.ops.losses import cross_entropy, ohem_cross_entropy, pixel_cross_entropy

LOSSES = 1e-5


def cases(content: list[dict]) -> Iterator[tuple[str, dict]]:
    for number, case in enumerate(content):
        for variant in case.get("variants", [None]):
            name = f"{case['kind']}-{number}" + ("" if variant is None else f"-{variant}")
            yield name, case | {"variant": variant}


def count(content: list[dict]) -> int:
    return sum(len(case.get("variants", [None])) for case in content)


def run(case: dict) -> None:
    RUNNERS[case["kind"]](case)


def _close(value: Tensor | float, expected: float) -> None:
    assert float(value) == pytest.approx(expected, rel=LOSSES, abs=1e-12)


def _ignore(label: Tensor, seed: int, share: float) -> Tensor:
    return label.masked_fill(golden.rand(seed, *label.shape) < share, 255) if share else label


def _blocky(seed: int, classes: int, shape: tuple[int, int, int], cell: int) -> Tensor:
    batch, height, width = shape
    cells = golden.randint(seed, classes, batch, -(-height // cell), -(-width // cell))
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width].contiguous()


def _onehot(label: Tensor, classes: int) -> Tensor:
    return (label.unsqueeze(1) == torch.arange(classes).view(1, -1, 1, 1)).float()


class _Tensors(nn.Module):
    """A network that gives these tensors: logits by mode, representations, auxiliary logits."""

    def __init__(self, classes: int, **tensors: Tensor) -> None:
        super().__init__()
        self.num_classes, self.tensors, self.calls, self.seen = classes, tensors, [], None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append([("train" if self.training else "eval"), len(images)])
        self.seen = images
        return images, images, images

    def fuse(self, x1: Tensor, x4: Tensor) -> Tensor:
        return x1

    def classify(self, fused: Tensor) -> Tensor:
        return self.tensors["train" if self.training else "eval"]

    def represent(self, fused: Tensor) -> Tensor:
        return self.tensors["embedding"]

    def auxiliary(self, x3: Tensor) -> Tensor | None:
        return self.tensors.get("aux")

    def coarse(self, images: Tensor, aux: bool = True) -> tuple[Tensor, None]:
        return self.classify(self.encode(images)[0]), None


def _method(case: dict, network: nn.Module | None = None, weight: float = 1.0, **options: Any) -> U2PL:
    """A method whose draws are those of the case."""
    capacity = case.get("capacity", [50_000, 30_000])
    assert set(capacity[1:]) == {capacity[1]}
    contrastive = Contrastive(
        loss_weight=weight, first_capacity=capacity[0], capacity=capacity[1], max_new_keys=None, **options
    )
    thresholds = case.get("ohem")
    criterion = cross_entropy if thresholds is None else partial(ohem_cross_entropy, **thresholds)
    supervised = partial(main_and_auxiliary, criterion, case.get("aux_loss_weight"))
    settings = Options(contrastive=contrastive, ema_decay=case.get("ema_decay", 0.99))
    method = U2PL(settings, lambda: network or nn.Identity(), supervised).train()
    _seed_draws(method, case.get("draw_seed", 0))
    return method


def _seed_draws(method: U2PL, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    method.draw = lambda count, shape, generator: torch.randint(count, shape, generator=drawn)


def _banks(case: dict) -> list[Tensor]:
    return [golden.randn(case["seed"] + 100 + c, size, case["D"]) for c, size in enumerate(case["bank_size_before"])]


def _unsupervised(case: dict) -> None:
    shape, seed = [case[key] for key in ("B", "C", "H", "W")], case["seed"]
    logits = (2 * golden.randn(seed, *shape)).requires_grad_()
    label = _ignore(golden.randint(seed + 1, case["C"], shape[0], *shape[2:]), seed + 2, case["ignored"])
    entropy = contrast.pixel_entropy(golden.randn(seed + 3, *shape) * case["spread"], shape[2:])
    golden.assert_recorded(entropy, case["entropy"], 1e-6)
    valid = label != 255
    limit = contrast.percentiles(entropy, valid, [case["drop_percent"]])
    _close(limit, case["entropy_threshold"])
    kept = valid & (entropy < limit)
    assert [label.numel(), int(valid.sum()), int(kept.sum())] == [case[k] for k in ("pixels", "valid_before", "kept")]
    total = pixel_cross_entropy(logits, label.masked_fill(~kept, 255)).sum()
    loss = reliable_mean(total, kept.sum(), label.numel())
    _close(loss.detach(), case["loss"])
    loss.backward()
    golden.assert_recorded(logits.grad, case["grad"], LOSSES)


def _onehots(case: dict) -> None:
    shape = [case[key] for key in ("B", "H", "W")]
    label = _ignore(golden.randint(case["seed"], case["C"], *shape), case["seed"] + 1, case["ignored"])
    everywhere = torch.ones(shape, dtype=torch.bool)
    probability = torch.rand(shape[0], case["C"], *shape[1:])
    ones = contrast.roles(label, probability, everywhere, everywhere, 0, (1, 2), 0.0, 1.0).positives
    assert ones.sum(1).tolist() == case["mended_ones_per_class"]
    assert ones.view(case["C"], shape[0], -1).sum((0, 2)).tolist() == case["mended_ones_per_image"]


def _bank(case: dict) -> None:
    bank, first = torch.empty(0, 1), 0
    for pushed, content in zip(case["pushes"], case["content_after_each"], strict=True):
        keys = torch.arange(first, first + pushed).view(-1, 1).float()
        bank, first = contrast.push(bank, keys, case["capacity"]), first + pushed
        assert bank.flatten().tolist() == content


def _cutmix(case: dict) -> None:
    seed, batch, size = case["seed"], case["B"], (case["H"], case["W"])
    method = _method(case)
    method.boxes = lambda *shape: torch.tensor(case["boxes"])
    images = golden.randn(seed, batch, 3, *size)
    for key, pixels in (
        ("label", golden.randint(seed + 1, case["C"], batch, *size)),
        ("confidence", golden.rand(seed + 2, batch, *size)),
    ):
        mixed = method.mix(images, pixels, None)
        golden.assert_recorded(mixed[0], case["images"], 1e-6)
        golden.assert_recorded(mixed[1], case[key], 1e-6)


def _contrastive(case: dict) -> None:
    seed, classes, labeled, size = case["seed"], case["C"], case["B_labeled"], (case["h"], case["w"])
    batch = labeled + case["B_unlabeled"]
    drawn = case["classes"]
    parts = [_blocky(first, drawn["K"], (n, *size), 3) for first, n in ((seed, labeled), (seed + 10, batch - labeled))]
    label = (torch.cat(parts) * drawn["stride"] + drawn["offset"]) % classes
    label[:labeled] = _ignore(label[:labeled], seed + 1, case["ignored"])
    logits = golden.randn(seed + 20, batch, classes, *size) * case["logit_spread"]
    probability = (logits + case["logit_boost"] * _onehot(label, classes)).softmax(1)
    given, r = label[:labeled] != 255, golden.rand(seed + 32, batch - labeled, 1, *size)[:, 0]
    low, high = torch.cat([given, r < case["low"]]), torch.cat([given, r > case["high"]])
    _compare_contrastive(case, label, probability, low, high, labeled, Contrastive(**case["options"]))


def _without_draws(case: dict) -> None:
    seed, classes, size = case["seed"], case["C"], (case["h"], case["w"])
    label = torch.full((2, *size), 255)
    for c in range(classes):
        label[0, c % size[0], c // size[0]] = c
    probability = (golden.randn(seed + 20, 2, classes, *size) + 6 * _onehot(label, classes)).softmax(1)
    high = torch.zeros(2, *size, dtype=torch.bool)
    more = {"bank_size_before": [1] * classes, "capacity": [50_000, 30_000]}
    for draw_seed in (0, 1):
        seeded = case | more | {"draw_seed": draw_seed}
        _compare_contrastive(seeded, label, probability, label != 255, high, 1, Contrastive())


def _compare_contrastive(
    case: dict, label: Tensor, probability: Tensor, low: Tensor, high: Tensor, labeled: int, options: Contrastive
) -> None:
    variant, expected = case["variant"], case["variants"][case["variant"]]
    ranks = (options.low_rank, options.high_rank)
    above, below = options.current_class_threshold, options.current_class_negative_threshold
    roles = contrast.roles(label, probability, low, high, labeled, ranks, above, below)
    if "pixels_low_per_class" in case:
        assert roles.positives.sum(1).tolist() == case["pixels_low_per_class"]
        assert roles.anchors.sum(1).tolist() == case["anchors_per_class"]
    if variant != "paper":  # defect 3 of the release
        of_class = label.unsqueeze(0) == torch.arange(case["C"]).view(-1, 1, 1, 1)
        roles = roles._replace(negatives=roles.negatives & of_class.flatten(1))
    assert roles.negatives.sum(1).tolist() == expected["new_keys"]

    method = _method(
        case, num_queries=options.num_queries, num_negatives=options.num_negatives, temperature=options.temperature
    )
    method.banks = _banks(case)
    shape = (len(label), case["D"], case["h"], case["w"])
    student, teacher = golden.randn(case["seed"] + 30, *shape).requires_grad_(), golden.randn(case["seed"] + 31, *shape)
    loss = method.contrast(student, teacher, roles, torch.Generator())
    loss.backward()
    if "bank" in expected:
        assert [len(bank) for bank in method.banks] == expected["bank_size"]
        golden.assert_recorded(torch.cat(method.banks), expected["bank"], 1e-6)
    present = int((roles.positives.sum(1) > 0).sum())
    if variant != "release" or present in (1, case["C"]):  # defect 2: elsewhere the release takes the wrong classes
        _close(loss.detach(), expected["loss"])
        golden.assert_recorded(student.grad, expected["grad"], LOSSES)


def _recorded(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[tuple, Any]]:
    """Arguments and result of each call of a function."""
    seen: list[tuple[tuple, Any]] = []
    original = getattr(module, name)

    def spy(*arguments: Any) -> Any:
        seen.append((arguments, original(*arguments)))
        return seen[-1][1]

    patch.setattr(module, name, spy)
    return seen


def _iteration(case: dict) -> None:
    expected, paper = case["variants"][case["variant"]], case["variant"] == "paper"
    seed, batch, classes = case["seed"], case["B"], case["C"]
    size, small = (case["H"], case["W"]), (case["h"], case["w"])
    image, weak = (golden.randn(seed + i, batch, 3, *size) for i in (1, 2))
    label = _ignore(_blocky(seed + 3, classes, (batch, *size), 6), seed + 4, case["ignored"])
    coarse = _onehot(_blocky(seed + 5, classes, (batch, *small), 3), classes)
    given = _onehot(label, classes)[:, :, ::4, ::4][:, :, : small[0], : small[1]]
    logits = 1.5 * golden.randn(seed + 7, 2 * batch, classes, *small) + case["spread"] * torch.cat([given, coarse])
    teacher = {
        "eval": golden.randn(seed + 6, batch, classes, *small) + case["spread"] * coarse,
        "train": logits,
        "embedding": golden.randn(seed + 11, 2 * batch, case["D"], *small),
    }
    student = {
        "train": golden.randn(seed + 8, 2 * batch, classes, *small).requires_grad_(),
        "embedding": golden.randn(seed + 9, 2 * batch, case["D"], *small).requires_grad_(),
    }
    if case["aux_loss_weight"]:
        student["aux"] = golden.randn(seed + 10, 2 * batch, classes, *small).requires_grad_()
    draws = {"num_queries": case["num_queries"], "num_negatives": case["num_negatives"]}
    method = _method(case, _Tensors(classes, **student), expected["contrastive_weight"], **draws)
    method.teacher, method.banks = _Tensors(classes, **teacher).eval(), _banks(case)
    method.boxes = lambda *shape: torch.tensor(case["boxes"]) if case["cutmix"] else None
    progress = Progress(case["epoch"], case["epochs"], 5, 7, torch.Generator())
    assert method.percents(progress) == pytest.approx((expected["drop_percent"], case["alpha_percent"]))
    unlabeled = Unlabeled(weak, (), torch.ones_like(label, dtype=torch.bool), torch.arange(batch))
    with pytest.MonkeyPatch.context() as patch:
        roles, targets = _recorded(patch, contrast, "roles"), _recorded(patch, u2pl, "pixel_cross_entropy")
        step = method(Labeled(image, label), unlabeled, progress)
    step.loss.backward()
    assert method.teacher.calls == expected["teacher_calls"] and method.student.calls == [["train", 2 * batch]]
    golden.assert_recorded(method.student.seen, expected["student_input"], 1e-6)
    golden.assert_recorded(targets[0][0][1], expected["pseudo_label"], 1e-6)
    (labels, _, low, high, *_), of_pixels = roles[0]
    for mask, name in ((low, "low_mask"), (high, "high_mask")):
        assert mask.sum((1, 2)).tolist() == expected[f"{name}_per_image"]
        golden.assert_recorded(mask.unsqueeze(1), expected[name], 1e-6)
    for name in ("loss_lb", "loss_ub"):
        _close(step.scalars[name], expected[name])
    golden.assert_recorded(student["train"].grad, expected["grad_pred"], LOSSES)
    if "aux" in student:
        golden.assert_recorded(student["aux"].grad, expected["grad_aux"], LOSSES)
    if not paper:  # what is left follows from the release's one-hot labels (defect 1)
        return
    golden.assert_recorded(_onehot(labels, classes), expected["labels_small"], 1e-6)
    assert of_pixels.negatives.sum(1).tolist() == expected["new_keys"]
    _close(step.scalars["loss_contrastive"], expected["loss_contrastive"] * expected["contrastive_weight"])
    _close(step.loss.detach(), expected["total"])
    golden.assert_recorded(student["embedding"].grad, expected["grad_rep"], LOSSES)
    assert [len(bank) for bank in method.banks] == expected["bank_size"]
    golden.assert_recorded(torch.cat(method.banks), expected["bank"], 1e-6)


class _Tiny(nn.Module):
    """A network of the release's names."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = classes
        convolution = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
        self.encoder = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU())
        self.decoder = nn.ModuleDict({"pred": nn.Conv2d(8, classes, 1), "rep": nn.Conv2d(8, width, 1)})

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (self.encoder(images),) * 3

    def fuse(self, x1: Tensor, x4: Tensor) -> Tensor:
        return x1

    def classify(self, fused: Tensor) -> Tensor:
        return self.decoder["pred"](fused)

    def represent(self, fused: Tensor) -> Tensor:
        return self.decoder["rep"](fused)

    def auxiliary(self, x3: Tensor) -> None:
        return None

    def coarse(self, images: Tensor, aux: bool = True) -> tuple[Tensor, None]:
        return self.classify(self.encode(images)[0]), None


def _steps(case: dict) -> None:
    expected, paper = case["variants"][case["variant"]], case["variant"] == "paper"
    seed, batch, classes, side, width = (case[key] for key in ("seed", "B", "C", "S", "D"))
    draws = {"num_queries": case["num_queries"], "num_negatives": case["num_negatives"]}
    network = golden.fill(_Tiny(classes, width))
    method = _method(case, network, expected["contrastive_weight"], **draws)
    salted = golden.fill(_Tiny(classes, width), salt="teacher:").state_dict()
    for name, tensor in method.teacher.state_dict().items():
        if "running" in name:
            tensor.copy_(salted[name])
    student, length = method.student, case["iterations_per_epoch"]
    groups = [
        {"params": student.encoder.parameters(), "base": case["lr"]},
        {"params": student.decoder.parameters(), "base": case["lr"] * case["head_lr_times"]},
    ]
    kwargs = {"momentum": case["momentum"], "weight_decay": case["weight_decay"]}
    optimizer = torch.optim.SGD(groups, lr=case["lr"], **kwargs)
    for figures in expected["iterations"] if paper else expected["iterations"][:1]:
        i = figures["iteration"]
        _seed_draws(method, figures["draw_seed"])
        boxes = figures["cutmix_boxes"]
        method.boxes = lambda *shape, boxes=boxes: torch.tensor(boxes) if boxes else None
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(group["base"], i, case["epochs"] * length, case["power"])
        images, weak = (golden.randn(seed + first + i, batch, 3, side, side) for first in (10, 30))
        label = _blocky(seed + 20 + i, classes, (batch, side, side), 6)
        unlabeled = Unlabeled(weak, (), torch.ones_like(label, dtype=torch.bool), torch.arange(batch))
        progress = Progress(i // length, case["epochs"], i, length, torch.Generator())
        with pytest.MonkeyPatch.context() as patch:
            roles = _recorded(patch, contrast, "roles")
            step = method(Labeled(images, label), unlabeled, progress)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        method.after_step(progress)
        (_, _, low, high, *_), of_pixels = roles[0]
        assert method.percents(progress)[0] == pytest.approx(figures["drop_percent"])
        assert low.sum((1, 2)).tolist() == figures["low_mask_per_image"]
        assert high.sum((1, 2)).tolist() == figures["high_mask_per_image"]
        for name in ("loss_lb", "loss_ub"):
            _close(step.scalars[name], figures[name])
        if not paper:  # from here on its weights are others
            return
        assert of_pixels.negatives.sum(1).tolist() == figures["new_keys"]
        _close(step.scalars["loss_contrastive"], figures["loss_contrastive"] * expected["contrastive_weight"])
        if (i + 1) % length == 0:
            after = expected["after"][i // length]
            for kind, of in (("student", student), ("teacher", method.teacher)):
                for name, record in after[kind].items():
                    golden.assert_recorded(of.state_dict()[name], record, LOSSES)
            assert [len(bank) for bank in method.banks] == after["bank_size"]


class _Head(nn.Module):
    """Only for the names of its tensors."""

    def __init__(self, fused: int) -> None:
        super().__init__()
        self.decoder = Decoder(8, 8, 4, low_conv_planes=fused - 256, embedding=256)


@torch.no_grad()
def _head(case: dict) -> None:
    module = golden.fill(_Head(case["in"])).eval()
    state = {name: list(tensor.shape) for name, tensor in module.state_dict().items() if "representation" in name}
    assert state == case["state"]
    fused = golden.randn(case["seed"], case["B"], case["in"], case["h"], case["w"])
    output = DeepLabV3Plus.represent(module, fused)
    golden.assert_recorded(output, case["output"], LOSSES)


def _schedule(case: dict) -> None:
    for row in case["rows"]:
        percents = _method({}).percents(Progress(row["epoch"], case["epochs"], 0, 1, torch.Generator()))
        assert percents == pytest.approx((row["drop_percent"], row["alpha_percent"]))


RUNNERS: dict[str, Callable[[dict], None]] = {
    "unsupervised": _unsupervised,
    "onehot": _onehots,
    "bank": _bank,
    "cutmix": _cutmix,
    "contrastive": _contrastive,
    "contrastive_without_draws": _without_draws,
    "iteration": _iteration,
    "steps": _steps,
    "representation_head": _head,
    "schedule": _schedule,
}
