"""What unlabeled images are worth on the embedded set.

    python -m benchmarks.shapes                      # learning rates on search seeds, then the table on fresh ones
    python -m benchmarks.shapes --seeds 7 8 9 10     # other fresh seeds
    python -m benchmarks.shapes --labeled 16 --way trainer.amp=bf16     # more labels; iMAS with this option too

Every figure is a run of ``train_semi.py`` on one thread (so that it can be repeated), on its own draw of the data.
All arms train the same network for the same number of iterations. Each SupOnly arm uses its own best learning rate
of ``RATES``, found on the search seeds; iMAS and the control use that of ``exps/shapes_imas``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from imas.config import load_config
from imas.data.lists import read_lists

ROOT = Path(__file__).parents[1]
IMAS, SUP = ROOT / "exps/shapes_imas/config.yaml", ROOT / "exps/shapes_sup/config.yaml"
RATES = (0.1, 0.2, 0.4)


def run(folder: Path, base: Path, seed: int, overrides: list[str]) -> dict[str, float]:
    """Train one arm in ``folder``, or read the figures that an earlier call has left there.

    Returns:
        mIoU in percent of the last epoch, by network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    shutil.copy(base, config)
    words = [f"dataset.shapes.seed={seed}", "saver.use_tb=false", *overrides]
    command = [sys.executable, str(ROOT / "train_semi.py"), "--config", str(config), "--seed", str(seed)]
    command += [argument for word in words for argument in ("--set", word)]
    with open(folder / "output.txt", "w") as output:
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output, check=True
        )
    with open(folder / "log" / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    names = {"student": "miou_stu", "teacher": "miou_tea"}
    return {name: float(last[column]) for name, column in names.items() if last[column]}


def arms(out: Path, labeled: int | None, ways: list[str]) -> dict[str, tuple[Path, list[str]]]:
    """Name → YAML and what differs from it, learning rates left out.

    Args:
        labeled: number of labeled images; None: that of the YAML.
        ways: options of iMAS, an arm each.
    """
    count = [] if labeled is None else [f"dataset.shapes.labeled={labeled}"]
    config = load_config(IMAS, count)
    shapes = config.dataset.shapes
    listed = out / "control.txt"
    listed.write_text("\n".join(read_lists(config).labeled) + "\n")
    size = config.dataset.train.epoch_size or shapes.unlabeled
    return {
        "SupOnly": (SUP, count),
        "SupOnly + strong views": (
            SUP,
            [*count, "dataset.train.strong_aug={num_augs: 2}", "sup_only.strong_views=true"],
        ),
        "control: iMAS without new images": (
            IMAS,
            [*count, f"dataset.train.unlabeled_list={listed}", f"dataset.train.epoch_size={size}"],
        ),
        "iMAS": (IMAS, count),
        "ceiling: SupOnly, all labels": (SUP, [f"dataset.shapes.labeled={shapes.labeled + shapes.unlabeled}"]),
    } | {f"iMAS, {words}": (IMAS, [*count, *words.split()]) for words in ways}


def best_rates(
    compared: dict[str, tuple[Path, list[str]]], out: Path, seeds: list[int], pool: ThreadPoolExecutor
) -> dict[str, float]:
    """Best learning rate of every SupOnly arm, by the mean student mIoU over the search seeds."""
    chosen = {}
    for arm, (base, overrides) in compared.items():
        if base != SUP:
            continue
        jobs = {
            (rate, seed): pool.submit(
                run,
                out / f"search {arm} {rate} {seed}",
                base,
                seed,
                [*overrides, f"trainer.optimizer.kwargs.lr={rate}"],
            )
            for rate in RATES
            for seed in seeds
        }
        means = {rate: statistics.mean(jobs[rate, seed].result()["student"] for seed in seeds) for rate in RATES}
        chosen[arm] = max(means, key=means.get)
        print(f"{arm}: " + ", ".join(f"lr {rate}: {mean:.1f}" for rate, mean in means.items()), flush=True)
    return chosen


def summary(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Search, train, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103], help="fresh seeds, at least two")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[1, 2], help="seeds for the learning rates")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/shapes"), help="folder of the runs")
    parser.add_argument("--labeled", type=int, help="labeled images; default: as in the YAML")
    parser.add_argument("--way", action="append", default=[], help="options of one more iMAS arm")
    options = parser.parse_args()
    if options.labeled is not None:  # an arm's folder keeps the figures of one number of labels
        options.out /= f"{options.labeled} labels"
    options.out.mkdir(parents=True, exist_ok=True)
    compared = arms(options.out, options.labeled, options.way)
    with ThreadPoolExecutor(options.jobs) as pool:
        rates = best_rates(compared, options.out, options.search_seeds, pool)
        jobs = {}
        for arm, (base, overrides) in compared.items():
            rate = [f"trainer.optimizer.kwargs.lr={rates[arm]}"] if arm in rates else []
            for seed in options.seeds:
                folder = options.out / f"{arm.split(':')[0]} {seed}"
                jobs[arm, seed] = pool.submit(run, folder, base, seed, overrides + rate)
        results = {key: job.result() for key, job in jobs.items()}

    print(f"\n{date.today()}, {platform.processor() or platform.machine()}, one thread a run, seeds {options.seeds}")
    print("mIoU in percent after the last epoch, mean ± standard deviation over seeds\n")
    print("| arm | lr | student | teacher | the last of these by seed |\n|---|---|---|---|---|")
    selected = {arm: [list(results[arm, seed].values())[-1] for seed in options.seeds] for arm in compared}
    table = {}
    for arm in compared:
        runs = [results[arm, seed] for seed in options.seeds]
        cells = [summary([one[name] for one in runs]) if name in runs[0] else "" for name in ("student", "teacher")]
        rate = rates.get(arm, load_config(IMAS).trainer.optimizer.kwargs.lr)
        print(f"| {arm} | {rate} | {cells[0]} | {cells[1]} | {', '.join(f'{each:.1f}' for each in selected[arm])} |")
        table[arm] = {"lr": rate, "runs": {str(seed): results[arm, seed] for seed in options.seeds}}
    for other in compared:
        if other not in ("iMAS", "ceiling: SupOnly, all labels"):
            gains = [ours - theirs for ours, theirs in zip(selected["iMAS"], selected[other])]
            print(f"iMAS (teacher) minus {other}: {summary(gains)}")
    (options.out / "results.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
