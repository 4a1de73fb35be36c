"""A small experiment on disk, and the project's scripts as real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

TINY = {
    "dataset": {
        "type": "shapes",
        "train": {
            "batch_size": 4,
            "flip": True,
            "strong_aug": {"num_augs": 2},
            "hardness_aware": {"trigger_cutmix": True, "blend": True},
        },
        "val": {"batch_size": 4, "crop": {"size": 48}},
        "shapes": {"size": 32, "labeled": 4, "unlabeled": 16, "val": 5},
        "workers": 0,
    },
    "trainer": {
        "epochs": 3,
        "sup_only_epoch": 1,
        "optimizer": {"kwargs": {"lr": 0.02}},
        "unsupervised": {"threshold": 0.25, "use_cutmix": True},
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


def start(*words: str | Path, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """A script of the project in a process of its own, on one thread."""
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """``start`` and wait."""
    process = start(*words, launcher=launcher)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
