"""What is wrong with the images and masks of an experiment, in sentences: before every run, and in full on demand."""

from __future__ import annotations

import contextlib
import filecmp
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..schema import Config
from .catalog import catalog_of, open_source
from .dataset import need_same_size
from .folder import IMAGES
from .labels import label_path, open_labels
from .lists import Lists, list_paths, read_lists, val_root
from .source import DataError, FileSource, Source, index_labels, upright_size

log = logging.getLogger("imas")
SHOWN = 10  # files named in a message
_COMPARED = 4096  # bytes in the middle of a file, before all of them are compared
_THREADS = 8
_FAR = 0.1  # a mean or deviation, in units of 0..1, that differs more from the configured one is worth a line
_EVERY = 4  # pixels between those whose mean and deviation are measured


class Finding(NamedTuple):
    """A sentence about the data; ``wrong``: it must be mended."""

    wrong: bool
    text: str
    files: tuple[str, ...] = ()

    def words(self, shown: int = SHOWN) -> str:
        """The sentence, the first of its files, and how many more there are."""
        more = [f"... and {len(self.files) - shown} more"] if len(self.files) > shown else []
        return "\n  ".join([self.text, *self.files[:shown], *more])


class DataReport(NamedTuple):
    """What ``examine`` found."""

    findings: list[Finding]
    table: str  # of lists and classes
    looked: str  # how many files were looked at

    @property
    def wrong(self) -> bool:
        return any(finding.wrong for finding in self.findings)

    def lines(self, shown: int = SHOWN) -> list[str]:
        """The findings in words, what is wrong first, each with the first of its files; then what was looked at."""
        ordered = sorted(self.findings, key=lambda finding: not finding.wrong)
        lines = (f"{'WRONG' if finding.wrong else 'note '}  {finding.words(shown)}" for finding in ordered)
        return [*lines, self.looked]


class Look(NamedTuple):
    """What one image and its mask are."""

    name: str
    problems: tuple[str, ...] = ()
    size: tuple[int, int] | None = None  # (width, height)
    counts: np.ndarray | None = None  # (256,) pixels of each mask value; None without a mask
    moments: np.ndarray | None = None  # (2, 3) mean and mean square of each channel, in units of 0..1
    highest: int = 0  # value of a binary mask as it is stored with 8 bits


def check_data(config: Config, training: bool = True) -> Lists:
    """Before every run: read the lists, find every file, read every mask once, and the validation images. Of an image
    that has a label or pseudo label the size is read; another one has to be there.

    Args:
        training: False looks at the validation images alone.

    Raises:
        UserError: lists or files that are missing, files that cannot be used. With ``dataset.on_error: skip`` files of
            training images are warned of instead.
    """
    lists = read_lists(config, training)
    looks = look_at(config, lists)
    wrong = _shared(config, lists) if training and config.wants.pseudo_label else []
    wrong += refused(config, looks)
    for finding in (*_of_lists(config, lists), *_of_classes(config, looks)) if training else ():
        log.warning("%s", finding.words())
    if wrong:
        raise UserError("\n".join(wrong))
    files = counted(config, lists, looks)
    log.info("%s", _in_words(files))
    return replace(lists, files=files)


def refused(config: Config, looks: dict[str, list[Look]]) -> list[str]:
    """A sentence for each list with files that cannot be used; with ``dataset.on_error: skip`` a warning instead, but
    for validation images.
    """
    wrong = []
    for list_name, finding in _broken(config, looks).items():
        if list_name == "val" or config.dataset.on_error == "stop":
            wrong.append(finding.words())
        else:
            log.warning("%s\nOther samples will take their place (dataset.on_error: skip)", finding.words())
    return wrong


def examine(config: Config, lists: Lists, *, workers: int = _THREADS, decoded: int | None = None) -> DataReport:
    """Look at every image and mask of an experiment.

    Args:
        workers: threads that read.
        decoded: see ``look_at``.
    """
    looks = look_at(config, lists, decoded, workers)
    findings = [*_broken(config, looks).values(), *_of_lists(config, lists)]
    findings += [*_of_classes(config, looks), *_of_pictures(config, looks)]
    return DataReport(findings, _table(config, lists, looks), _in_words(counted(config, lists, looks)))


def counted(config: Config, lists: Lists, looks: dict[str, list[Look]]) -> dict[str, Any]:
    """How many ``images`` and ``masks`` can be used, how many are ``used`` as what, and what ``more`` there is."""
    broken = {name: sum(bool(look.problems) for look in seen) for name, seen in looks.items()}
    used = {name: len(names) - broken[name] for name, names in lists.by_name().items()}
    labels = config.dataset.train.pseudo_labels is not None
    more = {f"{name} images cannot be used": count for name, count in broken.items() if count}
    return {
        "images": sum(used.values()),
        "masks": sum(count for name, count in used.items() if name != "unlabeled" or labels),
        "used": used,
        "more": more | {text: len(files) for text, files in lists.remarks.items()},
    }


def _in_words(files: dict[str, Any]) -> str:
    used = ", ".join(f"{count} {name}" for name, count in files["used"].items())
    more = "".join(f"; {count} {text}" for text, count in files["more"].items())
    return f"looked at {files['images']} images and {files['masks']} masks; used: {used}{more}"


def look_at(config: Config, lists: Lists, decoded: int | None = 0, workers: int = _THREADS) -> dict[str, list[Look]]:
    """The looks at the images of each list. Every mask and every validation image is read.

    Args:
        decoded: of each training list, so many images are decoded, evenly spread; None decodes all. Of another one with
            a mask the size is read, and one without has to be there. Those of the embedded set are left out.
    """
    looks, dataset = {}, config.dataset
    for list_name, names in lists.by_name().items():
        source = masks = source_of(config, list_name)
        if list_name == "unlabeled":
            masks = None if dataset.train.pseudo_labels is None else open_labels(dataset, dataset.train.pseudo_labels)
        chosen = set(names if decoded is None else names[:: max(1, len(names) // decoded)] if decoded else ())
        if isinstance(source, FileSource):
            chosen |= set(names if list_name == "val" else ())
        elif masks in (source, None):
            names = [name for name in names if name in chosen]
        look = partial(_look, source, masks, chosen, dataset.folder is not None and dataset.folder.binary)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            bar = tqdm(pool.map(look, names), list_name, len(names), unit="image", leave=False, disable=None)
            looks[list_name] = list(bar)
    return looks


def source_of(config: Config, list_name: str) -> Source:
    """Where the images of a list come from."""
    return open_source(config.dataset, val_root(config) if list_name == "val" else config.dataset.train.data_root)


def _look(source: Source, masks: Source | None, decoded: Collection[str], binary: bool, name: str) -> Look:
    image = mask = size = None
    try:
        if missing := source.missing(name, masks is source):
            return Look(name, tuple(f"{path}: no such file" for path in missing))
        mask = None if masks is None else masks.mask(name)
        if name in decoded or (mask and not isinstance(source, FileSource)):
            image = source.image(name)
            size = image.size
        elif mask:
            size = upright_size(source.paths(name)[0])
        if size and mask:
            need_same_size(name, size, mask.size)
    except DataError as error:
        return Look(name, (str(error),))
    counts = None if mask is None else np.array(mask.histogram())
    moments = None
    if image is not None:
        pixels = np.asarray(image)[::_EVERY, ::_EVERY].reshape(-1, 3) / 255
        moments = np.stack([pixels.mean(0), (pixels**2).mean(0)])
    stored = mask.info.get("stored") if mask and binary else None
    highest = 0 if stored is None or stored.mode == "1" else int(index_labels(Path(name), stored).max())
    return Look(name, (), size, counts, moments, highest)


def _broken(config: Config, looks: dict[str, list[Look]]) -> dict[str, Finding]:
    """For each list with images that cannot be used, what is wrong with them."""
    findings = {}
    for list_name, seen in looks.items():
        broken = [look for look in seen if look.problems]
        if broken:
            meant = _meant(config, list_name, broken[0].name)
            folder = config.dataset.train.pseudo_labels if list_name == "unlabeled" else None
            what = f"{list_name} images{folder and f' and their labels in {folder}' or ''}"
            text = f"{len(broken)} of the {len(seen)} {what} cannot be used{meant}:"
            findings[list_name] = Finding(True, text, tuple(problem for look in broken for problem in look.problems))
    return findings


def _meant(config: Config, list_name: str, name: str) -> str:
    """Where a list line is no image: which list it is, what a line should be, and what this one may mean."""
    source, masked, file = source_of(config, list_name), list_name != "unlabeled", list_paths(config)[list_name]
    if file is None or not source.missing(name, masked):
        return ""
    path = Path(name.split()[0].replace("\\", "/"))
    tails = [Path(*path.parts[start:]) for start in range(len(path.parts))]
    guesses = [tail.with_suffix(suffix).as_posix() for tail in tails for suffix in (tail.suffix, *IMAGES, "")]
    here = next((f", here {guess}" for guess in guesses if not source.missing(guess, masked)), "")
    what = catalog_of(config.dataset).line
    return f" ({file} has the line {name!r}; expected one name a line{here}: {what})"


def _of_lists(config: Config, lists: Lists) -> list[Finding]:
    """Duplicates, overlaps, and the count that the recipe expects."""
    findings = []
    for list_name, names in lists.by_name().items():
        if repeated := tuple(name for name, count in Counter(names).items() if count > 1):
            text = f"{len(repeated)} names stand more than once in the {list_name} list:"
            findings.append(Finding(True, text, repeated))
    for (one, two), common in _overlaps(config, lists).items():
        text = f"{len(common)} images are both {one} and {two}"
        text += ": the evaluation sees training images:" if two == "val" else ":"
        findings.append(Finding(two == "val" or config.wants.pseudo_label, text, common))
    findings += _copies(config, lists)
    findings += [Finding(False, f"{len(files)} {text}:", files) for text, files in lists.remarks.items()]
    if config.dataset.n_sup not in (None, len(lists.labeled)):
        text = f"dataset.n_sup is {config.dataset.n_sup}, but the labeled list has {len(lists.labeled)} lines"
        findings.append(Finding(False, f"{text}; the list counts"))
    return findings


def _copies(config: Config, lists: Lists) -> Iterator[Finding]:
    """Images of the training lists whose files are copies of those of validation images."""

    def fingerprints(list_name: str) -> dict[Path, tuple[int, bytes] | None]:
        source = source_of(config, list_name)
        paths = [source.paths(name)[0] for name in lists.by_name()[list_name]]
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(paths, pool.map(_fingerprint, paths)))

    if catalog_of(config.dataset).files is None:
        return
    known = {key: path for path, key in fingerprints("val").items()}
    for list_name in ("labeled", "unlabeled"):
        pairs = [(path, known.get(key, path)) for path, key in fingerprints(list_name).items() if key is not None]
        copies = tuple(f"{a} = {b.name}" for a, b in pairs if a != b and filecmp.cmp(a, b, shallow=False))
        if copies:
            text = f"{len(copies)} {list_name} images are val images under another name, the same bytes:"
            yield Finding(True, text, copies)


def _fingerprint(path: Path) -> tuple[int, bytes] | None:
    """Size and some bytes of a file: where they differ, two files do. None for one that cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        return size, file.read(_COMPARED)


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
        Finding(True, f"{len(names)} images are {what}; unlabeled images get pseudo labels:", names).words()
        for what, names in found.items()
    ]


def _of_classes(config: Config, looks: dict[str, list[Look]]) -> list[Finding]:
    """Classes that do not occur, and masks that are not what they are taken for."""
    findings, ignore = [], config.dataset.ignore_label
    by_highest = {
        value: [look.name for name in looks for look in looks[name] if look.highest == value] for value in (1, 255)
    }
    if all(by_highest.values()):
        one, white = map(len, by_highest.values())
        text = f"{one} binary masks hold 0 and 1, and {white} hold 0 and 255: save all in one way, or, where 255 means"
        text += " 'leave out', set dataset.folder.binary: false. Those that are fewer:"
        findings.append(Finding(True, text, tuple(min(by_highest.values(), key=len))))
    for list_name in ("labeled", "val"):
        counts = _counts(looks.get(list_name, []))
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
    if moments := [look.moments for look in seen if look.moments is not None]:
        mean, square = np.mean(moments, axis=0)
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
    for name, names in lists.by_name().items():
        sizes = sorted((look.size for look in looks[name] if look.size), key=lambda size: size[0] * size[1])
        ends = [f"{width}×{height}" for width, height in (sizes[:1] + sizes[-1:])] or ["", ""]
        lines.append(f"{name:12} {len(names):>8} {len(sizes):>10} {ends[0]:>12} {ends[-1]:>12}")
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
