"""Every figure of the authors' releases, through this project's own classes and functions.

``golden/methods/NAME.json`` holds the figures, unchanged. ``golden_cases/NAME.py`` beside it says how a case is run:
``cases(content)`` yields (id, case) for everything that the file holds, and ``run(case)`` checks one.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILES = sorted((Path(__file__).parent / "golden" / "methods").glob("*.json"))


def _cases() -> Iterator[Any]:
    for path in FILES:
        runner = importlib.import_module(f"golden_cases.{path.stem}")
        for name, case in runner.cases(json.loads(path.read_text(encoding="utf-8"))):
            yield pytest.param(runner, case, id=f"{path.stem}-{name}")


@pytest.mark.parametrize(("runner", "case"), list(_cases()))
def test_golden(runner: Any, case: Any) -> None:
    runner.run(case)


def test_every_case_of_every_file_is_run() -> None:
    """The number of figures that a runner yields is that of the file's lists, so that none is passed over."""
    for path in FILES:
        content = json.loads(path.read_text(encoding="utf-8"))
        runner = importlib.import_module(f"golden_cases.{path.stem}")
        assert len(list(runner.cases(content))) >= runner.count(content) > 0, path.name
