"""Train methods with several seeds, and write one table that tells a method from the luck of a seed.

    python -m imas.compare --configs exps/shapes_sup/config.yaml exps/shapes_imas/config.yaml --seeds 1 2 3 \\
        --out runs/shapes --baseline shapes_sup
    python -m imas.compare --out runs/shapes --baseline shapes_sup --report-only

Every run is train_semi.py in OUT/NAME/seed_N/; NAME is the folder of the YAML, or that of --arm. Called again, it goes
on with what is not finished. The tables hold all runs in OUT: OUT/table.md, .csv, .json, .tex, and OUT/compare.html.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..distributed import refuse_unusable_cuda
from ..engine import lock
from ..errors import UserError, run_script
from ..methods import METHODS
from .page import write
from .runs import Unfinished, found_runs, make_plans, read_recipe, read_run, run_folder, train
from .table import Run, analyse, misfits


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m imas.compare", description=__doc__, formatter_class=form)
    parser.add_argument("--configs", nargs="+", default=[], type=Path, metavar="YAML", help="an arm each")
    arm = "a further arm: a YAML with other options, such as a control (may be repeated)"
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar="NAME YAML KEY=VALUE", help=arm)
    parser.add_argument("--seeds", nargs="+", default=[], type=int, metavar="N")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    override = "override a dotted key in all arms; {seed} in it is the seed (may be repeated)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=override)
    parser.add_argument("--baseline", metavar="NAME", help="arm, or method, that the others are compared with")
    parser.add_argument("--mixed", action="store_true", help="put side by side what does not belong together")
    jobs = "runs at a time (default: one for each set of GPUs; without a GPU one for each CPU core, of one thread)"
    parser.add_argument("--jobs", type=int, metavar="N", help=jobs)
    parser.add_argument("--gpus-per-run", type=int, metavar="N", help="default 1, if there is a GPU")
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the tables of what is there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything, train what is not finished, write the tables.

    Raises:
        UserError: bad options or configurations, before anything is trained; runs that cannot be compared; runs that
            failed or were stopped, after the tables are written.
    """
    options = parse(arguments)
    arms, out = _arms(options), options.out
    if any(seed < 0 for seed in options.seeds) or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: expected numbers from 0 on, each once")
    if not options.report_only and not (arms and options.seeds):
        raise UserError("nothing to train: name --configs or --arm, and --seeds (or --report-only)")
    slots = _slots(options)
    plans = make_plans(arms, options.seeds, options.set, out)
    planned = [(plan.arm, plan.seed) for plan in plans]
    there = dict.fromkeys([*planned, *found_runs(out)])
    names, seeds = list(dict.fromkeys(arm for arm, _ in there)), sorted({seed for _, seed in there})
    methods = {plan.arm: plan.recipe for plan in plans}
    methods |= {arm: read_recipe(run_folder(out, arm, seed)) for arm, seed in there if arm not in methods}
    baseline = _baseline(options.baseline, methods)
    identities = {(plan.arm, plan.seed): plan.identity for plan in plans}
    runs = _runs(out, there)
    identities |= {(run.arm, run.seed): run.identity for run in runs}
    problems = misfits(identities)
    if problems and not options.mixed:
        head = f"{out}: these runs do not belong side by side. Nothing was trained; --mixed compares them nevertheless"
        raise UserError("\n  ".join([head, *problems]))
    unfinished = None
    if not options.report_only:
        _lock = lock.hold(out)
        try:
            train(plans, slots, options.gpus_per_run or 1)
        except Unfinished as error:
            unfinished = error
        runs = _runs(out, there)
    if not runs and unfinished is None:
        raise UserError(f"{out}: no finished run there")
    if runs:
        result = analyse(runs, names, seeds, baseline)
        earlier = [f"{arm} {seed}" for arm, seed in there if plans and (arm, seed) not in planned]
        result["notes"] += [f"of earlier calls: {', '.join(earlier)}"] * bool(earlier)
        result["notes"] += [f"mixed: {line}" for line in problems]
        print(write(out, result, runs))
        print(f"tables: {out / 'table.md'}, .csv, .json, .tex; page: {out / 'compare.html'}")
    if unfinished is not None:
        raise unfinished


def _arms(options: argparse.Namespace) -> dict[str, tuple[Path, list[str]]]:
    """YAML and overrides of each arm."""
    arms: dict[str, tuple[Path, list[str]]] = {}
    given = [[path.resolve().parent.name, path] for path in options.configs] + options.arm
    for name, *rest in given:
        if not rest or "/" in name or not name.strip("."):
            raise UserError(f"--arm {' '.join([name, *rest])}: expected NAME YAML KEY=VALUE ..., NAME without a /")
        if name in arms:
            raise UserError(
                f"{name}: two arms of this name. That of --configs is the folder of the YAML; --arm names one"
            )
        arms[name] = Path(rest[0]), rest[1:]
    return arms


def _slots(options: argparse.Namespace) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each run that may go on at a time; empty for a run on the CPU."""
    jobs, gpus = options.jobs, options.gpus_per_run
    if min(jobs or 1, gpus or 1) < 1 or 0 in (jobs, gpus):
        raise UserError("--jobs and --gpus-per-run: expected a number from 1 on")
    count = torch.cuda.device_count()
    if count < (gpus or 0):
        raise UserError(f"--gpus-per-run {gpus}: there are {count} GPUs here. Without it a run takes one, or the CPU")
    if not count:
        refuse_unusable_cuda()  # the runs would not: they are told to use the CPU
        return [""] * (jobs or len(os.sched_getaffinity(0)))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",")[:count] if given else [str(i) for i in range(count)]
    sets = [",".join(names[i : i + (gpus or 1)]) for i in range(0, count - (gpus or 1) + 1, gpus or 1)]
    return [sets[i % len(sets)] for i in range(jobs or len(sets))]


def _baseline(name: str | None, recipes: dict[str, dict[str, Any]]) -> str | None:
    """The arm that is meant: its own name, or that of a method which one arm alone has."""
    if name is None or name in recipes:
        return name
    same = [arm for arm, recipe in recipes.items() if name in METHODS and name in recipe]
    if len(same) != 1:
        found = f"{name} is the method of {', '.join(same)}" if same else "no arm or method of this name"
        raise UserError(f"--baseline {name}: {found}; expected one of {', '.join(recipes)}")
    return same[0]


def _runs(out: Path, there: Iterable[tuple[str, int]]) -> list[Run]:
    runs = (read_run(run_folder(out, arm, seed), arm, seed) for arm, seed in there)
    return [run for run in runs if run is not None]


if __name__ == "__main__":
    run_script(main)
