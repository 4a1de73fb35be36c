"""A method that trains in two stages: folders of their own, done once, killed and resumed."""

from __future__ import annotations

import re
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Forked, run, start

DATASET = TINY["dataset"] | {"shapes": {"size": 32, "labeled": 4, "unlabeled": 40, "val": 5}}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """``train_semi.py`` with iMAS in two stages: a supervised one, and one that starts from its networks."""
    path = tmp_path / "stages.py"
    path.write_text(
        textwrap.dedent(f"""
        import dataclasses, sys; sys.path.insert(0, {str(ROOT)!r})
        from imas.methods import METHODS
        from imas.methods.imas import IMAS
        class Staged(IMAS):
            @classmethod
            def run(cls, session):
                options = dataclasses.replace(session.config.options, sup_only_epoch=9)
                trainer = dataclasses.replace(session.config.trainer, epochs=2)
                config = dataclasses.replace(session.config, options=options, trainer=trainer)
                first = session.fit("first", cls, config)
                session.fit("second", cls, start=first.snapshot_dir / "ckpt.pth")
        METHODS["imas"] = Staged
        import train_semi
        from imas.errors import run_script
        run_script(lambda: train_semi.main(sys.argv[1:]))
        """)
    )
    return path


def _wait_for(path: Path, process: Forked) -> None:
    began = time.monotonic()
    while not path.is_file():
        assert process.poll() is None and time.monotonic() - began < 60
        time.sleep(0.01)


def _state(out: Path, stage: str) -> dict:
    return torch.load(out / "checkpoints" / stage / "ckpt.pth", weights_only=True)


def test_killed_in_the_second_stage_it_goes_on_there(
    script: Path, experiment: Callable[..., Path], tmp_path: Path
) -> None:
    config = experiment(dataset=DATASET)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    ended = run(script, "--config", config, "--out", straight)
    assert ended.returncode == 0, ended.stderr
    process = start(script, "--config", config, "--out", killed)
    _wait_for(killed / "checkpoints" / "second" / "ckpt.pth", process)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    first = killed / "checkpoints" / "first"
    assert (first / "done").is_file() and not (killed / "checkpoints" / "second" / "done").exists()
    written = (first / "ckpt.pth").stat().st_mtime_ns

    resumed = run(script, "--config", config, "--out", killed, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "stage first is done" in resumed.stdout and "resumed after epoch 0" in resumed.stdout
    assert (first / "ckpt.pth").stat().st_mtime_ns == written
    for stage in ("first", "second"):
        one, two = _state(straight, stage), _state(killed, stage)
        for key in ("model_state", "teacher_state"):
            assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])
        rows = [(out / "log" / stage / "metrics.csv").read_text() for out in (straight, killed)]
        assert rows[0] == rows[1]
        assert (killed / "log" / stage / "report.html").is_file()
    assert _state(straight, "first")["epoch"] == 2 and _state(straight, "second")["epoch"] == 3

    again = run(script, "--config", config, "--out", killed, "--resume", "auto")
    assert again.returncode == 0 and "stage second is done" in again.stdout
    by_hand = ("--resume", str(first / "ckpt.pth"), "--set", "imas.threshold=0.5")
    told = run(script, "--config", config, "--out", killed, *by_hand)
    assert told.returncode == 0, told.stderr
    assert re.search(r"changed since stage first, which stays as it is:\n  imas.threshold: 0.5, and", told.stdout)
    refused = run(script, "--config", config, "--out", killed, "--resume", "never")
    assert refused.returncode == 2 and "an earlier run has left its checkpoint here" in refused.stderr
