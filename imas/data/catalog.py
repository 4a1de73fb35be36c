"""What each data set is: one entry of ``DATASETS`` for each (spec, Layouts). See docs/add_a_dataset.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..schema import Dataset
from . import folder, shapes
from .source import FileSource, ShapesSource, Source, index_labels, shapes_lists

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Catalog:
    """All that is particular to a data set."""

    class_names: tuple[str, ...]  # in the order of their numbers
    palette: tuple[Colour, ...]  # a colour for each class
    # (root, list line) → the paths of image and mask; None for a set that is drawn, not read.
    files: Callable[[Path, str], tuple[Path, Path]] | None = None
    # (mask's path, image as stored, ignore index) → (H, W) uint8 labels; None: pixels are class numbers.
    decode: Callable[[Path, Image.Image, int], np.ndarray] | None = None
    drawn: Source | None = None  # where images and masks come from instead of ``files``
    side: int | None = None  # of all images in pixels, where it is known beforehand
    # (lists that are given, names of those to find) → lists, and remarks: sentence → the files that it is about. None:
    # the configuration must name every list.
    find: Callable[[Mapping[str, list[str]], list[str]], tuple[dict, dict[str, tuple[str, ...]]]] | None = None
    # Of a set with published lists, what its folder gives: "train", "val", "test" and "pool", all training images, each
    # as a list file or a pattern of files.
    folder_lists: Mapping[str, str] = field(default_factory=dict)
    line: str = "an image's path below dataset.train.data_root"  # what a list has in each line
    head_lr_times: float = 1.0  # default of ``trainer.optimizer.head_lr_times``
    test_ids: tuple[int, ...] | None = None  # numbers of the classes on the data set's test server, if they differ
    problems: Mapping[str, str] = field(default_factory=dict)  # dotted key → what is wrong with the configuration


def unlabeled_beside(labeled: Path) -> Path:
    """The unlabeled list that belongs to a labeled one: ``labeled.txt`` → ``unlabeled.txt``; another name stays."""
    return labeled.with_name(labeled.name.replace("labeled.txt", "unlabeled.txt"))


def voc_palette(count: int) -> tuple[Colour, ...]:
    """The VOC colour map: the bits of a class number, three at a time, become the high bits of red, green, blue."""

    def channel(class_id: int, offset: int) -> int:
        return sum((class_id >> (3 * bit + offset) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(count))


def far_colours(count: int) -> tuple[Colour, ...]:
    """Colours, at most 255, that are far from each other and from black, white and the grey of pixels without a class:
    each is the one of a grid that is farthest from all before it, where green differs most and red least to the eye.
    """
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, 7)] * 3), -1).reshape(-1, 3).round()
    taken = [np.zeros(3), np.full(3, 255), np.full(3, 224)]
    while len(taken) < count + 3:
        nearest = ((grid[:, None] - np.stack(taken)) ** 2 @ np.array([2, 4, 3])).min(1)
        taken.append(grid[nearest.argmax()])
    return tuple((int(red), int(green), int(blue)) for red, green, blue in taken[3:])


def pascal_files(root: Path, name: str) -> tuple[Path, Path]:
    """Image and mask of a list line, which is an ID."""
    return root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClassAug" / f"{name}.png"


PASCAL = Catalog(
    (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
    ),
    voc_palette(21),
    pascal_files,
    folder_lists={
        "train": "ImageSets/Segmentation/train.txt",
        "val": "ImageSets/Segmentation/val.txt",
        "pool": "SegmentationClassAug/*.png",
    },
    line="an image's name without folder and suffix, such as 2007_000032",
    head_lr_times=10.0,
)  # fmt: skip

# The raw labelIds of the 19 training classes; every other id is ignored.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def cityscapes_files(root: Path, name: str) -> tuple[Path, Path]:
    """Image and mask of a list line, which is the image's path below the root.

    The mask is ``…_gtFine_labelTrainIds.png``, or the raw ``…_gtFine_labelIds.png`` where there is no such file.
    """
    mask = name.replace("leftImg8bit", "gtFine", 1).replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
    raw = mask.replace("labelTrainIds", "labelIds")
    use_raw = not (root / mask).is_file() and (root / raw).is_file()
    return root / name, root / (raw if use_raw else mask)


def cityscapes_labels(path: Path, image: Image.Image, ignore_index: int) -> np.ndarray:
    """``index_labels``, through the standard map where the file has the raw labelIds."""
    labels = index_labels(path, image)
    if not path.stem.endswith("_labelIds"):
        return labels
    train_ids = np.full(256, ignore_index, dtype=np.uint8)
    train_ids[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return train_ids[labels]


CITYSCAPES = Catalog(
    (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
    cityscapes_files,
    cityscapes_labels,
    folder_lists={
        "pool": "leftImg8bit/train/*/*_leftImg8bit.png",
        "val": "leftImg8bit/val/*/*_leftImg8bit.png",
    },
    test_ids=CITYSCAPES_IDS,
)  # fmt: skip


def camvid_files(root: Path, name: str) -> tuple[Path, Path]:
    """Image and mask of a list line, which is the image's path below the root: ``train/a.png`` has the mask
    ``trainannot/a.png``.
    """
    folder, _, file = name.rpartition("/")
    return root / name, root / f"{folder}annot" / file


def camvid_labels(path: Path, image: Image.Image, ignore_index: int) -> np.ndarray:
    """``index_labels``; 11 is void, whatever number the configuration ignores."""
    labels = index_labels(path, image)
    return np.where(labels == 11, np.uint8(ignore_index), labels)


# The 480×360 version with 11 classes of the SegNet tutorial, and its colours.
CAMVID = Catalog(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    camvid_files,
    camvid_labels,
    folder_lists={"train": "train/*.png", "val": "val/*.png", "test": "test/*.png", "pool": "train/*.png"},
)  # fmt: skip


def _own(dataset: Dataset) -> Catalog:
    """Own data, described by its section of the configuration."""
    options = dataset.folder
    return Catalog(
        options.class_names,
        options.palette or options.colours or far_colours(len(options.class_names)),
        partial(folder.files, options),
        partial(folder.labels, options),
        find=partial(folder.lists, dataset),
        line="an image's path below dataset.folder.images, such as a/b.jpg",
        problems=folder.problems(dataset),
    )


def _embedded(dataset: Dataset) -> Catalog:
    options = dataset.shapes
    return Catalog(
        shapes.CLASS_NAMES,
        voc_palette(len(shapes.CLASS_NAMES)),
        drawn=ShapesSource(options.seed, options.size),
        side=options.size,
        find=partial(shapes_lists, options),
    )


# dataset.type → the data set, or a function of the configuration's section ``dataset`` that gives it.
DATASETS: dict[str, Catalog | Callable[[Dataset], Catalog]] = {
    "pascal": PASCAL,
    "cityscapes": CITYSCAPES,
    "camvid": CAMVID,
    "folder": _own,
    "shapes": _embedded,
}


def catalog_of(dataset: Dataset) -> Catalog:
    """The data set of a configuration."""
    entry = DATASETS[dataset.type]
    return entry if isinstance(entry, Catalog) else entry(dataset)


def open_source(dataset: Dataset, root: str | None) -> Source:
    """The images and masks of a configuration. ``root``: the folder of a data set that is read from files."""
    catalog = catalog_of(dataset)
    if catalog.files is None:
        return catalog.drawn
    decode = catalog.decode and partial(catalog.decode, ignore_index=dataset.ignore_label)
    return FileSource(catalog.files, Path(root), len(catalog.class_names), dataset.ignore_label, decode)
