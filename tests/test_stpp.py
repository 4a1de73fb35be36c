"""ST and ST++: stages that go on where they were, labels on the disk, and what people may do with them."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, run_ranks
from PIL import Image

import train_semi
from imas import load_config
from imas.config import carried_config
from imas.data.dataset import Draw, UnlabeledSet
from imas.data.labels import label_path, open_labels, write_labels
from imas.data.source import ShapesSource
from imas.data.weak import Geometry
from imas.engine import checkpoint, inference
from imas.engine.inference import Inference
from imas.engine.interrupt import Interrupted, Interruption
from imas.engine.session import Session
from imas.errors import ConfigError, UserError, run_script
from imas.schema import StrongAug

Experiment = Callable[..., Path]
STPP = {
    "imas": None,
    "stpp": {"scales": [0.5, 1.0]},
    "dataset": TINY["dataset"]
    | {"train": TINY["dataset"]["train"] | {"batch_size": 2, "strong_aug": {"type": "jitter", "cutout": True}}},
    "saver": {"auto_resume": True, "use_tb": False},
}
NAMES = [f"shapes/{number:05d}" for number in range(4, 20)]  # the unlabeled images


@pytest.fixture
def recipe(tmp_path: Path) -> Experiment:
    """Write an experiment of ``STPP``, with other options in its section."""

    def write(name: str, train: dict | None = None, **options: object) -> Path:
        sections = TINY | STPP
        dataset = sections["dataset"] | {"train": sections["dataset"]["train"] | (train or {})}
        sections |= {"stpp": sections["stpp"] | options, "dataset": dataset}
        del sections["imas"]
        path = tmp_path / name / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ST++ that was left alone."""
    path = tmp_path_factory.mktemp("straight") / "config.yaml"
    sections = TINY | STPP
    path.write_text(yaml.safe_dump({key: value for key, value in sections.items() if value is not None}))
    train_semi.main(["--config", str(path)])
    return path.parent


def _files(folder: Path) -> dict[str, object]:
    """What two runs must have alike: label files and scores as bytes, networks, momentum and figures."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("log_before_"):  # of a run that was killed before its first checkpoint
            continue
        if path.name in ("metrics.csv", "reliability.csv", "manifest.json") or "labels" in path.parts[-3:-1]:
            found[name] = path.read_bytes() if path.is_file() else None
        if path.suffix == ".pth" and path.name != checkpoint.PREVIOUS:
            found[name] = torch.load(path, weights_only=True)
    return found


def _same(one: Path, two: Path) -> None:
    first, second = _files(one), _files(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not isinstance(value, dict):
            assert value == second[name], name
            continue
        for key in ("model_state", "optimizer_state", "best", "epoch"):
            assert str(value.get(key)) == str(second[name].get(key)), (name, key)
        for key, tensor in value["model_state"].items():
            assert torch.equal(tensor, second[name]["model_state"][key]), (name, key)


def test_every_stage_has_its_folder(straight: Path) -> None:
    checkpoints = straight / "checkpoints"
    kept = sorted(path.name for path in (checkpoints / "1-labeled").iterdir())
    assert [name for name in kept if "epoch" in name] == [checkpoint.kept(number) for number in (1, 2, 3)]
    state = checkpoint.read(checkpoints / "1-labeled" / checkpoint.kept(2))
    assert checkpoint.network_names(state) == ["student"] and "optimizer_state" not in state
    for stage in ("1-labeled", "4-reliable", ""):
        for name in ("metrics.csv", "report.html", "evaluation.json", "train.log"):
            assert (straight / "log" / stage / name).is_file()
    with open(straight / "log" / "2-reliability" / "reliability.csv", newline="") as file:
        head, *rows = csv.reader(file)
    scores = [float(score) for _, score in rows]
    assert head == ["image", "reliability"] and scores == sorted(scores, reverse=True)
    assert sorted(name for name, _ in rows) == NAMES and 0 <= min(scores) < max(scores) <= 1
    reliable = [name for name, _ in rows[:8]]
    first, second = (checkpoints / stage / "labels" for stage in ("3-labels", "5-labels"))
    assert sorted(path.stem for path in first.rglob("*.png")) == sorted(name[-5:] for name in reliable)
    assert len(list(second.rglob("*.png"))) == 16 and not list(checkpoints.rglob("*.part"))
    for name in reliable:  # never labeled again
        assert label_path(first, name).read_bytes() == label_path(second, name).read_bytes()
    manifest = json.loads((second / "manifest.json").read_text())
    assert manifest["count"] == 16 and len(manifest["networks"]) == 1
    with Image.open(label_path(second, NAMES[0])) as image:
        assert image.mode == "P" and image.size == (32, 32) and np.asarray(image).max() < 4
        assert image.getpalette()[3:6] == [128, 0, 0]
    assert (straight / "log" / "reliability.png").is_file() and (straight / "log" / "views.png").is_file()
    page = (straight / "log" / "report.html").read_text()
    assert "Further pictures" in page and all(f"{stage}/report.html" in page for stage in ("1-labeled", "4-reliable"))


def test_later_trainings_start_anew_on_their_own_images(straight: Path) -> None:
    """Each from the same start; 2 + 2 images a batch, and 4 labeled ones in the first training."""
    first, second, last = (
        checkpoint.read(straight / "checkpoints" / stage / checkpoint.LAST) for stage in ("1-labeled", "4-reliable", "")
    )
    images = [{name: each["images"] for name, each in state["run"]["lists"].items()} for state in (first, second, last)]
    assert [each.get("unlabeled") for each in images] == [None, 8, 16] and {each["labeled"] for each in images} == {4}
    assert [state["run"]["total_batch"] for state in (first, second, last)] == [4, 2, 2]
    assert [state["iterations_per_epoch"] for state in (first, second, last)] == [2, 4, 8]  # 8 / 4, 16 / 4, 32 / 4
    for state, method in ((first, "sup_only"), (second, "stpp"), (last, "stpp")):  # eval.py reads them
        assert carried_config(state["config"], "ckpt.pth").method == method


class Killed(BaseException):
    """Not caught by anything, as the end of a process."""


def _killed_at(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int) -> None:
    original, calls = getattr(module, name), []

    def counted(*arguments: object, **options: object) -> object:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (inference, "write_labels", 3),  # while the reliable images get labels
        (inference, "write_labels", 12),  # and the others
        (inference.shutil, "copyfile", 5),
        (inference.os, "replace", 9),  # of a file or a folder
        (checkpoint, "save", 2),  # a network that is kept
        (checkpoint, "save", 9),
    ],
)
def test_a_killed_run_goes_on_bitwise(
    recipe: Experiment, straight: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int
) -> None:
    path = recipe("killed")
    with monkeypatch.context() as patch:
        _killed_at(patch, module, name, call)
        with pytest.raises(Killed):
            train_semi.main(["--config", str(path)])
    for torn in path.parent.rglob("labels.part"):  # a file that the system had not written out
        for file in list(torn.rglob("*.png"))[:1]:
            file.write_bytes(file.read_bytes()[:60])
    train_semi.main(["--config", str(path)])
    _same(straight, path.parent)


def test_stopped_within_an_epoch_of_a_stage(recipe: Experiment, straight: Path, monkeypatch) -> None:
    path = recipe("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "stops_before", lambda self, iteration: iteration == 7)  # of the second training
        with pytest.raises(Interrupted):
            train_semi.main(["--config", str(path)])
    assert not (path.parent / "checkpoints" / "4-reliable" / "done").is_file()
    assert (path.parent / "checkpoints" / "1-labeled" / "done").is_file()
    train_semi.main(["--config", str(path)])
    _same(straight, path.parent)
    before = _files(path.parent)
    train_semi.main(["--config", str(path)])  # once more: nothing is left to do
    assert str(before.keys()) == str(_files(path.parent).keys())


def test_another_seed_or_network_does_not_mix_in(recipe: Experiment) -> None:
    path = recipe("seeds", stages="st")
    train_semi.main(["--config", str(path)])
    with pytest.raises(UserError, match="seed"):
        train_semi.main(["--config", str(path), "--seed", "1"])
    for mark in (path.parent / "checkpoints").glob("ckpt*.pth"):  # as if the last stage had not begun
        mark.unlink()
    with pytest.raises(UserError, match="that run had the seed 0, this one has 1"):
        train_semi.main(["--config", str(path), "--seed", "1"])
    manifest = path.parent / "checkpoints" / "2-labels" / "labels" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"count": 16', '"count": 15'))
    with pytest.raises(UserError, match="of another network or of other images"):
        train_semi.main(["--config", str(path)])


def test_a_person_corrects_labels_between_stages(recipe: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited files are used as they are, and what does not fit is named in one sentence."""
    path = recipe("edited", stages="st")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_check_labels", lambda self, config, lists: _stop(config))
        with pytest.raises(Killed):
            train_semi.main(["--config", str(path)])
    folder = path.parent / "checkpoints" / "2-labels" / "labels"
    edited = {name: label_path(folder, name) for name in NAMES[:3]}
    before = {name: file.read_bytes() for name, file in edited.items()}
    Image.new("L", (32, 30)).save(edited[NAMES[0]])
    Image.new("L", (32, 32), 9).save(edited[NAMES[1]])
    edited[NAMES[2]].unlink()
    with pytest.raises(UserError) as error:
        train_semi.main(["--config", str(path)])
    for words in (
        "3 of the 16 unlabeled images and their labels in",
        "32×32 pixels, its mask 32×30",
        "values 9; expected classes 0..3",
        "no such file",
    ):
        assert words in str(error.value)
    for name, file in edited.items():
        file.write_bytes(before[name])
    Image.new("L", (32, 32), 255).save(edited[NAMES[0]])  # nothing of it is trained on
    train_semi.main(["--config", str(path)])
    assert np.asarray(Image.open(edited[NAMES[0]])).min() == 255


def _stop(config: object) -> None:
    if config.wants.pseudo_label:
        raise Killed


def test_labels_from_elsewhere(recipe: Experiment, straight: Path, tmp_path: Path) -> None:
    """The last stage alone: on the labels of a whole run it ends as that run's last stage."""
    labels = straight / "checkpoints" / "5-labels" / "labels"
    path = recipe("last", {"pseudo_labels": str(labels)}, stages="last")
    train_semi.main(["--config", str(path)])
    ours, theirs = (checkpoint.read(each / "checkpoints" / checkpoint.LAST) for each in (path.parent, straight))
    assert all(torch.equal(ours["model_state"][key], value) for key, value in theirs["model_state"].items())

    path = recipe("missing", {"pseudo_labels": str(tmp_path / "nowhere")}, stages="last")
    with pytest.raises(UserError, match="16 of the 16 unlabeled images and their labels in .*nowhere cannot"):
        train_semi.main(["--config", str(path)])
    assert not (path.parent / "log").exists()


def test_bad_configurations(recipe: Experiment, experiment: Experiment) -> None:
    with pytest.raises(ConfigError, match="pseudo_labels: missing; stpp.stages: last trains on labels from elsewhere"):
        load_config(recipe("a", stages="last"))
    with pytest.raises(ConfigError, match="to train on these, say stpp.stages: last"):
        load_config(recipe("b", {"pseudo_labels": "x"}))
    with pytest.raises(ConfigError, match="trainer.epochs: expected at least 2"):
        load_config(recipe("c"), ["trainer.epochs=1"])
    for word in ("pseudo_labels=x", "strong_aug.cutout=true"):
        with pytest.raises(
            ConfigError, match="only for a method that reads pseudo labels from files, which imas does not"
        ):
            load_config(experiment(), [f"dataset.train.{word}"])


def test_lists_that_do_not_go_together(recipe: Experiment, tmp_path: Path) -> None:
    lists = {"labeled": [0, 1, 2, 3], "unlabeled": [3, 4, 4, 5, 6], "val": [6, 7]}
    words = []
    for name, numbers in lists.items():
        file = tmp_path / f"{name}.txt"
        file.write_text("".join(f"shapes/{number:05d}\n" for number in numbers))
        key = {"labeled": "train.data_list", "unlabeled": "train.unlabeled_list", "val": "val.data_list"}[name]
        words += ["--set", f"dataset.{key}={file}"]
    path = recipe("lists")
    with pytest.raises(UserError) as error:
        train_semi.main(["--config", str(path), *words])
    text = str(error.value)
    for problem in ("more than once", "both labeled and unlabeled", "both unlabeled and val"):
        assert f"1 images are {problem}" in text
    assert not (path.parent / "log").exists()
    (tmp_path / "unlabeled.txt").write_text("shapes/00005\n")
    with pytest.raises(UserError, match="none of the 1 unlabeled images would be selected as reliable"):
        train_semi.main(["--config", str(path), *words])
    assert not (path.parent / "checkpoints").exists()


def test_a_full_disk_leaves_whole_labels_only(recipe: Experiment, monkeypatch, capsys) -> None:
    path, saved = recipe("full", stages="st"), []
    original = Image.Image.save

    def save(self: Image.Image, target: object, *arguments: object, **options: object) -> None:
        if "labels.part" in str(target):
            saved.append(target)
        if len(saved) == 4:
            Path(target).write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        original(self, target, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        with pytest.raises(SystemExit):
            run_script(lambda: train_semi.main(["--config", str(path)]))
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    folder = path.parent / "checkpoints" / "2-labels"
    assert not (folder / "labels").exists()
    assert len([file for file in (folder / "labels.part").rglob("*") if file.is_file()]) == 4  # 3 labels, the manifest
    train_semi.main(["--config", str(path)])
    assert len(list((folder / "labels").rglob("*.png"))) == 16


def test_two_ranks_write_each_label_once(recipe: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe("ranks", stages="st")
    for rank in run_ranks("train_semi.py", "--config", path):
        assert rank.returncode == 0, rank.stderr
    folder = path.parent / "checkpoints" / "2-labels" / "labels"
    assert len(list(folder.rglob("*.png"))) == 16

    config, written = load_config(path), []
    each = Inference(config, torch.device("cpu"), Interruption())
    monkeypatch.setattr(each, "config", SimpleNamespace(**vars(config), snapshot_dir=tmp_path, log_dir=tmp_path))
    monkeypatch.setattr(inference, "write_labels", lambda path, labels, palette: written.append(path))
    monkeypatch.setattr(inference.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(inference.distributed, "barrier", lambda: None)
    for rank in (1, 0):
        monkeypatch.setattr(inference.distributed, "rank", lambda rank=rank: rank)
        each.label("x", torch.nn.Conv2d(3, 4, 1), NAMES, lambda network, image: network(image).argmax(dim=1))
    assert len(written) == len(set(written)) == 16


def test_cutout_takes_the_label_out_and_leaves_the_weak_view(tmp_path: Path) -> None:
    source, geometry = ShapesSource(0, 32), Geometry(None, None, True, None, "rand", 255)
    dataset = load_config(_shapes(tmp_path)).dataset
    for name in NAMES:
        write_labels(label_path(tmp_path, name), np.array(source.mask(name)), ((1, 2, 3),) * 4)
    labels = open_labels(dataset, tmp_path)
    cut = 0
    for index in range(16):
        sample, plain = (
            UnlabeledSet(source, NAMES, geometry, 1, StrongAug("jitter", cutout=cutout), labels=labels)[
                Draw(index, (index,))
            ]
            for cutout in (True, False)
        )
        assert torch.equal(sample["weak"], plain["weak"])
        differs = (sample["strong"][0] != plain["strong"][0]).any(dim=0)
        taken_out = sample["label"] != plain["label"]
        assert (sample["label"][differs] == 255).all() and (sample["label"][taken_out] == 255).all()
        cut += bool(differs.any())
    assert 3 <= cut <= 13  # half of them


def _shapes(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (TINY | STPP).items() if value is not None}))
    return path


def test_label_files_are_named_by_the_list(tmp_path: Path) -> None:
    assert label_path(Path("x"), "2007_000032") == Path("x/2007_000032.png")
    assert label_path(Path("x"), "a/b.v2.jpg") == Path("x/a/b.v2.png")
    assert label_path(Path("x"), "../more/b.jpg") == Path("x/more/b.png")
    values = np.array([[0, 3, 255]], dtype=np.uint8)
    write_labels(tmp_path / "a" / "b.png", values, ((0, 0, 0),) * 4)
    for ignore in (255, 9):
        dataset = load_config(_shapes(tmp_path), [f"dataset.ignore_label={ignore}"]).dataset
        read = np.asarray(open_labels(dataset, tmp_path).mask("a/b"))
        assert read.tolist() == [[0, 3, ignore]]
