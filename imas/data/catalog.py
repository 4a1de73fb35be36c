"""What each data set is: classes, colours, and where the files of a list line lie (spec, Layouts)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..schema import Dataset
from . import shapes

Colour = tuple[int, int, int]


def _voc_palette(count: int) -> tuple[Colour, ...]:
    """The VOC colour map: the bits of a class number, three at a time, become the high bits of red, green, blue."""
    palette = []
    for number in range(count):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= ((number >> (3 * bit + channel)) & 1) << (7 - bit)
        palette.append(tuple(colour))
    return tuple(palette)


@dataclass(frozen=True)
class Catalog:
    """Names and colours of the classes, in the order of their numbers."""

    class_names: tuple[str, ...]
    palette: tuple[Colour, ...]


PASCAL = Catalog(
    (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
    ),
    _voc_palette(21),
)  # fmt: skip

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
)  # fmt: skip

SHAPES = Catalog(shapes.CLASS_NAMES, _voc_palette(len(shapes.CLASS_NAMES)))


def catalog_of(dataset: Dataset) -> Catalog:
    """Names and colours of a configuration's classes; own data without a palette gets VOC's colours."""
    if dataset.type == "folder":
        names = dataset.folder.class_names
        return Catalog(names, dataset.folder.palette or _voc_palette(len(names)))
    return {"pascal": PASCAL, "cityscapes": CITYSCAPES, "shapes": SHAPES}[dataset.type]


# Raw Cityscapes labelIds → the 19 training classes; every other id is ignored.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def pascal_files(root: Path, name: str) -> tuple[Path, Path]:
    """Image and mask of a list line, which is an ID."""
    return root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClassAug" / f"{name}.png"


def cityscapes_files(root: Path, name: str) -> tuple[Path, Path]:
    """Image and mask of a list line, which is the image's path below the root.

    The mask is ``…_gtFine_labelTrainIds.png``, or the raw ``…_gtFine_labelIds.png`` where there is no such file.
    """
    mask = name.replace("leftImg8bit", "gtFine", 1).replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
    raw = mask.replace("labelTrainIds", "labelIds")
    use_raw = not (root / mask).is_file() and (root / raw).is_file()
    return root / name, root / (raw if use_raw else mask)
