"""``train_semi.py`` and ``eval.py`` as a user starts them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run, run_ranks

from imas.errors import run_script

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / "ckpt.pth", weights_only=True)
    return {f"{key}/{name}": tensor for key in ("model_state", "teacher_state") for name, tensor in state[key].items()}


def test_train_then_evaluate(experiment: Callable[..., Path]) -> None:
    """The main path: lines, CSV files, checkpoints, pictures, TensorBoard; eval.py repeats the mIoU to the digit."""
    config = experiment()
    trained = run("train_semi.py", "--config", config, "--seed", "3")
    assert trained.returncode == 0, trained.stderr
    folder = config.parent
    state = torch.load(folder / "checkpoints" / "ckpt.pth", weights_only=True)
    assert {"epoch", "model_state", "teacher_state", "optimizer_state", "best_miou"} <= set(state)
    assert state["epoch"] == 3
    assert (folder / "checkpoints" / "ckpt_best.pth").is_file()
    assert (folder / "log" / "predictions.png").stat().st_size > 1000
    assert list(folder.glob("events.out.tfevents.*"))
    for words in ("epoch 2 [2/4]", "background", "checkpoints", "TensorBoard"):
        assert words in trained.stdout + trained.stderr, words

    metrics = _rows(folder / "log" / "metrics.csv")
    assert [row["epoch"] for row in metrics] == ["0", "1", "2"]
    assert metrics[0]["loss_ub"] == "" and float(metrics[1]["loss_ub"]) >= 0
    assert metrics[1]["miou_tea"] == metrics[1]["miou_stu"]  # the teacher is the student in its first epoch
    assert float(metrics[2]["best"]) == max(float(row["miou_tea"]) for row in metrics)
    assert float(metrics[2]["best-stu"]) == max(float(row["miou_stu"]) for row in metrics)
    scores = _rows(folder / "log" / "scores.csv")
    assert sorted(row["image"] for row in scores if row["epoch"] == "1") == [f"shapes/{i:05d}" for i in range(4, 20)]
    assert all(0 <= float(row["score"]) <= 1 for row in scores)

    for network, column, words in (("teacher", "miou_tea", ("--config", config)), ("student", "miou_stu", ())):
        out = folder / f"{network}.json"
        checkpoint = folder / "checkpoints" / "ckpt.pth"  # which carries its configuration
        evaluated = run("eval.py", *words, "--checkpoint", checkpoint, "--network", network, "--json", out)
        assert evaluated.returncode == 0, evaluated.stderr
        figures = json.loads(out.read_text())
        assert figures["miou"] == float(metrics[2][column])
        assert f"mIoU {figures['miou']:.2f}" in evaluated.stdout
        assert f"{network} mIoU {figures['miou']:.2f}" in trained.stdout
        assert figures["images"] == 5 and set(figures["iou"]) >= {"background"}


def test_sup_only_trains_and_has_no_teacher(experiment: Callable[..., Path]) -> None:
    config = experiment(
        dataset={
            "type": "shapes",
            "train": {"batch_size": 2, "strong_aug": {}, "epoch_size": 6},
            "shapes": {"size": 32, "labeled": 4, "val": 3},
            "val": {"crop": {"size": 48}},
            "workers": 0,
        },
        trainer={"epochs": 2, "eval_every": 2, "optimizer": {"kwargs": {"lr": 0.02}}},
    )
    trained = run("train_semi.py", "--config", config, "--set", "sup_only={strong_views: true}")
    assert trained.returncode == 0, trained.stderr
    assert "2 epochs of 3 iterations" in trained.stdout
    state = torch.load(config.parent / "checkpoints" / "ckpt.pth", weights_only=True)
    assert "teacher_state" not in state
    rows = _rows(config.parent / "log" / "metrics.csv")
    assert [row["miou_stu"] != "" for row in rows] == [False, True]
    assert all(row["miou_tea"] == row["loss_ub"] == "" for row in rows)
    evaluated = run("eval.py", "--config", config, "--checkpoint", config.parent / "checkpoints" / "ckpt.pth")
    assert f"mIoU {float(rows[1]['miou_stu']):.2f}" in evaluated.stdout


def test_same_seed_same_run_and_other_seed_another(experiment: Callable[..., Path]) -> None:
    ends = []
    for name, seed, pictures in (("a", "5", "1"), ("b", "5", "null"), ("c", "6", "null")):  # pictures change nothing
        config = experiment(name)
        options = ("--set", "trainer.epochs=2", "--set", f"saver.pictures_every={pictures}")
        assert run("train_semi.py", "--config", config, "--seed", seed, *options).returncode == 0
        ends.append(_weights(config.parent))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_two_processes_train_together(experiment: Callable[..., Path]) -> None:
    """Under torchrun: every validation image once, scores of all unlabeled images, one log."""
    config = experiment()
    trained = run("train_semi.py", "--config", config, launcher=TORCHRUN)
    assert trained.returncode == 0, trained.stderr
    assert "3 epochs of 2 iterations, batch 4 on 2 process(es)" in trained.stdout
    assert trained.stdout.count("epoch 2: teacher mIoU") == 1
    metrics = _rows(config.parent / "log" / "metrics.csv")
    scores = _rows(config.parent / "log" / "scores.csv")
    assert len([row for row in scores if row["epoch"] == "2"]) == 16  # 2 ranks, 2 batches of 4 each
    out = config.parent / "one.json"
    checkpoint = config.parent / "checkpoints" / "ckpt.pth"
    evaluated, _ = run_ranks("eval.py", "--config", config, "--checkpoint", checkpoint, "--json", out)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(out.read_text())["miou"] == float(metrics[2]["miou_tea"])
    assert "on 5 images" in evaluated.stdout


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(experiment: Callable[..., Path]) -> None:
    config = experiment()
    assert run("train_semi.py", "--config", config, "--set", "trainer.epochs=2").returncode == 0
    before = (config.parent / "checkpoints" / "ckpt.pth").read_bytes()
    words = ("--set", "trainer.optimizer.kwargs.lr=1e30", "--resume", config.parent / "checkpoints" / "ckpt.pth")
    stopped = run("train_semi.py", "--config", config, *words)
    assert stopped.returncode == 1
    assert re.search(r"iteration \d+: loss_\w+ = (nan|inf)", stopped.stderr)
    assert "Traceback" not in stopped.stderr
    assert (config.parent / "checkpoints" / "ckpt.pth").read_bytes() == before


def _pascal(folder: Path, value: int = 1) -> dict:
    """A Pascal tree with one image, and the sections that use it."""
    import numpy as np
    from PIL import Image

    for name in ("JPEGImages", "SegmentationClassAug"):
        (folder / "VOC" / name).mkdir(parents=True)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / "VOC" / "JPEGImages" / "a.jpg")
    Image.fromarray(np.full((40, 50), value, np.uint8)).save(folder / "VOC" / "SegmentationClassAug" / "a.png")
    (folder / "labeled.txt").write_text("a\n")
    (folder / "unlabeled.txt").write_text("a\n")
    lists = {"data_root": str(folder / "VOC"), "data_list": str(folder / "labeled.txt")}
    return {"type": "pascal", "train": {**lists, "crop": {"size": 33}, "batch_size": 1}, "val": lists, "workers": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["trainer.epoch=5", "net.num_classes=three"], ["trainer.epoch: unknown key; did you mean epochs?", "three"]),
        (
            ["dataset.train.data_list=nowhere/labeled.txt"],
            ["nowhere/labeled.txt", "nowhere/unlabeled.txt", "cannot read the list"],
        ),
        (["net.encoder.pretrain=nowhere.pth"], ["net.encoder.pretrain", "nowhere.pth", "no such file"]),
        (["nonsense"], ["nonsense", "dotted.key=value"]),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_on_disk(experiment, change: list[str], words: list[str]) -> None:
    config = experiment()
    ended = run("train_semi.py", "--config", config, *(word for item in change for word in ("--set", item)))
    assert ended.returncode == 2
    assert all(word in ended.stderr for word in words), ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(config.parent.iterdir()) == [config]


def test_mistakes_in_the_data_end_with_one_message_and_nothing_on_disk(experiment, tmp_path: Path) -> None:
    dataset = _pascal(tmp_path / "data", value=77)
    config = experiment(dataset=dataset)
    net = ("--set", "net.num_classes=21")
    ended = run("train_semi.py", "--config", config, *net)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "SegmentationClassAug/a.png" in ended.stderr and "77" in ended.stderr and "0..20" in ended.stderr
    (tmp_path / "data" / "VOC" / "JPEGImages" / "a.jpg").unlink()
    ended = run("train_semi.py", "--config", config, *net)
    assert ended.returncode == 2 and "JPEGImages/a.jpg" in ended.stderr and "no such file" in ended.stderr
    missing = run("train_semi.py", "--config", tmp_path / "none.yaml")
    assert missing.returncode == 2 and "none.yaml" in missing.stderr
    assert list(config.parent.iterdir()) == [config]


def test_an_earlier_run_is_not_overwritten(experiment: Callable[..., Path]) -> None:
    config = experiment()
    assert run("train_semi.py", "--config", config, "--set", "trainer.epochs=2").returncode == 0
    before = (config.parent / "checkpoints" / "ckpt.pth").read_bytes()
    cases = {
        ("--set", "saver.auto_resume=false"): "earlier run",
        ("--resume", "never"): "earlier run",
        ("--resume", config.parent / "none.pth"): "none.pth: no such file",
        ("--seed", "9"): "seed 0",
        ("--set", "net.encoder.kwargs.width=8"): "net.encoder.kwargs.width: 8, and 4 before",
    }
    for words, message in cases.items():
        ended = run("train_semi.py", "--config", config, *words)
        assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr
    assert (config.parent / "checkpoints" / "ckpt.pth").read_bytes() == before
    wrong = run("eval.py", "--config", config, "--checkpoint", config)
    assert wrong.returncode == 2 and "not safe to load" in wrong.stderr


def test_a_gpu_without_memory_is_a_sentence(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    assert (
        "error: the GPU is out of memory" in (err := capsys.readouterr().err) and "9 GiB" in err and "more" not in err
    )
