"""The runs of a comparison: planned and checked before any of them begins, trained as processes, read when finished."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from ..config import load_config
from ..data.lists import read_lists
from ..data.splits import digest
from ..engine import provenance
from ..engine.interrupt import interruptible
from ..errors import Together, UserError
from ..files import replacing
from ..report.records import NETWORK_NAMES, Curve, Record, read_records
from .table import Run

_SCRIPT = Path(__file__).parents[2] / "train_semi.py"
_RECIPE, _ENDED, _OUTPUT = "config.yaml", "ended.csv", "output.txt"  # in the folder of a run
_LAST_LINES = 6
_LISTED = ("labeled", "unlabeled")  # of a data set's own section: what the digests of the lists tell
_ASIDE = ("embedding", "sync_bn")  # of ``net``: what a method adds for training, and how it is carried out


class Plan(NamedTuple):
    """A run that is to be."""

    arm: str
    seed: int
    folder: Path
    recipe: dict[str, Any]
    identity: dict[str, Any]  # see ``Run``


class Unfinished(UserError):
    """Some runs have failed or were stopped."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def make_plans(
    arms: Mapping[str, tuple[Path, Sequence[str]]], seeds: Sequence[int], words: Sequence[str], out: Path
) -> list[Plan]:
    """Every arm with every seed, those of the first seed first.

    Args:
        arms: YAML and overrides, ``{seed}`` in which is the seed, by name.
        words: overrides of all arms, which come first.

    Raises:
        UserError: all mistakes of all configurations and lists; a folder with a run of another configuration.
    """
    together, plans = Together(), []
    failed: set[str] = set()  # arms, whose further seeds would bring the same mistakes
    for seed, (arm, (path, own)) in product(seeds, arms.items()):
        overrides = [word.replace("{seed}", str(seed)) for word in (*words, *own)]
        config = None if arm in failed else together(load_config, path, [*overrides, "saver.snapshot_dir=checkpoints"])
        lists = None if config is None else together(read_lists, config)
        if lists is None:
            failed.add(arm)
            continue
        described = {
            name: {"images": len(names), "sha256": digest(names)} for name, names in lists.by_name().items() if names
        }
        recipe, folder = config.to_dict(), run_folder(out, arm, seed)
        plan = Plan(arm, seed, folder, recipe, identity(recipe, described))
        together(_check_unchanged, plan)
        plans.append(plan)
    together.finish()
    return plans


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a run is."""
    return out / arm / f"seed_{seed}"


def found_runs(out: Path) -> Iterator[tuple[str, int]]:
    """Name and seed of each run, finished or not, in a folder."""
    for path in sorted(out.glob(f"*/seed_*/{_RECIPE}")):
        number = path.parent.name.removeprefix("seed_")
        if number.isdigit():
            yield path.parents[1].name, int(number)


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a run, finished or not."""
    return yaml.safe_load((folder / _RECIPE).read_text(encoding="utf-8"))


def _check_unchanged(plan: Plan) -> None:
    if not (plan.folder / "log").is_dir():
        return
    lines = provenance.changes(read_recipe(plan.folder), plan.recipe)
    lines = list(filter(provenance.steers, lines))
    run = read_run(plan.folder, plan.arm, plan.seed)
    if run is not None and not lines:
        before = run.identity
        lines = [f"{key}: {now}, and {before[key]} before" for key, now in plan.identity.items() if now != before[key]]
    if lines:
        head = f"{plan.folder}: a run of another configuration. Name another --out, or delete that folder"
        raise UserError("\n  ".join([head, *lines]))


def identity(recipe: dict[str, Any], lists: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What runs of one seed have to share, by dotted key.

    Args:
        recipe: ``Config.to_dict``.
        lists: number of images and digest by name.
    """
    dataset = recipe["dataset"]
    own = {key: value for key, value in (dataset.get(dataset["type"]) or {}).items() if key not in _LISTED}
    net = {key: value for key, value in recipe["net"].items() if key not in _ASIDE}
    names = {f"{name} list": shown_list(lists.get(name)) for name in ("labeled", "val")}
    window = recipe["dataset"]["val"]["crop"]["size"]
    sections = {"dataset.type": dataset["type"], f"dataset.{dataset['type']}": own, "net": net}
    return names | {"dataset.val.crop.size": window} | dict(_flat(sections))


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shown_list(entry: Mapping[str, Any] | None) -> str:
    """A list of images in short."""
    return "none" if entry is None else f"{entry['images']} images, sha256 {entry['sha256'][:12]}"


def _ends(folder: Path) -> list[dict[str, str]]:
    """How the processes of a run have ended: exit status and seconds."""
    path = folder / _ENDED
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def finished(folder: Path) -> bool:
    """Whether the last process of a run has ended well: then all stages are done."""
    return any(end["status"] == "0" for end in _ends(folder)[-1:])


def read_run(folder: Path, arm: str, seed: int) -> Run | None:
    """The figures of a finished run; None of any other. Of a run in stages they are those of the last stage, and the
    costs those of all stages.
    """
    if not finished(folder):
        return None
    (record,) = read_records([folder])
    stages = sorted(record.stages, key=lambda stage: stage.starts[-1]["started"])
    stages += [record] if record.epochs else []
    last, recipe = stages[-1], read_recipe(folder)
    start, protocol = last.starts[-1], dict(last.evaluation["protocol"])
    before = sum(map(_iterations, stages[:-1]))
    curves = {}
    for column, (epochs, values) in last.curves.items():
        kind, _, name = column.partition("_")
        if kind == "miou":
            iterations = [before + (epoch + 1) * start["iterations_per_epoch"] for epoch in epochs]
            curves[NETWORK_NAMES.get(name, name)] = Curve(iterations, values)
    networks = last.evaluation["networks"]  # the selecting one comes first
    times, peaks = (
        [value for stage in stages for value in stage.curves.get(column, Curve([], [])).values]
        for column in ("seconds", "memory_mib")
    )
    selecting = next(iter(networks))
    cost = {
        "iterations": before + _iterations(last),
        "hours": sum(float(end["seconds"]) for end in _ends(folder)) / 3600,
        "parameters": start["parameters"][selecting],
    }
    cost |= {"seconds": sum(times) / len(times), "memory_mib": max(peaks)} if times else {}
    packages = " ".join(f"{name} {number}" for name, number in start["packages"].items())
    lists = start["lists"]
    encoder = recipe["net"]["encoder"]
    facts = {
        "data": recipe["dataset"]["type"],
        **{f"{name} list": shown_list(lists.get(name)) for name in ("labeled", "unlabeled", "val")},
        "iterations": str(cost["iterations"]),
        "network": f"{encoder['type']} of width {encoder['kwargs']['width']}, {recipe['net']['decoder']['type']}",
        "batch": f"{start['total_batch']} labeled images on {start['processes']} process(es)",
        "evaluation": ", ".join(f"{key} {value}" for key, value in protocol.items() if key not in ("epoch", "images")),
        "versions": f"Python {start['python']} {packages}",
        "commit": str(start["git"]),
        "devices": ", ".join(dict.fromkeys(start["devices"])),
    }
    iou = networks[selecting]["iou"]
    ordered = {name: curves[name] for name in networks}
    return Run(arm, seed, ordered, iou, cost, facts, identity(recipe, lists))


def _iterations(stage: Record) -> int:
    return stage.epochs * stage.starts[-1]["iterations_per_epoch"]


def train(plans: Sequence[Plan], slots: Sequence[str], gpus_per_run: int) -> None:
    """Train what is not finished, each run in a process of its own (torchrun's, if it has several GPUs).

    Args:
        slots: value of CUDA_VISIBLE_DEVICES of each run that may go on at a time; empty: a CPU, of which a run gets one
            thread.

    Raises:
        Unfinished: runs failed, after all others; or this process was asked to stop, after every run has saved.
    """
    for plan in plans:
        plan.folder.mkdir(parents=True, exist_ok=True)
        with replacing(plan.folder / _RECIPE) as temporary:
            temporary.write_text(yaml.safe_dump(plan.recipe, sort_keys=False), encoding="utf-8")
    waiting = [plan for plan in plans if not finished(plan.folder)]
    free, failed, stopped = list(slots), [], False
    running: dict[subprocess.Popen, tuple[Plan, str, float]] = {}
    done = {plan.folder: _epochs_done(plan) for plan in plans}
    bar = tqdm(total=sum(map(_epochs, plans)), unit="epoch", dynamic_ncols=True, disable=None)
    with interruptible() as interruption, bar:
        try:
            while running or (waiting and not stopped):
                while waiting and free and not stopped:
                    plan, slot = waiting.pop(0), free.pop(0)
                    running[start(plan, slot, gpus_per_run)] = plan, slot, time.monotonic()
                time.sleep(0.2)
                if interruption.received is not None and not stopped:
                    stopped = True
                    tqdm.write("asked to stop: the runs that go on save and end")
                    for process in running:
                        process.terminate()
                for process, (plan, slot, began) in list(running.items()):
                    if process.poll() is not None:
                        del running[process]
                        free.append(slot)
                        told = _note_end(plan, process.returncode, time.monotonic() - began)
                        tqdm.write(told)
                        failed += [told] if process.returncode != 0 and not stopped else []
                    done[plan.folder] = _epochs_done(plan)
                bar.n = sum(done.values())
                bar.refresh()
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if stopped:
        left = sum(not finished(plan.folder) for plan in plans)
        raise Unfinished(f"stopped: {left} of {len(plans)} runs are not finished; the same command goes on", 75)
    if failed:
        raise Unfinished("\n".join([f"{len(failed)} of {len(plans)} runs failed:", *failed]), 1)


def start(plan: Plan, slot: str, gpus: int) -> subprocess.Popen:
    """Start the process of a run. It gets no signal of the terminal, but those that this process passes on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    words = ["--config", str(plan.folder / _RECIPE), "--seed", str(plan.seed), "--resume", "auto"]
    surroundings = {"CUDA_VISIBLE_DEVICES": slot} if slot else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(plan.folder / _OUTPUT, "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, str(_SCRIPT), *words], env={**os.environ, **surroundings},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def _note_end(plan: Plan, status: int, seconds: float) -> str:
    """Into the folder of the run; gives a line, with the last lines of a run that failed."""
    path = plan.folder / _ENDED
    new = not path.is_file()
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*([("status", "seconds")] if new else ()), (status, f"{seconds:.1f}")])
    told = f"{plan.arm}, seed {plan.seed}: " + (f"finished in {seconds:.0f} s" if status == 0 else f"status {status}")
    if status in (0, 75):
        return told
    output = plan.folder / _OUTPUT
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n    ".join([f"{told}; the last lines of {output}:", *lines[-_LAST_LINES:]])


def _epochs(plan: Plan) -> int:
    return plan.recipe["trainer"]["epochs"]


def _epochs_done(plan: Plan) -> int:
    """Epochs of all stages, of a run that is not finished at most one less than all."""
    if finished(plan.folder):
        return _epochs(plan)
    logs = plan.folder.glob("log/**/metrics.csv")
    rows = sum(max(0, path.read_bytes().count(b"\n") - 1) for path in logs)
    return min(rows, _epochs(plan) - 1)
