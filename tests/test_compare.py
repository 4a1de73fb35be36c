"""``python -m imas.compare``: statistics by hand, tables of stored runs, refusals, and runs as processes."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, Forked, run, start

from benchmarks import published
from imas.compare import runs as compare_runs
from imas.compare.__main__ import _slots, main, parse
from imas.compare.runs import Plan, Unfinished, command, make_plans
from imas.compare.table import difference, spread, t95
from imas.config import load_config
from imas.errors import UserError

CLASSES = ("background", "upright stripes", "level stripes", "dots")
SUP = {"imas": None, "sup_only": {}}
Sections = dict[str, dict]


def _sections(changed: Sections) -> Sections:
    return {key: value for key, value in {**TINY, **changed}.items() if value is not None}


def _store(
    out: Path, arm: str, seed: int, mious: dict[str, list[float]], changed: Sections, labeled: str = "a" * 64
) -> None:
    """A finished run of three epochs as it leaves its folder: mIoU by column, the selecting network first."""
    folder = out / arm / f"seed_{seed}"
    (folder / "log").mkdir(parents=True)
    yaml_file = folder / "config.yaml"
    yaml_file.write_text(yaml.safe_dump(_sections(changed)))
    yaml_file.write_text(yaml.safe_dump(load_config(yaml_file).to_dict()))
    (folder / "ended.csv").write_text("status,seconds\n75,1800\n0,1800\n")
    names = {"miou_stu": "student", "miou_tea": "teacher"}
    _stage(folder / "log", {names[column]: values for column, values in mious.items()}, mious, labeled)
    (folder / "log" / "report.html").touch()


def _stage(log: Path, networks: dict, columns: dict[str, list[float]], labeled: str = "a" * 64, day: int = 1) -> None:
    log.mkdir(parents=True, exist_ok=True)
    with open(log / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("epoch", *columns), *zip(range(3), *columns.values())])
    (log / "training.csv").write_text("epoch,seconds,memory_mib\n0,0.5,700\n1,1.5,900\n2,1.0,800\n")
    iou = {name: 50.0 + i for i, name in enumerate(CLASSES)} | {"dots": None}
    figures = {name: {"miou": values[-1], "iou": iou} for name, values in networks.items()}
    protocol = {"epoch": 3, "images": 5, "window": 48, "stride": 32, "flip": False, "scales": [1.0]}
    (log / "evaluation.json").write_text(json.dumps({"protocol": protocol, "networks": figures}))
    lists = {"labeled": {"images": 4, "sha256": labeled}, "val": {"images": 5, "sha256": "c" * 64}}
    described = {"started": f"2026-11-0{day}", "lists": lists, "iterations_per_epoch": 4, "total_batch": 4}
    described |= {"processes": 1, "python": "3.11", "packages": {"torch": "2"}, "git": "f00", "devices": ["CPU"]}
    described["parameters"] = dict.fromkeys(networks, 1234)
    (log / "run.yaml").write_text(yaml.safe_dump([described]))


def _rows(text: str, title: str) -> list[list[str]]:
    """Cells of the Markdown table below a heading."""
    lines = text.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Two arms with three seeds, of which one run is not finished. Last and best order the arms differently."""
    out = tmp_path / "out"
    for seed, base in ((1, 60.0), (2, 62.0), (3, 64.0)):
        _store(out, "base_line", seed, {"miou_stu": [50.0, base - 1, base]}, SUP)
        teacher = [50.0, base + 2 * seed, base - seed]
        _store(out, "imas", seed, {"miou_tea": teacher, "miou_stu": [40.0, base + 1, base]}, {})
    (out / "imas" / "seed_3" / "ended.csv").write_text("status,seconds\n0,9\n75,1\n")
    return out


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423)]
)
def test_quantiles_of_students_t(freedom: int, value: float) -> None:
    """Against any table of them."""
    assert t95(freedom) == pytest.approx(value, abs=5e-5)


def test_paired_differences_by_hand() -> None:
    theirs = {1: 70.0, 2: 71.0, 3: 72.0}
    found = difference({1: 71.0, 2: 73.0, 3: 75.0}, theirs)  # 1, 2, 3: 2 ± 4.3027 · 1 / √3
    assert (found["mean"], found["separable"], found["seeds"]) == (2.0, False, 3)
    assert found["low"] == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert found["high"] == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert difference({1: 80.0, 2: 81.1, 3: 81.9}, theirs)["separable"] is True
    alone = difference({1: 71.0, 2: None, 4: 9.0}, theirs)
    assert (alone["mean"], alone["low"], alone["separable"], alone["seeds"]) == (1.0, None, None, 1)
    assert difference({1: None}, theirs) is None


def test_conditions_name_who_has_which() -> None:
    runs = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert spread(dict.fromkeys(runs, "x")) == "x"
    assert spread(dict(zip(runs, "xyxy"))) == "x (seed 1); y (seed 2)"
    assert spread(dict(zip(runs, "xxyy"))) == "x (a); y (b)"
    assert spread(dict(zip(runs, "xxxy"))) == "x (a 1, a 2, b 1); y (b 2)"


def test_tables_of_stored_runs(stored: Path, capsys: pytest.CaptureFixture) -> None:
    main(["--out", str(stored), "--report-only", "--baseline", "sup_only"])
    text = (stored / "table.md").read_text()
    assert text in capsys.readouterr().out
    head, _, baseline, teacher, student = _rows(text, "mIoU in percent")
    assert head == ["method", "network", "last", "last minus base_line", "best", "best minus base_line",
                    "last by seed (1, 2, 3)", "best by seed (1, 2, 3)"]  # fmt: skip
    assert baseline == ["base_line †", "student", *["62.00 ± 2.00", ""] * 2, *["60.00, 62.00, 64.00"] * 2]
    # last: 59, 60 of 60, 62, so −1, −2: −1.5 ± 12.7062 · 0.7071 / √2; best: 62, 66, so 2, 4: 3 ± 12.7062 · 1.4142 / √2
    last, best = "−1.50 [−7.85, +4.85] not separable", "+3.00 [−9.71, +15.71] not separable"
    assert teacher == ["imas †", "teacher", "59.50 ± 0.71", last, "64.00 ± 2.83", best,
                       "59.00, 60.00, ×", "62.00, 66.00, ×"]  # fmt: skip
    assert student == ["", "student", "61.00 ± 1.41", "", "62.00 ± 1.41", "", "60.00, 62.00, ×", "61.00, 63.00, ×"]
    assert "no finished run of imas with seed 3" in text
    assert "last and best order base_line and imas differently: base_line minus imas is +1.50 last, −3.00 best" in text
    assert _rows(text, "What it costs")[2:] == [
        [arm, "12", "1.00", "1.000", "900", "1,234"] for arm in ("base_line", "imas")
    ]
    assert _rows(text, "IoU of each class")[3] == ["upright stripes", "51.00 ± 0.00", "51.00 ± 0.00"]
    assert _rows(text, "IoU of each class")[5] == ["dots", "×", "×"]
    for words in (
        "labeled list: 4 images, sha256 aaaaaaaaaaaa",
        "val list: 5 images",
        "iterations: 12\n",
        "commit: f00",
    ):
        assert words in text, words
    assert "evaluation: windows of 48, stride 32" in text and "network: resnet18 of width 4" in text

    with open(stored / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["network"], row["last.seeds.3"]) for row in rows] == [
        ("base_line", "student", "64.0"), ("imas", "teacher", "×"), ("imas", "student", "×"),
    ]  # fmt: skip
    assert float(rows[1]["last_minus_baseline.mean"]) == -1.5
    result = json.loads((stored / "table.json").read_text())
    assert result["arms"]["imas"]["networks"]["teacher"]["best"]["seeds"] == {"1": 62.0, "2": 66.0, "3": None}
    tex = (stored / "table.tex").read_text()
    assert r"base\_line $\dagger$ & student & 62.00 $\pm$ 2.00" in tex and "\n\\par $\\times$ no finished run" in tex


def test_the_page_holds_curves_and_leads_to_the_runs(stored: Path) -> None:
    main(["--out", str(stored), "--report-only"])
    page = (stored / "compare.html").read_text()
    assert page.count('class="band') == 2 and page.count('class="line') == 4  # with the keys
    links = re.findall('href="([^"]*)"', page)
    assert len(links) == 5 and all((stored / link).is_file() for link in links)
    assert "no --baseline was named" in page and "<script" not in page


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    _store(tmp_path, "sup", 1, {"miou_stu": [1.0, 2.0, 3.0]}, SUP)
    _store(tmp_path, "imas", 1, {"miou_tea": [1.0, 2.0, 4.0]}, {})
    main(["--out", str(tmp_path), "--report-only", "--baseline", "sup"])
    text = (tmp_path / "table.md").read_text()
    assert "one seed: no standard deviation and no interval" in text and "+1.00 (one seed: no interval)" in text
    assert "±" not in text.replace("mean ± standard deviation", "")


def test_figures_of_a_run_in_stages(tmp_path: Path) -> None:
    """The last stage by its start counts, whatever its name and place."""
    for arm in ("a", "b"):
        _store(tmp_path, arm, 1, {"miou_stu": [1.0, 2.0, 3.0]}, SUP)
        _stage(tmp_path / arm / "seed_1/log/z", {"student": [9.0] * 3}, {"miou_stu": [9.0] * 3})
    for name in ("metrics.csv", "training.csv", "evaluation.json", "run.yaml"):
        (tmp_path / "b/seed_1/log" / name).unlink()
    _stage(tmp_path / "b/seed_1/log/main", {"student": [5.0, 7.0, 6.0]}, {"miou_stu": [5.0, 7.0, 6.0]}, day=2)
    main(["--out", str(tmp_path), "--report-only"])
    text = (tmp_path / "table.md").read_text()
    assert [[row[2], row[4], row[3]] for row in _rows(text, "mIoU in percent")[2:]] == [
        ["3.00", "3.00", "3.00"],
        ["6.00", "6.00", "7.00"],
    ]
    assert [row[1] for row in _rows(text, "What it costs")[2:]] == ["24", "24"]


NETWORK = TINY["net"] | {"decoder": {"kwargs": {"inner_planes": 16, "low_conv_planes": 4, "dilations": [1, 2, 3]}}}
WINDOW = TINY["dataset"] | {"val": {"batch_size": 4, "crop": {"size": 64}}}
MORE_VAL = TINY["dataset"] | {"shapes": TINY["dataset"]["shapes"] | {"val": 6}}


@pytest.mark.parametrize(
    ("changed", "labeled", "says"),
    [
        ({"net": NETWORK}, "a", "net.decoder.kwargs.inner_planes: 16 (imas), 8 (sup)"),
        ({"dataset": WINDOW}, "a", "dataset.val.crop.size: 64 (imas), 48 (sup)"),
        ({"dataset": MORE_VAL}, "a", "dataset.shapes.val: 6 (imas), 5 (sup)"),
        ({}, "b", "labeled list: 4 images, sha256 bbbbbbbbbbbb (imas), 4 images, sha256 aaaaaaaaaaaa (sup)"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, changed: Sections, labeled: str, says: str) -> None:
    for seed in (1, 2):
        _store(tmp_path, "sup", seed, {"miou_stu": [1.0, 2.0, 3.0]}, SUP)
        _store(tmp_path, "imas", seed, {"miou_tea": [1.0, 2.0, 4.0]}, changed, labeled * 64)
    with pytest.raises(UserError, match=re.escape(f"{says}; seed 1, 2")):
        main(["--out", str(tmp_path), "--report-only"])
    assert not (tmp_path / "table.md").exists()
    main(["--out", str(tmp_path), "--report-only", "--mixed"])
    for name in ("table.md", "compare.html", "table.json"):
        assert f"mixed: {says}; seed 1, 2" in (tmp_path / name).read_text(), name
    assert "mixed: " in (tmp_path / "table.tex").read_text()


def test_another_number_of_iterations_is_only_said(tmp_path: Path) -> None:
    _store(tmp_path, "sup", 1, {"miou_stu": [1.0, 2.0, 3.0]}, SUP)
    _store(tmp_path, "imas", 1, {"miou_tea": [1.0, 2.0, 4.0]}, {})
    path = tmp_path / "imas/seed_1/log/run.yaml"
    path.write_text(path.read_text().replace("iterations_per_epoch: 4", "iterations_per_epoch: 5"))
    main(["--out", str(tmp_path), "--report-only"])
    assert "iterations: 15 (imas); 12 (sup)" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--configs YAML --seeds 1 2 1", "--seeds 1 2 1: expected numbers from 0 on, each once"),
        ("--configs YAML --seeds -1", "--seeds -1"),
        ("--configs YAML", "nothing to train"),
        ("--seeds 1", "nothing to train"),
        ("--report-only", "no finished run there"),
        ("--configs YAML YAML --seeds 1", "run: two arms of this name"),
        ("--arm a/b YAML --seeds 1", "NAME without a /"),
        ("--arm a --seeds 1", "expected NAME YAML KEY=VALUE"),
        (
            "--configs YAML --seeds 1 --baseline sup",
            "sup: no arm or method of this name; expected one of run",
        ),
        ("--configs YAML --arm two YAML --seeds 1 --baseline imas", "imas is the method of run, two"),
        ("--configs YAML --seeds 1 --jobs 0", "expected a number from 1 on"),
        ("--configs YAML --seeds 1 --gpus-per-run 2", "--gpus-per-run 2: there are 0 GPUs here"),
        ("--configs YAML --arm two YAML imas.threshold=2 --seeds 1 2", "imas.threshold"),
        ("--configs nowhere/config.yaml --seeds 1", "nowhere/config.yaml"),
        ("--configs YAML --seeds 1 --set dataset.train.data_list=nowhere.txt", "nowhere.txt"),
    ],
)
def test_bad_input(experiment: Callable[..., Path], tmp_path: Path, words: str, says: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        main([*words.replace("YAML", str(experiment())).split(), "--out", str(out)])
    assert says in str(caught.value)
    assert not out.exists()


def test_a_folder_that_is_not_ours_is_left_alone(experiment: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out/run/seed_1/log").mkdir(parents=True)
    with pytest.raises(UserError, match="run/seed_1: a run of another command"):
        main(["--configs", str(experiment()), "--seeds", "1", "--out", str(tmp_path / "out")])


def test_an_unfinished_run_goes_on_with_its_own_lists_alone(tmp_path: Path) -> None:
    _store(tmp_path, "one", 1, {"miou_stu": [1.0, 2.0, 3.0]}, SUP)
    folder = tmp_path / "one/seed_1"
    (folder / "ended.csv").unlink()
    lists = {"labeled list": f"4 images, sha256 {'a' * 12}", "unlabeled list": "none"}
    lists["val list"] = f"5 images, sha256 {'c' * 12}"
    plan = Plan("one", 1, folder, compare_runs.read_recipe(folder), {}, lists)
    compare_runs._check_unchanged(plan)
    for name, before in lists.items():
        with pytest.raises(UserError, match=f"{name}: another, and {before} before"):
            compare_runs._check_unchanged(plan._replace(lists=lists | {name: "another"}))


def test_each_run_gets_its_gpus(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def slots(*words: str) -> list[str]:
        return _slots(parse(["--out", "x", *words]))

    assert slots() == ["0", "1", "2", "3", "4"] and slots("--gpus-per-run", "2") == ["0,1", "2,3"]
    assert slots("--jobs", "2", "--gpus-per-run", "5") == ["0,1,2,3,4"] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,7")
    assert slots("--jobs", "2") == ["3", "4"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with monkeypatch.context() as broken:
        broken.setattr(torch.version, "cuda", "12.8")
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=3,4.*cannot use it"):
            slots()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots("--jobs", "2") == ["", ""] and len(slots()) == len(os.sched_getaffinity(0))
    plan = Plan("a", 7, tmp_path, {}, {}, {})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert command(plan, 2)[:4] == launcher and command(plan, 2)[4:] == command(plan, 1)
    assert command(plan, 1)[0] == str(ROOT / "train_semi.py")


def test_overrides_of_an_arm_come_last_and_know_the_seed(experiment: Callable[..., Path], tmp_path: Path) -> None:
    arms = {"one": (experiment(), []), "two": (experiment(), ["dataset.shapes.labeled=8"])}
    plans = make_plans(arms, [1, 2], ["dataset.shapes.labeled=6", "dataset.shapes.seed={seed}"], tmp_path)
    assert [(plan.arm, plan.seed) for plan in plans] == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]
    shapes = [plan.recipe["dataset"]["shapes"] for plan in plans]
    assert [each["labeled"] for each in shapes] == [6, 8, 6, 8] and [each["seed"] for each in shapes] == [1, 1, 2, 2]


@pytest.fixture
def forked(monkeypatch) -> None:
    """Runs in forked processes, which are spared the seconds of importing torch."""

    def begin(plan: Plan, slot: str, gpus: int) -> Forked:
        process = start(*command(plan, gpus))
        output = plan.folder / "output.txt"
        output.unlink(missing_ok=True)
        output.symlink_to(process._folder / "err")
        return process

    monkeypatch.setattr(compare_runs, "start", begin)


def test_runs_are_trained_interrupted_and_not_repeated(
    experiment: Callable[..., Path], tmp_path: Path, forked: None, capsys: pytest.CaptureFixture
) -> None:
    """Two methods with two seeds, and an arm that fails. TERM in between saves and stops them; the same command goes
    on; runs that are done stay as they are, and one of another configuration is refused.
    """
    short = {"trainer": TINY["trainer"] | {"epochs": 2}, "saver": {"use_tb": False}}
    sup = experiment("sup")
    sup.write_text(yaml.safe_dump(_sections(short | SUP)))
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    words = ["--configs", str(sup), str(experiment("semi", **short)), "--seeds", "1", "2", "--out", str(out)]
    words += ["--jobs", "2", "--set", "dataset.shapes.seed={seed}", "--baseline", "sup_only"]

    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.02):
            if (out / "semi/seed_1/log/metrics.csv").exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(Unfinished, match="runs are not finished; the same command goes on") as stopped:
            main(words)
    finally:
        over.set()
        thread.join()
    assert stopped.value.status == 75 and signal.getsignal(signal.SIGTERM) is before
    stops = {path: path.read_text() for path in out.glob("*/seed_*/ended.csv")}
    assert any("\n75," in text for text in stops.values()) and len(stops) < 4

    with pytest.raises(Unfinished, match="2 of 6 runs failed") as failed:
        main([*words, "--arm", "broken", words[2], "trainer.start_from=nowhere.pth"])
    assert failed.value.status == 1
    assert re.search(r"broken, seed 1: status 2; .*output.txt ends with\n.*nowhere.pth", str(failed.value))
    text = (out / "table.md").read_text()
    rows = _rows(text, "mIoU in percent")[2:]
    assert [row[:2] for row in rows] == [["sup", "student"], ["semi", "teacher"], ["", "student"], ["broken", "×"]]
    assert rows[-1][2:] == ["×", "×", "×", "×", "×, ×", "×, ×"] and not any(
        "×" in cell for row in rows[:3] for cell in row
    )
    assert "shapes, seed 1, size 32, val 5 (seed 1)" in text

    ended = {path: path.read_text() for path in out.glob("s*/seed_*/ended.csv")}
    assert len(ended) == 4 and all(text.startswith(stops.get(path, "")) for path, text in ended.items())
    main([*words, "--set", "saver.pictures_every=2"])  # which makes no other experiment of it
    assert {path: path.read_text() for path in ended} == ended
    assert "of earlier calls: broken 1, broken 2" in (out / "table.md").read_text()
    with pytest.raises(UserError, match="a run of another configuration") as refused:
        main([*words, "--set", "trainer.epochs=4"])
    assert "trainer.epochs: 4, and 2 before" in str(refused.value) and str(out / "semi/seed_2") in str(refused.value)


def test_a_stopped_torchrun_has_not_failed(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It ends with 1 whatever its ranks end with."""
    began, plan = tmp_path / "began", Plan("one", 1, tmp_path / "run", {"trainer": {"epochs": 2}}, {}, {})
    script = f"trap 'exit 1' TERM; touch {began}; while :; do sleep 0.05; done"
    monkeypatch.setattr(compare_runs, "start", lambda *_: subprocess.Popen(["sh", "-c", script]))

    def stop() -> None:
        while not began.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Unfinished, match="stopped: 1 of 1 runs are not finished"):
        compare_runs.train([plan], ["0,1"], 2)
    assert (plan.folder / "ended.csv").read_text().splitlines()[1].startswith("75,")
    assert "stopped and saved after" in capsys.readouterr().out


def test_the_command_trains_in_processes_of_its_own(experiment: Callable[..., Path], tmp_path: Path) -> None:
    path = experiment("one")
    one = {"trainer": TINY["trainer"] | {"epochs": 1}, "saver": {"use_tb": False}}
    path.write_text(yaml.safe_dump(_sections(one | SUP)))
    ended = run("-m", "imas.compare", "--configs", path, "--seeds", "3", "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert "one, seed 3: finished in" in ended.stdout and "compare.html" in ended.stdout
    assert "epoch 0" in (tmp_path / "out/one/seed_3/output.txt").read_text()


def test_the_audit_of_published_runs_is_that_of_the_page() -> None:
    page = (ROOT / "docs/results.md").read_text()
    for table in published.tables().split("\n\n"):
        assert table in page
