"""What is said where something is wrong: of the right thing, in time, in a sentence."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY
from PIL import Image
from test_folder import _tree, _write

import eval as evaluation
import train_semi
from imas import load_config
from imas.build import build_method
from imas.data.check import check_data, examine
from imas.data.lists import read_list, read_lists
from imas.data.source import DataError, FileSource, read_image
from imas.engine import checkpoint
from imas.errors import ConfigError, UserError, run_script
from imas.models.pretrained import load_safely

Words = tuple[str, ...]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a run of two epochs that is done."""
    path = tmp_path_factory.mktemp("finished") / "config.yaml"
    raw = {**TINY, "trainer": TINY["trainer"] | {"epochs": 2}, "saver": {"use_tb": False}}
    path.write_text(yaml.safe_dump(raw))
    train_semi.main(["--config", str(path)])
    return path


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The folder of an earlier run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "an earlier run has left its checkpoint here"),
        (("--resume", "auto", "--seed", "1"), "that run had the seed 0, this one has 1"),
        (("--resume", "auto", "--set", "trainer.epochs=3"), "another recipe.*\n  trainer.epochs: 3, and 2 before$"),
        (
            ("--resume", "auto", "--set", "net.decoder.kwargs.inner_planes=16", "--set", "imas.threshold=0.5"),
            "another recipe.*\n  net.decoder.kwargs.inner_planes: 16, and 8 before\n  imas.threshold: 0.5, and 0.25",
        ),
    ],
)
def test_another_run_in_the_folder_stops_with_out_as_the_remedy(finished: Path, words: Words, message: str) -> None:
    before = _files(finished.parent)
    with pytest.raises(UserError, match=rf"(?s){message}") as refused:
        train_semi.main(["--config", str(finished), *words])
    assert "name another folder with --out" in str(refused.value).lower() and _files(finished.parent) == before


@pytest.mark.parametrize("words", [(), ("--resume", "auto", "--set", "imas.threshold=0.5")])
def test_check_works_beside_a_checkpoint_and_writes_nothing(
    finished: Path, capsys: pytest.CaptureFixture, words: Words
) -> None:
    before = _files(finished.parent)
    train_semi.main(["--config", str(finished), "--check", *words])
    told = capsys.readouterr().out
    assert "a training would not begin in this folder: " in told and "checked: nothing is wrong" in told
    assert _files(finished.parent) == before


def test_logs_of_an_earlier_run_are_set_aside(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.parent, folder)
    before = _files(folder / "log")
    words = ("--set", "saver.snapshot_dir=elsewhere", "--set", "trainer.epochs=3", "--set", "imas.sup_only_epoch=2")
    train_semi.main(["--config", str(folder / "config.yaml"), *words])
    aside = _files(folder / "log_before_1")
    kept = {
        path.name: content for path, content in before.items() if path.name not in ("train.log", "run.yaml", "lock")
    }
    assert {path.name: content for path, content in aside.items()} == kept and "metrics.csv" in kept
    with open(folder / "log/metrics.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert len(yaml.safe_load((folder / "log/run.yaml").read_text())) == 2


def test_a_checkpoint_of_another_folder_does_not_go_on_in_the_logs_of_this_one(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.parent / "log", folder / "log")
    words = ("--out", str(folder), "--resume", str(finished.parent / "checkpoints/ckpt.pth"))
    train_semi.main(["--config", str(finished), *words, "--set", "trainer.epochs=4"])
    assert (folder / "log_before_1/metrics.csv").read_text() == (finished.parent / "log/metrics.csv").read_text()
    with open(folder / "log/metrics.csv", newline="", encoding="utf-8") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["2", "3"]


def test_no_epoch_before_the_first(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = build_method(load_config(finished), pretrained=False)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    state = checkpoint.read(finished.parent / "checkpoints/ckpt.pth")
    caplog.set_level("INFO", "imas")
    for epoch, step, said in (
        (0, 3, "after 3 updates from"),
        (0, 0, "after 0 updates"),
        (2, 1, "epoch 1 and 1 updates"),
    ):
        checkpoint.resume(state | {"epoch": epoch, "step": step}, tmp_path / "x", method, optimizer)
        assert said in caplog.text and "epoch -1" not in caplog.text


@pytest.mark.parametrize("where", ["start_from", "eval"])
def test_weights_with_nan_are_refused_by_name(finished: Path, tmp_path: Path, where: str) -> None:
    state = checkpoint.read(finished.parent / "checkpoints/ckpt.pth")
    for key in ("model_state", "teacher_state"):
        state[key]["encoder.layer1.0.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    start = (
        "--config",
        str(finished),
        "--out",
        str(tmp_path / "out"),
        "--set",
        f"trainer.start_from={tmp_path}/nan.pth",
    )
    main, words = {
        "eval": (evaluation.main, ("--checkpoint", f"{tmp_path}/nan.pth")),
        "start_from": (train_semi.main, start),
    }[where]
    with pytest.raises(UserError, match=r"nan.pth, \w+: NaN or infinite numbers in 1 tensors: encoder.layer1.0.conv1"):
        main(words)
    assert not (tmp_path / "out").exists()


# The command line and the YAML file


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainr.epochs=3", "--set: trainr: unknown key; did you mean trainer?"),
        ("net.encoder.kwarg.width=3", "--set: net.encoder.kwarg: unknown key; did you mean kwargs?"),
        ("dataset.val={crop: {size: a}}", "--set: dataset.val.crop.size: expected"),
        ("fixmatch.threshold=0.9", "--set: fixmatch: an experiment has one method"),
        ("trainer.epochs.x=1", "--set trainer.epochs.x=1: epochs is not a section"),
        ("trainer.epochs", "--set trainer.epochs: expected dotted.key=value"),
    ],
)
def test_a_mistake_of_set_is_no_mistake_of_the_file(finished: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(finished, [word])
    assert message in str(refused.value) and "config.yaml" not in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        evaluation.main(["--checkpoint", str(finished.parent / "checkpoints/ckpt.pth"), "--set", word])
    assert message in str(refused.value)


@pytest.mark.parametrize("value", [None, [], {"a": 1}])
@pytest.mark.parametrize(("section", "key"), [("dataset", "type"), ("net", "num_classes")])
def test_a_key_that_cannot_be_read_is_named(tmp_path: Path, section: str, key: str, value: object) -> None:
    raw = yaml.safe_load(_write(tmp_path).read_text())
    raw[section][key] = value
    if value is None:
        del raw[section][key]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=f"{section}.{key}: ") as refused:
        load_config(tmp_path / "wrong.yaml")
    assert " object at " not in str(refused.value)


# Files


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    _tree(tmp_path, labeled=3, unlabeled=1)
    for name in ("images/with0.jpg", "masks/with0.png", "empty.txt", "empty.yaml", "empty.pth"):
        (tmp_path / name).write_bytes(b"")
    config = load_config(_write(tmp_path))
    with pytest.raises(UserError, match=r"masks/with0.png: cannot be read as an image \(the file is empty\)"):
        check_data(config)
    with pytest.raises(DataError, match=r"images/with0.jpg: cannot be read as an image \(the file is empty\)"):
        read_image(tmp_path / "images/with0.jpg")
    cases: dict[str, Callable] = {"empty.txt": read_list, "empty.yaml": load_config, "empty.pth": load_safely}
    for name, read in cases.items():
        with pytest.raises((UserError, ValueError), match=rf"{name}: .*empty"):
            read(tmp_path / name)


def test_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    _tree(tmp_path)
    for key in ("train", "val"):
        config = load_config(_write(tmp_path), [f"dataset.{key}.data_root=nowhere"])
        with pytest.raises(UserError, match=rf"^dataset.{key}.data_root: nowhere: no such folder \(looked in .*\)$"):
            read_lists(config)


def test_the_hint_for_lists_names_what_makes_those_that_no_rule_makes(tmp_path: Path) -> None:
    path = next((ROOT / "exps").glob("pascal_imas*/config.yaml"))
    config = load_config(
        path, [f"dataset.train.data_root={tmp_path}", f"dataset.train.data_list={tmp_path}/labeled.txt"]
    )
    with pytest.raises(UserError, match=r"splits --dataset pascal --root .*--download.*--from FOLDER"):
        read_lists(config)


def test_a_list_of_another_format_is_named_with_the_format(tmp_path: Path) -> None:
    _tree(tmp_path)
    (tmp_path / "mine.txt").write_text("photo_1\nphoto_2\n")
    config = load_config(_write(tmp_path), [f"dataset.train.data_list={tmp_path / 'mine.txt'}"])
    expected = r"mine.txt has the line 'photo_1'; expected one name a line: an image's path below dataset.folder.images"
    with pytest.raises(UserError, match=expected):
        check_data(config)


def test_binary_masks_of_two_kinds_are_said(tmp_path: Path) -> None:
    """Where 255 means "leave out" in a set of 0 and 1, a mask without the class looks like one of 0 and 255."""
    _tree(tmp_path, labeled=4, unlabeled=2)
    for root in (tmp_path, tmp_path / "val"):
        for path in (root / "masks").rglob("*.png"):
            Image.fromarray((np.arange(1440).reshape(36, 40) % 2).astype(np.uint8)).save(path)
    options = {"class_names": ["no", "yes"], "binary": True}
    config = load_config(_write(tmp_path, folder=options))
    assert "hold 0 and 255" not in "\n".join(examine(config, read_lists(config)).lines())
    white = Image.open(tmp_path / "masks/with0.png").point(lambda value: 255 * value)
    white.save(tmp_path / "masks/with0.png")
    health = examine(config, read_lists(config))
    assert health.wrong and "7 binary masks hold 0 and 1, and 1 hold 0 and 255" in "\n".join(health.lines())
    assert "with0.jpg" in "\n".join(health.lines())


def test_masks_are_read_once_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tree(tmp_path)
    read: list[str] = []
    mask = FileSource.mask
    monkeypatch.setattr(FileSource, "mask", lambda self, name: read.append(name) or mask(self, name))
    train_semi.main(["--config", str(_write(tmp_path)), "--check", "--set", "net.num_classes=3"])
    assert len(read) == 10  # 6 labeled, 4 val


@pytest.mark.parametrize(("buffered", "status"), [(True, 0), (False, 141)])
def test_output_that_nobody_reads_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, buffered: bool, status: int
) -> None:
    """As of ``check | head``. What is found at the end alone, when all is done, keeps the status."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(os.fdopen(writer, "wb", -1 if buffered else 0), write_through=not buffered)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match=str(status)) if status else contextlib.nullcontext():
        run_script(lambda: print("a line"))
    stream.close()
    assert ("nobody reads the output" in capsys.readouterr().err) == (status != 0)
