"""ST and ST++: reliability and selection, pseudo labels, rates and kept networks, lists, cutout, augmentation, loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import golden
import numpy as np
import torch
from conftest import ROOT
from golden import randint, randn
from PIL import Image
from torch import Tensor, nn

from imas import load_config
from imas.build import build_model
from imas.data.loaders import EpochSampler
from imas.data.strong import KINDS, cutout, cutout_box
from imas.data.weak import Geometry, resized_size, weak_view
from imas.engine.fit import _note_results
from imas.engine.optim import build_optimizer, learning_rate
from imas.methods.base import Labeled, Progress, Unlabeled
from imas.methods.stpp import (
    STPP,
    Options,
    checkpoint_epochs,
    first_length,
    mixed_config,
    mixed_length,
    mutual_miou,
    reliability,
    select,
    summed_probabilities,
    supervised_config,
)
from imas.ops.losses import cross_entropy
from imas.ops.metrics import ConfusionMatrix
from imas.ops.resize import resize
from imas.schema import Optimizer, OptimizerKwargs, Scheduler, StrongAug

TTA = Options().scales


def cases(content: dict) -> Iterator[tuple[str, dict]]:
    """Each case with its kind; ``augmentation`` is one."""
    for kind in RUNNERS:
        listed = content[kind] if isinstance(content[kind], list) else [content[kind]]
        for number, case in enumerate(listed):
            yield f"{kind}-{number}", case | {"kind": kind}


def count(content: dict) -> int:
    return sum(len(value) if isinstance(value, list) else 1 for value in content.values())


def run(case: dict) -> None:
    RUNNERS[case["kind"]](case)


def blocks(seed: int, palette: Sequence[int], height: int, width: int, side: int) -> Tensor:
    cells = randint(seed, len(palette), -(-height // side), -(-width // side))
    whole = cells.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return torch.tensor(palette)[whole[:height, :width]]


def noisy(base: Tensor, seed: int, palette: Sequence[int], probability: float) -> Tensor:
    other = torch.tensor(palette)[randint(seed + 1, len(palette), *base.shape)]
    return torch.where(golden.rand(seed, *base.shape) < probability, other, base)


def _maps(case: dict, seed: int, last: Sequence[int], early: Sequence[int], middle: Sequence[int]) -> list[Tensor]:
    third = blocks(seed, last, *case["size"], case["side"])
    first = noisy(third, seed + 10, early, case["noise_early"])
    return [first, noisy(third, seed + 20, middle, case["noise_middle"]), third]


def run_reliability(case: dict) -> None:
    palettes = [case[f"palette_{which}"] for which in ("last", "early", "middle")]
    maps, classes = _maps(case, case["seed"], *palettes), case["num_classes"]
    found = [mutual_miou(each, maps[2], classes) for each in maps[:2]]
    np.testing.assert_allclose(found, case["miou"], rtol=1e-14)
    assert found == [mutual_miou(maps[2], each, classes) for each in maps[:2]]  # symmetric
    np.testing.assert_allclose(reliability(maps, classes), case["reliability"], rtol=1e-14)


def run_selection(case: dict) -> None:
    scores = {}
    for number in range(case["images"]):
        seed = case["seed"] + 100 * case["same_maps_as"].get(str(number), number)
        maps = _maps(case, seed, *[case["palette"]] * 3)
        scores[f"image{number:02d}"] = reliability(maps, case["num_classes"])
    np.testing.assert_allclose(list(scores.values()), case["reliability"], rtol=1e-14)
    assert select(scores, Options().reliable_share) == (case["reliable"], case["unreliable"])


class Centred(nn.Module):
    """The logits of the golden labels: 3·(z − mean of z over rows and columns)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        logits = self.network(images)[0]
        return 3 * (logits - logits.mean(dim=(2, 3), keepdim=True)), None


@torch.no_grad()
def run_pseudo_label(case: dict) -> None:
    net = {
        "num_classes": case["num_classes"],
        "encoder": {
            "type": "resnet18",
            "kwargs": {"width": 16, "deep_stem": False, "replace_stride_with_dilation": [False, False, True]},
        },
        "decoder": {"kwargs": {"inner_planes": 32, "low_conv_planes": 16, "dilations": [1, 2, 3]}},
    }
    network = Centred(golden.fill(build_model(net), gain=1.0)).eval()
    sizes: list[list[int]] = []
    network.register_forward_pre_hook(lambda module, images: sizes.append(list(images[0].shape[-2:])))
    image = golden.made(case["image"], resize=resize)
    total = summed_probabilities(network, image, TTA)
    assert sizes == [size for size in case["scaled_sizes"] for _ in range(2)]
    golden.assert_recorded(total, case["summed_softmax"], 1e-5)
    highest = total.topk(2, dim=1).values[0]
    sure = highest[0] - highest[1] >= 1e-4
    label, unsure = total.argmax(dim=1)[0], case["pixels_with_margin_below_1e-4"]
    assert abs(int((~sure).sum()) - unsure) <= max(3, unsure // 4)
    counts = torch.bincount(label.flatten(), minlength=case["num_classes"])
    assert (counts - torch.tensor(case["label_counts"])).abs().sum() <= 2 * unsure
    at = torch.tensor(case["label"]["index"])
    right = label.flatten()[at] == torch.tensor(case["label"]["value"])
    assert right[sure.flatten()[at]].all()
    plain = summed_probabilities(network, image, [1.0]).argmax(dim=1)  # one scale, mirrored as well
    assert (plain != label).sum() > 0


def run_training(case: dict) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    groups = [{"name": part, "part": part, "params": [parameter]} for part in ("encoder", "heads")]
    options = Optimizer(OptimizerKwargs(case["lr"], weight_decay=1e-4), head_lr_times=10.0)
    groups[1]["params"] = [nn.Parameter(torch.zeros(1))]
    encoder, heads = build_optimizer(groups, options).param_groups
    length = case["iterations_per_epoch"]
    for group, rates in ((encoder, case["encoder_lr"]), (heads, case["head_lr"])):
        assert len(rates) == case["epochs"] * length
        found = [learning_rate(Scheduler(), group["base_lr"], i, len(rates), length) for i in range(len(rates))]
        np.testing.assert_allclose(found, rates, rtol=1e-12)
    assert checkpoint_epochs(case["epochs"]) == case["checkpoints_after_epoch"]

    meter, run_log = SimpleNamespace(class_names=("nothing", "something")), SimpleNamespace(scalars=lambda *_: None)
    run, best = SimpleNamespace(best=None, meter=meter, epoch=0, data=range(length)), None
    for epoch, right in enumerate(case["pixels_right_of_100_by_epoch"]):
        matrix = ConfusionMatrix(2)
        matrix.update((torch.arange(100) >= right).long(), torch.zeros(100, dtype=torch.int64))
        if _note_results(run, run_log, {"student": matrix}, epoch)[1]:
            best = epoch + 1
    assert best == case["best_after_epoch"]


def run_lists(case: dict) -> None:
    labeled, unlabeled = case["labeled"], case["unlabeled"]
    names = [str(number) for number in range(unlabeled)]
    halves = [len(half) for half in select(dict.fromkeys(names, 0.0), Options().reliable_share)]
    assert halves == [case["reliable"], case["unreliable"]]
    lengths = [first_length(labeled), mixed_length(labeled, halves[0]), mixed_length(labeled, unlabeled)]
    assert lengths == [case["images_first"], case["images_second"], case["images_third"]]
    recipe = load_config(ROOT / "exps/pascal_stpp/config.yaml")  # 2 GPUs × (4 + 4) images
    configs = [supervised_config(recipe, labeled, 2)]
    configs += [mixed_config(recipe, labeled, images, 2, None) for images in (halves[0], unlabeled)]
    iterations = []
    for images, config in zip((labeled, halves[0], unlabeled), configs):
        train = config.dataset.train
        samplers = [
            EpochSampler(list(range(count)), train.epoch_size, train.batch_size, 0, "labeled", 0, 2, False)
            for count in (labeled, images)
        ]
        assert len(samplers[0]) == len(samplers[1])
        iterations.append(len(samplers[0]))
    assert iterations == case["iterations_per_epoch_at_batch_16"]


class Replayed:
    """NumPy's old generator with the words of the new one; notes every draw."""

    def __init__(self, seed: int) -> None:
        self.state, self.draws = np.random.RandomState(seed), []

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        drawn = self.state.uniform(low, high, size)
        if size is None:
            self.draws.append(drawn)
        return drawn

    def integers(self, high: int) -> int:
        self.draws.append(self.state.randint(0, high))
        return self.draws[-1]


def run_cutout(case: dict) -> None:
    seed = int(re.search(r"randint\((\d+), 256", case["image"]).group(1))
    before = randint(seed, 256, *case["size"], 3).numpy().astype(np.uint8)
    rng = Replayed(case["numpy_seed"])
    image, label = cutout(Image.fromarray(before), Image.new("L", before.shape[1::-1]), 255, rng)
    expected = [each[name] for each in case["tries"] for name in ("area", "aspect", "left", "top")]
    np.testing.assert_allclose(rng.draws, expected, rtol=1e-12)
    top, bottom, left, right = case["box_top_bottom_left_right"]
    after, inside = np.asarray(image), np.zeros(case["size"], bool)
    inside[top:bottom, left:right] = True
    assert int(after.sum(dtype=np.int64)) == case["image_sum"]
    assert (after[~inside] == before[~inside]).all() == case["outside_unchanged"]
    assert (np.asarray(label)[inside] == 255).all() and (np.asarray(label) == 255).sum() == case["mask_255_pixels"]


def run_cutout_statistics(case: dict) -> None:
    (height, width), rng = case["size"], np.random.default_rng(0)
    top, bottom, left, right = np.array([cutout_box(height, width, rng) for _ in range(case["draws"])]).T
    covered = (bottom - top) * (right - left) / (height * width)
    assert abs(covered.mean() / case["covered_mean"] - 1) < 0.03
    np.testing.assert_allclose(np.quantile(covered, [0.1, 0.5, 0.9]), case["covered_quantiles_10_50_90"], rtol=0.08)
    assert abs((bottom - top > right - left).mean() - case["taller_than_wide"]) < 0.03
    assert abs(((top + bottom) / 2 / height).mean() - case["centre_row_mean"]) < 0.03


class Scripted:
    """A generator whose ``random`` is given, that notes the ranges of all other draws, and gives their middle."""

    def __init__(self, *given: float) -> None:
        self.given, self.ranges = list(given), []

    def random(self) -> float:
        return self.given.pop(0)

    def uniform(self, low: float, high: float) -> float:
        self.ranges.append([low, high])
        return (low + high) / 2

    def integers(self, low: int, high: int) -> int:
        self.ranges.append([low, high - 1])
        return low

    def permutation(self, words: list[str]) -> list[str]:
        self.order = list(words)
        return self.order


def _jittered(*given: float) -> Scripted:
    rng = Scripted(*given)
    KINDS["jitter"](Image.fromarray(randint(1, 256, 8, 8, 3).numpy().astype(np.uint8)), StrongAug(), rng)
    return rng


def run_augmentation(case: dict) -> None:
    jitter, grey, blur = case["colour_jitter"], case["grayscale_probability"], case["blur"]
    assert case["order"][3:7] == ["colour jitter", "grayscale", "blur", "cutout"]
    rng = _jittered(jitter["probability"] - 1e-6, 1.0, blur["probability"] - 1e-6)
    assert sorted(rng.order) == ["brightness", "contrast", "hue", "saturation"]
    assert dict(zip(rng.order, rng.ranges)) == {name: jitter[name] for name in rng.order}
    assert rng.ranges[4:] == [blur["sigma"]]
    assert _jittered(jitter["probability"], 1.0, blur["probability"]).ranges == []
    picture = Image.fromarray(randint(1, 256, 8, 8, 3).numpy().astype(np.uint8))
    for chance, is_grey in ((grey - 1e-6, True), (grey, False)):
        pixels = np.asarray(KINDS["jitter"](picture, StrongAug(), Scripted(1.0, chance, 1.0)))
        assert (pixels == pixels[..., :1]).all() == is_grey

    for name in ("pascal", "cityscapes"):
        train, rng = load_config(ROOT / f"exps/{name}_stpp/config.yaml").dataset.train, Scripted()
        resized_size(500, 300, train.resize_base_size, train.rand_resize, rng)
        assert rng.ranges == [case["resize_long_side"][name]]
        assert train.crop.size == (case["crop"][name],) * 2 and train.flip and case["flip_probability"] == 0.5
        assert train.strong_aug.type == "jitter" and train.strong_aug.cutout
    padded = weak_view(
        Image.new("RGB", (4, 4)), Image.new("L", (4, 4)), np.random.default_rng(0), Geometry(crop=(6, 6))
    )[1]
    assert case["pad"]["label"] == 255 and case["pad"]["sides"] == "right and bottom"  # images: our mean colour
    assert (np.asarray(padded)[:4, :4] == 0).all() and (np.asarray(padded) == 255).sum() == 20

    rng = Replayed(3)
    while len(rng.draws) < 2000:
        cutout_box(100, 100, rng)
    (low, high), (narrow, tall) = case["cutout"]["area"], case["cutout"]["aspect"]
    areas, aspects = np.array(rng.draws[0::4]), np.array(rng.draws[1::4])
    assert low <= areas.min() < low + 0.02 and high - 0.02 < areas.max() <= high
    assert narrow <= aspects.min() < narrow + 0.1 and tall - 0.1 < aspects.max() <= tall


class Given(nn.Module):
    """A network that gives these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.num_classes = logits, logits.shape[1]

    def coarse(self, images: Tensor, aux: bool = True) -> tuple[Tensor, None]:
        assert len(images) == len(self.logits)
        return self.logits, None


def run_loss(case: dict) -> None:
    """One labeled image, the others with pseudo labels: one mean over the valid pixels of all."""
    logits = golden.made(case["logits"]).requires_grad_()
    recipe, *changes = case["target"].split("; ")
    target = golden.made(recipe)
    for change in changes:
        exec(f"target{change.removesuffix(' = 255')} = 255", {"target": target})
    images = randn(0, *target.shape[:1], 3, *target.shape[1:])
    method = STPP(Options(), lambda: Given(logits), lambda coarse, aux, label: cross_entropy(coarse, label))
    labeled = Labeled(images[:1], target[:1])
    unlabeled = Unlabeled(images[1:], (images[1:],), torch.ones(()), torch.arange(len(images) - 1), target[1:])
    step = method(labeled, unlabeled, Progress(0, 1, 0, 1, torch.Generator()))
    step.loss.backward()
    np.testing.assert_allclose(step.loss.item(), case["loss"], rtol=1e-6)
    golden.assert_recorded(logits.grad, case["grad"], 1e-5)


RUNNERS = {name.removeprefix("run_"): function for name, function in list(globals().items()) if name.startswith("run_")}
