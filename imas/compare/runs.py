"""The runs of a comparison: planned and checked before any of them begins, trained as processes, read when finished."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from ..config import load_config
from ..data.lists import read_lists
from ..engine import provenance
from ..engine.interrupt import Interrupted, interruptible
from ..engine.sliding import Protocol
from ..errors import Together, UserError
from ..files import replacing
from ..report.records import Curve, read_records
from ..strict import dotted
from .table import Run

_SCRIPT = Path(__file__).parents[2] / "train_semi.py"
_LAST_LINES = 6  # of a run that failed
_WORDS = {0: "finished in", Interrupted.status: "stopped and saved after", -signal.SIGTERM: "stopped after"}
_LISTED = ("labeled", "unlabeled")  # of a data set's own section: what the digests of the lists tell
_ASIDE = ("embedding", "sync_bn")  # of ``net``: what a method adds for training, and how it is carried out


class Plan(NamedTuple):
    """A run that is to be."""

    arm: str
    seed: int
    folder: Path
    recipe: dict[str, Any]  # ``Config.to_dict``
    identity: dict[str, Any]  # see ``Run``
    lists: dict[str, str]  # number of images and digest of each


class Unfinished(UserError):
    """Some runs have failed or were stopped."""


def make_plans(
    arms: Mapping[str, tuple[Path, Sequence[str]]], seeds: Sequence[int], words: Sequence[str], out: Path
) -> list[Plan]:
    """Every arm with every seed, those of the first seed first.

    Args:
        arms: YAML and overrides by name; ``{seed}`` in an override is the seed.
        words: overrides of all arms, which come first.

    Raises:
        UserError: all mistakes of all configurations and lists; folders with a run of another configuration.
    """
    together, plans = Together(), []
    wrong: set[str] = set()  # arms: further seeds would bring the same mistakes
    for seed, (arm, (path, own)) in product(seeds, arms.items()):
        overrides = [word.replace("{seed}", str(seed)) for word in (*words, *own)] + ["saver.snapshot_dir=checkpoints"]
        config = None if arm in wrong else together(load_config, path, overrides)
        lists = None if config is None else together(read_lists, config)
        if lists is None:
            wrong.add(arm)
            continue
        described = provenance.list_digests(lists)
        recipe, folder = config.to_dict(), run_folder(out, arm, seed)
        plans.append(Plan(arm, seed, folder, recipe, _identity(recipe, described), _lists(described)))
        together(_check_unchanged, plans[-1])
    together.finish()
    return plans


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a run is."""
    return out / arm / f"seed_{seed}"


def found_runs(out: Path) -> list[tuple[str, int]]:
    """Name and seed of each run in a folder, finished or not."""
    folders = [path.parent for path in sorted(out.glob("*/seed_*/config.yaml"))]
    numbers = ((folder.parent.name, folder.name.removeprefix("seed_")) for folder in folders)
    return [(arm, int(number)) for arm, number in numbers if number.isdigit()]


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a run, finished or not."""
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def _check_unchanged(plan: Plan) -> None:
    if not (plan.folder / "log").is_dir():
        return
    if not (plan.folder / "config.yaml").is_file():
        raise UserError(f"{plan.folder}: a run of another command, without config.yaml. Name another --out")
    lines = list(filter(provenance.steers, provenance.changes(read_recipe(plan.folder), plan.recipe)))
    for path in plan.folder.glob("log/**/run.yaml"):
        before = _lists(yaml.safe_load(path.read_text(encoding="utf-8"))[-1]["lists"])
        if path.parent.name != "log":  # a stage may read fewer unlabeled images
            before["unlabeled list"] = plan.lists["unlabeled list"]
        lines += [f"{key}: {now}, and {before[key]} before" for key, now in plan.lists.items() if now != before[key]]
    if lines:
        head = f"{plan.folder}: a run of another configuration. Name another --out, or delete that folder"
        raise UserError("\n  ".join([head, *dict.fromkeys(lines)]))


def _identity(recipe: dict[str, Any], lists: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What runs of one seed have to share, by dotted key. ``lists``: number of images and digest by name."""
    dataset, net = recipe["dataset"], {key: value for key, value in recipe["net"].items() if key not in _ASIDE}
    names = {key: text for key, text in _lists(lists).items() if key != "unlabeled list"}
    window = {"dataset.type": dataset["type"], "dataset.val.crop.size": dataset["val"]["crop"]["size"]}
    return names | window | dotted({f"dataset.{dataset['type']}": _own(dataset), "net": net})


def _own(dataset: dict[str, Any]) -> dict[str, Any]:
    """The section that data sets of this type alone have."""
    return {key: value for key, value in (dataset.get(dataset["type"]) or {}).items() if key not in _LISTED}


def _lists(lists: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Number of images and digest of each list."""
    texts = {name: f"{entry['images']} images, sha256 {entry['sha256'][:12]}" for name, entry in lists.items()}
    return {f"{name} list": texts.get(name, "none") for name in ("labeled", "unlabeled", "val")}


def _ends(folder: Path) -> list[dict[str, str]]:
    """Exit status and seconds of each process that a run has had."""
    path = folder / "ended.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def finished(folder: Path) -> bool:
    """Whether the last process of a run has ended well: then all stages are done."""
    return any(end["status"] == "0" for end in _ends(folder)[-1:])


def read_run(folder: Path, arm: str, seed: int) -> Run | None:
    """The figures of a finished run; None of any other. Those of a run in stages are of the last stage, its costs of
    all stages.
    """
    if not finished(folder):
        return None
    (record,), recipe = read_records([folder]), read_recipe(folder)
    stages = sorted(record.stages, key=lambda stage: stage.starts[-1]["started"]) + [record] * bool(record.epochs)
    last, lengths = stages[-1], [stage.starts[-1]["iterations_per_epoch"] for stage in stages]
    iterations = [stage.epochs * length for stage, length in zip(stages, lengths)]
    start, networks = last.starts[-1], last.evaluation["networks"]  # the selecting network comes first
    curves = {}
    for name in networks:
        epochs, values = last.mious[name]
        curves[name] = Curve([sum(iterations[:-1]) + (epoch + 1) * lengths[-1] for epoch in epochs], values)
    times, peaks = (
        [value for stage in stages if column in stage.curves for value in stage.curves[column].values]
        for column in ("seconds", "memory_mib")
    )
    cost = {"iterations": sum(iterations), "hours": sum(float(end["seconds"]) for end in _ends(folder)) / 3600}
    cost |= {"seconds": sum(times) / len(times), "memory_mib": max(peaks)} if times else {}
    selecting, dataset, encoder = next(iter(networks)), recipe["dataset"], recipe["net"]["encoder"]
    cost["parameters"] = start["parameters"][selecting]
    protocol = last.evaluation["protocol"]
    facts = {
        "data": ", ".join([dataset["type"], *(f"{key} {value}" for key, value in _own(dataset).items())]),
        **_lists(start["lists"]),
        "iterations": str(cost["iterations"]),
        "network": f"{encoder['type']} of width {encoder['kwargs']['width']}, {recipe['net']['decoder']['type']}",
        "batch": f"{start['total_batch']} labeled images on {start['processes']} process(es)",
        "evaluation": str(Protocol(protocol["window"], protocol["flip"], tuple(protocol["scales"]))),
        "versions": " ".join(["Python", start["python"], *(f"{key} {n}" for key, n in start["packages"].items())]),
        "commit": str(start["git"]),
        "devices": ", ".join(dict.fromkeys(start["devices"])),
    }
    return Run(arm, seed, curves, networks[selecting]["iou"], cost, facts, _identity(recipe, start["lists"]))


def train(plans: Sequence[Plan], slots: Sequence[str], gpus: int) -> None:
    """Train what is not finished, each run in a process of its own, with one bar over all.

    Args:
        slots: CUDA_VISIBLE_DEVICES of each run that may go on at a time; empty: a run on one thread of the CPU.
        gpus: of a run. Several are torchrun's.

    Raises:
        Unfinished: runs failed, after all others; or this process was asked to stop, after every run has saved.
    """
    for plan in plans:
        plan.folder.mkdir(parents=True, exist_ok=True)
        with replacing(plan.folder / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(plan.recipe, sort_keys=False), encoding="utf-8")
    waiting = [plan for plan in plans if not finished(plan.folder)]
    free, failed, stopped = list(slots), [], False
    running: dict[subprocess.Popen, tuple[Plan, str, float]] = {}
    total = sum(map(_epochs, plans))
    initial = total - sum(map(_epochs, waiting))
    bar = tqdm(total=total, initial=initial, unit="epoch", dynamic_ncols=True, disable=None)
    with interruptible() as interruption, bar:
        try:
            while running or (waiting and not stopped):
                while waiting and free and not stopped:
                    plan, slot = waiting.pop(0), free.pop(0)
                    running[start(plan, slot, gpus)] = plan, slot, time.monotonic()
                time.sleep(0.2)
                if interruption.received is not None and not stopped:
                    stopped = True
                    tqdm.write("asked to stop: the runs that go on save and end")
                    for process in running:
                        process.terminate()
                for process, (plan, slot, began) in list(running.items()):
                    status = process.poll()
                    if status is not None:
                        del running[process]
                        free.append(slot)
                        if stopped and gpus > 1 and status == 1:  # torchrun's, whatever its ranks end with
                            status = Interrupted.status
                        line = _note_end(plan, status, time.monotonic() - began)
                        tqdm.write(line)
                        failed += [line] if status != 0 and not stopped else []
                if not bar.disable:  # else nobody sees what is read here
                    going = sum(_epochs(plan) - _epochs_done(plan) for plan, *_ in running.values())
                    bar.n = total - sum(map(_epochs, waiting)) - going
                    bar.refresh()
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if stopped:
        left = sum(not finished(plan.folder) for plan in plans)
        raise Unfinished(
            f"stopped: {left} of {len(plans)} runs are not finished; the same command goes on", Interrupted.status
        )
    if failed:
        raise Unfinished("\n".join([f"{len(failed)} of {len(plans)} runs failed:", *failed]), 1)


def start(plan: Plan, slot: str, gpus: int) -> subprocess.Popen:
    """Start the process of a run. It gets no signal of the terminal, but those that this process passes on."""
    surroundings = {"CUDA_VISIBLE_DEVICES": slot} | ({} if slot else {"OMP_NUM_THREADS": "1"})
    with open(plan.folder / "output.txt", "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, *command(plan, gpus)], env={**os.environ, **surroundings},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def command(plan: Plan, gpus: int) -> list[str]:
    """The words that Python is started with."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    words = ["--config", str(plan.folder / "config.yaml"), "--seed", str(plan.seed), "--resume", "auto"]
    return [*launcher, str(_SCRIPT), *words]


def _note_end(plan: Plan, status: int, seconds: float) -> str:
    """Into the folder of the run; gives a line, and the last lines of a run that failed."""
    head = [] if _ends(plan.folder) else [("status", "seconds")]
    with open(plan.folder / "ended.csv", "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*head, (status, f"{seconds:.1f}")])
    if status in _WORDS:
        return f"{plan.arm}, seed {plan.seed}: {_WORDS[status]} {seconds:.0f} s"
    output = plan.folder / "output.txt"
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n    ".join([f"{plan.arm}, seed {plan.seed}: status {status}; {output} ends with", *lines[-_LAST_LINES:]])


def _epochs(plan: Plan) -> int:
    return plan.recipe["trainer"]["epochs"]


def _epochs_done(plan: Plan) -> int:
    """Those of all stages, but not all of them, while the run goes on."""
    rows = sum(max(0, path.read_bytes().count(b"\n") - 1) for path in plan.folder.glob("log/**/metrics.csv"))
    return min(rows, _epochs(plan) - 1)
