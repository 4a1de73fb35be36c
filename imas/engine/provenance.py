"""Provenance of a run: command line, seed, versions, machines, lists. In ``log/run.yaml`` and in every checkpoint."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import distributed
from ..data.lists import Lists, list_paths
from ..data.splits import digest
from ..errors import UserError
from ..schema import Config
from ..strict import dotted
from .optim import total_batch

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pyyaml")


def describe(config: Config, lists: Lists, seed: int, world: int) -> dict:
    """One start of a run as plain YAML values."""
    paths = list_paths(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
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
        "devices": distributed.gather(device),
        "lists": {
            name: {"path": paths[name] and str(paths[name]), **entry} for name, entry in list_digests(lists).items()
        },
        "files": dict(lists.files),
    }


def list_digests(lists: Lists) -> dict[str, dict[str, Any]]:
    """Number of ``images`` and ``sha256`` of each list that is not empty."""
    named = lists.by_name().items()
    return {name: {"images": len(names), "sha256": digest(names)} for name, names in named if names}


# Keys that steer how a run is carried out.
_ASIDE = ("saver.", "dataset.workers", "dataset.cache", "dataset.on_error")


def changes(before: dict, config: dict, path: str = "") -> list[str]:
    """A line for each key of the recipe that has another value than in an earlier one. Keys that only one of them has,
    below a section that both have, are passed over: they came or went with a version of this project.
    """
    if before == config:
        return []
    if not isinstance(before, dict) or not isinstance(config, dict):
        return [f"{path}: {config!r}, and {before!r} before"]
    lines = []
    for key in dict.fromkeys([*before, *config]):
        here = f"{path}.{key}" if path else str(key)
        if key in before and key in config:
            lines += changes(before[key], config[key], here)
        elif not path:
            lines.append(f"{here}: {'a section' if key in config else 'no section'}, other than before")
    return lines


def steers(line: str) -> bool:
    """Whether a line of ``changes`` makes it another experiment."""
    return not line.startswith(_ASIDE)


def need_same(path: Path, state: dict[str, Any], config: Config, seed: int, by_hand: bool) -> list[str]:
    """See that a checkpoint is of this run; what has changed in its recipe all the same, as lines of ``changes``.

    Args:
        state: the checkpoint's dict.
        by_hand: the file was named, so that the run goes on from it with another recipe, too.

    Raises:
        UserError: another seed; another recipe, with the keys that differ.
    """
    if state.get("seed", seed) != seed:
        raise UserError(
            f"{path}: that run had the seed {state['seed']}, this one has {seed}. Continue it with its own seed, or "
            "name another folder with --out"
        )
    before = state.get("config")
    if not before or "method" in before:  # the authors' code; version 0.1, whose keys had other names
        return []
    lines = changes(before, config.to_dict())
    if not by_hand and any(map(steers, lines)):
        text = (
            f"{path} is of another recipe. Name another folder with --out; or, to go on from it with this recipe: "
            f"--resume {path}"
        )
        raise UserError("\n  ".join([text, *lines]))
    return lines


def val_digest(description: dict | None) -> str | None:
    """The digest of the val list, None of a description without one."""
    return (description or {}).get("lists", {}).get("val", {}).get("sha256")


def surroundings_changed(before: dict, now: dict) -> list[str]:
    """A line for each thing beside the recipe that differs between two descriptions: lists, processes, threads,
    versions, commit.
    """
    lines = [
        f"{key}: {now[key]}, and {before[key]} before"
        for key in ("processes", "threads", "python", "cuda", "git")
        if key in before and before[key] != now[key]
    ]
    for name, number in before.get("packages", {}).items():
        if now["packages"].get(name) != number:
            lines.append(f"{name}: {now['packages'].get(name)}, and {number} before")
    for name in dict.fromkeys([*before.get("lists", {}), *now["lists"]]):
        one, two = (lists.get(name, {"images": 0, "sha256": None}) for lists in (before.get("lists", {}), now["lists"]))
        if one["sha256"] != two["sha256"]:
            lines.append(f"the {name} list: {two['images']} images, and {one['images']} (others) before")
    return lines


def in_numbers(config: Config, lists: Lists, iterations: int, world: int) -> str:
    """Images, iterations (of an epoch), batch and processes, for the log."""
    images = f"{len(lists.labeled)} labeled, {len(lists.unlabeled)} unlabeled, {len(lists.val)} validation images"
    batch = f"batch {config.dataset.train.batch_size} on {world} process(es)"
    return f"{images}; {config.trainer.epochs} epochs of {iterations} iterations, {batch}"


def identity(config: Config, seed: int) -> dict[str, str]:
    """Whatever ranks of one run share, as text by name: seed, folder, commit, versions, and every key of the recipe."""
    texts = {"seed": seed, "run folder": config.folder.resolve(), "commit": git_commit()}
    texts |= {name: version(name) for name in PACKAGES}
    return {name: str(text) for name, text in (texts | dotted(config.to_dict())).items()}


def record(config: Config, description: dict) -> None:
    """Into the log folder: the resolved recipe as ``config.yaml``; this start, after earlier ones, in ``run.yaml``."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    (config.log_dir / "config.yaml").write_text(text, encoding="utf-8")
    with open(config.log_dir / "run.yaml", "a", encoding="utf-8") as file:
        yaml.safe_dump([description], file, sort_keys=False, allow_unicode=True)


def git_commit() -> str | None:
    """The commit of this project, with ``-dirty`` where files differ from it; None outside a repository."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
