"""How fast one loader worker makes samples, ours against a plain twin, on one thread.

    python -m benchmarks.loading                              # a minute for each data set
    python -m benchmarks.loading --seconds 20 --json out.json

Images as heavy as those of Cityscapes and Pascal are drawn into a temporary folder, in their layouts. Timed is a pair
of a labeled sample with its mask and an unlabeled one with weak and strong view, each as a batch of one, as the
published experiments have it. All ways make the same draws, take turns at every pair, and read the same files,
which the operating system keeps in memory. The plain twin (``plain.py``) does the same in the order of the spec and
normalises in the worker; ours leaves that to the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw
from torch.utils.data import default_collate

from imas.data import dataset
from imas.data.cache import CachedSource
from imas.data.catalog import PASCAL, open_source
from imas.data.source import Source
from imas.data.weak import Geometry
from imas.schema import Dataset, StrongAug, TrainData

from . import plain
from .figures import in_words, spread

_STRONG_AUG = StrongAug(num_augs=2)
_ROUND = 3.0  # seconds, about
_PARTS = ("decode", "resize, flip, crop", "strong view", "tensor, normalise", "batch", "all")


class Case(NamedTuple):
    """One data set's shape: of its files, and of the samples that training reads."""

    size: tuple[int, int]  # height, width
    images: int
    noise: float  # grey levels, so that files weigh what real ones do
    objects: int
    classes: int
    geometry: Geometry


CASES = {
    "cityscapes": Case(
        (1024, 2048), 12, 0.9, 120, 19, Geometry((1024, 2048), (0.5, 2.0), True, (769, 769), "rand", 255)
    ),
    "pascal": Case((375, 500), 60, 8.0, 30, 21, Geometry(500, (0.5, 2.0), True, (513, 513), "rand", 255)),
}


def scene(case: Case, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Light and colour that change slowly, polygons with ignored borders, a little noise: RGB, and labels as mode L."""
    height, width = case.size
    coarse = rng.integers(30, 226, (height // 128 + 2, width // 128 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    mask = Image.new("L", (width, height))
    on_image, on_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    for _ in range(case.objects):
        centre, radius = rng.random(2) * (width, height), height * np.exp(rng.uniform(np.log(0.02), np.log(0.3)))
        angles, radii = np.sort(rng.random(9)) * 2 * np.pi, radius * rng.uniform(0.5, 1, 9)
        corners = (centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)).ravel().tolist()
        on_image.polygon(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
        on_mask.polygon(corners, fill=int(rng.integers(case.classes)), outline=255)
    noisy = np.asarray(image) + rng.normal(0, case.noise, (height, width, 3))
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)), mask


def write(layout: str, root: Path) -> list[str]:
    """Draw the images and masks of a case into its layout below ``root``. Returns their names."""
    case, rng = CASES[layout], np.random.default_rng(0)
    names = [
        f"leftImg8bit/train/aachen/aachen_{number:06d}_000019_leftImg8bit.png"
        if layout == "cityscapes"
        else f"2007_{number:06d}"
        for number in range(case.images)
    ]
    for name in names:
        image, mask = scene(case, rng)
        if layout == "pascal":
            mask.putpalette([value for colour in PASCAL.palette for value in colour])
        for path, picture in zip(plain.PlainSource(layout, root).paths(name), (image, mask)):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=92)
    return names


class Clock:
    """Seconds by part, of the functions that it is put around."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def put_around(self, owner: object, **parts: str) -> None:
        """Let the time of ``owner``'s functions, by name, count for a part."""
        for name, part in parts.items():
            setattr(owner, name, partial(self._timed, part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[part] += time.perf_counter() - start
        return result

    def run(self, pair: Callable[[int], tuple[dict, dict]], collate: Callable, number: int) -> Counter[str]:
        """Make a pair of samples, each a batch. Returns seconds by part, and as ``all``."""
        self.seconds = Counter()
        start = time.perf_counter()
        for sample in pair(number):
            self._timed("batch", collate, [sample])
        whole = time.perf_counter() - start
        return self.seconds + Counter({"tensor, normalise": whole - self.seconds.total(), "all": whole})


def ours(source: Source, names: list[str], geometry: Geometry) -> Callable[[int], tuple[dict, dict]]:
    """Number → labeled and unlabeled sample, from the project's own data sets."""
    labeled = dataset.LabeledSet(source, names, geometry)
    unlabeled = dataset.UnlabeledSet(source, names, geometry, 1, _STRONG_AUG)
    return lambda number: (
        labeled[dataset.Draw(number % len(names), (0, number))],
        unlabeled[dataset.Draw((number + len(names) // 2) % len(names), (1, number))],
    )


def twin(source: plain.PlainSource, names: list[str], geometry: Geometry) -> Callable[[int], tuple[dict, dict]]:
    """Number → labeled and unlabeled sample of the plain twin, with the same draws."""
    generator = np.random.default_rng
    return lambda number: (
        plain.labeled(source, names[number % len(names)], geometry, generator((0, number))),
        plain.unlabeled(
            source, names[(number + len(names) // 2) % len(names)], geometry, _STRONG_AUG, generator((1, number))
        ),
    )


def measure(layout: str, root: Path, seconds: float, clock: Clock) -> tuple[dict[str, list[Counter[str]]], int]:
    """Rounds in turns, until the time is over.

    Returns:
        Seconds by part of every round, by way; and the pairs in a round.
    """
    names, geometry = write(layout, root), CASES[layout].geometry
    source, plain_source = open_source(Dataset(layout, TrainData()), str(root)), plain.PlainSource(layout, root)
    cached = CachedSource(source, names, names)
    for one in (source, plain_source, cached):
        clock.put_around(one, image="decode", mask="decode")
    ways = {
        "plain twin": (twin(plain_source, names, geometry), default_collate),
        "ours": (ours(source, names, geometry), dataset.stacked),
        "ours, cached": (ours(cached, names, geometry), dataset.stacked),
    }
    warm = sum(clock.run(*way, number)["all"] for number in range(len(names)) for way in ways.values())
    pairs = max(4, round(_ROUND * len(names) / warm))
    rounds: dict[str, list[Counter[str]]] = {way: [] for way in ways}
    end, first = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for way in ways:
            rounds[way].append(Counter())
        for number in range(first, first + pairs):
            for way in list(ways)[:: 1 if number % 2 else -1]:  # so that none always comes first
                rounds[way][-1] += clock.run(*ways[way], number)
        first += pairs
    return rounds, pairs


def report(layout: str, rounds: dict[str, list[Counter[str]]], pairs: int) -> dict:
    """Print a data set's table. Returns its figures."""
    samples = 2 * pairs * len(rounds["ours"])
    milliseconds = {
        way: {part: 1000 * sum(one[part] for one in parts) / samples for part in _PARTS}
        for way, parts in rounds.items()
    }
    print(f"\n{layout}: {samples} samples in {len(rounds['ours'])} rounds, ms a sample")
    print(f"| | {' | '.join(_PARTS)} | samples/s | ratio, median (min..max) |\n|---|{'---|' * (len(_PARTS) + 2)}")
    seconds = {way: [one["all"] for one in parts] for way, parts in rounds.items()}
    ratios = {way: spread(seconds["plain twin"], own) for way, own in seconds.items()}
    for way, row in milliseconds.items():
        cells = " | ".join(f"{row[part]:.1f}" for part in _PARTS)
        print(f"| {way} | {cells} | {1000 / row['all']:.1f} | {in_words(ratios[way])} |", flush=True)
    return {
        way: {"ms": row, "samples_per_s": 1000 / row["all"], "ratio": ratios[way]["median"]}
        | {"ratio_min": ratios[way]["min"], "ratio_max": ratios[way]["max"]}
        for way, row in milliseconds.items()
    }


def main() -> None:
    """Measure both data sets, print the tables, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each data set")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Pillow {PIL.__version__}"
    print(f"{date.today()}, {machine}, one thread")
    clock, figures = Clock(), {}
    for module in (dataset, plain):
        clock.put_around(module, weak_view="resize, flip, crop", strong_view="strong view")
    for layout in CASES:
        with tempfile.TemporaryDirectory() as root:
            figures[layout] = report(layout, *measure(layout, Path(root), options.seconds, clock))
    if options.json:
        ratio = {layout: ways["ours"]["ratio"] for layout, ways in figures.items()}
        content = {"ratio": ratio, "date": str(date.today()), "machine": machine, "figures": figures}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
