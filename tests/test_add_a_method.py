"""docs/add_a_method.md to the letter, in a copy of the project: files touched, contract, a short training."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from conftest import ROOT, run
from test_readme import apply_page

PAGE = "docs/add_a_method.md"
CONFIG = "exps/shapes_mean_teacher/config.yaml"


def test_the_worked_example(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__", "checkpoints", "log", ".venv", ".git", "out", "[!s]*_os*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    touched = apply_page(PAGE, copy)
    # One file, one line in the table, one YAML, and the line that puts it under contract.
    assert touched == {"imas/methods/mean_teacher.py", "imas/methods/__init__.py", CONFIG, "tests/test_methods.py"}

    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_methods.py", "tests/test_structure.py")
    its_own = "mean_teacher or under_contract or every_definition"
    tested = run(*words, "-k", its_own, folder=copy)
    assert tested.returncode == 0 and int(re.search(r"(\d+) passed", tested.stdout)[1]) >= 6, tested.stdout
    small = ("dataset.shapes.size=32", "dataset.shapes.unlabeled=16", "dataset.shapes.val=4", "trainer.epochs=2")
    settings = [word for setting in small for word in ("--set", setting)]
    trained = run("train_semi.py", "--config", CONFIG, *settings, folder=copy)
    assert trained.returncode == 0, trained.stderr
    assert "teacher mIoU" in trained.stdout and "could not be drawn" not in trained.stdout
    log = (copy / CONFIG).with_name("log")
    assert len((log / "metrics.csv").read_text().splitlines()) == 3 and (log / "views.png").is_file()
    for wrong, sentence in (
        ("dataset.train.strong_aug=null", "mean_teacher trains on strong views"),
        ("mean_teacher.loss_wieght=1", "did you mean loss_weight?"),
    ):
        refused = run("train_semi.py", "--config", CONFIG, "--out", tmp_path / "out", "--set", wrong, folder=copy)
        assert refused.returncode == 2 and sentence in refused.stderr
        assert not (tmp_path / "out").exists()
