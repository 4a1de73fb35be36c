"""What a run was: command line, seed, versions, machines, lists. In ``log/run.yaml`` and in every checkpoint."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from .. import distributed
from ..data.lists import Lists, list_paths
from ..data.splits import digest
from ..schema import Config
from .optim import total_batch

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pyyaml")
_ROOT = Path(__file__).parents[2]


def describe(config: Config, lists: Lists, seed: int, world: int) -> dict:
    """One start of a run as plain YAML values."""
    paths = list_paths(config)
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "config": str(config.path.resolve()),
        "seed": seed,
        "processes": world,
        "threads": torch.get_num_threads(),
        "total_batch": total_batch(config, world),
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "host": platform.node(),
        "devices": distributed.gather(_device_name()),
        "lists": {
            name: {"path": paths[name] and str(paths[name]), "images": len(names), "sha256": digest(names)}
            for name, names in lists.by_name().items()
            if names
        },
        "files": {text: len(files) for text, files in lists.remarks.items()},
    }


def record(config: Config, description: dict) -> None:
    """Into the log folder: the resolved recipe as ``config.yaml``; this start, after earlier ones, in ``run.yaml``."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    (config.log_dir / "config.yaml").write_text(text, encoding="utf-8")
    with open(config.log_dir / "run.yaml", "a", encoding="utf-8") as file:
        yaml.safe_dump([description], file, sort_keys=False, allow_unicode=True)


def git_commit() -> str | None:
    """The commit of this project, with ``-dirty`` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
