"""The data doctor: what is wrong with the images of an experiment, in sentences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import UserError
from ..schema import Config
from .catalog import catalog_of
from .check import some, source_of
from .dataset import read_pair
from .lists import Lists, val_root
from .source import DataError, Source

_FAR = 0.1  # a mean or deviation, in units of 0..1, that differs more from the configured one is worth a line
_EVERY = 4  # pixels between those that mean and deviation are taken of


class Unhealthy(UserError):
    """The data must be mended first."""

    status = 1


class Finding(NamedTuple):
    """Something worth knowing."""

    wrong: bool  # else worth a look
    text: str
    files: tuple[str, ...] = ()


@dataclass
class Health:
    """What ``examine`` has found."""

    findings: list[Finding] = field(default_factory=list)
    table: str = ""

    @property
    def wrong(self) -> bool:
        return any(finding.wrong for finding in self.findings)

    def lines(self) -> list[str]:
        """The findings in words, what is wrong first."""
        ordered = sorted(self.findings, key=lambda finding: not finding.wrong)
        return [
            "\n".join([f"{'WRONG' if finding.wrong else 'note '}  {finding.text}", *some(finding.files)])
            for finding in ordered
        ]


class Look(NamedTuple):
    """What is to be known of one image."""

    name: str
    problem: str | None
    size: tuple[int, int] | None = None  # (width, height)
    counts: np.ndarray | None = None  # (256,) pixels of each mask value; None without a mask
    moments: np.ndarray | None = None  # (2, 3) mean and mean square of each channel, in units of 0..1


class _Looks(Dataset):
    def __init__(self, source: Source, names: list[str], masked: bool) -> None:
        self.source, self.names, self.masked = source, names, masked

    def __getitem__(self, index: int) -> Look:
        name = self.names[index]
        try:
            image, mask = read_pair(self.source, name) if self.masked else (self.source.image(name), None)
        except DataError as error:
            return Look(name, str(error))
        pixels = np.asarray(image)[::_EVERY, ::_EVERY].reshape(-1, 3) / 255
        counts = None if mask is None else np.array(mask.histogram())
        return Look(name, None, image.size, counts, np.stack([pixels.mean(0), (pixels**2).mean(0)]))

    def __len__(self) -> int:
        return len(self.names)


def examine(config: Config, lists: Lists, *, workers: int = 0, limit: int | None = None) -> Health:
    """Look at every image and mask of an experiment.

    Args:
        workers: processes that read; 0 reads in this one.
        limit: images of each list at most, evenly spread; None reads all.
    """
    health, looks = Health(), {}
    for list_name, names in vars(lists).items():
        step = 1 if limit is None else max(1, len(names) // limit)
        dataset = _Looks(source_of(config, list_name), names[::step], list_name != "unlabeled")
        loader = DataLoader(dataset, 8, num_workers=workers if len(dataset) > 8 else 0, collate_fn=list)
        shown = None if len(dataset) else True  # None: on a terminal
        bar = tqdm(total=len(dataset), desc=list_name, unit="image", leave=False, disable=shown)
        looks[list_name] = []
        for batch in loader:
            looks[list_name] += batch
            bar.update(len(batch))
        bar.close()
        problems = tuple(look.problem for look in looks[list_name] if look.problem)
        if problems:
            text = f"{len(problems)} of the {len(dataset)} {list_name} images cannot be used:"
            health.findings.append(Finding(True, text, problems))
    health.findings += [*_of_lists(config, lists), *_of_classes(config, looks), *_of_pictures(config, looks)]
    health.table = _table(config, lists, looks)
    return health


def _of_lists(config: Config, lists: Lists) -> list[Finding]:
    """Duplicates, overlaps, and the count that the recipe expects."""
    findings = []
    for list_name, names in vars(lists).items():
        if repeated := tuple(name for name, count in Counter(names).items() if count > 1):
            findings.append(
                Finding(True, f"{len(repeated)} names stand more than once in the {list_name} list:", repeated)
            )
    same_root = val_root(config) == config.dataset.train.data_root
    pairs = [("labeled", "unlabeled", False)]
    pairs += [("labeled", "val", True), ("unlabeled", "val", True)] if same_root else []
    for one, two, wrong in pairs:
        if common := tuple(sorted(set(getattr(lists, one)) & set(getattr(lists, two)))):
            text = f"{len(common)} images are both {one} and {two}"
            text += ": the evaluation sees training images:" if wrong else ":"
            findings.append(Finding(wrong, text, common))
    if config.dataset.n_sup not in (None, len(lists.labeled)):
        text = f"dataset.n_sup is {config.dataset.n_sup}, but the labeled list has {len(lists.labeled)} lines"
        findings.append(Finding(False, text))
    return findings


def _of_classes(config: Config, looks: dict[str, list[Look]]) -> list[Finding]:
    """Classes that do not occur, and masks that are not what they are taken for."""
    findings, ignore = [], config.dataset.ignore_label
    names = catalog_of(config.dataset).class_names
    for list_name in ("labeled", "val"):
        counts = _counts(looks[list_name])
        if counts is None:
            continue
        present = set(np.flatnonzero(counts).tolist())
        if present == {0, ignore} and ignore == 255:
            remedy = (
                "set dataset.folder.binary: true" if config.dataset.type == "folder" else "they are not of this set"
            )
            text = f"the {list_name} masks hold 0 and 255 alone, and 255 is ignored: binary masks? If so, {remedy}"
            findings.append(Finding(True, text))
        absent = [name for number, name in enumerate(names) if not counts[number]]
        if absent:
            what = "they cannot be learned" if list_name == "labeled" else "their IoU will be n/a"
            findings.append(
                Finding(list_name == "labeled", f"not in any {list_name} mask: {', '.join(absent)}; {what}")
            )
        valid = counts.sum() - counts[ignore]
        if valid == 0:
            findings.append(Finding(True, f"every pixel of the {list_name} masks is ignored"))
    return findings


def _of_pictures(config: Config, looks: dict[str, list[Look]]) -> list[Finding]:
    """Sizes against the crop; mean and deviation against the configured ones."""
    findings, train = [], config.dataset.train
    seen = [look for name in ("labeled", "unlabeled") for look in looks[name] if look.size is not None]
    if train.crop is not None and train.rand_resize is None:
        height, width = train.crop.size
        small = tuple(look.name for look in seen if look.size[0] < width or look.size[1] < height)
        if small:
            text = f"{len(small)} images are smaller than the crop of {height}×{width} pixels and will be padded:"
            findings.append(Finding(False, text, small))
    if seen:
        mean, square = np.mean([look.moments for look in seen], axis=0)
        unit = 255 if max(config.dataset.mean) > 1 else 1
        for name, found in (("mean", mean), ("std", np.sqrt(np.maximum(square - mean**2, 0)))):
            configured = np.array(getattr(config.dataset, name)) / unit
            if np.abs(found - configured).max() > _FAR:
                found, configured = (", ".join(f"{value:.3f}" for value in values) for values in (found, configured))
                text = f"the images' {name} is [{found}], far from the configured dataset.{name} [{configured}]"
                findings.append(Finding(False, text))
    return findings


def _counts(looks: list[Look]) -> np.ndarray | None:
    """(256,) pixels of each mask value over all readable masks; None where there is none."""
    counts = [look.counts for look in looks if look.counts is not None]
    return np.sum(counts, axis=0) if counts else None


def _table(config: Config, lists: Lists, looks: dict[str, list[Look]]) -> str:
    """Images and sizes of each list; of each class, its share of the pixels and the images that show it."""
    lines = [f"{'list':12} {'images':>8} {'looked at':>10} {'smallest':>12} {'largest':>12}"]
    for name, names in vars(lists).items():
        sizes = sorted((look.size for look in looks[name] if look.size), key=lambda size: size[0] * size[1])
        ends = [f"{width}×{height}" for width, height in (sizes[:1] + sizes[-1:])] or ["", ""]
        lines.append(f"{name:12} {len(names):>8} {len(looks[name]):>10} {ends[0]:>12} {ends[-1]:>12}")
    class_names = [*catalog_of(config.dataset).class_names, "(ignored)"]
    numbers = [*range(len(class_names) - 1), config.dataset.ignore_label]
    width = max(map(len, class_names))
    lines += ["", f"{'class':{width}}  labeled: pixels  images    val: pixels  images"]
    for name, number in zip(class_names, numbers):
        cells = []
        for list_name in ("labeled", "val"):
            counts = _counts(looks[list_name])
            if counts is None:
                cells += ["", ""]
                continue
            base = counts.sum() if name == "(ignored)" else counts.sum() - counts[config.dataset.ignore_label]
            shown = sum(bool(look.counts[number]) for look in looks[list_name] if look.counts is not None)
            cells += [f"{100 * counts[number] / max(base, 1):.2f} %", str(shown)]
        lines.append(f"{name:{width}}  {cells[0]:>15} {cells[1]:>7} {cells[2]:>14} {cells[3]:>7}")
    return "\n".join(lines)
