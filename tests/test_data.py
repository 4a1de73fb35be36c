"""Reading, weak and strong views, sampling and loaders, on small trees in the layouts of the real data sets."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms

from imas.config import load_config
from imas.data import strong
from imas.data.catalog import (
    CAMVID,
    CITYSCAPES,
    PASCAL,
    cityscapes_files,
    cityscapes_labels,
    open_source,
    pascal_files,
)
from imas.data.check import check_data
from imas.data.dataset import Draw, EvaluationSet, LabeledSet, UnlabeledSet, stacked
from imas.data.lists import read_list, read_lists
from imas.data.loaders import EpochSampler, TrainingData, evaluation_batches, evaluation_loader, oversample
from imas.data.normalise import Normalise
from imas.data.source import DataError, FileSource, ShapesSource
from imas.data.strong import KINDS, OPERATIONS, strong_view
from imas.data.weak import Geometry, resized_size, weak_view
from imas.engine.run import to_device
from imas.errors import UserError
from imas.schema import Config, Dataset, StrongAug, TrainData

CITY_NAME = "leftImg8bit/train/hamburg/hamburg_000000_080169_leftImg8bit.png"
CITY_MASK = "gtFine/train/hamburg/hamburg_000000_080169_gtFine_{}.png"
WHOLE = Geometry(base=None, scale=None, flip=False, crop=None, crop_type="rand", ignore_index=255)

# The names of Cityscapes' labelIds and, in the same order, what the spec trains on.
TRAINED_IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours that JPEG can keep roughly: a smooth field of the position and the seed."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 // width, y * 255 // height, np.full_like(x, seed * 40 % 256))
    return np.stack(channels, -1).astype(np.uint8)


def _save(path: Path, array: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette([value for colour in PASCAL.palette for value in colour])
        assert image.mode == "P"
    image.save(path)


def _pascal_tree(root: Path, labeled: int = 3, unlabeled: int = 0, val: int = 0, sizes: bool = False) -> list[str]:
    """VOC's layout: every image a JPEG, the labeled and validation ones with a palette PNG. Returns the labeled IDs."""
    names = [f"2007_{number:06d}" for number in range(labeled + unlabeled + val)]
    for number, name in enumerate(names):
        height, width = (20 + 2 * (number % 2), 24) if sizes else (20, 24)
        _save(root / "JPEGImages" / f"{name}.jpg", _noise(height, width, number))
        if number < labeled or number >= labeled + unlabeled:
            mask = np.full((height, width), number % 21, dtype=np.uint8)
            mask[0] = 255
            mask[-1] = 20
            _save(root / "SegmentationClassAug" / f"{name}.png", mask, palette=True)
    parts = {"labeled": names[:labeled], "unlabeled": names[labeled : labeled + unlabeled]}
    for part, lines in (parts | {"val": names[labeled + unlabeled :]}).items():
        (root / f"{part}.txt").write_text("".join(f"{line}\n" for line in lines))
    return names[:labeled]


def _pascal(root: Path) -> FileSource:
    return FileSource(pascal_files, root, 21, 255)


def _cityscapes(root: Path) -> FileSource:
    return FileSource(cityscapes_files, root, 19, 255, partial(cityscapes_labels, ignore_index=255))


def _config(folder: Path, raw: dict, overrides: tuple[str, ...] = ()) -> Config:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_config(path, overrides)


def _pascal_config(root: Path, *overrides: str) -> Config:
    raw = {
        "imas": {},
        "dataset": {
            "type": "pascal",
            "train": {
                "data_root": str(root),
                "data_list": str(root / "labeled.txt"),
                "crop": {"size": 16},
                "strong_aug": {"num_augs": 2},
            },
            "val": {"data_list": str(root / "val.txt")},
            "workers": 0,
        },
        "trainer": {"epochs": 2, "optimizer": {"kwargs": {"lr": 0.01}}},
        "net": {"num_classes": 21, "encoder": {"type": "resnet18"}},
    }
    return _config(root, raw, overrides)


def _shapes_config(folder: Path, *overrides: str) -> Config:
    raw = {
        "imas": {},
        "dataset": {
            "type": "shapes",
            "train": {
                "flip": True,
                "rand_resize": [0.5, 2.0],
                "resize_base_size": 32,
                "crop": {"size": 24},
                "strong_aug": {"num_augs": 2},
            },
            "shapes": {"size": 32, "labeled": 3, "unlabeled": 9, "val": 4},
            "workers": 0,
        },
        "trainer": {"epochs": 2, "optimizer": {"kwargs": {"lr": 0.01}}},
        "net": {"num_classes": 4, "encoder": {"type": "resnet18"}},
    }
    return _config(folder, raw, overrides)


def _chi_square(counts: Counter, kinds: int) -> float:
    expected = sum(counts.values()) / kinds
    return sum((count - expected) ** 2 for count in counts.values()) / expected + (kinds - len(counts)) * expected


def _batches(data: TrainingData, epoch: int, unlabeled: bool) -> list[dict]:
    """The batches of an epoch, whichever update they belong to."""
    return [batch for update in data.epoch(epoch, unlabeled) for batch in update]


# Reading


def test_pascal_labels_are_palette_indices_not_colours(tmp_path: Path) -> None:
    """Mode P masks hold class numbers, 255 included; images come as RGB."""
    labels = np.array([[0, 1, 20], [255, 15, 7]], dtype=np.uint8)
    _save(tmp_path / "JPEGImages" / "a.jpg", _noise(2, 3))
    _save(tmp_path / "SegmentationClassAug" / "a.png", labels, palette=True)
    image, label = EvaluationSet(_pascal(tmp_path), ["a"])[0]
    assert label.tolist() == labels.tolist()
    assert label.dtype == torch.uint8
    assert image.shape == (3, 2, 3)
    assert image.dtype == torch.uint8


def test_gray_masks_and_gray_images_read_alike(tmp_path: Path) -> None:
    """Masks of mode L are as good as palette ones; a gray JPEG becomes three equal channels."""
    labels = np.array([[0, 20], [255, 3]], dtype=np.uint8)
    _save(tmp_path / "JPEGImages" / "a.jpg", np.full((2, 2), 77, dtype=np.uint8))
    _save(tmp_path / "SegmentationClassAug" / "a.png", labels)
    image, label = EvaluationSet(_pascal(tmp_path), ["a"])[0]
    assert label.tolist() == labels.tolist()
    assert image.unique().tolist() == [77]
    assert len(image) == 3


def test_cityscapes_reads_train_ids(tmp_path: Path) -> None:
    """labelTrainIds are taken as they are, and preferred where the raw labelIds lie beside them."""
    labels = np.array([[0, 1, 18], [255, 7, 11]], dtype=np.uint8)
    _save(tmp_path / CITY_NAME, _noise(2, 3))
    _save(tmp_path / CITY_MASK.format("labelTrainIds"), labels)
    _save(tmp_path / CITY_MASK.format("labelIds"), np.zeros_like(labels))
    image, label = EvaluationSet(_cityscapes(tmp_path), [CITY_NAME])[0]
    assert label.tolist() == labels.tolist()
    assert image.permute(1, 2, 0).numpy().tolist() == _noise(2, 3).tolist()


def test_cityscapes_reads_raw_ids_through_the_standard_map(tmp_path: Path) -> None:
    """A tree with labelIds alone: 19 of the 34 ids are trained on, in their order, all else is ignored."""
    ids = np.arange(36, dtype=np.uint8).reshape(4, 9)
    ids[-1, -1] = 255  # the id -1, license plate
    _save(tmp_path / CITY_NAME, _noise(4, 9))
    _save(tmp_path / CITY_MASK.format("labelIds"), ids)
    _, label = EvaluationSet(_cityscapes(tmp_path), [CITY_NAME])[0]
    order = list(TRAINED_IDS)
    expected = [order.index(value) if value in TRAINED_IDS else 255 for value in ids.ravel().tolist()]
    assert label.ravel().tolist() == expected
    assert CITYSCAPES.class_names == tuple(TRAINED_IDS.values())


def test_camvid_reads_masks_beside_the_folders_of_images(tmp_path: Path) -> None:
    """``train/a.png`` has the mask ``trainannot/a.png``; 11 is ignored by whatever number."""
    mask = np.array([[0, 10, 11]], dtype=np.uint8)
    _save(tmp_path / "train/a.png", _noise(1, 3))
    _save(tmp_path / "trainannot/a.png", mask)
    for ignored in (11, 255):
        source = open_source(Dataset("camvid", TrainData(), ignore_label=ignored), str(tmp_path))
        image, label = EvaluationSet(source, ["train/a.png"])[0]
        assert image.permute(1, 2, 0).numpy().tolist() == _noise(1, 3).tolist()
        assert label.tolist() == [[0, 10, ignored]]
    mask[0, 0] = 12
    _save(tmp_path / "trainannot/a.png", mask)
    with pytest.raises(DataError, match="trainannot/a.png.*12"):
        EvaluationSet(source, ["train/a.png"])[0]
    assert len(CAMVID.class_names) == len(CAMVID.palette) == 11


def test_unlabeled_images_need_no_mask(tmp_path: Path) -> None:
    """In a batch as in the check before a run; the labeled and validation masks are needed."""
    _pascal_tree(tmp_path, labeled=2, unlabeled=4, val=2)
    assert len(list((tmp_path / "SegmentationClassAug").iterdir())) == 4
    config = _pascal_config(tmp_path)
    lists = check_data(config)
    assert (len(lists.labeled), len(lists.unlabeled), len(lists.val)) == (2, 4, 2)
    batches = _batches(TrainingData(config, lists, seed=0, rank=0, world=1), 0, True)
    assert len(batches) == 2
    for batch in batches:
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        assert labeled["image"].shape == unlabeled["weak"].shape == (2, 3, 16, 16)
        assert labeled["label"].shape == (2, 16, 16) and labeled["strong"] == []
        assert [view.shape for view in unlabeled["strong"]] == [(2, 3, 16, 16)]
        assert unlabeled["real"].shape == (2, 2)
    indices = torch.cat([batch["unlabeled"]["index"] for batch in batches])
    assert sorted(indices.tolist()) == [0, 1, 2, 3]


def test_without_unlabeled_no_unlabeled_image_is_read(tmp_path: Path) -> None:
    """Warm-up epochs: the unlabeled files could as well be missing."""
    _pascal_tree(tmp_path, labeled=2, unlabeled=4, val=1)
    config = _pascal_config(tmp_path)
    data = TrainingData(config, read_lists(config), seed=0, rank=0, world=1)
    for name in read_list(tmp_path / "unlabeled.txt"):
        (tmp_path / "JPEGImages" / f"{name}.jpg").unlink()
    batches = _batches(data, 0, False)
    assert [set(batch) for batch in batches] == [{"labeled", "skipped"}] * 2


# Mistakes in the data


def test_mask_with_foreign_values_is_named_with_its_values(tmp_path: Path) -> None:
    labels = np.array([[0, 20, 21], [255, 254, 21]], dtype=np.uint8)
    _save(tmp_path / "JPEGImages" / "a.jpg", _noise(2, 3))
    _save(tmp_path / "SegmentationClassAug" / "a.png", labels, palette=True)
    with pytest.raises(UserError) as caught:
        EvaluationSet(_pascal(tmp_path), ["a"])[0]
    message = str(caught.value)
    assert str(tmp_path / "SegmentationClassAug" / "a.png") in message
    assert "3 pixels" in message
    assert "21, 254" in message
    assert "0..20 or 255" in message


def test_mask_that_is_a_colour_picture_is_named(tmp_path: Path) -> None:
    """The painted VOC masks, not the class numbers."""
    _save(tmp_path / "JPEGImages" / "a.jpg", _noise(2, 3))
    _save(tmp_path / "SegmentationClassAug" / "a.png", _noise(2, 3))
    with pytest.raises(UserError, match=r"a\.png: expected a mask of one channel .*RGB"):
        EvaluationSet(_pascal(tmp_path), ["a"])[0]


@pytest.mark.parametrize("part", ["JPEGImages/2007_000001.jpg", "SegmentationClassAug/2007_000001.png"])
def test_missing_file_is_named(tmp_path: Path, part: str) -> None:
    names = _pascal_tree(tmp_path)
    (tmp_path / part).unlink()
    data = EvaluationSet(_pascal(tmp_path), names)
    assert len(data[0]) == 2
    with pytest.raises(UserError, match="no such file") as caught:
        data[1]
    assert str(tmp_path / part) in str(caught.value)


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _no_image(data: bytes) -> bytes:
    return b"<html>404 Not Found</html>"


def _nothing(data: bytes) -> bytes:
    return b""


def _short_header(data: bytes) -> bytes:
    assert data[12:16] == b"IHDR"
    return data[:11] + b"\x05" + data[12:]


def _short_chunk(data: bytes) -> bytes:
    at = data.index(b"IDAT")
    return data[: at - 1] + b"\x00" + data[at:]


@pytest.mark.parametrize("damage", [_truncated, _no_image, _nothing])
def test_broken_jpeg_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    names = _pascal_tree(tmp_path)
    path = tmp_path / "JPEGImages" / f"{names[0]}.jpg"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="cannot be read as an image") as caught:
        EvaluationSet(_pascal(tmp_path), names)[0]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", [_truncated, _no_image, _nothing, _short_header, _short_chunk])
def test_broken_png_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """Pillow has an exception of its own for each kind of damage, and not all are OSError."""
    _save(tmp_path / CITY_NAME, _noise(8, 9))
    mask = tmp_path / CITY_MASK.format("labelTrainIds")
    _save(mask, np.zeros((8, 9), dtype=np.uint8))
    mask.write_bytes(damage(mask.read_bytes()))
    with pytest.raises(UserError, match="cannot be read as an image") as caught:
        EvaluationSet(_cityscapes(tmp_path), [CITY_NAME])[0]
    assert str(mask) in str(caught.value)


def test_image_and_mask_of_different_sizes_are_named_with_both(tmp_path: Path) -> None:
    names = _pascal_tree(tmp_path)
    _save(tmp_path / "SegmentationClassAug" / f"{names[2]}.png", np.zeros((24, 20), dtype=np.uint8))
    for data, item in (
        (EvaluationSet(_pascal(tmp_path), names), 2),
        (LabeledSet(_pascal(tmp_path), names, WHOLE), Draw(2, (0,))),
    ):
        with pytest.raises(UserError) as caught:
            data[item]
        for part in (names[2], "24×20", "20×24"):
            assert part in str(caught.value)


def test_lists_that_cannot_serve_are_named(tmp_path: Path) -> None:
    """Empty, blank, missing and binary lists; blank lines and Windows line ends are no items."""
    for name, content in (("empty", b""), ("blank", b"\n  \n"), ("binary", b"\xff\xfe\x80")):
        (tmp_path / name).write_bytes(content)
    for name, reason in (("empty", "empty"), ("blank", "empty"), ("binary", "not a text"), ("gone", "No such file")):
        with pytest.raises(UserError, match=reason) as caught:
            read_list(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "good").write_bytes(b"2007_000032\r\n\r\n 2007_000039\n")
    assert read_list(tmp_path / "good") == ["2007_000032", "2007_000039"]


def test_unlabeled_list_lies_beside_the_labeled_one(tmp_path: Path) -> None:
    """labeled.txt → unlabeled.txt, unless another is named; other names need it named."""
    _pascal_tree(tmp_path, labeled=1, unlabeled=2, val=1)
    assert read_lists(_pascal_config(tmp_path)).unlabeled == ["2007_000001", "2007_000002"]
    named = f"dataset.train.unlabeled_list={tmp_path / 'val.txt'}"
    assert read_lists(_pascal_config(tmp_path, named)).unlabeled == ["2007_000003"]
    with pytest.raises(UserError, match=r"dataset\.train\.unlabeled_list: missing.*val\.txt"):
        read_lists(_pascal_config(tmp_path, f"dataset.train.data_list={tmp_path / 'val.txt'}"))
    assert read_lists(_pascal_config(tmp_path, "sup_only={}")).unlabeled == []


def test_check_lists_every_missing_file_and_compares_n_sup(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files of all three lists in one message; a wrong n_sup is a warning with both numbers."""
    _pascal_tree(tmp_path, labeled=2, unlabeled=2, val=1)
    config = _pascal_config(tmp_path, "dataset.n_sup=662")
    with caplog.at_level(logging.WARNING, logger="imas"):
        check_data(config)
    assert "662" in caplog.text
    assert "has 2 lines" in caplog.text
    gone = [
        tmp_path / "SegmentationClassAug" / "2007_000000.png",
        tmp_path / "JPEGImages" / "2007_000001.jpg",
    ]
    for path in gone:
        path.unlink()
    with pytest.raises(UserError, match="2 of the 2 labeled images cannot be used") as caught:
        check_data(config)
    for path in gone:
        assert str(path) in str(caught.value)


def test_check_reads_every_mask(tmp_path: Path) -> None:
    """A foreign value is found before the run, not in its tenth epoch."""
    _pascal_tree(tmp_path, labeled=2, unlabeled=2, val=2)
    _save(tmp_path / "SegmentationClassAug" / "2007_000005.png", np.full((20, 24), 77, dtype=np.uint8))
    with pytest.raises(UserError, match=r"2007_000005\.png: 480 pixels have the values 77"):
        check_data(_pascal_config(tmp_path))


# Weak views

BLOCK = 16  # of the marked image: 6 × 4 blocks, each with a colour and a class of its own


def _marked() -> tuple[Image.Image, Image.Image]:
    y, x = np.mgrid[: 4 * BLOCK, : 6 * BLOCK] // BLOCK
    image = np.stack([20 + 40 * x, 20 + 60 * y, np.full_like(x, 200)], -1)
    return Image.fromarray(image.astype(np.uint8)), Image.fromarray((6 * y + x).astype(np.uint8))


def _colour_of(labels: np.ndarray) -> np.ndarray:
    colours = np.stack([20 + 40 * (labels % 6), 20 + 60 * (labels // 6), np.full_like(labels, 200)], -1)
    colours[labels == 255] = (123, 116, 103)
    return colours


def _inner(labels: np.ndarray, margin: int = 2) -> np.ndarray:
    """Pixels whose surroundings are of one class: there, bilinear colours are pure."""
    inner = np.zeros(labels.shape, dtype=bool)
    inner[margin:-margin, margin:-margin] = True
    for dy in range(-margin, margin + 1):
        for dx in range(-margin, margin + 1):
            shifted = np.roll(labels, (dy, dx), axis=(0, 1))[margin:-margin, margin:-margin]
            inner[margin:-margin, margin:-margin] &= shifted == labels[margin:-margin, margin:-margin]
    return inner


@pytest.mark.parametrize("base", [96, (64, 96)], ids=["longer side", "pair"])
def test_image_and_mask_stay_together(base: int | tuple[int, int]) -> None:
    """Resize, flip, pad and crop move colours and classes alike; the padding is the mean colour and 255."""
    padded = 0
    for seed in range(60):
        image, mask, _ = weak_view(
            *_marked(), np.random.default_rng(seed), Geometry(base=base, scale=(0.5, 2.0), flip=True, crop=(72, 80))
        )
        assert image.size == mask.size == (80, 72)
        pixels, labels = np.asarray(image).astype(int), np.asarray(mask).astype(int)
        assert set(np.unique(labels)) <= {*range(24), 255}
        inner = _inner(labels)
        assert inner.mean() > 0.25
        np.testing.assert_array_equal(pixels[inner], _colour_of(labels)[inner])
        padding = labels == 255
        np.testing.assert_array_equal(pixels[padding], np.broadcast_to((123, 116, 103), (padding.sum(), 3)))
        padded += padding.any()
    assert 10 < padded < 60  # both kinds were seen


def test_padding_lies_at_bottom_and_right_only() -> None:
    """The image keeps the upper left corner, unchanged, however much is padded."""
    for width, height in ((30, 20), (50, 20), (30, 40), (7, 3)):
        image, mask = Image.fromarray(_noise(height, width)), Image.fromarray(np.full((height, width), 5, np.uint8))
        out, label, _ = weak_view(image, mask, np.random.default_rng(0), Geometry(crop=(40, 50)))
        expected = np.broadcast_to(np.array((123, 116, 103), dtype=np.uint8), (40, 50, 3)).copy()
        expected[:height, :width] = np.asarray(image)
        np.testing.assert_array_equal(np.asarray(out), expected)
        expected_label = np.full((40, 50), 255)
        expected_label[:height, :width] = 5
        np.testing.assert_array_equal(np.asarray(label), expected_label)


def test_the_mask_is_padded_with_the_ignore_label() -> None:
    _, label, _ = weak_view(
        Image.new("RGB", (2, 2)),
        Image.new("L", (2, 2)),
        np.random.default_rng(0),
        Geometry(crop=(3, 2), ignore_index=254),
    )
    assert np.asarray(label).tolist() == [[0, 0], [0, 0], [254, 254]]


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (500, 333), (50, 50)])
def test_integer_base_draws_the_longer_side_uniformly(width: int, height: int) -> None:
    """Integers of [int(base·lo), int(base·hi)], ends included; the shorter side keeps the aspect, rounded."""
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(4000):
        size = resized_size(width, height, 51, (0.5, 1.3), rng)
        longer, shorter = max(size), min(size)
        assert (size[0] >= size[1]) == (width >= height)
        assert abs(shorter - longer * min(width, height) / max(width, height)) <= 0.5
        counts[longer] += 1
    assert (min(counts), max(counts)) == (25, 66)
    assert _chi_square(counts, 42) < 90  # 41 degrees of freedom: beyond the 99.99th percentile


def test_pair_base_draws_one_factor_for_both_sides() -> None:
    """Whatever the image's size: (int(h·s), int(w·s)) with s uniform between lo and hi."""
    rng = np.random.default_rng(0)
    sizes = [resized_size(70, 10, (1024, 2048), (0.5, 2.0), rng) for _ in range(3000)]
    assert all(width // 2 == height for width, height in sizes)
    factors = np.array([width / 2048 for width, _ in sizes])
    assert factors.min() >= 0.499
    assert factors.max() < 2
    histogram = Counter(((factors - 0.4995) // 0.15).astype(int).tolist())
    assert _chi_square(histogram, 10) < 34


def test_weak_view_resizes_bilinearly_and_masks_to_the_nearest() -> None:
    """One possible size, compared with Pillow's own calls."""
    image, mask = _marked()
    out, label, _ = weak_view(image, mask, np.random.default_rng(0), Geometry(base=60, scale=(1, 1)))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(image.resize((60, 40), Image.Resampling.BILINEAR)))
    np.testing.assert_array_equal(np.asarray(label), np.asarray(mask.resize((60, 40), Image.Resampling.NEAREST)))


def test_half_of_the_views_are_flipped() -> None:
    image, mask = _marked()
    flips = 0
    for seed in range(400):
        out, label, _ = weak_view(image, mask, np.random.default_rng(seed), Geometry(flip=True))
        flipped = np.asarray(label)[0, 0] == 5
        reference = (ImageOps.mirror(image), ImageOps.mirror(mask)) if flipped else (image, mask)
        assert (out.tobytes(), label.tobytes()) == (reference[0].tobytes(), reference[1].tobytes())
        flips += flipped
    assert 160 < flips < 240
    for seed in range(20):
        assert weak_view(image, mask, np.random.default_rng(seed), Geometry())[0].tobytes() == image.tobytes()


def test_windows_are_uniform_over_all_positions() -> None:
    """8 × 4 windows of 5 × 7 pixels in 12 × 10, first and last included."""
    y, x = np.mgrid[:10, :12]
    image, mask = Image.fromarray(_noise(10, 12)), Image.fromarray((12 * y + x).astype(np.uint8))
    rng = np.random.default_rng(0)
    corners = Counter()
    for _ in range(960):
        out, label, _ = weak_view(image, mask, rng, Geometry(crop=(7, 5)))
        top, left = divmod(int(np.asarray(label)[0, 0]), 12)
        np.testing.assert_array_equal(np.asarray(out), np.asarray(image)[top : top + 7, left : left + 5])
        corners[top, left] += 1
    assert set(corners) == {(top, left) for top in range(4) for left in range(8)}
    assert _chi_square(corners, 32) < 75


def test_center_windows_are_in_the_middle() -> None:
    image = Image.fromarray(_noise(10, 12))
    out, _, _ = weak_view(image, None, np.random.default_rng(0), Geometry(crop=(6, 4), crop_type="center"))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(image)[2:8, 4:8])


def test_the_draws_are_the_same_with_and_without_a_mask() -> None:
    image, mask = _marked()
    options = {"base": 96, "scale": (0.5, 2.0), "flip": True, "crop": (72, 80)}
    for seed in range(30):
        with_mask, without = np.random.default_rng(seed), np.random.default_rng(seed)
        first, _, _ = weak_view(image, mask, with_mask, Geometry(**options))
        second, none, _ = weak_view(image, None, without, Geometry(**options))
        assert none is None
        assert first.tobytes() == second.tobytes()
        assert with_mask.random() == without.random()


# Strong views

FIXED_U = [0.0, 0.26, 0.5, 0.77, 0.9999]

# The spec's table once more, in Pillow's own calls. Hue has a test of its own.
EXPECTED = {
    "identity": lambda image, u: image.copy(),
    "autocontrast": lambda image, u: ImageOps.autocontrast(image),
    "equalize": lambda image, u: ImageOps.equalize(image),
    "invert": lambda image, u: ImageOps.invert(image),
    "blur": lambda image, u: image.filter(ImageFilter.GaussianBlur(radius=0.1 + 1.9 * 0.999 * u)),
    "contrast": lambda image, u: ImageEnhance.Contrast(image).enhance(0.95 - 0.85 * 0.999 * u),
    "brightness": lambda image, u: ImageEnhance.Brightness(image).enhance(0.95 - 0.85 * 0.999 * u),
    "colour": lambda image, u: ImageEnhance.Color(image).enhance(0.95 - 0.85 * 0.999 * u),
    "sharpness": lambda image, u: ImageEnhance.Sharpness(image).enhance(0.95 - 0.85 * 0.999 * u),
    "posterize": lambda image, u: ImageOps.posterize(image, 8 - max(1, math.ceil(4 * 0.999 * u))),
    "solarize": lambda image, u: ImageOps.solarize(image, max(1, min(256, 256 - math.ceil(255 * 0.999 * u)))),
}


def _photo() -> Image.Image:
    """Smooth, noisy, dark and bright parts."""
    rng = np.random.default_rng(3)
    return Image.fromarray(np.clip(_noise(24, 32, 3) * 0.7 + rng.normal(30, 12, (24, 32, 3)), 0, 255).astype(np.uint8))


def test_there_are_the_twelve_operations_of_the_spec() -> None:
    assert set(OPERATIONS) == {*EXPECTED, "hue"}


@pytest.mark.parametrize("u", FIXED_U)
@pytest.mark.parametrize("name", EXPECTED)
def test_operation_equals_its_definition(name: str, u: float) -> None:
    out = OPERATIONS[name](_photo(), u, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(EXPECTED[name](_photo(), u)))


def test_posterize_keeps_between_four_and_seven_bits() -> None:
    """The definition in figures: even u = 0 takes one bit, and never more than four are taken."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    bits = [math.log2(len(np.unique(OPERATIONS["posterize"](ramp, u, None)))) for u in (0, 0.25, 0.26, 0.7, 0.999)]
    assert bits == [7, 7, 6, 5, 4]


def test_solarize_inverts_from_the_threshold_on() -> None:
    """The definition in figures: u = 0 changes nothing, the largest u leaves black alone."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    values = np.arange(256)
    for u, threshold in ((0.0, 256), (0.5, 128), (0.9999, 1)):
        out = np.asarray(OPERATIONS["solarize"](ramp, u, None)).reshape(256, 3)[:, 0]
        np.testing.assert_array_equal(out, np.where(values < threshold, values, 255 - values))


@pytest.mark.parametrize("u", FIXED_U)
def test_hue_turns_the_colour_circle_to_either_side(u: float) -> None:
    """±0.5·0.999·u of the circle, both signs as often, saturation and brightness as they were; on current NumPy."""
    colours = np.array([[(220, 40, 30), (30, 200, 60)], [(40, 60, 230), (200, 190, 20)]], dtype=np.uint8)
    image = Image.fromarray(colours.repeat(4, 0).repeat(4, 1))
    before = np.asarray(image.convert("HSV")).astype(int)
    rng = np.random.default_rng(0)
    signs = Counter()
    for _ in range(100):
        out = OPERATIONS["hue"](image, u, rng)
        after = np.asarray(out.convert("HSV")).astype(int)
        assert np.abs(after - before)[..., 1:].max() <= 4
        turned = after[..., 0] - before[..., 0]
        wanted = 0.5 * 0.999 * u * 256
        off = {sign: np.abs((turned - sign * wanted + 128) % 256 - 128).max() for sign in (1, -1)}
        assert min(off.values()) <= 3
        signs[min(off, key=off.get)] += 1
    if 0.1 < u < 0.9:
        assert 25 < signs[1] < 75


@pytest.mark.parametrize("name", [*EXPECTED, "hue"])
def test_operation_keeps_size_mode_and_its_input(name: str) -> None:
    for u in FIXED_U:
        image = _photo()
        out = OPERATIONS[name](image, u, np.random.default_rng(0))
        assert (out.size, out.mode) == (image.size, "RGB")
        assert image.tobytes() == _photo().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_strong_view_keeps_size_mode_and_its_input(kind: str) -> None:
    image, rng, changed = _photo(), np.random.default_rng(0), 0
    for _ in range(100):
        out = strong_view(image, StrongAug(type=kind), rng)
        assert (out.size, out.mode) == (image.size, "RGB")
        assert image.tobytes() == _photo().tobytes()
        changed += out.tobytes() != image.tobytes()
    assert changed > 80


def test_operations_are_drawn_uniformly_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, pairs of names (each of 144 alike, doubles among them), and strengths u ~ U(0, 1)."""
    calls: list[tuple[str, float]] = []

    def recorder(name: str) -> Callable:
        return lambda image, u, rng: calls.append((name, u)) or image

    monkeypatch.setattr(strong, "OPERATIONS", {name: recorder(name) for name in OPERATIONS})
    rng = np.random.default_rng(0)
    for _ in range(4000):
        strong_view(None, StrongAug(), rng)  # which the recorders only hand on
    assert len(calls) == 8000
    names = [name for name, _ in calls]
    assert _chi_square(Counter(names), 12) < 38
    assert _chi_square(Counter(zip(names[::2], names[1::2])), 144) < 220
    assert _chi_square(Counter(int(u * 10) for _, u in calls), 10) < 34
    first_half = [u for name, u in calls if name in list(OPERATIONS)[:6]]
    assert abs(np.mean(first_half) - 0.5) < 0.02  # the strength does not hang on the operation


@pytest.mark.parametrize("count", [1, 3])
def test_strong_view_applies_as_many_operations_as_asked(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """One after the other: each reads what the one before returned."""
    monkeypatch.setattr(strong, "OPERATIONS", {"add": lambda image, u, rng: image + 1})
    assert strong_view(0, StrongAug(num_augs=count), np.random.default_rng(0)) == count


def test_strong_view_is_the_weak_crop_with_other_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same geometry: with inversion as the only operation, weak + strong is white everywhere."""
    _save(tmp_path / "JPEGImages" / "a.jpg", _noise(20, 24))
    geometry = Geometry(base=24, scale=(0.5, 2.0), flip=True, crop=(16, 16), crop_type="rand", ignore_index=255)
    monkeypatch.setattr(strong, "OPERATIONS", {"invert": OPERATIONS["invert"]})
    data = UnlabeledSet(_pascal(tmp_path), ["a"], geometry, 1, StrongAug(num_augs=1))
    for seed in range(10):
        sample = data[Draw(0, (seed,))]
        assert (sample["weak"].int() + sample["strong"][0].int() == 255).all()
    assert UnlabeledSet(_pascal(tmp_path), ["a"], geometry)[Draw(0, (0,))]["strong"] == []


def test_several_strong_views_are_drawn_independently(tmp_path: Path) -> None:
    _save(tmp_path / "JPEGImages" / "a.jpg", _noise(20, 24))
    data = UnlabeledSet(_pascal(tmp_path), ["a"], WHOLE, strong=2, strong_aug=StrongAug())
    pairs = [data[Draw(0, (seed,))]["strong"] for seed in range(10)]
    assert all(len(pair) == 2 for pair in pairs) and any(not torch.equal(*pair) for pair in pairs)


def test_padding_is_known_on_the_device(tmp_path: Path) -> None:
    """An image of 20×24 in a crop of 32×30: the rest is padding, at the bottom and at the right."""
    _save(tmp_path / "JPEGImages" / "a.jpg", _noise(20, 24))
    data = UnlabeledSet(_pascal(tmp_path), ["a"], WHOLE._replace(crop=(32, 30)))
    batch = {"labeled": stacked([{"image": torch.zeros(3, 4, 4), "label": torch.zeros(4, 4), "strong": []}])}
    batch["unlabeled"] = stacked([data[Draw(0, (0,))]])
    _, unlabeled = to_device(batch, lambda images: images.float(), torch.device("cpu"))
    expected = torch.zeros(1, 32, 30, dtype=torch.bool)
    expected[:, :20, :24] = True
    assert torch.equal(unlabeled.valid, expected)


def test_jitter_leaves_unchanged_and_grey_as_often_as_it_should() -> None:
    image, rng, counts = _photo(), np.random.default_rng(0), Counter()
    for _ in range(400):
        out = np.asarray(strong_view(image, StrongAug(type="jitter"), rng)).astype(int)
        counts["unchanged"] += (out == np.asarray(image)).all()
        counts["grey"] += (out[..., 0] == out[..., 1]).all() and (out[..., 1] == out[..., 2]).all()
    assert 12 < counts["unchanged"] < 55  # 0.2 · 0.8 · 0.5 = 0.08
    assert 55 < counts["grey"] < 110  # 0.2


# Sampling


@pytest.mark.parametrize(("count", "wanted"), [(662, 9920), (3, 10), (5, 15), (7, 8), (1, 4), (4, 4)])
def test_oversampling_draws_from_the_repeated_list(count: int, wanted: int) -> None:
    """U of the ceil(U/L)-fold list, without replacement: no index more than ceil(U/L) times."""
    items = oversample(count, wanted, seed=1)
    counts = Counter(items)
    assert len(items) == wanted
    assert set(items) <= set(range(count))
    assert max(counts.values()) <= math.ceil(wanted / count)
    if wanted % count == 0:
        assert set(counts.values()) == {wanted // count}
        assert len(counts) == count
    assert items == oversample(count, wanted, seed=1)
    if count > 1:
        assert any(oversample(count, wanted, seed=seed) != items for seed in (2, 3, 4))


def test_oversampling_is_a_uniform_draw() -> None:
    """L = 3, U = 4: of the 6 entries every pair is left out alike, so 3 times in 15 an image is left out whole."""
    absent = Counter()
    for seed in range(1500):
        absent.update(set(range(3)) - set(oversample(3, 4, seed)))
    assert 240 < sum(absent.values()) < 360
    assert _chi_square(absent, 3) < 19


@pytest.mark.parametrize(("count", "wanted"), [(1488, 1487), (10, 3)])
def test_more_labeled_than_wanted_are_distinct(count: int, wanted: int) -> None:
    """L > U: U different labeled images, other ones for another seed."""
    items = oversample(count, wanted, seed=0)
    assert len(set(items)) == len(items) == wanted
    assert any(set(oversample(count, wanted, seed)) != set(items) for seed in (1, 2, 3))


def _sampler(items: int, batch: int, *, size: int | None = None, epoch: int = 0, **kwargs) -> EpochSampler:
    options = {"seed": 0, "stream": "unlabeled", "rank": 0, "world": 1} | kwargs
    sampler = EpochSampler(list(range(items)), size or items, batch, **options)
    sampler.epoch = epoch
    return sampler


# (images, GPUs, batch, iterations), as the authors' logs have them
PUBLISHED_IMAS = [
    (2789, 4, 4, 174), (2789, 8, 2, 174), (2603, 4, 4, 162), (2603, 8, 2, 163), (2231, 4, 4, 139), (1487, 8, 2, 93),
    (9920, 4, 4, 620), (9259, 4, 4, 578), (7936, 4, 4, 496), (9118, 4, 4, 570), (10399, 4, 4, 650), (10490, 4, 4, 655),
]  # fmt: skip
PUBLISHED_SUP_ONLY = [
    (662, 2, 8, 42, False), (1323, 2, 8, 83, False), (2646, 2, 8, 166, False), (92, 2, 8, 6, False),
    (183, 2, 8, 12, False), (186, 2, 8, 11, True), (372, 2, 8, 23, True), (744, 2, 8, 46, True), (1488, 2, 8, 93, True),
]  # fmt: skip


@pytest.mark.parametrize(("count", "world", "batch", "expected"), PUBLISHED_IMAS)
def test_iterations_per_epoch_are_the_published_ones(count: int, world: int, batch: int, expected: int) -> None:
    """floor(ceil(U / world) / batch), and as many batches come, all full, on every rank."""
    assert expected == math.ceil(count / world) // batch
    for rank in (0, world - 1):
        sampler = _sampler(count, batch, rank=rank, world=world)
        assert len(sampler) == expected
        assert [len(draws) for draws in sampler] == [batch] * expected


@pytest.mark.parametrize(("count", "world", "batch", "expected", "drop_last"), PUBLISHED_SUP_ONLY)
def test_sup_only_iterations_are_the_published_ones(
    count: int, world: int, batch: int, expected: int, drop_last: bool
) -> None:
    """Pascal keeps the last short batch, Cityscapes drops it."""
    sampler = _sampler(count, batch, world=world, stream="labeled", drop_last=drop_last)
    sizes = [len(draws) for draws in sampler]
    assert len(sampler) == len(sizes) == expected
    assert sizes[:-1] == [batch] * (expected - 1)
    assert sum(sizes) == (expected * batch if drop_last else math.ceil(count / world))


def test_a_last_batch_of_one_image_is_left_out() -> None:
    """BatchNorm cannot train on it; of two images it can."""
    assert [len(_sampler(count, 8, drop_last=False)) for count in (8, 9, 10)] == [1, 1, 2]


def test_sup_only_of_a_config_keeps_the_short_batch_on_pascal(tmp_path: Path) -> None:
    """Five images in batches of two or three: one pass over the list, none of them twice."""
    _pascal_tree(tmp_path, labeled=5, val=1)
    config = _pascal_config(tmp_path, "sup_only={}", "dataset.train.batch_size=3")
    data = TrainingData(config, read_lists(config), seed=0, rank=0, world=1)
    assert [len(batch["labeled"]["image"]) for batch in _batches(data, 0, False)] == [3, 2]
    assert sorted(draw.index for draws in data.labeled_sampler for draw in draws) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("count", "world"), [(24, 4), (25, 4), (26, 3), (3, 4)])
def test_ranks_share_an_epoch_out(count: int, world: int) -> None:
    """Every item on some rank; none on two, but for those that fill the last round up; equal shares."""
    shares = [
        [draw.index for draws in _sampler(count, 1, rank=rank, world=world, epoch=3) for draw in draws]
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {math.ceil(count / world)}
    counts = Counter(index for share in shares for index in share)
    assert set(counts) == set(range(count))
    assert sum(counts.values()) - count == -count % world
    if count % world == 0:
        assert set(counts.values()) == {1}


def test_order_changes_with_epoch_and_seed_and_repeats_for_both() -> None:
    """A resumed run deals epoch 5 as the straight one did, whatever came before."""

    def order(**kwargs) -> list[Draw]:
        return [draw for draws in _sampler(40, 4, **kwargs) for draw in draws]

    assert order(epoch=5, seed=1) == order(epoch=5, seed=1)
    orders = [order(epoch=epoch, seed=seed) for epoch in range(3) for seed in range(3)]
    assert len({tuple(draw.index for draw in draws) for draws in orders}) == 9
    for draws in orders:
        assert sorted(draw.index for draw in draws) == list(range(40))
    sampler = _sampler(40, 4)
    before = list(sampler)
    sampler.epoch = 1
    assert list(sampler) != before
    sampler.epoch = 0
    assert list(sampler) == before


@pytest.mark.parametrize("size", [4, 6, 10, 17])
def test_epochs_of_another_size_go_on_through_the_list(size: int) -> None:
    """With an epoch size, whole passes over the items follow one another, each in an order of its own."""
    stream = [draw.index for epoch in range(10) for draws in _sampler(10, 1, size=size, epoch=epoch) for draw in draws]
    assert len(stream) == 10 * size
    passes = [stream[start : start + 10] for start in range(0, 10 * size, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == size


def test_no_two_draws_share_a_seed() -> None:
    """Over ranks, epochs, streams and positions, repeated items included: in name and in the numbers drawn."""
    seeds = [
        draw.seed
        for stream in ("labeled", "unlabeled")
        for epoch in range(4)
        for rank in range(3)
        for run in (0, 1)
        for draws in _sampler(10, 2, rank=rank, world=3, epoch=epoch, stream=stream, seed=run)
        for draw in draws
    ]
    assert len(seeds) == 2 * 4 * 3 * 2 * 4
    assert len(set(seeds)) == len(seeds)
    assert len({np.random.default_rng(seed).random() for seed in seeds}) == len(seeds)


def test_orders_and_draws_come_from_different_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator that shuffles an epoch must not be the one that augments one of its images."""
    made: list[tuple[int, ...]] = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    oversample(3, 10, seed=7)
    seeds = [
        draw.seed
        for stream in ("labeled", "unlabeled")
        for epoch in range(2)
        for draws in _sampler(10, 2, epoch=epoch, stream=stream, seed=7)
        for draw in draws
    ]
    assert len(made) == 5
    states = Counter(tuple(np.random.SeedSequence(seed).generate_state(4)) for seed in [*made, *seeds])
    assert set(states.values()) == {1}


def _equal(first: Any, second: Any) -> bool:
    """Whether batches, dicts and lists of tensors, are the same."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return torch.equal(first, second)


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """Two epochs with 0 and 2 workers, every tensor; the epochs themselves differ, and so do the ranks."""

    def epochs(workers: int, rank: int = 0) -> list[list[dict]]:
        config = _shapes_config(tmp_path, f"dataset.workers={workers}")
        data = TrainingData(config, read_lists(config), seed=4, rank=rank, world=2)
        return [_batches(data, number, True) for number in range(2)]

    alone, with_workers = epochs(0), epochs(2)
    assert [len(batches) for batches in alone] == [2, 2]
    assert _equal(alone[0], with_workers[0])
    assert _equal(alone[1], with_workers[1])
    assert not _equal(alone[0], alone[1])
    assert not _equal(alone[0], epochs(0, rank=1)[0])


def test_an_epoch_read_alone_equals_the_same_epoch_of_a_whole_run(tmp_path: Path) -> None:
    """What a resumed run reads, also where the run began with epochs of labeled images alone."""
    config = _shapes_config(tmp_path)
    straight, resumed = (TrainingData(config, read_lists(config), seed=4, rank=0, world=1) for _ in range(2))
    _batches(straight, 0, False)
    assert _equal(_batches(straight, 1, True), _batches(resumed, 1, True))


def test_updates_that_were_done_are_left_out_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of an epoch is that of the whole epoch, and no image of its beginning is decoded."""
    config = _shapes_config(tmp_path)
    data = TrainingData(config, read_lists(config), seed=4, rank=0, world=1)
    whole = _batches(data, 1, True)
    read = []
    image = ShapesSource.image
    monkeypatch.setattr(ShapesSource, "image", lambda source, name: read.append(name) or image(source, name))
    rest = [batch for update in data.epoch(1, True, done=3) for batch in update]
    assert len(whole) == 4 and _equal(rest, whole[3:])
    assert len(read) == 2 * config.dataset.train.batch_size
    assert list(data.epoch(1, True, done=4)) == []


def test_epoch_size_sets_the_iterations(tmp_path: Path) -> None:
    """As many labeled and unlabeled draws an epoch, more than there are images or fewer."""
    for size, iterations in ((20, 10), (4, 2)):
        config = _shapes_config(tmp_path, f"dataset.train.epoch_size={size}")
        data = TrainingData(config, read_lists(config), seed=0, rank=0, world=1)
        assert len(data) == len(_batches(data, 0, True)) == iterations


def test_with_an_epoch_size_the_baseline_sees_what_the_method_sees(tmp_path: Path) -> None:
    """The same iterations, and the same labeled views in the same order; without it far fewer iterations."""
    size = "dataset.train.epoch_size=20"
    ours, baseline = _shapes_config(tmp_path, size), _shapes_config(tmp_path, size, "sup_only={}")
    method, sup_only = (TrainingData(each, read_lists(each), seed=3, rank=0, world=1) for each in (ours, baseline))
    assert len(method) == len(sup_only) == 10
    for epoch in range(2):
        seen, also = (_batches(data, epoch, data is method) for data in (method, sup_only))
        assert _equal([batch["labeled"] for batch in seen], [batch["labeled"] for batch in also])
    short = _shapes_config(tmp_path, "sup_only={}")
    assert len(TrainingData(short, read_lists(short), seed=3, rank=0, world=1)) < 4


def test_accumulated_batches_are_those_of_a_run_without(tmp_path: Path) -> None:
    """Nine images in batches of two, two an update: the first four batches, as two updates."""
    one, two = (_shapes_config(tmp_path, f"trainer.accumulate={count}") for count in (1, 2))
    data = TrainingData(two, read_lists(two), seed=4, rank=0, world=1)
    updates = list(data.epoch(0, True))
    assert len(data) == len(updates) == 2 and [len(update) for update in updates] == [2, 2]
    alone = TrainingData(one, read_lists(one), seed=4, rank=0, world=1)
    assert _equal(_batches(data, 0, True), _batches(alone, 0, True))


def test_sup_only_keeps_a_short_last_update_on_pascal(tmp_path: Path) -> None:
    """Eight images in batches of two, three batches an update: the last update has one."""
    _pascal_tree(tmp_path, labeled=8, val=1)
    config = _pascal_config(tmp_path, "sup_only={}", "trainer.accumulate=3")
    data = TrainingData(config, read_lists(config), seed=0, rank=0, world=1)
    assert [len(update) for update in data.epoch(0, False)] == [3, 1] and len(data) == 2


def test_too_few_images_for_one_batch_are_explained(tmp_path: Path) -> None:
    config = _shapes_config(tmp_path, "dataset.train.batch_size=4")
    with pytest.raises(UserError, match=r"dataset\.train\.batch_size: 9 images .*over 3 process.* batch of 4"):
        TrainingData(config, read_lists(config), seed=0, rank=0, world=3)
    config = _shapes_config(tmp_path, "trainer.accumulate=5")
    with pytest.raises(UserError, match="one batch of 5 batches of 2"):
        TrainingData(config, read_lists(config), seed=0, rank=0, world=1)


# Evaluation, errors, normalisation


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_validation_image_is_seen_once_over_all_ranks(tmp_path: Path, world: int) -> None:
    """Whole and unchanged, sizes mixed, also where the ranks do not divide them or outnumber them."""
    _pascal_tree(tmp_path, labeled=1, val=3, sizes=True)
    config = _pascal_config(tmp_path, "sup_only={}", "dataset.val.batch_size=2")
    names = read_lists(config).val
    seen = Counter()
    for rank in range(world):
        for images, labels in evaluation_batches(evaluation_loader(config, names, rank, world)):
            assert images.shape[-2:] == labels.shape[-2:]
            seen.update(labels[:, 5, 5].tolist())
    assert seen == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_mistake_in_the_data_leaves_the_loader_as_its_message_alone(tmp_path: Path, workers: int) -> None:
    """With and without a worker process the user reads the same line, and no traceback."""
    names = _pascal_tree(tmp_path, labeled=2, unlabeled=2, val=1)
    for name in [*names, "2007_000004"]:
        _save(tmp_path / "SegmentationClassAug" / f"{name}.png", np.full((20, 24), 99, dtype=np.uint8))
    config = _pascal_config(tmp_path, f"dataset.workers={workers}")
    data = TrainingData(config, read_lists(config), seed=0, rank=0, world=1)
    for batches in (
        data.epoch(0, unlabeled=True),
        data.epoch(0, unlabeled=False),
        evaluation_batches(evaluation_loader(config, ["2007_000004"], 0, 1)),
    ):
        with pytest.raises(UserError) as caught:
            list(batches)
        message = str(caught.value)
        assert message.startswith(str(tmp_path / "SegmentationClassAug" / "2007_00000"))
        assert "the values 99; expected classes 0..20 or 255 (ignored)" in message
        assert "Traceback" not in message
        assert "\n" not in message


@pytest.mark.parametrize("unit", [1.0, 255.0])
def test_normalise_equals_torchvision_in_both_units(unit: float) -> None:
    """mean and std of values in 0..1, or, as the published files have them, in 0..255."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = [Image.fromarray(_noise(6, 7, seed)) for seed in (1, 5)]
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([reference(image) for image in images])
    stored = torch.stack([transforms.functional.pil_to_tensor(image) for image in images])
    before = stored.clone()
    out = Normalise([unit * value for value in mean], [unit * value for value in std])(stored)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert out.dtype == torch.float32
    assert torch.equal(stored, before)
