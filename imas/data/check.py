"""What is wrong with the images and masks of an experiment, in sentences: before every run, and in full on demand."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..schema import Config
from .catalog import catalog_of, open_source
from .dataset import read_pair
from .labels import label_path, open_labels
from .lists import Lists, read_lists, val_root
from .source import DataError, Source

log = logging.getLogger("imas")
_SHOWN = 10  # files named in a message
_THREADS = 8
_FAR = 0.1  # a mean or deviation, in units of 0..1, that differs more from the configured one is worth a line
_EVERY = 4  # pixels between those whose mean and deviation are measured


class Unhealthy(UserError):
    """The data must be mended first."""

    status = 1


class Finding(NamedTuple):
    """A sentence about the data; ``wrong``: it must be mended."""

    wrong: bool
    text: str
    files: tuple[str, ...] = ()


@dataclass
class Health:
    """The findings of ``examine``, and its table of lists and classes."""

    findings: list[Finding] = field(default_factory=list)
    table: str = ""

    @property
    def wrong(self) -> bool:
        return any(finding.wrong for finding in self.findings)

    def lines(self) -> list[str]:
        """The findings in words, what is wrong first."""
        ordered = sorted(self.findings, key=lambda finding: not finding.wrong)
        heads = (f"{'WRONG' if finding.wrong else 'note '}  {finding.text}" for finding in ordered)
        return ["\n".join([head, *_some(finding.files)]) for head, finding in zip(heads, ordered)]


class Look(NamedTuple):
    """What one image and its mask are."""

    name: str
    problems: tuple[str, ...] = ()
    size: tuple[int, int] | None = None  # (width, height)
    counts: np.ndarray | None = None  # (256,) pixels of each mask value; None without a mask
    moments: np.ndarray | None = None  # (2, 3) mean and mean square of each channel, in units of 0..1


def check_data(config: Config, training: bool = True) -> Lists:
    """Before every run: read the lists, find every file, and read every mask once, those of pseudo labels with their
    images. Unlabeled images need no mask.

    Args:
        training: False looks at the validation images alone.

    Raises:
        UserError: lists or files that are missing, masks with values that are no class. With ``dataset.on_error: skip``
            files of training images are warned of instead.
    """
    lists = read_lists(config, training)
    if training and (text := _other_count(config, lists)):
        log.warning("%s; the list counts", text)
    wrong = _shared(config, lists) if training and config.wants.pseudo_label else []
    if wrong := wrong + unusable(config, lists):
        raise UserError("\n".join(wrong))
    return lists


def unusable(config: Config, lists: Lists) -> list[str]:
    """A sentence for each list with files that cannot be used; with ``dataset.on_error: skip`` a warning instead, but
    for validation images.
    """
    wrong = []
    for list_name, looks in _looks(config, lists, with_images=False).items():
        problems = [problem for look in looks for problem in look.problems]
        if not problems:
            continue
        folder = config.dataset.train.pseudo_labels if list_name == "unlabeled" else None
        head = f"{len(problems)} files of the {list_name} images{folder and f' and their labels in {folder}' or ''}"
        text = "\n".join([f"{head} cannot be used:", *_some(problems)])
        if list_name == "val" or config.dataset.on_error == "stop":
            wrong.append(text)
        else:
            log.warning("%s\nOther samples will take their place (dataset.on_error: skip)", text)
    return wrong


def examine(config: Config, lists: Lists, *, workers: int = _THREADS, limit: int | None = None) -> Health:
    """Look at every image and mask of an experiment.

    Args:
        workers: threads that read.
        limit: images of each list at most, evenly spread; None reads all.
    """
    looks, findings = _looks(config, lists, True, workers, limit), []
    for list_name, seen in looks.items():
        if problems := tuple(problem for look in seen for problem in look.problems):
            broken = sum(bool(look.problems) for look in seen)
            text = f"{broken} of the {len(seen)} {list_name} images cannot be used:"
            findings.append(Finding(True, text, problems))
    findings += [*_of_lists(config, lists), *_of_classes(config, looks), *_of_pictures(config, looks)]
    return Health(findings, _table(config, lists, looks))


def _looks(
    config: Config, lists: Lists, with_images: bool, workers: int = _THREADS, limit: int | None = None
) -> dict[str, list[Look]]:
    """The looks at each list's images, of which all or ``limit`` are read; masks are read wherever they are used."""
    looks, dataset = {}, config.dataset
    for list_name, names in vars(lists).items():
        source = open_source(dataset, val_root(config) if list_name == "val" else dataset.train.data_root)
        masks, paired = source, with_images
        if list_name == "unlabeled":
            paired = with_images or dataset.train.pseudo_labels is not None
            masks = None if dataset.train.pseudo_labels is None else open_labels(dataset, dataset.train.pseudo_labels)
        if catalog_of(dataset).files is None and not paired:
            continue
        look = partial(_look, source, masks, paired)
        names = names[:: 1 if limit is None else max(1, len(names) // limit)]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            shown = None if names else True  # None: on a terminal
            done = tqdm(pool.map(look, names), list_name, len(names), unit="image", leave=False, disable=shown)
            looks[list_name] = list(done)
    return looks


def _look(source: Source, masks: Source | None, with_image: bool, name: str) -> Look:
    if missing := source.missing([name], masks is source):
        return Look(name, tuple(f"{path}: no such file" for path in missing))
    image = mask = None
    try:
        if masks is not None and with_image:
            image, mask = read_pair(source, name, masks)
        elif masks is not None:
            mask = masks.mask(name)
        elif with_image:
            image = source.image(name)
    except DataError as error:
        return Look(name, (str(error),))
    counts = None if mask is None else np.array(mask.histogram())
    if image is None:
        return Look(name, counts=counts)
    pixels = np.asarray(image)[::_EVERY, ::_EVERY].reshape(-1, 3) / 255
    return Look(name, (), image.size, counts, np.stack([pixels.mean(0), (pixels**2).mean(0)]))


def _other_count(config: Config, lists: Lists) -> str | None:
    if config.dataset.n_sup in (None, len(lists.labeled)):
        return None
    return f"dataset.n_sup is {config.dataset.n_sup}, but the labeled list has {len(lists.labeled)} lines"


def _of_lists(config: Config, lists: Lists) -> list[Finding]:
    """Duplicates, overlaps, and the count that the recipe expects."""
    findings = []
    for list_name, names in vars(lists).items():
        if repeated := tuple(name for name, count in Counter(names).items() if count > 1):
            text = f"{len(repeated)} names stand more than once in the {list_name} list:"
            findings.append(Finding(True, text, repeated))
    for (one, two), common in _overlaps(config, lists).items():
        text = f"{len(common)} images are both {one} and {two}"
        text += ": the evaluation sees training images:" if two == "val" else ":"
        findings.append(Finding(two == "val" or config.wants.pseudo_label, text, common))
    text = _other_count(config, lists)
    return [*findings, Finding(False, text)] if text else findings


def _overlaps(config: Config, lists: Lists) -> dict[tuple[str, str], tuple[str, ...]]:
    """The images that two lists share; a validation list is of the same images only below the same root."""
    pairs = [("labeled", "unlabeled")]
    if val_root(config) == config.dataset.train.data_root:
        pairs += [("labeled", "val"), ("unlabeled", "val")]
    common = {pair: set.intersection(*(set(getattr(lists, name)) for name in pair)) for pair in pairs}
    return {pair: tuple(sorted(names)) for pair, names in common.items() if names}


def _shared(config: Config, lists: Lists) -> list[str]:
    """What is wrong with unlabeled images that get pseudo labels: each needs a file of its own, and no true label."""
    files = Counter(str(label_path(Path(), name)) for name in lists.unlabeled)
    twice = tuple(path for path, count in files.items() if count > 1)
    found = {"more than once in the unlabeled list, or with names of one label file": twice} if twice else {}
    pairs = _overlaps(config, lists).items()
    found |= {f"both {one} and {two}": names for (one, two), names in pairs if "unlabeled" in (one, two)}
    return [
        "\n".join([f"{len(names)} images are {what}; unlabeled images get pseudo labels:", *_some(names)])
        for what, names in found.items()
    ]


def _of_classes(config: Config, looks: dict[str, list[Look]]) -> list[Finding]:
    """Classes that do not occur, and masks that are not what they are taken for."""
    findings, ignore = [], config.dataset.ignore_label
    for list_name in ("labeled", "val"):
        counts = _counts(looks[list_name])
        if counts is None:
            continue
        if set(np.flatnonzero(counts).tolist()) == {0, ignore} and ignore == 255:
            own = config.dataset.folder is not None
            remedy = "set dataset.folder.binary: true" if own else "they are not of this set"
            text = f"the {list_name} masks hold 0 and 255 alone, and 255 is ignored: binary masks? If so, {remedy}"
            findings.append(Finding(True, text))
        absent = [name for name, count in zip(catalog_of(config.dataset).class_names, counts) if not count]
        if absent:
            what = "they cannot be learned" if list_name == "labeled" else "their IoU will be n/a"
            text = f"not in any {list_name} mask: {', '.join(absent)}; {what}"
            findings.append(Finding(list_name == "labeled", text))
        if counts.sum() == counts[ignore]:
            findings.append(Finding(True, f"every pixel of the {list_name} masks is ignored"))
    return findings


def _of_pictures(config: Config, looks: dict[str, list[Look]]) -> list[Finding]:
    """Sizes against the crop; mean and deviation against the configured ones."""
    findings, train = [], config.dataset.train
    seen = [look for name in ("labeled", "unlabeled") for look in looks[name] if look.size is not None]
    if train.crop is not None and train.rand_resize is None:
        height, width = train.crop.size
        if small := tuple(look.name for look in seen if look.size[0] < width or look.size[1] < height):
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
    ignore = config.dataset.ignore_label
    classes = {name: i for i, name in enumerate(catalog_of(config.dataset).class_names)} | {"(ignored)": ignore}
    width = max(map(len, classes))
    lines += ["", f"{'class':{width}}  labeled: pixels  images    val: pixels  images"]
    for name, value in classes.items():
        cells = []
        for list_name in ("labeled", "val"):
            counts = _counts(looks[list_name])
            if counts is None:
                cells += ["", ""]
                continue
            base = counts.sum() if value == ignore else counts.sum() - counts[ignore]
            shown = sum(bool(look.counts[value]) for look in looks[list_name] if look.counts is not None)
            cells += [f"{100 * counts[value] / max(base, 1):.2f} %", str(shown)]
        lines.append(f"{name:{width}}  {cells[0]:>15} {cells[1]:>7} {cells[2]:>14} {cells[3]:>7}")
    return "\n".join(lines)


def _some(items: Sequence[str]) -> list[str]:
    """The first items as indented lines, and how many more there are."""
    more = [f"  ... and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [*(f"  {item}" for item in items[:_SHOWN]), *more]
