"""Fast loading gives what plain loading gives: views against the plain twin, the cache against the files."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import loading, plain
from imas.data.cache import CachedSource
from imas.data.catalog import open_source
from imas.data.dataset import Draw, LabeledSet
from imas.data.source import DataError, FileSource
from imas.data.weak import Geometry, resized_size, weak_view
from imas.errors import UserError
from imas.schema import Dataset, TrainData


def _noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _places(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """Masks that hold every pixel's column, and its row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(columns), Image.fromarray(rows)


def _both(image: Image.Image, mask: Image.Image | None, seed: int, options: dict) -> tuple[np.ndarray, ...]:
    """Our image and mask and those of the plain twin, from equal generators that must end equal."""
    ours, twin = np.random.default_rng(seed), np.random.default_rng(seed)
    views = *weak_view(image, mask, ours, Geometry(**options))[:2], *plain.weak_view(image, mask, twin, **options)
    assert ours.random() == twin.random()
    return tuple(np.asarray(view).astype(int) for view in views)


def _random_case(seed: int) -> tuple[int, int, dict]:
    """Width, height and options: any proportion of image, base and crop."""
    rng = np.random.default_rng((seed, 99))
    width, height, *numbers = rng.integers(8, 90, 6).tolist()
    return width, height, {
        "base": (numbers[0], numbers[1]) if rng.random() < 0.5 else numbers[0],
        "scale": (0.5, 2.0),
        "flip": bool(rng.random() < 0.7),
        "crop": (numbers[2], numbers[3]),
        "crop_type": "rand" if rng.random() < 0.7 else "center",
    }  # fmt: skip


def _ties(source: int, resized: int) -> int:
    """How many positions of a resized side have their middle so near the border of two source pixels that rounding
    decides which is the nearest.
    """
    middles = (np.arange(resized) + 0.5) * source / resized
    return int((np.abs(middles - middles.round()) < 1e-3).sum())


def test_views_are_the_twins_but_for_rounding() -> None:
    """400 geometries: image within two grey levels of noise; columns and rows of the mask the same ones, but where
    the nearest pixel is decided by rounding: there it may be the neighbour. So sizes, flips and windows are the same.
    """
    padded = flipped = exact = 0
    for seed in range(400):
        width, height, options = _random_case(seed)
        image = _noise(np.random.default_rng(seed), width, height)
        size = resized_size(width, height, options["base"], options["scale"], np.random.default_rng(seed))
        for axis, mask in enumerate(_places(width, height)):
            view, labels, expected, expected_labels = _both(image, mask, seed, options)
            assert view.shape[:2] == labels.shape == options["crop"]
            assert np.abs(view - expected).max() <= 2
            assert ((labels == 255) == (expected_labels == 255)).all()
            off = np.abs(labels - expected_labels)
            assert off.max() <= 1
            assert off.any(axis=axis).sum() <= _ties((width, height)[axis], size[axis])
            exact += not off.any()
            padded += (labels == 255).any()
            flipped += axis == 0 and labels[0, 0] > labels[0, 1]
    assert exact > 600
    assert 100 < padded < 700
    assert 50 < flipped < 250


@pytest.mark.parametrize(
    "change",
    [{"scale": None}, {"crop": None}, {"crop": (300, 300)}, {"base": 64, "scale": (1, 1)}],
    ids=["no resize", "no crop", "whole image in the crop", "resize to the same size"],
)
def test_views_are_bitwise_the_twins_where_nothing_is_left_out(change: dict) -> None:
    for seed in range(60):
        options = _random_case(seed)[2] | change
        mask = _places(64, 40)[seed % 2]
        view, labels, expected, expected_labels = _both(
            _noise(np.random.default_rng(seed), 64, 40), mask, seed, options
        )
        np.testing.assert_array_equal(view, expected)
        np.testing.assert_array_equal(labels, expected_labels)


def test_few_pixels_of_a_picture_differ_at_all() -> None:
    """Of a VOC-like picture at the published geometry: a hundredth of the image, a thousandth of the mask."""
    case = loading.CASES["pascal"]
    image, mask = loading.scene(case, np.random.default_rng(0))
    apart = []
    for seed in range(40):
        view, labels, expected, expected_labels = _both(image, mask, seed, case.geometry._asdict())
        apart.append(((view != expected).mean(), (labels != expected_labels).mean()))
    assert (np.mean(apart, axis=0) < (0.01, 0.001)).all()


def test_image_and_mask_stay_together_to_the_pixel() -> None:
    """Red counts columns, green rows, and the masks hold them too: wherever a pixel goes, all go."""
    columns, rows = _places(120, 80)
    image = Image.merge("RGB", [columns.point(lambda v: 2 * v), rows.point(lambda v: 2 * v), Image.new("L", (120, 80))])
    for seed in range(60):
        options = _random_case(seed)[2]
        for channel, (mask, side) in enumerate(((columns, 120), (rows, 80))):
            view, label, _ = weak_view(image, mask, np.random.default_rng(seed), Geometry(**options))
            colours, labels = np.asarray(view).astype(int), np.asarray(label).astype(int)
            padding = labels == 255
            assert (colours[padding] == (123, 116, 103)).all()
            # At an edge, averages lean inwards; elsewhere the nearest pixel is within half a pixel of the place.
            inner = ~padding & (labels >= 8) & (labels < side - 8)
            assert (np.abs(colours[..., channel] - 2 * labels)[inner] <= 2).all()


# The cache


def _cityscapes(root: Path) -> tuple[FileSource, list[str]]:
    """Three small images in the layout of Cityscapes, and their names."""
    rng, names = np.random.default_rng(0), [f"leftImg8bit/train/a/{number}_leftImg8bit.png" for number in range(3)]
    for number, name in enumerate(names):
        mask = Image.fromarray(rng.integers(0, 19, (16, 20 + number), dtype=np.uint8))
        for path, picture in zip(
            plain.PlainSource("cityscapes", root).paths(name), (_noise(rng, 20 + number, 16), mask)
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return open_source(Dataset("cityscapes", TrainData()), str(root)), names


def test_cache_gives_what_the_source_gave_without_its_files(tmp_path: Path) -> None:
    """Other names, and masks that were not asked for, still come from the source."""
    source, names = _cityscapes(tmp_path)
    expected = [(np.array(source.image(name)), np.array(source.mask(name))) for name in names]
    cached = CachedSource(source, names[:2], names[1:2])
    images, masks = zip(*map(source.files, [tmp_path] * 3, names))
    for path in (*images[:2], masks[1]):
        path.unlink()
    for name, (image, mask) in zip(names, expected):
        view = cached.image(name)
        assert view.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(view), image)
        label = cached.mask(name)
        assert label.mode == "L"
        np.testing.assert_array_equal(np.asarray(label), mask)
    missing = [path for name in names for path in source.missing(name, mask=True)]
    assert missing == [images[0], images[1], masks[1]]


def test_views_leave_the_cache_as_it_is(tmp_path: Path) -> None:
    source, names = _cityscapes(tmp_path)
    cached = CachedSource(source, names, names)
    view, label, _ = weak_view(cached.image(names[0]), cached.mask(names[0]), np.random.default_rng(0), Geometry())
    view.paste((1, 2, 3), (0, 0, 9, 9))
    label.paste(7, (0, 0, 9, 9))
    np.testing.assert_array_equal(np.asarray(cached.image(names[0])), np.asarray(source.image(names[0])))
    np.testing.assert_array_equal(np.asarray(cached.mask(names[0])), np.asarray(source.mask(names[0])))


def test_broken_files_are_reported_when_they_are_asked_for(tmp_path: Path) -> None:
    """As without the cache: at the time of reading, where ``on_error`` decides. The others are kept."""
    source, names = _cityscapes(tmp_path)
    broken, foreign = source.files(tmp_path, names[0])[0], source.files(tmp_path, names[1])[1]
    broken.write_bytes(broken.read_bytes()[:100])
    Image.new("L", (21, 16), 77).save(foreign)
    source.files(tmp_path, names[2])[1].write_bytes(b"")
    cached = CachedSource(source, names, names)
    for read, name in ((cached.image, names[0]), (cached.mask, names[1]), (cached.mask, names[2])):
        with pytest.raises(DataError, match=r"\.png: "):
            read(name)
    assert cached.image(names[1]).size == (21, 16)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_from_one_memory_however_they_start(tmp_path: Path, method: str) -> None:
    """Two workers without the files; what is sent to them is less than the pixels."""
    source, names = _cityscapes(tmp_path)
    cached = CachedSource(source, names, names)
    assert len(ForkingPickler.dumps(cached)) < 2000  # of 4,032 bytes of pixels
    for name in names:
        for path in source.files(tmp_path, name):
            path.unlink()
    batches = [[Draw(index, (index,))] for index in range(3)]
    data = LabeledSet(cached, names, Geometry(None, None, True, (12, 12), "rand", 255))
    loader = DataLoader(data, batch_sampler=batches, num_workers=2, multiprocessing_context=method)
    for batch, (draw,) in zip(loader, batches, strict=True):
        expected = data[draw]
        assert torch.equal(batch["image"][0], expected["image"])
        assert torch.equal(batch["label"][0], expected["label"])


def test_too_little_memory_is_explained_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, names = _cityscapes(tmp_path)

    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError(f"no room for {len(tensor)} bytes")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(source, "image", None)
    with pytest.raises(UserError, match=r"dataset\.cache: 0\.0 GB .*no room for 4032 bytes.*/dev/shm"):
        CachedSource(source, names, names)
