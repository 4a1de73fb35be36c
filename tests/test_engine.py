"""Schedules, evaluation, checkpoints and what a run writes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import golden
import pytest
import torch
from PIL import Image
from torch import nn

from imas import ConfusionMatrix, build_model, poly_lr, predict_sliding
from imas.data.catalog import Catalog
from imas.data.dataset import EvaluationSet
from imas.data.loaders import evaluation_batches
from imas.data.source import ShapesSource, shapes_names
from imas.engine import checkpoint
from imas.engine.evaluate import evaluate, figures, format_table
from imas.engine.log import RunLog
from imas.engine.meter import Meter, NonFiniteLoss
from imas.engine.optim import build_optimizer, cosine_lr, learning_rate
from imas.engine.pictures import _fitted, prediction_sheet, spread
from imas.engine.sliding import Predictor, Protocol
from imas.errors import UserError
from imas.schema import Optimizer, OptimizerKwargs, Scheduler, SchedulerKwargs


def test_poly_equals_the_authors() -> None:
    schedule = golden.read("schedule")
    total = schedule["epochs"] * schedule["iterations_per_epoch"]
    for iteration, *rates in schedule["lr_used_in_iteration"]:
        ours = [poly_lr(base, iteration, total, schedule["power"]) for base in schedule["base_lr"]]
        assert ours == pytest.approx(rates, rel=1e-12)


def test_cosine_and_milestones() -> None:
    assert [cosine_lr(1.0, i, 4, 0.2) for i in (0, 2)] == pytest.approx([1.0, 0.6])
    assert cosine_lr(1.0, 4, 4, 0.2) == pytest.approx(0.2)
    steps = Scheduler("milestones", SchedulerKwargs(milestones=(1, 3)))
    rates = [learning_rate(steps, 1.0, i, 8, 2) for i in range(8)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert learning_rate(Scheduler("cosine"), 1.0, 0, 8, 2) == 1.0


@pytest.mark.parametrize("kind", ["SGD", "adam"])
def test_two_learning_rates(kind: str) -> None:
    groups = [{"name": name, "part": name, "params": [nn.Parameter(torch.zeros(1))]} for name in ("encoder", "heads")]
    options = Optimizer(OptimizerKwargs(lr=0.001, weight_decay=0.1), kind, head_lr_times=10.0)
    optimizer = build_optimizer(groups, options)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.01])
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_evaluation_equals_the_authors() -> None:
    case = golden.read("evaluation")
    model = golden.fill(build_model(golden.network("resnet50-os16-aux"))).eval()
    matrix = ConfusionMatrix(19)
    images, labels = golden.made(case["images"]), golden.made(case["labels"])
    matrix.update(predict_sliding(model, images, case["crop"]).argmax(1), labels)
    assert matrix.target.tolist() == case["target"]
    # A pixel on which two classes are equally likely may fall either way with the machine's rounding.
    torch.testing.assert_close(matrix.intersection, torch.tensor(case["intersection"]), atol=3, rtol=0)
    torch.testing.assert_close(matrix.union, torch.tensor(case["union"]), atol=3, rtol=0)
    assert math.isclose(matrix.miou, case["mIoU"], rel_tol=2e-3)


def test_windows_cover_the_image() -> None:
    """Starts 0, stride, ... while inside; every pixel's sum is the number of windows over it."""
    seen = []

    def model(window: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(window.shape[-2:]))
        return torch.zeros(len(window), 2, *window.shape[-2:])

    total = predict_sliding(model, torch.zeros(1, 3, 10, 25), 12)  # stride 8
    assert seen == [(10, 12), (10, 12), (10, 9), (10, 1), (2, 12), (2, 12), (2, 9), (2, 1)]
    counts = total.sum(1)[0]
    assert counts[0, 0] == 1 and counts[0, 8] == 2 and counts[9, 24] == 4
    seen.clear()
    predict_sliding(model, torch.zeros(1, 3, 8, 8), 12)
    assert seen == [(8, 8)]  # not larger than one stride: seen whole


def test_evaluation_counts_every_image_once_whatever_the_batch() -> None:
    source, names = ShapesSource(0, 32), shapes_names(0, 7)
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3, padding=1).train()
    counts = []
    for batch in (1, 3):
        loader = torch.utils.data.DataLoader(EvaluationSet(source, names), batch, collate_fn=list)
        matrices = evaluate(
            {"student": network}, loader, lambda images: images / 255.0,
            Predictor(Protocol(40), torch.device("cpu")), num_classes=4, ignore_index=255,
        )  # fmt: skip
        counts.append(matrices["student"].counts)
    assert torch.equal(*counts)
    dataset = EvaluationSet(source, names)
    assert counts[0].sum() == sum((dataset[i][1] != 255).sum() for i in range(7))
    assert network.training


def test_images_of_different_sizes_share_a_batch() -> None:
    samples = [(torch.zeros(3, side, side, dtype=torch.uint8), torch.zeros(side, side)) for side in (4, 5, 4)]
    shapes = sorted(tuple(images.shape) for images, _ in evaluation_batches([samples]))
    assert shapes == [(1, 3, 5, 5), (2, 3, 4, 4)]


def test_table_says_na_for_absent_classes() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    lines = format_table(matrix, ("background", "cat", "dog")).splitlines()
    assert lines[1].split() == ["background", "50.00", "50.00", "66.67"]
    assert lines[3].split() == ["dog", "n/a", "n/a", "0.00"]
    assert lines[4].split() == ["mean", "50.00", "75.00"]
    assert lines[5].split() == ["by", "frequency", "50.00", "66.67"]


def test_figures_are_percent_by_class_name() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1]))
    found = figures(matrix, ("background", "cat", "dog"))
    assert found["iou"] == pytest.approx({"background": 75.0, "cat": 50.0, "dog": None})
    assert found["pixels"] == pytest.approx({"background": 60.0, "cat": 40.0, "dog": 0.0})
    assert found["accuracy"] == {"background": 100.0, "cat": 50.0, "dog": None}
    means = {name: found[name] for name in ("miou", "fwiou", "pixel_accuracy", "mean_accuracy")}
    assert means == pytest.approx({"miou": 62.5, "fwiou": 65.0, "pixel_accuracy": 80.0, "mean_accuracy": 75.0})
    empty = figures(ConfusionMatrix(2), ("a", "b"))
    assert empty["miou"] is None and empty["fwiou"] is None and empty["pixels"] == {"a": None, "b": None}


def test_checkpoints_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "ckpt.pth"
    checkpoint.save({"model_state": {}, "epoch": 1}, path)

    def torn(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(UserError, match=r"ckpt\.pth: cannot be written \(disk full\)\. The last good checkpoint stays"):
        checkpoint.save({"model_state": {}, "epoch": 2}, path)
    assert checkpoint.read(path)["epoch"] == 1
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_an_improved_checkpoint_is_written_once_where_the_file_system_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*paths: Path) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    best, last = tmp_path / checkpoint.BEST, tmp_path / checkpoint.LAST
    for epoch in (1, 2):
        checkpoint.save({"model_state": {"weight": torch.zeros(1)}, "epoch": epoch}, best)
        checkpoint.save({"model_state": {"weight": torch.zeros(1)}, "epoch": epoch}, last, twin=best)
        assert best.samefile(last) == links
        assert checkpoint.read(best)["epoch"] == checkpoint.read(last)["epoch"] == epoch
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS)["epoch"] == 1
    assert not list(tmp_path.glob("*.tmp"))


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"torn", "torn, foreign or not safe"),
        ({"weights": {}}, "not a training checkpoint"),
        ({"model_state": {}, "x": _Evil()}, "not safe to load"),
    ],
)
def test_checkpoints_that_cannot_be_used(tmp_path: Path, content, message: str, capsys) -> None:
    path = tmp_path / "ckpt.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        checkpoint.read(path)
    assert "executed" not in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_names_the_tensors() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    weights = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    checkpoint.load_network(network, "student", {"model_state": weights}, "old.pth")  # the authors' prefix
    weights["module.0.weight"] = torch.zeros(9, 9)
    del weights["module.1.bias"]
    weights["module.extra"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        checkpoint.load_network(network, "student", {"model_state": weights}, "old.pth")
    for words in ("old.pth", "missing: 1.bias", "unexpected: extra", "0.weight (9, 9), expected (3, 2)"):
        assert words in str(error.value)
    with pytest.raises(UserError, match="has no network teacher; it has student"):
        checkpoint.load_network(network, "teacher", {"model_state": weights}, "old.pth")


def test_meter_names_the_first_bad_iteration() -> None:
    meter = Meter()
    for value in (1.0, 3.0):
        meter.add({"loss_lb": torch.tensor(value)})
    assert meter.window(1) == {"loss_lb": 2.0}
    meter.add({"loss_lb": torch.tensor(-0.0)})
    assert str(meter.window(2)) == "{'loss_lb': 0.0}"  # never -0.0
    for value in (1.0, float("nan"), float("inf")):
        meter.add({"loss_lb": torch.tensor(1.0), "loss_ub": torch.tensor(value)})
    with pytest.raises(NonFiniteLoss, match="iteration 4: loss_ub = nan"):
        meter.window(5)


def test_csv_rows_of_a_cut_off_epoch_are_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None, 0)
    for epoch in range(3):
        log.metrics({"epoch": epoch, "loss_lb": 0.5})
        log.scores([(epoch, "a, b", 0.25)])
    RunLog(tmp_path, None, 2)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["epoch,loss_lb,loss_ub,miou_stu,miou_tea,best,best-stu", "0,0.5,,,,,", "1,0.5,,,,,"]
    assert (tmp_path / "scores.csv").read_text().splitlines() == [
        "epoch,image,score",
        '0,"a, b",0.2500',
        '1,"a, b",0.2500',
    ]


def test_prediction_sheet_shows_every_network() -> None:
    dataset = EvaluationSet(ShapesSource(0, 32), shapes_names(0, 3))
    red, blue = (255, 0, 0), (0, 0, 255)

    class Always(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(images), 4, *images.shape[-2:])
            logits[:, self.number] = 9
            return logits

    sheet = prediction_sheet(
        {"teacher": Always(1), "student": Always(3)}, dataset, lambda images: images / 255.0,
        Predictor(Protocol(40), torch.device("cpu")),
        Catalog(("a", "b", "c", "d"), ((0, 0, 0), red, (0, 255, 0), blue)), count=2,
    )  # fmt: skip
    assert sheet.height == 2 * 260 + 40  # titles, two images of the list, a line of classes
    assert sheet.getpixel((2 * 260 + 100, 150)) == red
    assert sheet.getpixel((3 * 260 + 100, 150)) == blue


def test_pictures_are_spread_over_a_list() -> None:
    assert [spread(12, 4), spread(2, 6), spread(0, 6)] == [[0, 3, 6, 9], [0, 1], []]


def test_a_tile_is_at_least_a_pixel_high() -> None:
    assert _fitted(Image.new("RGB", (2000, 1))).size == (256, 1)
