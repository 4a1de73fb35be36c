"""A small experiment on disk, and the project's scripts as real processes."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
# Each test process, and what it starts, computes on one thread: on two cores, two of two threads block each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and the scripts under test would inherit that

TINY = {
    "imas": {
        "threshold": 0.25,
        "use_cutmix": True,
        "sup_only_epoch": 1,
        "hardness": {"trigger_cutmix": True, "blend": True},
    },
    "dataset": {
        "type": "shapes",
        "train": {
            "batch_size": 4,
            "flip": True,
            "strong_aug": {"num_augs": 2},
        },
        "val": {"batch_size": 4, "crop": {"size": 48}},
        "shapes": {"size": 32, "labeled": 4, "unlabeled": 16, "val": 5},
        "workers": 0,
    },
    "trainer": {
        "epochs": 3,
        "optimizer": {"kwargs": {"lr": 0.02}},
    },
    "net": {
        "num_classes": 4,
        "encoder": {"type": "resnet18", "kwargs": {"width": 4, "replace_stride_with_dilation": [False, True, True]}},
        "decoder": {"kwargs": {"inner_planes": 8, "low_conv_planes": 4, "dilations": [1, 2, 3]}},
    },
    "saver": {"auto_resume": True},
}


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny experiment as ``tmp_path/NAME/config.yaml``."""

    def write(name: str = "run", **sections: dict) -> Path:
        path = tmp_path / name / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({**TINY, **sections}))
        return path

    return write


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """A script that ran in this process leaves the logger as it was."""
    logger = logging.getLogger("imas")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


class Forked:
    """A script in a forked process, with the words of ``subprocess.Popen``. What takes it seconds to import is there
    already (see ``_FORKS``); modules of the project are not.
    """

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path) -> None:
        self.args = words
        self._folder = Path(tempfile.mkdtemp(prefix="imas-test-"))
        self._process = _FORKS.Process(target=_as_script, args=(words, environment, folder, self._folder))
        self._process.start()
        self.pid = self._process.pid
        _started.append(self)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        _started.remove(self)
        texts = [self._folder / name for name in ("out", "err")]
        out, err = (path.read_text() if path.is_file() else "" for path in texts)
        shutil.rmtree(self._folder)
        return out, err


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "torch.utils.tensorboard"])
_started: list[Forked] = []


@atexit.register
def _end() -> None:
    """What a failed test has left."""
    for forked in _started:
        forked._process.kill()
        shutil.rmtree(forked._folder, ignore_errors=True)


def _as_script(words: list[str], environment: dict[str, str], folder: Path, outputs: Path) -> None:
    """In the forked process: as the interpreter does it."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(outputs / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.path.insert(0, str(folder if words[0] == "-m" else (folder / words[0]).resolve().parent))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def start(
    *words: str | Path, launcher: tuple[str, ...] = (), folder: Path = ROOT, **environment: str
) -> subprocess.Popen | Forked:
    """A script of the project in a process of its own."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    if not launcher:
        return Forked(list(map(str, words)), environment, folder)
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(
    *words: str | Path, launcher: tuple[str, ...] = (), folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """``start`` and wait."""
    process = start(*words, launcher=launcher, folder=folder, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def meeting(world: int = 2) -> dict[str, str]:
    """What a launcher tells every rank: how many there are, and a free port to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_ranks(*words: str | Path, of_rank_1: tuple[str, ...] = (), world: int = 2) -> list[subprocess.CompletedProcess]:
    """A script on several ranks, without the seconds that torchrun takes; further words for the second."""
    where, more = meeting(world), {1: of_rank_1}
    ranks = [start(*words, *more.get(rank, ()), RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(world)]
    outputs = [process.communicate(timeout=300) for process in ranks]
    return [subprocess.CompletedProcess(words, each.returncode, *texts) for each, texts in zip(ranks, outputs)]
