"""``python -m imas.report``: the page of a run, from small files in the layout of a log folder."""

from __future__ import annotations

import base64
import csv
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import yaml
from conftest import run
from PIL import Image

import train_semi
from imas import load_config
from imas.errors import UserError
from imas.report import write
from imas.report.markup import Line, chart
from imas.report.records import read_records

METRICS = ("epoch", "loss_lb", "loss_ub", "miou_stu", "miou_tea", "best", "best-stu")
CLASSES = ("ground", "<b>&\"road'", "a/b")
HOSTILE = "<script>alert(1)</script>/ä&.jpg"
PICTURES = ["Unlabeled images, as a step would have treated them", "Validation images", "Further pictures"]
SECTIONS = ["Warnings", "Summary", "Curves", "Classes, in percent", *PICTURES, "Recipe", "Environment"]


def _table(path: Path, header: tuple[str, ...] | list[str], rows: list) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _make_run(folder: Path, threshold: float = 0.9, scale: float = 1.0) -> Path:
    """A run of six epochs, the first of them supervised only, evaluated every second one; ``scale`` of its losses."""
    log = folder / "log"
    log.mkdir(parents=True)
    miou = {1: (50.0, 50.0), 3: (60.0, 66.0), 5: (61.5, 65.0)}
    rows = [[e, scale / (e + 1), "" if e == 0 else 0.1 * scale * e, *miou.get(e, ("", "")), "", ""] for e in range(6)]
    _table(log / "metrics.csv", METRICS, rows)
    shares = {f"predicted/{name}": 0.5 / (n + 1) for n, name in enumerate(CLASSES)}
    shares |= {f"confident/{name}": 0.25 * (n == 0) for n, name in enumerate(CLASSES)}
    unlabeled = {"pseudo": 0.5, "pseudo_teacher": 0.6, "agreement": 0.9, "decay": 0.99, "score": 0.5, "score_std": 0.1}
    unlabeled |= shares
    always = {"lr_encoder": 0.1, "lr_heads": 1.0, "seconds": 0.5, "seconds_waiting": 0.1, "memory_mib": 700}
    columns = [*always, *unlabeled, "own"]
    training = [[e, *always.values(), *(unlabeled.values() if e else [""] * len(unlabeled)), e * e] for e in range(6)]
    ious = [[10.0 * e, 50.0] if e in miou else ["", ""] for e in range(6)]
    rows = [[*row, *iou] for row, iou in zip(training, ious)]
    _table(log / "training.csv", ["epoch", *columns, "iou/ground", f"iou/{HOSTILE}"], rows)
    _table(log / "warnings.csv", ("epoch", "warning"), [[4, "class a/b never passes, try <less>"]])
    figures = {"miou": 65.0, "fwiou": 70.0, "pixel_accuracy": 80.0, "mean_accuracy": 75.0}
    figures |= {"iou": {"ground": 90.0, CLASSES[1]: None, "a/b": 40.0}, "accuracy": dict.fromkeys(CLASSES, 75.0)}
    networks = {"teacher": {**figures, "pixels": dict.fromkeys(CLASSES, 33.3)}}
    networks["student"] = networks["teacher"] | {"miou": 61.5}
    evaluation = {"protocol": {"epoch": 6, "images": 5, "window": 48}, "networks": networks}
    (log / "evaluation.json").write_text(json.dumps(evaluation))
    recipe = {"method": "imas", "dataset": {"type": "shapes"}, "net": {"encoder": {"type": "resnet18"}}}
    recipe["trainer"] = {"epochs": 6, "unsupervised": {"threshold": threshold}}
    (log / "config.yaml").write_text(yaml.safe_dump(recipe))
    lists = {"labeled": {"images": 4, "path": None}, "unlabeled": {"images": 4}, "val": {"images": 5}}
    started = {"started": "2026-11-23T14:00:31+00:00", "command": ["python", "a <b>"], "seed": 3, "lists": lists}
    (log / "run.yaml").write_text(yaml.safe_dump([started]))
    for name, colour in (("views", (255, 0, 255)), ("predictions", (0, 255, 0)), ("method", (0, 0, 255))):
        Image.new("RGB", (700, 90), colour).save(log / f"{name}.png")
    return folder


def _tree(path: Path) -> ElementTree.Element:
    """The page as XML; nothing in it may come from elsewhere or be executed."""
    text = path.read_text(encoding="utf-8")
    for word in ("http:", "https:", "<script", "<link", "@import", "url(", "<iframe", "srcset"):
        assert word not in text, word
    first, rest = text.split("\n", 1)
    assert first == "<!DOCTYPE html>"
    tree = ElementTree.fromstring(rest)
    assert tree.get("lang") == "en" and tree.find("head/title").text
    policy = tree.find("head/meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for element in tree.iter():
        assert element.tag != "img" or (element.get("src").startswith("data:image/png;base64,") and element.get("alt"))
        assert element.tag == "img" or element.get("src") is None
        assert element.get("href") is None or (
            element.tag == "a" and (path.parent / unquote(element.get("href"))).is_file()
        )
        assert element.tag != "table" or element.find("tbody/tr/th") is not None
    return tree


def _text(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def _sections(tree: ElementTree.Element) -> list[str]:
    return [heading.text for heading in tree.iter("h2")]


def _rows(tree: ElementTree.Element, title: str) -> list[list[str]]:
    """Texts of all table rows of the section with this heading."""
    section = next(part for part in tree.iter("section") if part.findtext("h2") == title)
    return [["".join(cell.itertext()) for cell in row] for row in section.iter("tr")]


def _keys(tree: ElementTree.Element, title: str) -> list[str]:
    """The legend of the chart with this title."""
    figure = next(figure for figure in tree.iter("figure") if figure.findtext("figcaption") == title)
    return [_text(key) for key in figure.iter("span")]


def _charts(tree: ElementTree.Element) -> list[str]:
    return [figure.findtext("figcaption") for figure in tree.iter("figure")]


def test_a_run_with_everything(tmp_path: Path) -> None:
    folder = _make_run(tmp_path / "shapes_imas")
    out = write([folder])
    assert out == folder / "log" / "report.html"
    tree = _tree(out)
    assert _sections(tree) == SECTIONS and tree.findtext(".//h1") == "shapes_imas"
    assert [_text(item) for item in tree.findall(".//p[@class='warning']")] == [
        "epoch 4: class a/b never passes, try <less>"
    ]
    assert len(_charts(tree)) == 11
    assert _charts(tree)[-3:] == ["own", "IoU in percent", "Pseudo labels, share of all pixels"]
    summary = dict(_rows(tree, "Summary"))
    assert summary["method"] == "imas" and summary["started"] == "2026-11-23 14:00" and summary["seed"] == "3"
    assert summary["images"] == "4 labeled, 4 unlabeled, 5 val" and summary["epochs"] == "6 of 6"
    assert summary["best mIoU, student"] == "61.50 % in epoch 5; last 61.50 %, 0.00 points lost"
    assert summary["best mIoU, teacher"] == "66.00 % in epoch 3; last 65.00 %, 1.00 points lost"
    assert summary["measured on"] == "epoch 6, images 5, window 48"

    table = _rows(tree, "Classes, in percent")
    passed = "those that pass the threshold"
    assert table[0] == ["class", "IoU, teacher", "IoU, student", "pixels", "pseudo labels", passed]
    assert table[1:] == [
        ["ground", "90.00", "90.00", "33.30", "50.00", "25.00"],
        [CLASSES[1], "–", "–", "33.30", "25.00", "0.00"],
        ["a/b", "40.00", "40.00", "33.30", "16.67", "0.00"],
        ["miou", "65.00", "61.50", "–", "–", "–"],
        ["fwiou", "70.00", "70.00", "–", "–", "–"],
        ["mean_accuracy", "75.00", "75.00", "–", "–", "–"],
        ["pixel_accuracy", "80.00", "80.00", "–", "–", "–"],
    ]
    assert _keys(tree, "Pseudo labels, share of all pixels") == ["ground 0.5", "<b>&\"road' 0.25", "a/b 0.1667"]
    assert _keys(tree, "IoU in percent") == ["ground 50", f"{HOSTILE} 50"]
    for image, name in zip(tree.iter("img"), ("views", "predictions", "method"), strict=True):
        data = base64.b64decode(image.get("src").partition(",")[2])
        assert data == (folder / "log" / f"{name}.png").read_bytes()
    for text, file in zip(tree.iter("pre"), ("config.yaml", "run.yaml"), strict=True):
        assert yaml.safe_load(text.text) == yaml.safe_load((folder / "log" / file).read_text())
    before = out.read_bytes()
    write([folder / "log"])
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ("warnings.csv", "Warnings"),
        ("views.png", PICTURES[0]),
        ("predictions.png", PICTURES[1]),
        ("method.png", PICTURES[2]),
        ("config.yaml", "Recipe"),
        ("run.yaml", "Environment"),
        ("training.csv", None),
        ("evaluation.json", None),
    ],
)
def test_what_is_not_there_is_not_shown(tmp_path: Path, missing: str, section: str | None) -> None:
    folder = _make_run(tmp_path / "run")
    (folder / "log" / missing).unlink()
    tree = _tree(write([folder]))
    assert _sections(tree) == [title for title in SECTIONS if title != section]
    columns = {"training.csv": 4, "evaluation.json": 3}  # of the table of classes
    assert len(_rows(tree, "Classes, in percent")[0]) == columns.get(missing, 6)


def test_a_folder_with_metrics_alone(tmp_path: Path) -> None:
    """Older runs, and those that have just begun: cells are empty or NaN, a row is cut short, or there is none."""
    metrics = tmp_path / "log" / "metrics.csv"
    metrics.parent.mkdir()
    _table(metrics, METRICS, [])
    tree = _tree(write([tmp_path]))
    assert _sections(tree) == ["Summary"] and _rows(tree, "Summary") == [["epochs", "0 of ?"]]
    _table(metrics, METRICS, [[0, 1.5, "", "", "", "", ""], [1, "nan", "", 40.5, "", 40.5, 40.5], [2, 0.5]])
    tree = _tree(write([tmp_path]))
    assert _charts(tree) == ["Supervised loss", "mIoU in percent, the best marked"]
    best = ["best mIoU, student", "40.50 % in epoch 1; last 40.50 %, 0.00 points lost"]
    assert _rows(tree, "Summary") == [["epochs", "2 of ?"], best]


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    first, second = _make_run(tmp_path / "a" / "seed1"), _make_run(tmp_path / "b" / "seed1", threshold=0.8)
    supervised = tmp_path / "sup" / "log"
    supervised.mkdir(parents=True)
    _table(supervised / "metrics.csv", METRICS, [[0, 1.0, "", 30.0, "", 30.0, 30.0]])
    (supervised / "config.yaml").write_text("method: sup_only\ntrainer: {epochs: 6}\n")
    tree = _tree(write([first, second, supervised], tmp_path / "both.html"))
    assert tree.findtext(".//h1") == "3 runs side by side"
    assert _rows(tree, "Summary")[0] == ["", "a/seed1", "b/seed1", "sup"]
    differences = _rows(tree, "What differs between the recipes")
    assert ["method", "imas", "imas", "sup_only"] in differences
    assert ["trainer.unsupervised.threshold", "0.9", "0.8", "–"] in differences
    assert not any(row[0] == "trainer.epochs" for row in differences)
    header = _rows(tree, "Classes, in percent")[0]
    assert [len(header), header[1], header[4], header[5]] == [
        11, "a/seed1 IoU, teacher", "b/seed1 IoU, student", "a/seed1 pixels"
    ]  # fmt: skip
    mious = tree.findall(".//figure")[2]
    assert {path.get("class") for path in mious.iter("path") if path.get("class") != "grid"} == {
        "line c0 d0", "line c0 d1", "line c1 d0", "line c1 d1", "line c2 d0"
    }  # fmt: skip
    assert _keys(tree, "mIoU in percent, the best marked") == [
        "a/seed1 student 61.5", "a/seed1 teacher 65", "b/seed1 student 61.5", "b/seed1 teacher 65", "sup student 30"
    ]  # fmt: skip
    assert len(list(tree.iter("img"))) == 6
    equal = _tree(write([first, _make_run(tmp_path / "c")], tmp_path / "equal.html"))
    assert _sections(equal) == SECTIONS  # nothing differs between the recipes


def test_networks_and_losses_are_those_of_the_columns(tmp_path: Path) -> None:
    """Without classes, scores and unlabeled data the page is whole."""
    columns = ("epoch", "loss_lb", "loss_contrastive", "miou_student2", "miou_mean", "miou_stu", "best", "best-stu")
    (tmp_path / "log").mkdir()
    _table(tmp_path / "log" / "metrics.csv", columns, [[0, 1, 2, 50, 40, 30, 40, 30], [1, 1, 2, 51, 44, 46, 44, 46]])
    _table(tmp_path / "log" / "training.csv", ["epoch", "predicted/a"], [[0, 0.5], [1, 0.25]])
    (tmp_path / "log" / "config.yaml").write_text("dataset: {type: pascal}\nother_method: {}\ntrainer: {epochs: 2}\n")
    tree = _tree(write([tmp_path]))
    assert _sections(tree) == ["Summary", "Curves", "Classes, in percent", "Recipe"]
    assert _charts(tree)[:3] == ["Supervised loss", "mIoU in percent, the best marked", "loss contrastive"]
    assert _keys(tree, "mIoU in percent, the best marked") == ["student2 51", "mean 44", "student 46"]
    summary = dict(_rows(tree, "Summary"))
    assert summary["method"] == "other_method"
    assert {name for name in summary if "mIoU" in name} == {
        "best mIoU, student2", "best mIoU, mean", "best mIoU, student"
    }  # fmt: skip


def test_stages_have_pages_of_their_own(tmp_path: Path) -> None:
    """A run with stages needs no figures of its own; with ``--out`` the links lead there from elsewhere."""
    log = tmp_path / "run" / "log"
    for time, stage in enumerate(("warm up", "train")):
        shutil.copytree(_make_run(tmp_path / stage) / "log", log / stage)
        os.utime(log / stage / "metrics.csv", (time, time))
    for out in (None, tmp_path / "page.html"):
        tree = _tree(write([tmp_path / "run"], out))
        assert _sections(tree) == ["Stages"]
        links = tree.findall(".//th/a")
        assert [link.text for link in links] == ["warm up", "train"]
        where = "" if out is None else "run/log/"
        assert [link.get("href") for link in links] == [f"{where}warm%20up/report.html", f"{where}train/report.html"]
        assert ["best mIoU, teacher", *["66.00 % in epoch 3; last 65.00 %, 1.00 points lost"] * 2] in _rows(
            tree, "Stages"
        )
    page = _tree(log / "train" / "report.html")
    assert page.findtext(".//h1") == "train" and _sections(page) == SECTIONS
    assert write([log / "train"]) == log / "train" / "report.html"
    assert write([log]) == log / "report.html"


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [_make_run(tmp_path / name) for name in ("x/a/s0", "x/a/s1", "y/a/s0")]
    assert [record.name for record in read_records(folders)] == ["x/a/s0", "x/a/s1", "y/a/s0"]
    assert [record.name for record in read_records(folders[:2])] == ["s0", "s1"]
    assert [record.name for record in read_records([folders[0] / "log"])] == ["s0"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.csv", "a,b\n1,2\n", "metrics.csv: expected a CSV file with the columns epoch"),
        ("training.csv", "epoch,loss_lb\n0,low\n", "training.csv: expected numbers, got 'low'"),
        ("evaluation.json", "{", "evaluation.json: cannot be read as JSON"),
        ("evaluation.json", "[]", "expected a mapping"),
        ("config.yaml", "a: [", "config.yaml: cannot be read as YAML"),
        ("run.yaml", "a: 1", "run.yaml: expected a list of starts"),
    ],
)
def test_files_that_are_none_of_ours(tmp_path: Path, name: str, content: str, words: str) -> None:
    folder = _make_run(tmp_path / "run")
    (folder / "log" / name).write_text(content)
    with pytest.raises(UserError, match="run/log") as error:
        write([folder])
    assert words in str(error.value)
    assert not (folder / "log" / "report.html").exists()


def test_the_command(tmp_path: Path) -> None:
    folder = _make_run(tmp_path / "run")
    out = tmp_path / "page.html"
    made = run("-m", "imas.report", folder, "--out", out)
    assert made.returncode == 0 and made.stdout == f"report: {out}\n"
    assert _sections(_tree(out)) == SECTIONS
    wrong = run("-m", "imas.report", folder, tmp_path)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert f"{tmp_path}: no log/metrics.csv there" in wrong.stderr and not (tmp_path / "report.html").exists()
    with pytest.raises(UserError, match="named twice"):
        write([folder, folder / "log"])
    with pytest.raises(UserError, match="none/page.html: expected a file to write"):
        write([folder], tmp_path / "none" / "page.html")


def test_training_writes_the_page_and_does_not_fail_for_it(
    experiment: Callable[..., Path], caplog, monkeypatch
) -> None:
    path = experiment()
    trained = run("train_semi.py", "--config", path, "--set", "trainer.epochs=2")
    assert trained.returncode == 0, trained.stderr
    page = path.parent / "log" / "report.html"
    assert f"report:       {page}" in trained.stdout
    assert {"Supervised loss", "Unsupervised loss"} <= set(_charts(_tree(page)))
    monkeypatch.setattr(logging.getLogger("imas"), "propagate", True)
    config = load_config(path)
    page.unlink()
    page.mkdir()
    train_semi.write_report(config)
    assert "the page of the run was not written" in caplog.text and "Traceback" not in caplog.text
    monkeypatch.setattr(train_semi, "write_page", lambda *_: 1 / 0)
    train_semi.write_report(config)
    assert "Traceback" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_line_is_where_its_values_are() -> None:
    """Epochs 0..10 take up 46..432 of the picture, values 0..1 take up 179..10."""
    line = Line([0, 5, 10], [0.0, 1.0, 0.5], "c1", 5, "a<b teacher", True)
    figure = ElementTree.fromstring(chart("t", [line]))
    path = next(path for path in figure.find("svg").iter("path") if path.get("class") == "line c1 d1")
    assert path.get("d") == "M46.0 179.0L239.0 10.0L432.0 94.5" and path.findtext("title") == "a<b teacher"
    best = figure.find("svg/circle[@class='best c1']")
    assert (best.get("cx"), best.get("cy")) == ("239.0", "10.0")
    ticks = [text.text for text in figure.iter("text")]
    assert ticks == ["epoch", "0", "0.2", "0.4", "0.6", "0.8", "1", "0", "2", "4", "6", "8", "10"]


@pytest.mark.parametrize("values", [[0.0], [1.0], [-3.0], [1e-7], [1e9], [0.01, 0.010000000000000002]])
def test_a_chart_of_one_value(values: list[float]) -> None:
    figure = ElementTree.fromstring(chart("t", [Line(range(len(values)), values)]))
    assert 10 <= float(figure.find("svg/circle").get("cy")) <= 179


def _pixels(page: Path) -> dict[tuple[int, int, int], int]:
    """How often each colour is in a screenshot of a page, by headless Chromium."""
    shot = page.with_suffix(".png")
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --disable-sync"
    words += " --disable-background-networking --disable-component-update --window-size=1280,5200"
    subprocess.run(
        ["chromium", *words.split(), f"--user-data-dir={page}.profile", f"--screenshot={shot}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(shot) as picture:
        return {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 24)}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_shows_curves_and_pictures(tmp_path: Path) -> None:
    """Lines in the colours of both runs, and all of the pictures."""
    page = write([_make_run(tmp_path / "one"), _make_run(tmp_path / "two", scale=0.5)], tmp_path / "page.html")
    bare = tmp_path / "bare.html"
    text = page.read_text().replace("stroke-width: 1.6", "stroke-width: 5")  # more of them than their soft rims
    page.write_text(text)
    bare.write_text(text.replace('class="line', 'opacity="0" class="line'))
    shown, without = _pixels(page), _pixels(bare)
    for colour in ((11, 107, 179), (189, 84, 0)):
        assert shown[colour] > without[colour] + 2000, colour
    assert min(shown[colour] for colour in ((255, 0, 255), (0, 255, 0), (0, 0, 255))) >= 2 * 700 * 90
