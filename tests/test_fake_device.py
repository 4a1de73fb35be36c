"""Whole training steps on a device that is not there: nothing stays on the CPU, nothing waits, all gets a gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT
from torch.utils import backend_registration

from imas.config import load_config
from imas.methods import METHODS

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a later torch"
)

# Recipes and overrides, most with SyncBN. What makes a step wait for the device, once: CutMix that follows the score.
SMALL = "net.encoder.type=resnet18"  # which takes less time
STEPS = {
    f"cityscapes_imas372_r50_os8 {SMALL}": 1,
    f"pascal_imas1323_r50_os16 {SMALL} imas.hardness.trigger_cutmix=false trainer.checkpoint_encoder=true": 0,
    f"cityscapes_sup372_r50_os16 {SMALL}": 0,
    f"pascal_fixmatch {SMALL}": 0,
    f"pascal_unimatch {SMALL}": 0,
    f"cityscapes_unimatch {SMALL} unimatch.teacher=true unimatch.complementary_dropout=true": 0,
    f"cityscapes_augseg {SMALL}": 0,
    f"pascal_cps {SMALL}": 0,
    f"pascal_psmt {SMALL}": 0,
    f"pascal_u2pl {SMALL}": 3 * 21 * 2,  # one wait for these numbers, which a fake tensor gives one by one
    f"pascal_stpp {SMALL}": 0,
    "shapes_imas": 0,  # in its warm-up
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """All steps in one process, since the device cannot be taken back."""
    words = [step.split() for step in STEPS]
    lines = "\n".join(" ".join([f"exps/{recipe}/config.yaml", *overrides]) for recipe, *overrides in words)
    ended = subprocess.run(
        [sys.executable, "tests/fake_step.py"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=lines, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == len(STEPS), ended.stderr[-3000:]
    return dict(zip(STEPS, found))


def test_every_method_has_its_step_here() -> None:
    assert {load_config(ROOT / "exps" / step.split()[0] / "config.yaml").method for step in STEPS} == METHODS.keys()


@pytest.mark.parametrize("step", STEPS)
def test_a_step_stays_on_its_device(step: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[step]
    assert "error" not in result, result["error"]
    assert result["waits"] == STEPS[step]
    assert result["without gradient"] == [] and result["on another device"] == []
    assert result["largest copy"] <= 8192, "a copy that is no handful of numbers"
