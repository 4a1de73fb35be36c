"""Who sends what to whom: every such run ends saved, and goes on from there (docs/reference.md, "Interruptions").

The rows of ``FEW`` are tested always. IMAS_SIGNALS=all tests the whole table: some ten minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, TINY, Forked, meeting, start
from torch.distributed.run import get_args_parser

import train_semi

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
HANDS_ON_USR1 = hasattr(get_args_parser().parse_args(["script"]), "signals_to_handle")


class Row(NamedTuple):
    """A run and the signals that it gets, those after the first 30 ms later each."""

    signals: str
    to: str  # main: processes that train; group: with their workers; launcher: torchrun alone; all: everything
    processes: int = 1
    workers: int = 2
    launcher: bool = False
    seconds: float = 0.0  # that an update takes besides

    def __str__(self) -> str:
        kind = "torchrun" if self.launcher else "plain"
        slow = f"-{self.seconds:g}s" if self.seconds else ""
        return f"{self.signals.replace(' ', '+')}-{self.to}-{self.processes}-{kind}-{self.workers}workers{slow}"


FEW = [
    Row("TERM TERM", "group"),
    Row("INT", "group"),
    Row("HUP", "group"),
    Row("USR1", "group", processes=2),
    Row("USR1", "launcher", processes=2, launcher=True),
    Row("TERM TERM", "all", processes=2, launcher=True),
    Row("TERM", "main", processes=2, workers=0, seconds=1.0),
]
WAYS = ("TERM", "INT", "USR1", "HUP", "TERM TERM", "INT INT", "HUP TERM")
ALL = [
    *(Row(way, to, workers=count) for way in WAYS for to in ("main", "group") for count in (0, 2)),
    *(Row(way, to, 2, count) for way in WAYS for to in ("main", "group") for count in (0, 2)),
    *(Row(way, to, 2, count, True) for way in WAYS for to in ("launcher", "all", "main") for count in (0, 2)),
    *(Row("TERM", to, 2, 2, True, seconds=8.0) for to in ("launcher", "all")),
]


def _script(folder: Path, row: Row) -> Path:
    """``train_semi.py``, which notes the beginning of each update."""
    path = folder / "noting.py"
    path.write_text(
        textwrap.dedent(f"""
        import sys, time; sys.path.insert(0, {str(ROOT)!r})
        import train_semi
        from imas import distributed
        from imas.engine import fit
        from imas.errors import run_script
        update = fit._update
        def noted(*arguments):
            with open({str(folder / "updates")!r} + str(distributed.rank()), "a") as file:
                print("begun", file=file)
            time.sleep({row.seconds})
            return update(*arguments)
        fit._update = noted
        run_script(distributed.for_summary(train_semi.main))
        """)
    )
    return path


def _start(row: Row, script: Path, config: Path) -> list[Forked | subprocess.Popen]:
    """The processes that are ours to wait for: torchrun, or those that train."""
    words = (script, "--config", config, "--set", "trainer.epochs=200")
    if row.launcher:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environment["PET_SIGNALS_TO_HANDLE"] = HANDED_ON  # as single_run.sh
        return [
            subprocess.Popen(
                [sys.executable, *TORCHRUN, *map(str, words)], cwd=ROOT, env=environment, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        ]  # fmt: skip
    where = meeting(row.processes)
    return [start(*words, RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(row.processes)]


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _signal(row: Row, processes: list[Forked | subprocess.Popen]) -> None:
    pids = [process.pid for process in processes]
    if row.launcher and row.to in ("all", "main"):
        ranks = _children(pids[0])
        pids = ranks if row.to == "main" else [*pids, *ranks]
    whole = row.to in ("group", "all")
    targets = [each for pid in pids for each in [pid, *(_children(pid) if whole and not row.launcher else [])]]
    if row.launcher and whole:
        targets += [worker for rank in pids[1:] for worker in _children(rank)]
    for name in row.signals.split():
        for pid in targets:
            os.kill(pid, getattr(signal, f"SIG{name}"))
        time.sleep(0.03)


@pytest.mark.parametrize("row", ALL if os.environ.get("IMAS_SIGNALS") == "all" else FEW, ids=str)
def test_it_ends_saved_and_goes_on(
    row: Row, experiment: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if row.launcher and row.to != "main" and "USR1" in row.signals and not HANDS_ON_USR1:
        pytest.skip("this torchrun dies of SIGUSR1")
    train = TINY["dataset"]["train"] | {"epoch_size": 48}
    imas = TINY["imas"] | {"sup_only_epoch": 0}
    config = experiment(imas=imas, dataset=TINY["dataset"] | {"train": train, "workers": row.workers})
    processes = _start(row, _script(tmp_path, row), config)
    first, began = tmp_path / "updates0", time.monotonic()
    while not first.is_file() or first.read_text().count("begun") < 4:
        assert processes[0].poll() is None, processes[0].communicate()[1]
        assert time.monotonic() - began < 180
        time.sleep(0.02)
    _signal(row, processes)
    before = first.read_text().count("begun")
    ended = [process.communicate(timeout=90) for process in processes]
    errors = "".join(err for _, err in ended)
    assert [process.returncode for process in processes] == [1 if row.launcher else 75] * len(processes), errors
    assert "and saved; the same command with --resume auto goes on" in errors
    assert row.launcher or "Traceback" not in errors  # torchrun prints its own
    assert first.read_text().count("begun") - before <= 2

    state = torch.load(config.parent / "checkpoints" / "ckpt.pth", weights_only=True)
    assert state["epoch"] * 12 + state["step"] >= 3
    capsys.readouterr()
    settings = f"trainer.epochs={state['epoch'] + 1}", "dataset.workers=0"  # on one process, with other workers
    last = str(config.parent / "checkpoints" / "ckpt.pth")  # named, since the number of epochs is another one
    train_semi.main(["--config", str(config), "--resume", last, *(w for each in settings for w in ("--set", each))])
    told = capsys.readouterr().out
    done = [f"epoch {state['epoch'] - 1}"] * (state["epoch"] > 0) + [f"{state['step']} updates"] * (state["step"] > 0)
    assert f"resumed after {' and '.join(done)} from" in told and f"epoch {state['epoch']}: teacher" in told
