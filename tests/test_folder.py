"""Own data: folders, kinds of files, broken images, the doctor."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, run
from PIL import Image

from imas import load_config
from imas.data.catalog import catalog_of, open_source
from imas.data.check import examine
from imas.data.folder import find
from imas.data.lists import read_lists
from imas.data.loaders import TrainingData
from imas.data.source import DataError, FileSource
from imas.errors import ConfigError, UserError
from imas.schema import Config

RGB = [[9, 0, 0], [0, 250, 0], [0, 0, 70]]
SIZE = (36, 40)  # height, width
GREEN = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 251


def _image(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    noise = np.random.default_rng(number).normal(0, 66, (*size, 3)) + [124, 116, 104]
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def _mask(number: int) -> Image.Image:
    """Classes 0, 1, 2 in stripes, and an ignored line."""
    labels = np.tile((np.arange(SIZE[1]) // 5 + number) % 3, (SIZE[0], 1)).astype(np.uint8)
    labels[0] = 255
    return Image.fromarray(labels)


def _tree(root: Path, labeled: int = 6, unlabeled: int = 8) -> Path:
    """images/, masks/ and val/ of the same kind; some images in a folder of their own."""
    for first, (part, count, masks) in enumerate((("", labeled, True), ("", unlabeled, False), ("val", 4, True))):
        for number in range(count):
            stem = f"{'sub/' if number % 2 else ''}{'with' if masks else 'without'}{number}"
            for folder, kind, picture in (("images", "jpg", _image), ("masks", "png", _mask))[: 1 + masks]:
                path = root / part / folder / f"{stem}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(number if folder == "masks" else 100 * first + number).save(path)
    return root


def _write(root: Path, *, folder: dict | None = None, name: str = "run", **dataset: object) -> Path:
    """The tiny experiment on the folder data set."""
    raw = {
        **TINY,
        "dataset": {
            "type": "folder",
            "folder": {"class_names": ["ground", "left", "right"], **(folder or {})},
            "train": {**TINY["dataset"]["train"], "data_root": str(root), "batch_size": 2, "crop": {"size": 32}},
            "val": {"data_root": str(root / "val"), "crop": {"size": 48}},
            "workers": 0,
            **dataset,
        },
        "net": {**TINY["net"], "num_classes": len((folder or {}).get("class_names", "abc"))},
    }
    path = root / name / "config.yaml"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(yaml.safe_dump(raw))
    return path


def _config(root: Path, *overrides: str, **options: object) -> Config:
    return load_config(_write(root, **options), overrides)


# Lists and reading


def test_images_with_a_mask_are_labeled_and_all_others_unlabeled(tmp_path: Path) -> None:
    config = _config(_tree(tmp_path))
    lists = read_lists(config)
    assert lists.labeled == ["sub/with1.jpg", "sub/with3.jpg", "sub/with5.jpg", "with0.jpg", "with2.jpg", "with4.jpg"]
    assert len(lists.unlabeled) == 8 and all("without" in name for name in lists.unlabeled)
    assert len(lists.val) == 4
    source = open_source(config.dataset, str(tmp_path))
    assert source.mask("sub/with1.jpg").getpixel((0, 1)) == 1
    assert catalog_of(config.dataset).class_names == ("ground", "left", "right")


def test_lists_win_over_folders_and_leave_the_rest_unlabeled(tmp_path: Path) -> None:
    """What is in no list is unlabeled, masks or not; validation images of the same folder are no training images."""
    _tree(tmp_path)
    (tmp_path / "few.txt").write_text("with0.jpg\n")
    (tmp_path / "val.txt").write_text("sub/with1.jpg\nwith2.jpg\n")
    words = [f"dataset.val.data_list={tmp_path / 'val.txt'}", "dataset.val.data_root=null"]
    lists = read_lists(_config(tmp_path, f"dataset.train.data_list={tmp_path / 'few.txt'}", *words))
    assert lists.labeled == ["with0.jpg"] and len(lists.unlabeled) == 3 + 8
    assert not {"sub/with1.jpg", "with2.jpg"} & set(lists.unlabeled)
    lists = read_lists(_config(tmp_path, *words))
    assert len(lists.labeled) == 4 and not set(lists.labeled) & set(lists.val)


def test_a_folder_of_further_unlabeled_images(tmp_path: Path) -> None:
    _tree(tmp_path, unlabeled=1)
    (tmp_path / "more" / "deep").mkdir(parents=True)
    _image(9).save(tmp_path / "more" / "deep" / "x.png")
    config = _config(tmp_path, folder={"unlabeled": "more"})
    assert read_lists(config).unlabeled == ["without0.jpg", "../more/deep/x.png"]
    source = open_source(config.dataset, str(tmp_path))
    assert source.image("../more/deep/x.png").size == (40, 36)


def test_without_images_of_a_kind_a_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no unlabeled image: none without a mask was found below the folders images"):
        read_lists(_config(_tree(tmp_path, unlabeled=0)))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_lists(_config(tmp_path, folder={"images": "nowhere"}))


def test_masks_with_a_suffix_and_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    _image(0).save(tmp_path / "images" / "a.b.jpg")
    _mask(0).save(tmp_path / "masks" / "a.b_gt.tif")
    config = _config(tmp_path, folder={"mask_suffix": "_gt"})
    assert open_source(config.dataset, str(tmp_path)).mask("a.b.jpg").getpixel((0, 0)) == 255


def test_masks_beside_their_images(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for name, picture in (("a.png", _image(0)), ("a_mask.png", _mask(0)), ("b.png", _image(1))):
        picture.save(tmp_path / "all" / name)
    options = {"images": "all", "masks": "all", "mask_suffix": "_mask"}
    words = (f"dataset.val.data_root={tmp_path}", "dataset.val.data_list=none.txt")
    config = _config(tmp_path, *words, folder=options)
    assert find(config.dataset.folder, tmp_path) == (["a.png"], ["b.png"])


def _saved_mask(tmp_path: Path, mask: Image.Image, kind: str = "png", **folder: object) -> Image.Image:
    (tmp_path / "masks").mkdir(exist_ok=True)
    mask.save(tmp_path / "masks" / f"a.{kind}")
    return open_source(_config(tmp_path, folder=folder).dataset, str(tmp_path)).mask("a.jpg")


def test_masks_of_every_kind_are_read_alike(tmp_path: Path) -> None:
    """8-bit grey, palette, 16-bit, 1-bit, three equal channels, alpha, TIFF."""
    labels = np.asarray(_mask(0))
    grey = Image.fromarray(labels)
    palette = Image.fromarray(labels)
    palette.putpalette([17, 99, 3] * 256)
    kinds = {
        "grey": (grey, "png"),
        "palette": (palette, "png"),
        "16 bits": (Image.fromarray(labels.astype(np.uint16)), "png"),
        "three channels": (Image.merge("RGB", [grey] * 3), "png"),
        "alpha": (Image.merge("LA", [grey, Image.new("L", grey.size, 7)]), "png"),
        "tiff": (grey, "tif"),
    }
    for name, (mask, kind) in kinds.items():
        for path in (tmp_path / "masks").glob("*"):
            path.unlink()
        assert np.array_equal(np.asarray(_saved_mask(tmp_path, mask, kind)), labels), name
    assert set(np.unique(np.asarray(_saved_mask(tmp_path, Image.fromarray(labels == 1), "tif")))) == {0, 1}


def test_binary_and_colour_masks(tmp_path: Path) -> None:
    labels = np.asarray(_mask(0)) % 2
    binary = {"binary": True, "class_names": ["no", "yes"]}
    assert np.array_equal(np.asarray(_saved_mask(tmp_path, Image.fromarray(labels * 255), **binary)), labels)
    colours = np.array([[0, 0, 0], [250, 10, 0], [1, 2, 3]], np.uint8)
    palette = {"palette": colours[:2].tolist(), "ignore_colour": [1, 2, 3], "class_names": ["no", "yes"]}
    labels = np.asarray(_mask(0)) % 3
    expected = np.where(labels == 2, 255, labels)
    mask = Image.fromarray(colours[labels])
    assert np.array_equal(np.asarray(_saved_mask(tmp_path, mask, **palette)), expected)
    assert catalog_of(_config(tmp_path, folder=palette).dataset).palette == ((0, 0, 0), (250, 10, 0))


@pytest.mark.parametrize(
    ("mask", "kind", "folder", "message"),
    [
        (Image.fromarray(np.full(SIZE, 300, np.uint16)), "png", {}, "class numbers in 0..255, got mode .* up to 300"),
        (_image(0), "png", {}, "expected a mask of one channel .*dataset.folder.palette"),
        (Image.fromarray(np.full(SIZE, 0.5, np.float32)), "tif", {}, "class numbers"),
        (Image.fromarray(np.full(SIZE, 3, np.uint8)), "png", {}, r"1440 pixels have the values 3; expected .* 0\.\.2"),
        (Image.fromarray(np.full(SIZE, 7, np.uint8)), "png", {"binary": True, "class_names": list("ab")}, "got 7"),
        (_image(0), "png", {"palette": [[0, 0, n] for n in range(3)]}, "colours that dataset.folder.palette lacks"),
    ],
)  # fmt: skip
def test_masks_that_cannot_be_used_are_named(
    tmp_path: Path, mask: Image.Image, kind: str, folder: dict, message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s)masks/a.{kind}: .*{message}"):
        _saved_mask(tmp_path, mask, kind, **folder)


def test_a_jpeg_cannot_be_a_mask(tmp_path: Path) -> None:
    _mask(0).save(tmp_path / "a.png", "JPEG")
    source = FileSource(lambda root, name: (root / name, root / name), tmp_path, 3, 255)
    with pytest.raises(DataError, match=r"a\.png: a JPEG cannot be a mask"):
        source.mask("a.png")


def test_images_of_every_kind_are_read_as_rgb(tmp_path: Path) -> None:
    """Grey, 16-bit grey, palette, alpha, CMYK; turned upright by EXIF; floating point is refused by name."""
    grey = Image.fromarray(GREEN.astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    kinds = {
        "grey.png": (grey, GREEN),
        "deep.png": (Image.fromarray((GREEN * 257).astype(np.uint16)), GREEN),
        "deep.tif": (Image.fromarray((GREEN * 257 + 100).astype(np.uint16)), GREEN),
        "palette.png": (grey.convert("P"), GREEN),
        "alpha.png": (Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 9)]), GREEN),
        "bmp.bmp": (grey, GREEN),
    }
    source = FileSource(lambda root, name: (root / name, root / name), tmp_path, 3, 255)
    for name, (picture, expected) in kinds.items():
        picture.save(tmp_path / name)
        read = np.asarray(source.image(name))
        assert read.shape == (*SIZE, 3) and np.array_equal(read[..., 1], expected), name
    grey.convert("CMYK").save(tmp_path / "print.jpg")
    assert source.image("print.jpg").mode == "RGB"
    grey.save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(np.asarray(source.image("turned.png"))[..., 0], np.rot90(GREEN, -1))
    Image.fromarray(np.zeros(SIZE, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: .*floating-point"):
        source.image("float.tif")


@pytest.mark.parametrize(
    ("edit", "key", "message"),
    [
        ({"folder": None}, "dataset.folder", "missing"),
        ({"type": "pascal"}, "dataset.folder", "only the data set type folder"),
        ({"folder": {"class_names": ["one"]}}, "dataset.folder.class_names", "two or more class names"),
        ({"folder": {"class_names": ["a", "a", "b"]}}, "dataset.folder.class_names", "two or more class names"),
        ({"folder": {"class_names": ["a", "b", "c", "d"]}}, "net.num_classes", "4 classes, got 3"),
        ({"folder": {"class_names": list("abc"), "palette": [[0, 0, 0]]}}, "dataset.folder.palette", "3 in all"),
        ({"folder": {"class_names": list("abc"), "palette": [[0, 0, 256]] * 3}}, "dataset.folder.palette", "0..255"),
        ({"folder": {"class_names": list("abc"), "colours": [[0, 0, 0]]}}, "dataset.folder.colours", "3 in all"),
        ({"folder": {"class_names": list("abc"), "palette": RGB, "colours": RGB}}, "dataset.folder.colours", "leave"),
        ({"folder": {"class_names": list("abc"), "binary": True}}, "dataset.folder.binary", "two classes"),
        ({"folder": {"class_names": list("abc"), "ignore_colour": [0] * 3}}, "dataset.folder.ignore_colour", "palette"),
        ({"folder": {"class_names": list("abc"), "masks": "images"}}, "dataset.folder.mask_suffix", "missing"),
        ({"val": {}}, "dataset.val.data_list", "must not be training images"),
    ],
)  # fmt: skip
def test_wrong_folder_sections(tmp_path: Path, edit: dict, key: str, message: str) -> None:
    path = _write(tmp_path, name="run")
    raw = yaml.safe_load(path.read_text())
    raw["dataset"] |= edit
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = [line for line in str(caught.value).splitlines() if f": {key}: " in line]
    assert lines and message in lines[0], caught.value


def test_classes_are_drawn_in_colours_far_apart_or_in_those_that_are_given(tmp_path: Path) -> None:
    for count, apart in ((3, 150), (19, 70), (255, 40)):
        names = [f"class {number}" for number in range(count)]
        palette = catalog_of(_config(tmp_path, folder={"class_names": names}).dataset).palette
        colours = np.array([*palette, (0, 0, 0), (255, 255, 255)], float)
        distances = np.linalg.norm(colours[:, None] - colours, axis=2) + 999 * np.eye(count + 2)
        assert len(palette) == count and distances.min() > apart
    given = _config(tmp_path, folder={"colours": RGB})
    assert catalog_of(given.dataset).palette == tuple(map(tuple, RGB))


def test_class_0_of_own_data_counts_in_the_score(tmp_path: Path, experiment: Callable[..., Path]) -> None:
    path = _write(tmp_path)
    scored = ["imas.hardness={}"], ["imas.hardness={ignore_background: true}"]
    assert [load_config(path, words).options.hardness.ignore_background for words in scored] == [False, True]
    assert load_config(experiment(), scored[0]).options.hardness.ignore_background is True


def test_own_data_is_trained_and_evaluated(tmp_path: Path) -> None:
    """From folders to a table, unlabeled images without a mask anywhere."""
    config = _write(_tree(tmp_path))
    trained = run("train_semi.py", "--config", config)
    assert trained.returncode == 0, trained.stderr
    assert "6 labeled, 8 unlabeled, 4 validation images" in trained.stdout
    assert "not a published protocol" in trained.stdout and "left" in trained.stdout
    evaluated = run("eval.py", "--config", config, "--checkpoint", config.parent / "checkpoints" / "ckpt.pth")
    assert evaluated.returncode == 0 and "on 4 images" in evaluated.stdout


def test_a_cached_run_is_the_same_run(tmp_path: Path) -> None:
    """Bitwise, with worker processes."""
    _tree(tmp_path)
    ends = []
    for name, words in (("plain", ()), ("cached", ("--set", "dataset.cache=true", "--set", "dataset.workers=2"))):
        config = _write(tmp_path, name=name)
        trained = run("train_semi.py", "--config", config, *words)
        assert trained.returncode == 0, trained.stderr
        ends.append(torch.load(config.parent / "checkpoints" / "ckpt.pth", weights_only=True)["model_state"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# Broken images


def test_a_broken_image_stops_training_after_a_checkpoint(tmp_path: Path) -> None:
    """In the middle of an epoch, with its name and no traceback; mended, the run ends as one that never met it."""
    _tree(tmp_path)
    straight = _write(tmp_path, name="straight")
    assert run("train_semi.py", "--config", straight).returncode == 0
    broken = _write(tmp_path, name="broken", workers=1)
    data = TrainingData(load_config(broken), read_lists(load_config(broken)), 0, 0, 1)
    later = [int(batch["unlabeled"]["index"][0]) for update in data.epoch(2, True) for batch in update][2]
    path = tmp_path / "images" / read_lists(load_config(broken)).unlabeled[later]
    whole = path.read_bytes()
    # The checks before a run find files, but do not decode unlabeled images: so it stops when the image is drawn.
    path.write_bytes(whole[: len(whole) // 3])
    stopped = run("train_semi.py", "--config", broken)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert str(path) in stopped.stderr and "saved after" in stopped.stdout
    state = torch.load(broken.parent / "checkpoints" / "ckpt.pth", weights_only=True)
    assert (state["epoch"], state["step"]) >= (1, 0)
    path.write_bytes(whole)
    resumed = run("train_semi.py", "--config", broken)
    assert resumed.returncode == 0, resumed.stderr
    states = [
        torch.load(config.parent / "checkpoints" / "ckpt.pth", weights_only=True) for config in (straight, broken)
    ]
    for key in ("model_state", "teacher_state"):
        assert all(torch.equal(states[0][key][name], states[1][key][name]) for name in states[0][key])
    for name in ("metrics.csv", "scores.csv"):
        assert (straight.parent / "log" / name).read_text() == (broken.parent / "log" / name).read_text()


def test_broken_images_are_replaced_where_asked(tmp_path: Path) -> None:
    """``on_error: skip``: one labeled mask and one unlabeled image are broken; both named, the epoch's count logged."""
    _tree(tmp_path)
    (tmp_path / "images" / "without0.jpg").write_bytes(b"no image")
    (tmp_path / "masks" / "with0.png").write_bytes(b"no mask")
    config = _write(tmp_path, on_error="skip", workers=1)
    trained = run("train_semi.py", "--config", config)
    assert trained.returncode == 0, trained.stderr
    assert "replaced by another sample: " in trained.stdout and "without0.jpg" in trained.stdout
    assert "with0.png" in trained.stdout and "broken images were replaced by others" in trained.stdout
    with open(config.parent / "log" / "scores.csv", newline="") as file:
        assert all(row["image"] != "without0.jpg" for row in csv.DictReader(file))
    stopped = run("train_semi.py", "--config", _write(tmp_path, name="strict"))
    assert stopped.returncode == 2 and "with0.png" in stopped.stderr


# The doctor


def _sick(root: Path, what: str) -> dict:
    """A tree with one disease; gives what the experiment needs beside it."""
    options: dict = {}
    if what == "unreadable image":
        (root / "images" / "without2.jpg").write_bytes(b"nothing")
    elif what == "missing file":
        (root / "few.txt").write_text("with0.jpg\nwith2.jpg\ngone.jpg\n")
        options["train.data_list"] = root / "few.txt"
    elif what == "other size":
        _mask(0).resize((10, 12), Image.Resampling.NEAREST).save(root / "masks" / "with0.png")
    elif what == "foreign value":
        Image.fromarray(np.full(SIZE, 9, np.uint8)).save(root / "masks" / "with0.png")
    elif what in ("class not labeled", "class not in val"):
        for path in (root / ("masks" if what == "class not labeled" else "val/masks")).rglob("*.png"):
            labels = np.asarray(Image.open(path))
            Image.fromarray(np.where(labels == 2, 1, labels).astype(np.uint8)).save(path)
    elif what == "overlap":
        (root / "val.txt").write_text("with0.jpg\nwith2.jpg\nsub/with1.jpg\n")
        (root / "few.txt").write_text("with0.jpg\nwith4.jpg\nsub/with3.jpg\n")
        options = {"train.data_list": root / "few.txt", "val.data_list": root / "val.txt", "val.data_root": root}
    elif what == "duplicates":
        (root / "few.txt").write_text("with0.jpg\nwith2.jpg\nwith0.jpg\n")
        options["train.data_list"] = root / "few.txt"
    elif what == "binary":
        for path in [*(root / "masks").rglob("*.png"), *(root / "val" / "masks").rglob("*.png")]:
            labels = np.asarray(Image.open(path))
            Image.fromarray(np.where(labels == 1, 255, 0).astype(np.uint8)).save(path)
    elif what == "all ignored":
        for path in (root / "val" / "masks").rglob("*.png"):
            Image.fromarray(np.full(SIZE, 255, np.uint8)).save(path)
    elif what == "small images":
        options = {"train.crop.size": 38}
    elif what == "other colours":
        options = {"mean": [0.9, 0.5, 0.4]}
    elif what == "other count":
        options = {"n_sup": 99}
    return options


DISEASES = {
    "unreadable image": (True, r"1 of the 8 unlabeled images cannot be used:\n.*without2\.jpg: cannot be read"),
    "missing file": (
        True,
        r"1 of the 3 labeled images cannot be used \(\S+ has the line 'gone.jpg'.*:\n.*gone\.jpg: no such file",
    ),
    "other size": (True, r"with0\.jpg: the image is 40×36 pixels, its mask 10×12"),
    "foreign value": (True, r"with0\.png: 1440 pixels have the values 9; expected classes 0\.\.2 or 255"),
    "class not labeled": (True, "not in any labeled mask: right; .*cannot be learned"),
    "class not in val": (False, "not in any val mask: right; .*n/a"),
    "overlap": (True, r"1 images are both labeled and val: the evaluation sees training images:\n  with0\.jpg"),
    "duplicates": (True, r"1 names stand more than once in the labeled list:\n  with0\.jpg"),
    "binary": (True, "labeled masks hold 0 and 255 alone.*binary: true"),
    "all ignored": (True, "every pixel of the val masks is ignored"),
    "small images": (False, "14 images are smaller than the crop of 38×38 pixels and will be padded"),
    "other colours": (False, r"the images' mean is \[0\.4.*far from the configured dataset\.mean \[0\.900"),
    "other count": (False, "dataset.n_sup is 99, but the labeled list has 6 lines"),
}


@pytest.mark.parametrize("what", DISEASES)
def test_every_disease_is_found_and_explained(tmp_path: Path, what: str) -> None:
    _tree(tmp_path)
    options = _sick(tmp_path, what)
    config = _config(tmp_path, *(f"dataset.{key}={value}" for key, value in options.items()))
    health = examine(config, read_lists(config))
    wrong, message = DISEASES[what]
    hits = [line for line in health.lines() if re.search(message, line)]
    assert hits, health.lines()
    assert hits[0].startswith("WRONG" if wrong else "note ") and health.wrong == wrong


def test_a_healthy_tree_has_a_table_and_one_note(tmp_path: Path) -> None:
    """Also with worker processes; shares by hand: one line of 36 is ignored, classes change every 5 columns."""
    config = _config(_tree(tmp_path))
    for workers in (0, 2):
        health = examine(config, read_lists(config), workers=workers)
        (note,) = health.findings
        assert "on no list: they are unlabeled" in note.text and len(note.files) == 8 and not health.wrong
        assert health.looked.startswith("looked at 18 images and 10 masks; used: 6 labeled, 8 unlabeled, 4 val; 8 ")
    rows = {line.split()[0]: line.split()[1:] for line in health.table.splitlines() if line}
    assert rows["labeled"] == ["6", "6", "40×36", "40×36"] and rows["unlabeled"][0] == "8"
    assert rows["(ignored)"][:3] == ["2.78", "%", "6"]
    columns = [sum((c // 5 + n) % 3 == 1 for c in range(40) for n in range(6)) / 240]
    assert rows["left"][0] == f"{100 * columns[0]:.2f}"


def test_the_command_of_the_doctor(tmp_path: Path) -> None:
    """Table, findings, exit status, the list of offending files; --check of train_semi.py finds the same."""
    _tree(tmp_path)
    config = _write(tmp_path)
    healthy = run("-m", "imas.data", "check", "--config", config)
    assert healthy.returncode == 0, healthy.stderr + healthy.stdout
    assert "labeled" in healthy.stdout and "nothing is wrong" in healthy.stdout
    (tmp_path / "images" / "without2.jpg").write_bytes(b"nothing")
    offending = tmp_path / "offending.txt"
    sick = run("-m", "imas.data", "check", "--config", config, "--write", offending)
    assert sick.returncode == 1 and "without2.jpg" in sick.stdout and "Traceback" not in sick.stderr
    assert "without2.jpg" in offending.read_text()
    quick = run("train_semi.py", "--config", config, "--check")
    assert quick.returncode == 1 and "without2.jpg" in quick.stdout + quick.stderr
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.yaml"]
