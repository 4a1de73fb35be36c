"""Files and machines as people have them: each situation is made, and what is said of it is looked at."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_folder import _image, _mask, _tree, _write

import train_semi
from imas import build_model, distributed, load_config
from imas.data.check import check_data, examine
from imas.data.folder import files, find
from imas.data.lists import read_list, read_lists
from imas.data.loaders import TrainingData
from imas.data.source import DataError, existing, read_image
from imas.engine import checkpoint, fit, log, predict, provenance
from imas.engine.interrupt import interruptible
from imas.engine.sliding import Predictor, Protocol
from imas.errors import ConfigError, UserError, run_script
from imas.models.pretrained import load_encoder, load_safely
from imas.models.resnet import ResNet

TINY_TIFF = Image.new("RGBX", (8, 6))


def _listed(root: Path, **lists: list[str]) -> dict:
    """Options of ``_write`` that name these lists, written below ``root``."""
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return {f"dataset.{'val' if name == 'val' else 'train'}.data_list": root / f"{name}.txt" for name in lists}


def _config(root: Path, options: dict | None = None, **dataset: object):
    return load_config(_write(root, **dataset), [f"{key}={value}" for key, value in (options or {}).items()])


def _said(config) -> str:
    health = examine(config, read_lists(config))
    return "\n".join(health.lines())


# What is in the folders


def test_masks_are_found_whatever_their_suffix_and_letters(tmp_path: Path) -> None:
    """.PNG; umlauts that are composed in another way; a folder that is a link."""
    _tree(tmp_path, labeled=4, unlabeled=2)
    os.rename(tmp_path / "masks/with0.png", tmp_path / "masks/with0.PNG")
    for folder, form, suffix in (("images", "NFC", "jpg"), ("masks", "NFD", "png")):
        old = tmp_path / folder / f"with2.{suffix}"
        os.rename(old, old.with_name(unicodedata.normalize(form, f"straße_ü.{suffix}")))
    os.rename(tmp_path / "masks/sub", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "masks/sub")
    os.symlink(tmp_path / "images", tmp_path / "images/loop")
    config = _config(tmp_path)
    lists = read_lists(config)
    assert len(lists.labeled) == 4 and len(lists.unlabeled) == 2 and "belong to no image" not in _said(config)
    assert check_data(config).labeled == lists.labeled
    options = _listed(tmp_path, labeled=[unicodedata.normalize("NFD", "straße_ü.jpg"), "with0.jpg"])
    listed = _config(tmp_path, options)
    assert len(check_data(listed).unlabeled) == 4


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    _tree(tmp_path, labeled=6, unlabeled=2)
    os.rename(tmp_path / "masks/with0.png", tmp_path / "masks/with0_mask.png")
    _image(50).save(tmp_path / "images/with2.png")
    (tmp_path / "images/.ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "val/images/with0.jpg", tmp_path / "images/.ipynb_checkpoints/with0-checkpoint.jpg")
    (tmp_path / "images/._with2.jpg").write_bytes(bytes(99))
    (tmp_path / "images/notes.txt").write_text("x")
    config = _config(tmp_path)
    said = _said(config)
    for text in (
        r"1 masks in \S+masks belong to no image:\n  with0_mask.png",
        r"2 images below \S+ share a mask with another one:\n  with2.jpg\n  with2.png",
        r"1 files below \S+ are no images by their suffix:\n  notes.txt",
        r"2 names below \S+ start with a dot: left out:\n  ._with2.jpg\n  .ipynb_checkpoints/",
        r"3 images below \S+ are on no list: they are unlabeled:",
        r"looked at 13 images and 10 masks; used: 6 labeled, 3 unlabeled, 4 val; 3 images",
    ):
        assert re.search(text, said), (text, said)
    files = provenance.describe(config, check_data(config), 0, 1)["files"]
    assert files["images"] == 13 and files["masks"] == 10 and files["used"]["unlabeled"] == 3
    assert list(files["more"].values()) == [3, 1, 2, 1, 2]


@pytest.mark.parametrize("name", ["with0.jpg", "with0.npy", "with0.png.png"])
def test_where_no_mask_is_found_an_example_says_why(tmp_path: Path, name: str) -> None:
    _tree(tmp_path, labeled=1, unlabeled=1)
    os.rename(tmp_path / "masks/with0.png", tmp_path / "masks" / name)
    with pytest.raises(UserError, match=rf"the mask of with0.jpg would be \S+masks/with0.png .*masks has {name}"):
        read_lists(_config(tmp_path))


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tree(tmp_path, labeled=2, unlabeled=1)
    scan = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("masks"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"masks: cannot be read \(Permission denied\)"):
        check_data(_config(tmp_path))


# Lists


def test_the_list_beside_is_used_for_own_data(tmp_path: Path) -> None:
    _tree(tmp_path)
    options = _listed(tmp_path, labeled=["with0.jpg", "with2.jpg"], unlabeled=["without0.jpg", "without2.jpg"])
    del options["dataset.train.data_list"]
    config = _config(tmp_path, {"dataset.train.data_list": tmp_path / "labeled.txt"})
    lists = read_lists(config)
    assert lists.unlabeled == ["without0.jpg", "without2.jpg"]
    assert re.search(r"10 images below \S+ are on no list: they take no part", _said(config))
    assert provenance.describe(config, lists, 0, 1)["lists"]["unlabeled"]["path"] == str(tmp_path / "unlabeled.txt")


def test_a_copy_of_a_val_image_is_found_by_its_bytes(tmp_path: Path) -> None:
    _tree(tmp_path)
    shutil.copy(tmp_path / "val/images/with0.jpg", tmp_path / "images/other.jpg")
    said = _said(_config(tmp_path))
    assert re.search(r"WRONG  1 unlabeled images are val images under another name.*\n  \S+other.jpg = with0.jpg", said)


@pytest.mark.parametrize("line", ["images/{0}.jpg masks/{0}.png", "{0}", "images/{0}.jpg", "{0}.jpg 0"])
def test_a_list_of_another_form_is_explained(tmp_path: Path, line: str) -> None:
    _tree(tmp_path)
    config = _config(tmp_path, _listed(tmp_path, labeled=[line.format("with0"), "with2.jpg"]))
    with pytest.raises(UserError, match=r"labeled.txt has the line '.*'; expected one name a line, here with0.jpg: "):
        check_data(config)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n")
    assert read_list(tmp_path / "list.txt") == ["a.jpg", "b.jpg"]


# Images and masks


@pytest.mark.parametrize("what", ["truncated val image", "smaller val mask", "smaller labeled mask"])
def test_what_would_end_a_run_is_found_before_it(tmp_path: Path, what: str) -> None:
    _tree(tmp_path)
    path = tmp_path / ("masks" if "labeled" in what else "val/masks") / "with0.png"
    if "image" in what:
        path = tmp_path / "val/images/with0.jpg"
        path.write_bytes(path.read_bytes()[:700])
    else:
        Image.open(path).crop((0, 0, 39, 36)).save(path)
    with pytest.raises(UserError, match="with0.jpg: (cannot be read|the image is 40×36 pixels, its mask 39×36)"):
        train_semi.main(["--config", str(_write(tmp_path, on_error="stop" if "labeled" in what else "skip"))])
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_broken_exif_entry_does_not_keep_a_photo_from_being_turned(tmp_path: Path) -> None:
    turn = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    after = turn + struct.pack("<HHI", 0x011A, 7, 4) + b"\1\2\3\4"
    before = struct.pack("<HHI", 0x0100, 2, 4) + b"640\0" + turn
    for entries in (after, before):
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + b"\0\0\0\0"
        _image(0).save(tmp_path / "a.jpg", exif=exif)
        assert read_image(tmp_path / "a.jpg").size == (36, 40)


def test_bands_that_would_be_dropped_are_said(tmp_path: Path) -> None:
    TINY_TIFF.save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="some of its 4 bands are neither colour nor alpha"):
        read_image(tmp_path / "a.tif")
    Image.new("RGBA", (8, 6)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").mode == "RGB"


def test_binary_masks_with_pixels_to_leave_out_are_refused(tmp_path: Path) -> None:
    _tree(tmp_path, labeled=2, unlabeled=1)
    config = _config(tmp_path, folder={"binary": True, "class_names": ["no", "yes"]})
    with pytest.raises(UserError, match="expects masks of 0 and 255, or of 0 and 1, got 0, 1, 2, 255"):
        check_data(config)
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "masks/with0.png")
    with pytest.raises(UserError, match=r"with0.png: .*got 0, 1, 255.* set it to false"):
        check_data(config)


def test_a_label_above_the_classes_may_mean_leave_out(tmp_path: Path) -> None:
    _tree(tmp_path)
    Image.fromarray(np.full((36, 40), 3, np.uint8)).save(tmp_path / "masks/with0.png")
    with pytest.raises(UserError, match="if 3 means 'leave out', set dataset.ignore_label: 3"):
        check_data(_config(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset.ignore_label": 0}, "dataset.ignore_label: 0 is one of the 3 classes. .*ADE20K.*0 becomes 255"),
        ({"dataset.folder.class_names": "[no, yes, off]"}, "class_names: .*want quotes"),
        ({"dataset.folder.class_names": "[0, 1, 2]"}, "class_names: .*want quotes"),
        ({"dataset.folder.palette": "[[0, 0, 0], [1, 1, 1], [1, 1, 1]]"}, r"palette: \[\[1, 1, 1\]\] stands"),
        (
            {"dataset.folder.palette": "[[0, 0, 0], [1, 1, 1], [2, 2, 2]]", "dataset.folder.ignore_colour": "[0,0,0]"},
            r"palette: \[\[0, 0, 0\]\] stands for .*ignore_colour",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_meant(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(tmp_path, options)


# Weight files


def test_numpy_numbers_load_and_code_does_not_run(tmp_path: Path) -> None:
    state = {"model_state": {"a": torch.ones(2)}, "best_miou": np.float64(0.5), "ious": np.array([1, 2], np.int32)}
    torch.save(state, tmp_path / "a.pth")
    read = checkpoint.read(tmp_path / "a.pth")
    assert read["best_miou"] == 0.5 and read["ious"].tolist() == [1, 2]
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"holds objects beside tensors \(torch.nn.modules.linear.Linear\)"):
        load_safely(tmp_path / "b.pth")

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "c.pth").write_bytes(pickle.dumps({"best": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="c.pth: "):
        load_safely(tmp_path / "c.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html>\n<html>404", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer"),
        (b"PK\3\4 and no more", "torn, foreign"),
    ],
)
def test_a_file_that_is_no_weight_file_is_called_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_safely(tmp_path / "a.pth")
    assert "\x1b" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_weights_below_prefixes_and_keys_and_with_nan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ResNet("resnet18", deep_stem=False, width=4)
    state = {name: value + 1 for name, value in encoder.state_dict().items()}
    own = encoder.state_dict()["layer1.0.conv1.weight"]
    for wrapped in (
        {f"module.{name}": value for name, value in state.items()},
        {f"backbone.{name}": value for name, value in state.items()},
        {"model": state},
        {"state_dict": {f"module.encoder_{k}.{n}": v + (k == "k") for k in "qk" for n, v in state.items()}},
    ):
        own.zero_()
        torch.save(wrapped, tmp_path / "a.pth")
        load_encoder(encoder, tmp_path / "a.pth")
        assert torch.equal(own, state["layer1.0.conv1.weight"])
    state["layer2.0.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="NaN or infinite numbers in 1 tensors: layer2.0.conv1.weight"):
        load_encoder(encoder, tmp_path / "a.pth")


# Prediction


def test_prediction_says_what_it_leaves_out_and_writes_large_overlays_as_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for name, kind in (("a.jfif", "JPEG"), ("b.gif", "GIF"), ("c.png", "PNG")):
        _image(0).save(tmp_path / "in" / name, kind)
    logging.getLogger("imas").propagate = True
    images, problems = predict.find_images([str(tmp_path / "in")], tmp_path / "out")
    assert sorted(map(str, images)) == ["a", "c"] and not problems
    assert "left out: 1 files (b.gif)" in caplog.text
    monkeypatch.setattr(predict, "_LARGEST_JPEG", 39)
    config = _config(tmp_path)
    predictor = Predictor(Protocol(48), torch.device("cpu"))
    network = build_model(config.net)
    assert predict.predict_images(network, images, predictor, config.dataset, tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out/overlay").iterdir()) == ["a.png", "c.png"]


# Machines


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE, "),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2, but SLURM_PROCID, "),
        (
            {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "RANK is 'x'; expected a number",
        ),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
    ],
)
def test_launcher_variables_that_are_half_set(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], missing: str | None
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if missing is None:
        distributed.read_launcher()
        assert distributed.rank() == 0 and "WORLD_SIZE" not in os.environ
    else:
        with pytest.raises(UserError, match=missing):
            distributed.read_launcher()


def test_a_terminal_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    run_script(lambda: print("40×36 → done", flush=True))
    assert raw.getvalue() == b"40?36 ? done\n"


def test_a_tensorboard_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="saver.use_tb: TensorBoard cannot be imported .*set saver.use_tb: false"):
        log.need_tensorboard()


def test_a_closed_terminal_is_a_signal_to_stop_unless_it_is_ignored() -> None:
    with interruptible() as interruption:
        signal.raise_signal(signal.SIGHUP)
        assert interruption.received == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptible() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "reason",
    ["DataLoader worker (pid 7) is killed by signal: Killed.", "unable to write to file </torch_1>: No space left"],
)
def test_a_worker_that_dies_ends_in_a_sentence(reason: str, capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{reason}")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "fewer dataset.workers" in error and "--shm-size" in error and reason in error


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch, whose val pixels are all left out; its console is in ``console.txt``."""
    root = tmp_path_factory.mktemp("finished")
    _tree(root, labeled=4, unlabeled=4)
    for path in (root / "val/masks").rglob("*.png"):
        Image.new("L", (40, 36), 255).save(path)
    return root


def _train(root: Path, *words: str, name: str = "run") -> str:
    """Train in this process; what train.log has of it."""
    config = root / name / "config.yaml"
    before = len((config.parent / "log/train.log").read_text()) if (config.parent / "log/train.log").is_file() else 0
    always = ("--set", "saver.use_tb=false", "--set", "imas.sup_only_epoch=0")
    train_semi.main(["--config", str(config), *always, *words])
    return (config.parent / "log/train.log").read_text()[before:]


def test_a_run_says_what_it_is(finished: Path, capfd: pytest.CaptureFixture) -> None:
    """All val pixels are left out: no best checkpoint is named; dates; threads; counts of files; no bar in a file."""
    _write(finished)
    told = _train(finished, "--set", "trainer.epochs=1")
    folder = finished / "run"
    assert "every pixel of the val masks is ignored" in capfd.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["ckpt.pth"]
    assert "ckpt_best" not in told and "fallen" not in told
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", told)
    (start,) = yaml.safe_load((folder / "log/run.yaml").read_text())
    assert start["threads"] == torch.get_num_threads()
    assert start["files"] == {
        "images": 12,
        "masks": 8,
        "used": {"labeled": 4, "unlabeled": 4, "val": 4},
        "more": {f"images below {finished / 'images'} are on no list: they are unlabeled": 4},
    }
    assert "it/s" not in capfd.readouterr().err


def test_a_resumed_run_says_what_changed(tmp_path: Path) -> None:
    _tree(tmp_path, labeled=4, unlabeled=4)
    _write(tmp_path)
    _train(tmp_path, "--set", "trainer.epochs=1")
    last = tmp_path / "run/checkpoints/ckpt.pth"
    words = ("--set", "trainer.epochs=2", "--set", "trainer.optimizer.kwargs.lr=0.5")
    with pytest.raises(
        UserError, match=r"is of another recipe.*--resume \S+ckpt.pth\n.*trainer.*lr: 0.5, and 0.02 bef"
    ):
        _train(tmp_path, *words)
    (tmp_path / "images/without0.jpg").unlink()
    (tmp_path / "val/images/with0.jpg").unlink()
    told = _train(tmp_path, *words, "--set", "dataset.workers=1", "--resume", str(last))
    for text in (
        "changed since the checkpoint:",
        "trainer.epochs: 2, and 1 before",
        "trainer.optimizer.kwargs.lr: 0.5, and 0.02 before",
        "dataset.workers: 1, and 0 before",
        "the unlabeled list: 3 images, and 4 (others) before",
        "the val list: 3 images, and 4 (others) before",
        "is of another val list: the best starts anew",
    ):
        assert text in told, (text, told)
    assert "changed" not in _train(tmp_path, *words, "--set", "dataset.workers=1")


@pytest.mark.parametrize("what", ["evaluation", "worker"])
def test_whatever_ends_a_run_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """An evaluation that fails is made up for by the resumed run."""
    _tree(tmp_path, labeled=4, unlabeled=4)
    _write(tmp_path)
    words = ("--set", "trainer.epochs=1")
    if what == "evaluation":
        error: Exception = DataError("val/with0.jpg: cannot be read")
        monkeypatch.setattr(fit.Evaluation, "__call__", lambda *_: (_ for _ in ()).throw(error))
    else:
        error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        epoch = TrainingData.epoch

        def broken(*arguments: object) -> object:
            yield next(epoch(*arguments))
            raise error

        monkeypatch.setattr(TrainingData, "epoch", broken)
    with pytest.raises(type(error), match=str(error).split("(")[0]):
        _train(tmp_path, *words)
    state = checkpoint.read(tmp_path / "run/checkpoints/ckpt.pth")
    assert (state["epoch"], state["step"]) == (0, 2 if what == "evaluation" else 1)
    monkeypatch.undo()
    assert "epoch 0: teacher mIoU" in _train(tmp_path, *words)


def test_names_are_found_in_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names are looked for: a folder on a slow disk is read once."""
    _tree(tmp_path, labeled=6, unlabeled=8)
    for folder in tmp_path.rglob("*"):
        if folder.is_dir():
            os.utime(folder, (1e9, 1e9))
    count, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: count.append(str(folder)) or scan(folder))
    config = _config(tmp_path)
    check_data(config)
    assert len(count) == len(set(count)) and any(folder.endswith("/masks") for folder in count)
    assert existing(tmp_path / "images/WITH0.jpg") is None
    assert existing(tmp_path / "images/with0.JPG") == tmp_path / "images/with0.jpg"
    assert find(config.dataset.folder, tmp_path)[0][0] == "sub/with1.jpg"
    assert files(config.dataset.folder, tmp_path, "with0.jpg")[1] == tmp_path / "masks/with0.png"
    assert np.asarray(_mask(0)).shape == (36, 40)
