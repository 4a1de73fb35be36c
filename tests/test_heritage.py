"""What people bring along: checkpoints of the authors' code, ImageNet files; fewer GPUs; what a run says of itself."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, run, run_ranks
from first_step import progress
from torch import nn

from imas import build_model, load_config
from imas.build import build_method
from imas.data.lists import read_lists
from imas.data.loaders import TrainingData
from imas.data.splits import digest
from imas.engine import checkpoint
from imas.engine.optim import build_optimizer, explain_batch
from imas.errors import UserError
from imas.methods.base import Labeled
from imas.models.pretrained import load_encoder
from imas.models.resnet import ResNet

Experiment = Callable[..., Path]


@pytest.fixture(autouse=True)
def _audible() -> None:
    logging.getLogger("imas").propagate = True


def _theirs(config: Path, path: Path, seed: int = 5, **more) -> dict:
    """A checkpoint as the authors' code writes it for this network: ``module.`` prefixes, their five keys."""
    torch.manual_seed(seed)
    networks = {name: build_model(load_config(config).net) for name in ("model_state", "teacher_state")}
    optimizer = torch.optim.SGD(networks["model_state"].parameters(), lr=0.01, momentum=0.9)
    state = {
        "epoch": 2,
        "optimizer_state": optimizer.state_dict(),
        "best_miou": 0.7,
        **{
            key: {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
            for key, network in networks.items()
        },
        **more,
    }
    torch.save(state, path)
    return state


# Checkpoints


def test_their_checkpoints_are_evaluated(experiment: Experiment, tmp_path: Path) -> None:
    """Both networks, and the figures are those of the weights: the same as of our own checkpoint of them."""
    config = experiment()
    state = _theirs(config, tmp_path / "theirs.pth")
    bare = {
        key: {name.removeprefix("module."): tensor for name, tensor in state[key].items()}
        for key in ("model_state", "teacher_state")
    }
    torch.save({"epoch": 2, **bare}, tmp_path / "ours.pth")
    figures = {}
    for name in ("theirs", "ours"):
        for network in ("teacher", "student"):
            out = tmp_path / f"{name}.json"
            words = ("--config", config, "--checkpoint", tmp_path / f"{name}.pth", "--network", network, "--json", out)
            ended = run("eval.py", *words)
            assert ended.returncode == 0, ended.stderr
            figures[name, network] = json.loads(out.read_text())["iou"]
    assert figures["theirs", "teacher"] == figures["ours", "teacher"] != figures["ours", "student"]
    assert figures["theirs", "student"] == figures["ours", "student"]


def test_training_starts_from_their_networks(experiment: Experiment, tmp_path: Path) -> None:
    """``trainer.start_from``: at epoch 0, student and teacher as they stand there."""
    config = experiment()
    state = _theirs(config, tmp_path / "theirs.pth")
    method = build_method(load_config(config))
    checkpoint.start_from(method.networks(), tmp_path / "theirs.pth")
    for network, key in ((method.student, "model_state"), (method.teacher, "teacher_state")):
        assert all(torch.equal(tensor, state[key][f"module.{name}"]) for name, tensor in network.state_dict().items())
    _theirs(config, tmp_path / "sup_only.pth", teacher_state=None)
    checkpoint.start_from(method.networks(), tmp_path / "sup_only.pth")
    assert all(map(torch.equal, method.teacher.state_dict().values(), method.student.state_dict().values()))

    words = ("--set", f"trainer.start_from={tmp_path / 'theirs.pth'}", "--set", "trainer.epochs=2")
    trained = run("train_semi.py", "--config", config, *words, "--set", "net.encoder.pretrain=not-needed.pth")
    assert trained.returncode == 0, trained.stderr
    assert "starts from the networks" in trained.stdout and "epoch 0: " in trained.stdout
    wrong = run("train_semi.py", "--config", experiment("other"), *words, "--set", "net.encoder.kwargs.width=8")
    assert wrong.returncode == 2 and "misshapen" in wrong.stderr and "Traceback" not in wrong.stderr


def test_their_run_is_continued_and_what_is_lost_is_said(experiment: Experiment, tmp_path: Path) -> None:
    config = experiment()
    _theirs(config, tmp_path / "theirs.pth")
    ended = run("train_semi.py", "--config", config, "--resume", tmp_path / "theirs.pth")
    assert ended.returncode == 0, ended.stderr
    assert "resumed after epoch 1" in ended.stdout and "epoch 2: teacher mIoU" in ended.stdout
    assert "momentum starts at zero" in ended.stdout and "best starts anew" in ended.stdout
    assert torch.load(config.parent / "checkpoints" / "ckpt.pth", weights_only=True)["epoch"] == 3
    again = run("train_semi.py", "--config", config, "--resume", tmp_path / "theirs.pth")
    assert again.returncode == 2 and "earlier run" in again.stderr


def test_resume_from_a_file_equals_resume_from_the_last(experiment: Experiment, tmp_path: Path) -> None:
    """A checkpoint carried to another folder goes on to the same end, momentum and all."""
    first, second = experiment("first"), experiment("second")
    assert run("train_semi.py", "--config", first, "--set", "trainer.epochs=2").returncode == 0
    kept = tmp_path / "kept.pth"
    kept.write_bytes((first.parent / "checkpoints" / "ckpt.pth").read_bytes())
    # The rates depend on the number of epochs, which is set back to three for both.
    assert run("train_semi.py", "--config", first, "--resume", first.parent / "checkpoints/ckpt.pth").returncode == 0
    carried = run("train_semi.py", "--config", second, "--resume", kept)
    assert carried.returncode == 0 and "momentum" not in carried.stdout
    states = [
        torch.load(path.parent / "checkpoints" / "ckpt.pth", weights_only=True)["model_state"]
        for path in (first, second)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_momentum_of_other_parameters_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = nn.Module()
    method.student = nn.Linear(3, 2)
    method.networks = lambda: {"student": method.student}
    optimizer = torch.optim.SGD([{"name": "all", "params": list(method.parameters())}], 0.1, 0.9)
    method.student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"epoch": 1, "model_state": method.student.state_dict(), "optimizer_state": optimizer.state_dict()}
    momentum = [values["momentum_buffer"] for values in state["optimizer_state"]["state"].values()]
    for order, kept in (([0, 1], True), ([1, 0], False)):
        state["optimizer_state"]["state"] = {i: {"momentum_buffer": momentum[k].clone()} for i, k in enumerate(order)}
        fresh = torch.optim.SGD([{"name": "all", "params": list(method.parameters())}], 0.1, 0.9)
        caplog.clear()
        checkpoint.resume(state, tmp_path / "ckpt.pth", method, fresh)
        assert "the best starts anew" in caplog.text
        assert bool(fresh.state_dict()["state"]) == kept
        assert ("momentum starts at zero" in caplog.text) != kept


def test_a_file_without_an_epoch_can_only_be_a_start(experiment: Experiment, tmp_path: Path) -> None:
    config = experiment()
    state = _theirs(config, tmp_path / "weights.pth", epoch=None)
    assert state["epoch"] is None
    ended = run("train_semi.py", "--config", config, "--resume", tmp_path / "weights.pth")
    assert ended.returncode == 2 and "trainer.start_from" in ended.stderr


# ImageNet files


def test_files_for_another_stem_are_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "tv.pth")
    with pytest.raises(ValueError, match="torchvision's kind.*deep_stem to false"):
        load_encoder(ResNet("resnet18"), tmp_path / "tv.pth")
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match="the authors' kind.*deep_stem to true"):
        load_encoder(ResNet("resnet18", deep_stem=False), tmp_path / "deep.pth")


def test_torchvision_fetches_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch's cache, where a file of that name lies; without it and without a network, a sentence."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    cached = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(theirs, cached)
    net = {
        "num_classes": 4,
        "encoder": {"type": "resnet18", "pretrain": "torchvision", "kwargs": {"deep_stem": False}},
    }
    assert torch.equal(build_model(net).encoder.conv1.weight, theirs["conv1.weight"])

    cached.unlink()

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"(?s)net\.encoder\.pretrain: .*resnet18-.*no route to host.*checkpoints"):
        build_model(net)


def test_a_missing_weight_file_is_named_with_the_way_out(experiment: Experiment) -> None:
    """One message, beside what is missing of the data; nothing is made."""
    config = experiment()
    words = ["--set", "net.encoder.pretrain=pretrained/resnet50.pth", "--set", "dataset.val.data_list=none.txt"]
    ended = run("train_semi.py", "--config", config, *words)
    assert ended.returncode == 2
    assert "pretrained/resnet50.pth: no such file" in ended.stderr and "pretrained/README.md" in ended.stderr
    assert "--set net.encoder.pretrain=null" in ended.stderr and "none.txt: cannot read the list" in ended.stderr
    assert list(config.parent.iterdir()) == [config]


def test_a_newcomers_first_start_says_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    """A published recipe without data: lists and weights in one message, each with the way to it."""
    recipe = (ROOT / "exps" / "cityscapes_imas372_r50_os16" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(
        recipe.replace("data/splits/", f"{tmp_path}/").replace("pretrained/", f"{tmp_path}/")
    )
    ended = run("train_semi.py", "--config", tmp_path / "config.yaml")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    for words in (
        "372/labeled.txt",
        "val.txt",
        "imas.data splits --dataset cityscapes",
        "resnet50.pth",
        "pretrain=null",
    ):
        assert words in ended.stderr, ended.stderr


# Fewer GPUs


def test_accumulated_gradients_are_those_of_one_batch(experiment: Experiment) -> None:
    """SupOnly with frozen statistics: two batches of two, averaged, equal one of four."""
    config = load_config(experiment(), ["sup_only={}", "dataset.train.strong_aug=null"])
    method = build_method(config).eval()
    tensors = next(TrainingData(config, read_lists(config), 0, 0, 1).epoch(0, False))[0]
    images, labels = tensors["labeled"]["image"].float() / 255, tensors["labeled"]["label"].long()

    def gradients(parts: int) -> list[torch.Tensor]:
        method.zero_grad()
        for x, y in zip(images.chunk(parts), labels.chunk(parts)):
            (method(Labeled(x, y), None, progress()).loss / parts).backward()
        return [parameter.grad.clone() for parameter in method.parameters() if parameter.grad is not None]

    labels[labels == 255] = 0  # as many valid pixels in every part
    assert all(map(partial(torch.allclose, rtol=1e-4, atol=1e-6), gradients(1), gradients(2)))


def test_a_run_that_accumulates_has_fewer_updates_and_says_so(experiment: Experiment) -> None:
    """Two batches of four an update: half as many iterations, scores of all images, the notes on the batch."""
    config = experiment()
    words = ("--set", "trainer.accumulate=2", "--set", "trainer.reference_batch=16")
    trained = run("train_semi.py", "--config", config, *words)
    assert trained.returncode == 0, trained.stderr
    assert "3 epochs of 2 iterations" in trained.stdout
    assert "an update accumulates 2 batches: scores, CutMix, OHEM and BatchNorm still see 4" in trained.stdout
    assert "total batch 8 (1 process(es) × 4 × accumulate 2)" in trained.stdout
    scores = (config.parent / "log" / "scores.csv").read_text().splitlines()
    assert sum(line.startswith("2,") for line in scores) == 16


def test_the_note_on_the_batch_names_what_fits() -> None:
    path = ROOT / "exps" / "pascal_imas662_r50_os16" / "config.yaml"
    assert explain_batch(load_config(path), world=4) == []
    (note,) = explain_batch(load_config(path), world=1)
    assert "total batch 4 " in note and "is for 16" in note
    assert "trainer.accumulate=4" in note and "scale_lr=true multiplies the learning rates by 0.25" in note
    (note,) = explain_batch(load_config(path), world=3)
    assert "trainer.accumulate" not in note
    (note,) = explain_batch(load_config(path, ["trainer.accumulate=4"]), world=1)
    assert "4 batches" in note and "total batch" not in note
    notes = explain_batch(load_config(path, ["trainer.scale_lr=true"]), world=2)
    assert notes[0] == "learning rates times 0.5 (trainer.scale_lr)" and "multiplies" not in notes[1]


def test_accumulation_on_two_ranks(experiment: Experiment) -> None:
    config = experiment()
    trained, _ = run_ranks("train_semi.py", "--config", config, "--set", "trainer.accumulate=2")
    assert trained.returncode == 0, trained.stderr
    assert "3 epochs of 1 iterations, batch 4 on 2 process(es)" in trained.stdout


def test_scaled_rates_reach_both_groups() -> None:
    config = load_config(ROOT / "exps" / "pascal_imas662_r50_os16" / "config.yaml")
    groups = [{"name": name, "part": name, "params": [nn.Parameter(torch.zeros(1))]} for name in ("encoder", "heads")]
    rates = [group["base_lr"] for group in build_optimizer(groups, config.trainer.optimizer, 0.5).param_groups]
    assert rates == pytest.approx([0.0005, 0.005])


# What a run says of itself


def test_a_run_records_what_it_was(experiment: Experiment) -> None:
    """The resolved recipe, loadable; every start with command, seed, versions, lists; the same in the checkpoint."""
    config = experiment()
    words = ("--seed", "4", "--set", "trainer.epochs=2")
    for _ in range(2):
        assert run("train_semi.py", "--config", config, *words).returncode == 0
    log = config.parent / "log"
    assert load_config(log / "config.yaml") == load_config(config, ["trainer.epochs=2"])
    starts = yaml.safe_load((log / "run.yaml").read_text())
    assert len(starts) == 2
    state = torch.load(config.parent / "checkpoints" / "ckpt.pth", weights_only=True)
    assert state["run"] == starts[0] and state["config"]["trainer"]["epochs"] == 2
    described = starts[0]
    assert described["seed"] == 4 and described["command"][1:] == ["train_semi.py", "--config", str(config), *words]
    assert torch.__version__.startswith(described["packages"]["torch"].split("+")[0])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", described["git"]) or not (ROOT / ".git").exists()
    assert described["lists"]["labeled"] == {
        "path": None, "images": 4, "sha256": digest([f"shapes/{i:05d}" for i in range(4)]),
    }  # fmt: skip


def test_digests_do_not_depend_on_the_order() -> None:
    """SHA-256 of the sorted lines, each with its newline: what ``printf 'a\\nb\\n' | sha256sum`` prints."""
    expected = "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2"
    assert digest(["b", "a"]) == digest(["a", "b"]) == expected != digest(["a", "b", "b"])


def test_old_words_are_translated_in_one_line(experiment: Experiment) -> None:
    config = experiment()
    raw = yaml.safe_load(config.read_text())
    del raw["imas"]
    raw["trainer"] |= {"sup_only_epoch": 1, "unsupervised": {"threshold": 0.25}}
    raw["dataset"]["train"]["hardness_aware"] = {"flag_using_v1": True, "flag_augs_mixup_by_hard": True}
    raw["net"]["encoder"]["type"] = "imas.models.resnet.resnet18"
    config.write_text(yaml.safe_dump(raw))
    trained = run(
        "train_semi.py", "--config", config, "--port", "29500", "--local_rank", "0", "--deterministic",
        "--set", "trainer.epochs=2",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    (line,) = [line for line in trained.stdout.splitlines() if "translated: " in line]
    assert "flag_using_v1 → imas.hardness.version: 1" in line and "resnet18" in line
    assert "flag_augs_mixup_by_hard → imas.hardness.blend" in line and "trainer.sup_only_epoch → imas.sup_only" in line


def test_check_prints_the_recipe_and_writes_nothing(experiment: Experiment) -> None:
    config = experiment()
    words = ("--set", "trainer.reference_batch=16")
    checked = run("train_semi.py", "--config", config, "--check", *words)
    assert checked.returncode == 0, checked.stderr
    assert list(config.parent.iterdir()) == [config]
    resolved = config.parent / "resolved.yaml"
    text = checked.stdout.split("config.yaml:\n")[1]
    resolved.write_text(re.split(r"\n\d{4}-", text)[0])
    assert load_config(resolved) == load_config(config, words[1:])
    for expected in ("total batch 4", "4 labeled, 16 unlabeled, 5 validation", "nothing was written"):
        assert expected in checked.stdout, expected
    wrong = run("train_semi.py", "--config", config, "--check", "--set", "net.encoder.pretrain=none.pth")
    assert wrong.returncode == 2 and "none.pth" in wrong.stderr
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.yaml", "resolved.yaml"]
