"""A whole training step, ours against a plain twin: same weights, inputs and draws, in alternation.

    python -m benchmarks.step                                         # tiny on a CPU, Cityscapes R50 on a GPU
    python -m benchmarks.step --recipe cityscapes_r101 --json out.json
    python -m benchmarks.step --way "trainer.amp=bf16 trainer.compile=true"     # one more way, with these options

CutMix always fires, so the largest step is measured. Before every repetition all ways return to the same weights, and
what they give (losses, scores, weights) is compared with the twin's. Apart from the step, score and losses are measured
at the size of Cityscapes crops, from coarse logits as a step calls them, and the memory of each way in a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imas.methods import imas as method_file
from imas.ops.hardness import score_predictions
from imas.ops.losses import consistency_loss, ohem_cross_entropy
from imas.ops.pseudo import predict
from imas.ops.resize import resize

from . import plain_step
from .clock import Clock
from .figures import in_words, resident_peak, spread
from .ways import FAITHFUL, PARTS, RECIPES, ROOT, TWIN, Way, make_batch, recipe_config

TOLERANCE = 1e-4


def difference(way: Way, result: plain_step.Losses, twin: Way, expected: plain_step.Losses) -> dict[str, float]:
    """How far a way is from the twin after the same step: losses (relative where above 1), scores, updates by norm."""
    found = {}
    for name in ("loss_lb", "loss_ub"):
        ours, theirs = getattr(result, name).item(), getattr(expected, name).item()
        found[name] = abs(ours - theirs) / max(1.0, abs(theirs))
    found["score"] = (result.score - expected.score).abs().max().item()
    moved = apart = 0.0
    for key, before in twin.start["student"].items():
        if before.is_floating_point():
            ours, theirs = (each.networks["student"].state_dict()[key] for each in (way, twin))
            moved += (theirs - before).pow(2).sum().item()
            apart += (ours - theirs).pow(2).sum().item()
    return found | {"update": (apart / moved) ** 0.5}


def compare(ways: list[Way], repeats: int) -> tuple[dict[str, list[Counter]], dict[str, Counter], dict[str, dict]]:
    """Steps in alternation.

    Returns:
        Seconds of every repetition by way, seconds by part (medians) by way, and the difference from the twin by way.
    """
    twin = ways[0]
    times, detailed = {way.name: [] for way in ways}, {way.name: [] for way in ways}
    differences = {}
    for way in ways:
        for _ in range(2):
            way.run(False)
    _, expected = twin.run(False)
    for way in ways[1:]:
        differences[way.name] = difference(way, way.run(False)[1], twin, expected)
    for repeat in range(repeats):
        for way in ways[:: 1 if repeat % 2 else -1]:  # so that none always comes first
            times[way.name].append(way.run(False)[0])
            if repeat < max(3, repeats // 3):
                detailed[way.name].append(way.run(True)[0])
    parts = {
        name: Counter({part: statistics.median(one[part] for one in rounds) for part in (*PARTS, "all")})
        for name, rounds in detailed.items()
    }
    return times, parts, differences


def compare_ops(device: torch.device, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Score, OHEM and consistency loss of 4 crops of 769² in 19 classes, the losses forward and backward, all from
    coarse logits: seconds by operation and way.
    """
    generator = torch.Generator().manual_seed(2)
    size, classes, threshold = (769, 769), 19, 0.7
    smooth = 4 * torch.randn(4, classes, 25, 25, generator=generator)
    student = resize(smooth, (193, 193))
    teacher = (student + torch.randn(student.shape, generator=generator)).to(device)
    student = student.to(device)
    sure, noise = predict(smooth.to(device), size), torch.rand(4, *size, generator=generator).to(device)
    labels = torch.where(noise < 0.8, sure.label, 0)
    labels[:, :40] = 255

    def plain_score() -> Tensor:
        return plain_step.plain_score(resize(student, size), resize(teacher, size), threshold, classes)

    def score() -> Tensor:
        return score_predictions(predict(student, size), predict(teacher, size), classes, threshold).score

    def with_gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        logits = teacher.detach().requires_grad_()
        value = loss(logits)
        value.backward()
        return torch.stack([value.detach(), logits.grad.abs().sum()])

    weak, weights = (sure.label, sure.confidence, threshold), torch.rand(4, generator=generator).to(device)
    losses: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "ohem": (
            lambda z: plain_step.plain_ohem(resize(z, size), labels, 0.7, 100_000),
            lambda z: ohem_cross_entropy(z, labels, 0.7, 100_000),
        ),
        "consistency": (
            lambda z: plain_step.consistency(resize(z, size), *weak, weights),
            lambda z: consistency_loss(z, *weak, weights),
        ),
    }
    ops = {"score": (plain_score, score)}
    ops |= {name: tuple(partial(with_gradient, way) for way in both) for name, both in losses.items()}
    clock = Clock(device)
    seconds: dict[str, dict[str, list[float]]] = {name: {TWIN: [], FAITHFUL: []} for name in ops}
    for name, (plain, ours) in ops.items():
        torch.testing.assert_close(ours(), plain(), atol=1e-6, rtol=TOLERANCE)
        for repeat in range(repeats):
            for way, function in [(TWIN, plain), (FAITHFUL, ours)][:: 1 if repeat % 2 else -1]:
                seconds[name][way].append(clock.measure(function, False)[0]["all"])
    return seconds


def peak_memory(words: list[str], name: str) -> int:
    """Bytes that a way holds at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", *words, "--peak-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return int(done.stdout.split()[-1])


def print_peak(way: Callable[[], Way], device: torch.device) -> None:
    """What ``peak_memory`` reads: on a GPU the allocator's peak, on a CPU the growth of the process in three steps."""
    if device.type == "cpu":
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    one = way()
    for _ in range(3):
        one.run(False)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        print(resident_peak() - before)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large matrix products: the device's peak, as measured."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    clock = Clock(device)
    seconds = min(clock.measure(lambda: a @ a, False)[0]["all"] for _ in range(20))
    return 2 * 8192**3 / seconds


def report_steps(batch: int, times: dict[str, list[float]], parts: dict[str, Counter], peaks: dict[str, int]) -> None:
    """The tables of the step: by way, and by part. ``batch``: labeled images, and as many unlabeled ones."""
    print("\n| way | ms a step, median (min..max) | images/s | twin / way, median (min..max) | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(
            f"| {name} | {1e3 * middle:.0f} ({1e3 * min(seconds):.0f}..{1e3 * max(seconds):.0f}) "
            f"| {2 * batch / middle:.2f} | {in_words(spread(times[TWIN], seconds))} "
            f"| {peaks[name] / 2**20:,.0f} |"
        )
    print(f"\nms by part, medians\n| way | {' | '.join(PARTS)} |\n|---|{'---|' * len(PARTS)}")
    for name, row in parts.items():
        print(f"| {name} | {' | '.join(f'{1e3 * row[part]:.1f}' for part in PARTS)} |")


def report_ops(ops: dict[str, dict[str, list[float]]]) -> None:
    """The table of the single operations."""
    print("\n(4, 19, 193, 193) logits of crops of 769², ms, medians")
    print("| | plain twin | ours | ratio, median (min..max) |\n|---|---|---|---|")
    for name, seconds in ops.items():
        plain, ours = (1e3 * statistics.median(seconds[way]) for way in (TWIN, FAITHFUL))
        print(f"| {name} | {plain:.1f} | {ours:.1f} | {in_words(spread(seconds[TWIN], seconds[FAITHFUL]))} |")


def report_device(flops: int, times: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """FLOPs of a step, and what share of the device's peak, that of a matrix product, the ways reach."""
    print(f"\n{flops / 1e12:.3f} TFLOP a step in convolutions (torch.utils.flop_counter, CutMix fired)")
    if device.type != "cuda":
        return {"flops": flops}
    peaks = {name: matmul_peak(device, dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    print(", ".join(f"{name} matrix product {peak / 1e12:.0f} TFLOP/s" for name, peak in peaks.items()))
    shares = {name: flops / statistics.median(seconds) / peaks["bf16"] for name, seconds in times.items()}
    print(", ".join(f"{name}: {100 * share:.1f} % of the bf16 peak" for name, share in shares.items()))
    return {"flops": flops, "peak_flops": peaks, "share_of_bf16_peak": shares}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, help="default: cityscapes_r50 on a GPU, tiny without")
    parser.add_argument(
        "--way",
        action="append",
        help="options of one more way; default on a GPU: trainer.amp=bf16 with and without compile",
    )
    parser.add_argument("--repeats", type=int, default=9, help="of every measurement (default 9)")
    parser.add_argument("--threads", type=int, help="of a CPU; default: PyTorch's")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # in a process of its own: see peak_memory
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    options.recipe = options.recipe or ("cityscapes_r50" if on_gpu else "tiny")
    if options.way is None:
        options.way = ["trainer.amp=bf16", "trainer.amp=bf16 trainer.compile=true"] if on_gpu else []
    options.threads = options.threads or torch.get_num_threads()
    return options


def main() -> None:
    """Measure, print the tables, write them as JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device)
    clock.put_around(method_file, logged_shares="logged shares", score_predictions="score")
    config = recipe_config(options.recipe, [])
    batch = make_batch(config)
    make = {TWIN: lambda: Way(TWIN, config, batch, device, clock)}
    make[FAITHFUL] = lambda: Way(FAITHFUL, config, batch, device, clock)
    for words in options.way:
        make[words] = partial(Way, words, recipe_config(options.recipe, words.split()), batch, device, clock)
    if options.peak_of:
        print_peak(make[options.peak_of], device)
        return

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {options.threads} thread(s)"
    load = os.getloadavg()[0]
    print(f"{date.today()}, {options.recipe}, {name}, PyTorch {torch.__version__}, load {load:.1f} at the start")
    words = ["--recipe", options.recipe, "--threads", str(options.threads)]
    words += [word for way in options.way for word in ("--way", way)]
    peaks = {way: peak_memory(words, way) for way in make}
    ways = [build() for build in make.values()]
    rounds, parts, differences = compare(ways, options.repeats)
    times = {way: [one["all"] for one in seconds] for way, seconds in rounds.items()}
    with FlopCounterMode(display=False) as counter:
        ways[0].run(False)
    del ways
    report_steps(config.dataset.train.batch_size, times, parts, peaks)
    for way, found in differences.items():
        print(f"{way}, from the twin after the same step: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
    ops = compare_ops(device, options.repeats)
    report_ops(ops)
    extent = report_device(counter.get_total_flops(), times, device)
    if options.json:
        ratio = {"step": spread(times[TWIN], times[FAITHFUL])["median"]}
        ratio |= {op: spread(seconds[TWIN], seconds[FAITHFUL])["median"] for op, seconds in ops.items()}
        ratio["peak_memory"] = peaks[TWIN] / peaks[FAITHFUL]
        ways_ratio = {way: spread(times[TWIN], seconds) for way, seconds in times.items()}
        figures = {"seconds": times, "parts": parts, "peak_bytes": peaks, "ops": ops, "difference": differences}
        about = {"date": str(date.today()), "machine": name, "recipe": options.recipe, "load": load}
        content = {"ratio": ratio, **about, "ratio_of_ways": ways_ratio, **figures, **extent}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    far = {k: v for k, v in differences[FAITHFUL].items() if k != "update" and v > TOLERANCE}
    if far:
        sys.exit(f"error: our step is not the twin's within {TOLERANCE}: {far}")


def cpu_name() -> str:
    """The processor's, as Linux tells it, and its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
