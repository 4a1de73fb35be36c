"""What a run tells of itself: warnings in words, pictures, scalars, figures."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_semi
from imas.config import load_config
from imas.data.catalog import Catalog
from imas.data.normalise import Normalise
from imas.engine.fit import _time_left
from imas.engine.health import Health
from imas.engine.log import RunLog, one_line, spoken
from imas.engine.meter import Clock, Meter
from imas.engine.pictures import look_sheet

CLASSES = ("ground", "road", "roof")
HEALTHY = {"loss_ub": 0.1, "seconds": 1.0, "seconds_waiting": 0.1, "score": 0.6, "agreement": 0.9}
for _name, _share in zip(CLASSES, (0.5, 0.3, 0.2)):
    HEALTHY |= {f"labeled/{_name}": _share, f"predicted/{_name}": _share, f"confident/{_name}": _share / 2}
LASTING = 5  # epochs, where an epoch has ten iterations or more


@pytest.fixture
def health(experiment: Callable[..., Path]) -> Callable[..., Health]:
    config = load_config(experiment())
    return lambda length=10, rows=(): Health(config, length, CLASSES, "miou_tea", rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seconds_waiting": 0.5}, "waits for data 50 % of the time: more dataset.workers (now 0)"),
        ({"score": 0.0}, "the score has been 0 for 5 epochs"),
        ({"score": 1.0}, "the score has been 1 for 5 epochs"),
        ({"agreement": 0.4}, "agreed on less than half of all pixels for 5 epochs (40 % in this one)"),
        ({"confident/roof": 0.0}, "no pixel of roof has passed the threshold for 5 epochs"),
        ({"confident/roof": 0.0, "confident/road": 0.0}, "no pixel of road, roof has passed"),
        ({"predicted/ground": 0.795, "predicted/road": 0.2, "predicted/roof": 0.005}, "collapsed onto ground: of roof"),
    ],
)
def test_each_thing_is_said_once_when_it_has_lasted(health, changes: dict, words: str) -> None:
    patient = health()
    said = [patient.look(HEALTHY | changes) for _ in range(3 * LASTING)]
    assert said[: LASTING - 1] == [[]] * (LASTING - 1)
    (warning,) = said[LASTING - 1]
    assert words in warning and "may help" in warning
    assert said[LASTING:] == [[]] * (2 * LASTING)


def test_a_fall_of_the_selecting_network_is_said_at_once(health) -> None:
    patient = health()
    mious = [(50.0, 57.0), (51.0, 65.0), (52.0, 60.0), (64.0, 54.9), (64.0, 40.0)]
    said = [
        patient.look(HEALTHY | {"epoch": 2 * epoch, "miou_stu": student, "miou_tea": teacher})
        for epoch, (student, teacher) in enumerate(mious)
    ]
    assert said[:3] == [[]] * 3 and said[4] == []
    (warning,) = said[3]
    assert (
        "mIoU has fallen to 54.9 from 65.0" in warning
        and "10.1 points lost since the best epoch, 2: if log/views.png shows wrong pseudo labels" in warning
    )


@pytest.mark.parametrize(
    ("dead", "words"),
    [
        ({"iou/road": 0.2, "iou/roof": 12.0}, "IoU 0.2 after 43.2"),
        ({"predicted/road": 0.0006}, "0.06 % of the pseudo labels, 30.0 % of the labels"),
    ],
)
def test_the_first_class_to_die_is_named_at_once(health, dead: dict, words: str) -> None:
    patient = health()
    alive = {"iou/road": 43.2, "iou/roof": 12.0, "miou_tea": 50.0}
    assert patient.look(HEALTHY | alive | {"epoch": 0}) == patient.look(HEALTHY | {"epoch": 1}) == []
    (warning,) = patient.look(HEALTHY | {"epoch": 2} | dead)
    assert warning.startswith(f"first class to die: road in epoch 2 (road: {words}): if log/views.png")
    (fall,) = patient.look(HEALTHY | dead | {"epoch": 3, "iou/roof": 0.0, "miou_tea": 30.0})
    assert "20.0 points lost since the best epoch, 0; first class to die: road in epoch 2: if" in fall
    assert patient.look(HEALTHY | alive | {"epoch": 4, "miou_tea": 60.0}) == []
    again = patient.look(HEALTHY | dead | {"epoch": 5, "miou_tea": 30.0})
    assert "first class to die: road in epoch 5" in again[0] and "30.0 points lost since the best epoch, 4" in again[1]


def test_a_class_that_never_lived_does_not_die(health) -> None:
    patient = health()
    for epoch, (share, iou) in enumerate([(0.001, 0.0), (0.05, 9.0), (0.0, 0.0)]):
        assert patient.look(HEALTHY | {"epoch": epoch, "predicted/roof": share, "iou/roof": iou}) == []


def test_advice_is_of_options_that_the_method_has(experiment: Callable[..., Path]) -> None:
    config = load_config(experiment())
    silent = HEALTHY | {"confident/roof": 0.0}
    for method, options, advice in (
        (config.method, config.options, f"a lower {config.method}.threshold (now 0.25), a longer"),
        ("other", object(), "teach it: more labeled images of it may help"),
    ):
        patient = Health(dataclasses.replace(config, method=method, options=options), 10, CLASSES, "miou")
        said = [warning for _ in range(LASTING) for warning in patient.look(silent)]
        assert len(said) == 1 and advice in said[0]


def test_supervised_training_hears_nothing_of_pseudo_labels(experiment: Callable[..., Path]) -> None:
    config = load_config(experiment(), ["sup_only={}"])
    patient = Health(config, 10, CLASSES, "miou_stu")
    good = {
        "iou/road": 43.2,
        "iou/roof": 12.0,
        "miou_stu": 50.0,
        "loss_lb": 0.1,
        "seconds": 1.0,
        "seconds_waiting": 0.0,
    }
    said = [patient.look(good | {"epoch": 0}), patient.look(good | {"epoch": 1, "iou/road": 0.0, "miou_stu": 33.0})]
    assert said[0] == [] and len(said[1]) == 2
    assert "first class to die: road in epoch 1 (road: IoU 0.0 after 43.2): a lower trainer" in said[1][0]
    assert "17.0 points lost since the best epoch, 0; first class to die: road in epoch 1: a lower" in said[1][1]
    assert not any(word in "".join(said[1]) for word in ("pseudo", "views", "threshold", "unlabeled"))


def test_a_method_without_scores_is_judged_by_its_pixels(health) -> None:
    patient = health()
    said = [patient.look({"pseudo": 0.001, "seconds": 1.0, "seconds_waiting": 0.0}) for _ in range(2 * LASTING)]
    assert [len(warnings) for warnings in said] == [0] * (LASTING - 1) + [1] + [0] * LASTING
    assert "the share of pixels that pass the threshold has been 0 for 5 epochs" in said[LASTING - 1][0]


def test_health_is_silent_where_all_is_well_or_a_bad_epoch_passes(health) -> None:
    patient = health()
    lean = {"predicted/ground": 0.3, "predicted/road": 0.64, "predicted/roof": 0.06}  # no class has vanished
    assert not any(health().look(HEALTHY | lean) for _ in range(30))
    for epoch in range(30):
        row = HEALTHY | ({"score": 0.0, "agreement": 0.1, "confident/roof": 0.0} if epoch % LASTING == 2 else {})
        assert patient.look(row) == []


def test_short_epochs_need_more_of_them(health) -> None:
    patient = health(length=2)
    said = [patient.look(HEALTHY | {"score": 0.0}) for _ in range(25)]
    assert [number for number, warnings in enumerate(said) if warnings] == [24]  # 50 iterations


def test_warm_up_has_no_scores_to_judge(health) -> None:
    patient = health()
    for _ in range(LASTING):
        assert patient.look({"seconds": 1.0, "seconds_waiting": 0.0}) == []


def test_rows_of_other_methods_and_of_crops_without_labels_are_no_mistake(health) -> None:
    patient = health()
    unlabeled = HEALTHY | {f"labeled/{name}": 0.0 for name in CLASSES}
    for row in (
        [{"score": 0.5, "seconds": 1.0, "seconds_waiting": 0.0}] * LASTING + [{}] * LASTING + [unlabeled] * LASTING
    ):
        assert patient.look(row) == []


def test_a_run_that_goes_on_does_not_repeat_itself(health) -> None:
    sick = HEALTHY | {"score": 0.0}
    assert health().look(sick) == []
    resumed = health(rows=[sick] * LASTING)
    assert resumed.look(sick) == []
    (other,) = resumed.look(sick | {"seconds_waiting": 9.0})
    assert "waits for data" in other
    assert health(rows=[sick] * (LASTING - 1)).look(sick) != []


def test_a_collapsing_run_says_so_and_shows_itself(experiment: Callable[..., Path]) -> None:
    """Without warm-up and with ten times the unsupervised loss everything becomes background (design/shapes.md)."""
    config = experiment(
        trainer={"epochs": 14, "eval_every": 14, "optimizer": {"kwargs": {"lr": 0.3}}},
        imas=TINY["imas"] | {"threshold": 0.3, "loss_weight": 10.0, "sup_only_epoch": 0},
    )
    trained = run("train_semi.py", "--config", config, "--set", "saver.pictures_every=7")
    assert trained.returncode == 0, trained.stderr
    folder = config.parent / "log"
    with open(folder / "warnings.csv", newline="", encoding="utf-8") as file:
        warnings = [row["warning"] for row in csv.DictReader(file)]
    assert sum("pseudo labels have collapsed onto background" in warning for warning in warnings) == 1
    assert any("passed the threshold for 13 epochs" in warning for warning in warnings)
    assert len(set(warnings)) == len(warnings) and all(warning in trained.stdout for warning in warnings)

    with open(folder / "training.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(14))
    for row in rows:
        shares = [float(row[name]) for name in row if name.startswith("predicted/")]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1)
        assert 0 <= float(row["seconds_waiting"]) < float(row["seconds"])
    assert [float(row["decay"]) for row in rows[:2]] == [0.0, 1 - 1 / 8]  # k = 7 at the end of the second epoch

    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    assert figures["networks"]["teacher"]["miou"] == float(last["miou_tea"])
    assert figures["networks"]["student"]["miou"] == float(last["miou_stu"])
    assert figures["protocol"]["images"] == 5
    assert Image.open(folder / "views.png").size[1] > 6 * 256  # three hardest, three easiest

    size = {"images": 0, "histograms": 0, "scalars": 0}
    events = EventAccumulator(str(config.parent), size_guidance=size).Reload()  # which is the run's name
    assert [event.step for event in events.Images("train/views")] == [28, 56]
    assert {"val/predictions", "train/views"} == set(events.Tags()["images"])
    assert len(events.Histograms("train/scores")) == 14
    wanted = {f"train/{name}" for name in ("loss_lb", "loss_ub", "pseudo", "score", "agreement", "decay")}
    wanted |= {"val/mIoU", "val/mIoU_student", "val/IoU/dots", "lr", "time/seconds", "time/seconds_waiting"}
    tags = set(events.Tags()["scalars"])
    assert wanted <= tags and {tag.split("/")[0] for tag in tags} == {"lr", "time", "train", "train_classes", "val"}
    assert [(event.step, event.value) for event in events.Scalars("val/mIoU")] == [
        (56, pytest.approx(float(last["miou_tea"]), rel=1e-6))
    ]
    assert [event.step for event in events.Scalars("train/loss_lb")] == [10, 20, 30, 40, 50]


def test_a_run_is_not_lost_for_want_of_a_picture(experiment: Callable[..., Path], monkeypatch, capsys) -> None:
    def broken(*_, **__):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr("imas.engine.show.prediction_sheet", broken)
    config = experiment()
    train_semi.main(["--config", str(config), "--set", "trainer.epochs=2"])
    log = config.parent / "log"
    assert (log / "report.html").is_file() and not (log / "predictions.png").exists()
    assert "pictures could not be drawn; the run itself is whole" in capsys.readouterr().out


def test_rows_of_a_cut_off_epoch_are_forgotten(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None, 0)
    log.training({"epoch": 0, "loss_lb": 0.5})
    log.training({"epoch": 1, "loss_lb": 0.25, "score": 1.0})
    log.warn(1, "too, soon")
    assert (tmp_path / "training.csv").read_text().splitlines() == ["epoch,loss_lb,score", "0,0.5,", "1,0.25,1.0"]
    assert RunLog(tmp_path, None, 1).rows == [{"epoch": 0, "loss_lb": 0.5}]
    assert (tmp_path / "warnings.csv").read_text().splitlines() == ["epoch,warning"]


def test_a_person_reads_one_line_of_a_step() -> None:
    values = {"loss_lb": 0.14317, "loss_ub": 0.00717, "pseudo": 0.73245, "pseudo_teacher": 0.6, "score": 0.503}
    values |= {"score_std": 0.1, "confident/dots": 0.5, "decay": 0.9, "lr_encoder": 0.05519, "lr_heads": 0.5519}
    values |= {"seconds": 0.2628, "seconds_waiting": 0.0128}
    line = "loss_lb 0.143, loss_ub 0.00717, pseudo 73 %, score 0.50, lr 0.055, 0.263 s/it, waits 5 %"
    assert one_line(values) == line
    assert len(f"2026-11-26 07:13:39  epoch 239 [1488/1488]: {line}, 12h35 left") <= 145
    assert [spoken(seconds) for seconds in (3.4, 99, 100, 3600, 45300)] == ["3 s", "99 s", "2 min", "60 min", "12h35"]


def test_time_left_counts_iterations_and_evaluations(experiment: Callable[..., Path]) -> None:
    """Epochs of 4 iterations; evaluated after the third, sixth and seventh."""
    config = load_config(experiment(), ["trainer.epochs=7", "trainer.eval_every=3"])
    later = SimpleNamespace(needs_unlabeled=lambda epoch: epoch > 1)
    run = SimpleNamespace(config=config, data=range(4), method=later, pace=None, evaluating=10.0)
    assert _time_left(run, 3, 1.0) == "over 54 s left"
    assert _time_left(run, 11, 1.0) == "46 s left"
    assert _time_left(run, 12, 2.0) == "42 s left"  # pace 1.5
    run.config = dataclasses.replace(config, stage="first")
    assert _time_left(run, 27, 1.5) == "10 s left of this stage"


def test_tensorboard_hides_what_a_cut_off_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    for updates, value in ((0, 0.0), (0, 1.0), (20, 2.0)):
        log = RunLog(tmp_path, tmp_path, updates // 10, updates=updates)
        for step in (10, 20, 30)[updates // 10 :]:
            log.scalars({"train/loss_lb": value}, step)
        log.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss_lb")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_meter_reads_a_value_for_each_class() -> None:
    meter = Meter(("cat", "dog"))
    meter.add({"loss_lb": torch.tensor(1.0), "confident": torch.tensor([0.2, 0.6])})
    meter.add({"loss_lb": torch.tensor(3.0), "confident": torch.tensor([0.4, 0.0])})
    expected = {"loss_lb": 2.0, "confident/cat": 0.3, "confident/dog": 0.3}
    assert meter.window(1) == pytest.approx(expected) and meter.means() == pytest.approx(expected)


def test_clock_counts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("imas.engine.meter.time.perf_counter", lambda: now[0])

    def slow():
        for number in range(3):
            now[0] += 2
            yield number

    clock = Clock()
    for _ in clock.waits(slow()):
        now[0] += 3
    assert clock.means() == {"seconds": 5.0, "seconds_waiting": 2.0}


def test_a_look_shows_images_labels_marks_and_numbers() -> None:
    normalise, grey, red = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (224, 224, 224), (200, 30, 30)
    blue, green = (0, 0, 255), (0, 255, 0)
    right = torch.zeros(1, 32, 32, dtype=torch.bool)
    right[..., 16:] = True
    look = {
        "view": normalise(torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)),
        "score": torch.tensor([0.25]),
        "label": torch.where(right, 255, 1),
        "student": 1 + right.long(),
        "differ": right,
    }
    catalog = Catalog(("x", "y", "z"), ((0, 0, 0), blue, green))
    sheet = look_sheet(look, ["a"], normalise, catalog)
    assert [sheet.getpixel((4 + column * 260 + 60, 150)) for column in range(4)] == [(200,) * 3, blue, blue, grey]
    assert [sheet.getpixel((4 + column * 260 + 200, 150)) for column in range(4)] == [(200,) * 3, grey, green, red]
    assert sheet.width == 4 * 260 + 4  # a number is no column
    captions = [look_sheet(look, [text], normalise, catalog).crop((0, 20, 200, 36)).tobytes() for text in "ab"]
    assert captions[0] != captions[1]
    assert look_sheet({"score": torch.tensor([0.25])}, ["a"], normalise, catalog) is None
