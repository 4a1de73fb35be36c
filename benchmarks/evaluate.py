"""How fast images are evaluated, and in how much memory: our sliding windows against a plain twin.

    python -m benchmarks.evaluate                                       # Cityscapes' shape on CUDA, Pascal's on a CPU
    python -m benchmarks.evaluate --case large --rounds 3 --json out.json

The plain twin sums the windows' softmax over the whole map, takes the argmax of it, and counts by NumPy's histogram on
the CPU, one each for intersection, prediction and truth. Both have the same network with random weights (ours in
``channels_last``, as runs have it) and the same random images, take turns in every round, and must count the same in
every one, but for one pixel in 100,000 that rounding may turn. ``network`` is the time of the windows' forward passes
alone; ``counting`` that of counting alone, on the same label maps. On a CPU all times are processor time, since other
programs on the machine disturb that less.

Memory is the peak for one image, with network and image, each way in a process of its own: on CUDA what PyTorch has
allocated, on a CPU what is resident beyond the libraries.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imas import build_model
from imas.engine.evaluate import evaluate
from imas.engine.sliding import Predictor, Protocol
from imas.ops.metrics import ConfusionMatrix

from .figures import in_words, resident_peak, spread


class Case(NamedTuple):
    """What is evaluated."""

    encoder: str
    width: int
    classes: int
    size: tuple[int, int]  # of the images: height, width
    window: int
    images: int


CASES = {
    "tiny": Case("resnet18", 16, 4, (256, 256), 97, 4),
    "pascal": Case("resnet50", 64, 21, (375, 500), 513, 1),
    "cityscapes": Case("resnet50", 64, 19, (1024, 2048), 769, 1),
    "large": Case("resnet18", 8, 19, (4000, 6000), 769, 1),
}
_IGNORE = 255


def network_of(case: Case, way: str, device: torch.device) -> nn.Module:
    """Random weights, output stride 16."""
    torch.manual_seed(0)
    kwargs = {"width": case.width, "replace_stride_with_dilation": [False, False, True]}
    planes = {"inner_planes": 4 * case.width, "low_conv_planes": 48}
    net = {"num_classes": case.classes, "encoder": {"type": case.encoder, "kwargs": kwargs}}
    layout = torch.channels_last if way == "ours" else torch.contiguous_format
    return build_model(net | {"decoder": {"kwargs": planes}}).eval().to(device, memory_format=layout)


def samples_of(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Coarse random images (3, H, W) uint8 with coarse random labels (H, W) int64, some of them ignored."""
    rng = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(case.images):
        coarse = torch.rand(1, 3, 9, 9, generator=rng) * 255
        labels = torch.randint(0, case.classes + 1, (1, 1, 17, 17), generator=rng).float()
        labels = F.interpolate(labels, case.size)[0, 0].long()
        image = F.interpolate(coarse, case.size, mode="bilinear")[0].byte()
        samples.append((image, labels.masked_fill_(labels == case.classes, _IGNORE)))
    return samples


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 → float32 around 0."""
    return images.float().div_(128).sub_(1)


def ours(case: Case, network: nn.Module, samples: list, device: torch.device) -> np.ndarray:
    """(3, C): intersection, prediction and truth."""
    options = {"num_classes": case.classes, "ignore_index": _IGNORE}
    predictor = Predictor(Protocol(case.window), device)
    counts = evaluate({"student": network}, [[sample] for sample in samples], normalise, predictor, **options)
    return table(counts["student"])


def table(matrix: ConfusionMatrix) -> np.ndarray:
    """(3, C): intersection, prediction and truth."""
    return torch.stack([matrix.intersection, matrix.counts.sum(0), matrix.target]).cpu().numpy()


@torch.no_grad()
def twin(case: Case, network: nn.Module, samples: list, device: torch.device) -> np.ndarray:
    """(3, C): intersection, prediction and truth, in plain steps."""
    counts = np.zeros((3, case.classes), np.int64)
    for image, target in samples:
        images = normalise(image.unsqueeze(0).to(device))
        total = torch.zeros(1, case.classes, *case.size, device=device)
        for window in windows(case):
            total[window] += network(images[window])[0].softmax(dim=1)
        counts += histograms(total.argmax(dim=1)[0], target, case.classes)
    return counts


WAYS = {"ours": ours, "plain twin": twin}


@torch.no_grad()
def alone(case: Case, network: nn.Module, samples: list, device: torch.device) -> None:
    """The forward passes, and nothing of what they give."""
    for image, _ in samples:
        images = normalise(image.unsqueeze(0).to(device))
        for window in windows(case):
            network(images[window])
    if device.type == "cuda":
        torch.cuda.synchronize()


def windows(case: Case) -> list[tuple]:
    """Indices of the windows of an image, in the order of the spec."""
    stride = int(case.window * 2 / 3)
    starts = [range(0, side, stride) for side in case.size]
    return [
        (..., slice(top, top + case.window), slice(left, left + case.window)) for top in starts[0] for left in starts[1]
    ]


def histograms(prediction: Tensor, target: Tensor, classes: int) -> np.ndarray:
    """(3, C) by NumPy on the CPU."""
    predicted, true = prediction.cpu().numpy(), target.cpu().numpy()
    predicted = np.where(true == _IGNORE, _IGNORE, predicted)
    edges = np.arange(classes + 1)  # 255 lies beyond the last
    parts = (predicted[predicted == true], predicted, true)
    return np.stack([np.histogram(part[part != _IGNORE], edges)[0] for part in parts])


def counting(case: Case, samples: list, device: torch.device) -> tuple[Callable, Callable]:
    """Ours and the twin's counting of the same predicted label maps, which lie on the device."""
    pairs = [((label.roll(7, 1) % case.classes).byte().to(device), label) for _, label in samples]

    def matrix() -> np.ndarray:
        counts = ConfusionMatrix(case.classes, _IGNORE, device)
        for prediction, target in pairs:
            counts.update(prediction, target.to(device))
        return table(counts)

    return matrix, lambda: sum(histograms(*pair, case.classes) for pair in pairs)


def timed(device: torch.device, function: Callable, *arguments) -> tuple[float, object]:
    """Seconds, and what came."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    result = function(*arguments)
    return clock() - start, result


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by part.

    Raises:
        RuntimeError: ours and the twin count differently.
    """
    samples, parts = samples_of(case), {}
    for (way, function), count in zip(WAYS.items(), counting(case, samples, device)):
        whole = (case, network_of(case, way, device), samples, device)
        parts |= {way: (function, *whole), f"network, {way}": (alone, *whole), f"counting, {way}": (count,)}
    seconds: dict[str, list[float]] = {part: [] for part in parts}
    for number in range(rounds + 1):
        results = {}
        for part in list(parts)[:: 1 if number % 2 else -1]:  # so that none always comes first
            taken, results[part] = timed(device, *parts[part])
            if number:  # the first warms up
                seconds[part].append(taken)
        for prefix in ("", "counting, "):
            mine, plain = (results[f"{prefix}{way}"] for way in WAYS)
            differ, pixels = np.abs(mine - plain).max(), plain[2].sum()
            if differ > (0 if prefix else 1e-5 * pixels):
                raise RuntimeError(f"{prefix}ours and the plain twin differ by {differ} of {pixels} pixels")
    return seconds


def peak_of(name: str, way: str, device: torch.device) -> float:
    """MiB that an evaluation needs, in a process of its own."""
    case, before = CASES[name], resident_peak()
    WAYS[way](case, network_of(case, way, device), samples_of(case)[:1], device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resident_peak() - before) / 2**20


def report(case: Case, seconds: dict[str, list[float]], peaks: dict[str, float]) -> tuple[dict, dict]:
    """Print the table. Returns ratios (twin divided by ours) and figures."""
    figures = {
        part: {"ms": 1000 * statistics.median(values) / case.images, "rounds": len(values)}
        for part, values in seconds.items()
    }
    ratios, spreads = {}, {}
    for name, prefix in (("evaluate", ""), ("counting", "counting, ")):
        ratio = spread(seconds[f"{prefix}plain twin"], seconds[f"{prefix}ours"])
        ratios[name], spreads[name] = ratio["median"], in_words(ratio)
        figures[f"{prefix}ours"] |= {"ratio_min": ratio["min"], "ratio_max": ratio["max"]}
    ratios["peak_memory"] = peaks["plain twin"] / peaks["ours"]
    print("| | ms an image | of that beyond the network | counting, ms | peak memory, MiB |\n|---|---|---|---|---|")
    for way in reversed(WAYS):
        whole, count = figures[way]["ms"], figures[f"counting, {way}"]["ms"]
        beyond = whole - figures[f"network, {way}"]["ms"]
        print(f"| {way} | {whole:.1f} | {beyond:.1f} | {count:.1f} | {peaks[way]:.0f} |")
    print(
        f"| ratio, median (min..max) | {spreads['evaluate']} | | {spreads['counting']} | {ratios['peak_memory']:.2f} |"
    )
    return ratios, figures | {"peak_mib": peaks}


def main() -> None:
    """Measure one case, print its table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="default: cityscapes on CUDA, pascal on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # as runs have it
    name = options.case or ("cityscapes" if cuda else "pascal")
    case = CASES[name]
    where = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}"
    machine = f"{where}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    height, width = case.size
    print(f"{date.today()}, {machine}")
    print(f"{name}: {case.encoder}, {case.images} image(s) of {height}×{width}, {Protocol(case.window)}", flush=True)
    seconds = measure(case, device, options.rounds)
    peaks = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[way] = pool.apply(peak_of, (name, way, device))
    ratios, figures = report(case, seconds, peaks)
    if options.json:
        content = {"ratio": ratios, "date": str(date.today()), "machine": machine, "case": name, "figures": figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
