"""What a killed run loses: nothing. On the embedded set, on one process and on two.

    python -m benchmarks.survive                     # 30 kills, then 200 epochs of a tiny run: about 15 minutes
    python -m benchmarks.survive --kills 3 --epochs 0

Runs are killed at random moments, -9 and TERM mixed, started again each time, and at the end compared with a run that
was left alone: weights bitwise, CSV files to the letter. After every kill the checkpoints are read. Then memory and
open files of a longer run are watched, to see that they stay flat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from imas.engine import checkpoint
from imas.errors import UserError

ROOT = Path(__file__).parents[1]
BASE = ROOT / "exps" / "shapes_imas" / "config.yaml"
SHORT = {
    "dataset.train.epoch_size": 320,
    "dataset.shapes.val": 40,
    "trainer.epochs": 10,
    "imas.sup_only_epoch": 1,
    "trainer.eval_every": 2,
    "saver.save_every": 0.02,
}
TINY = {
    "dataset.shapes.size": 32,
    "dataset.shapes.val": 8,
    "dataset.val.crop.size": 48,
    "dataset.workers": 1,
    "imas.sup_only_epoch": 1,
}


def launch(folder: Path, processes: int, settings: dict) -> subprocess.Popen:
    """Start, or go on with, the run of a folder, in a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").is_file():
        shutil.copy(BASE, folder / "config.yaml")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train_semi.py")]
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [*command, "--config", str(folder / "config.yaml"), "--resume", "auto", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Wait for a run that is left alone."""
    if process.wait():
        raise RuntimeError(f"{folder / 'output.txt'} tells what went wrong")


def torn(folder: Path) -> int:
    """Checkpoints that cannot be read."""
    count = 0
    for path in (folder / "checkpoints").glob("*.pth"):
        try:
            checkpoint.read(path)
        except UserError:
            count += 1
    return count


def killed_run(
    folder: Path, processes: int, kills: int, settings: dict, rng: random.Random, longest: float = 8.0
) -> dict[str, int]:
    """Start, kill, start again; at last let it end. Gives kills of each kind, torn files, and kills within training.

    Two kills of three come within training, however long the start takes.

    Args:
        longest: seconds until a kill, for each process: from the start, or from the first line of the log on.
    """
    log = folder / "log" / "train.log"
    counts = {"SIGKILL": 0, "SIGTERM": 0, "torn": 0, "in training": 0}
    for number in range(kills):
        size = log.stat().st_size if log.is_file() else 0
        process = launch(folder, processes, settings)
        while number % 3 and process.poll() is None and (not log.is_file() or log.stat().st_size == size):
            time.sleep(0.02)
        way = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        try:
            process.wait(rng.uniform(0, longest * processes))
        except subprocess.TimeoutExpired:
            began = log.is_file() and log.stat().st_size > size
            if way == signal.SIGKILL:
                os.killpg(process.pid, way)
            else:
                process.terminate()
            process.wait()
            counts[way.name] += 1
            counts["in training"] += began
            counts["torn"] += torn(folder)
        else:
            finish(process, folder)
            break
    finish(launch(folder, processes, settings), folder)
    return counts


def differing(one: Path, two: Path) -> tuple[int, int, list[str]]:
    """Tensors of the last checkpoints in all, and those that differ; CSV files that differ."""
    states = [checkpoint.read(folder / "checkpoints" / checkpoint.LAST) for folder in (one, two)]
    tensors = [
        {f"{key}/{name}": tensor for key in ("model_state", "teacher_state") for name, tensor in state[key].items()}
        for state in states
    ]
    different = sum(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    names = ("metrics.csv", "scores.csv")
    files = [name for name in names if (one / "log" / name).read_text() != (two / "log" / name).read_text()]
    return len(tensors[0]), different, files


def watched_run(folder: Path, epochs: int) -> list[tuple[float, int]]:
    """Host memory (MiB) and open files of a run's process, sampled over its epochs."""
    process = launch(folder, 1, {**TINY, "trainer.epochs": epochs, "trainer.eval_every": 10})
    samples = []
    while process.poll() is None:
        time.sleep(1)
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except (OSError, IndexError):
            continue
        if (folder / "log" / "metrics.csv").is_file():
            samples.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files))
    finish(process, folder)
    return samples


def main() -> None:
    """Print what was killed, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="in all, half of them on two processes")
    parser.add_argument("--epochs", type=int, default=200, help="of the run that is watched; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "survive")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    shutil.rmtree(options.out, ignore_errors=True)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    figures: dict[str, dict] = {}
    for processes in (1, 2):
        kills = options.kills - options.kills // 2 if processes == 1 else options.kills // 2
        straight, killed = options.out / f"straight{processes}", options.out / f"killed{processes}"
        finish(launch(straight, processes, SHORT), straight)
        counts = killed_run(killed, processes, kills, SHORT, rng)
        total, different, files = differing(straight, killed)
        figures[f"{processes} processes"] = counts | {"tensors": total, "differing": different, "CSV files": files}
        print(
            f"{processes} process(es): killed {counts['SIGKILL']} times by -9 and {counts['SIGTERM']} by TERM, "
            f"{counts['in training']} of them after training had begun; {counts['torn']} torn files; of {total} "
            f"tensors {different} differ from a run that was left alone; CSV files that differ: {files or 'none'}"
        )
    if options.epochs:
        samples = watched_run(options.out / "long", options.epochs)
        tail = samples[len(samples) // 5 :]
        first, last = tail[: max(1, len(tail) // 5)], tail[-max(1, len(tail) // 5) :]
        means = [sum(memory for memory, _ in part) / len(part) for part in (first, last)]
        opened = [max(files for _, files in part) for part in (first, last)]
        figures["long"] = {"epochs": options.epochs, "MiB": means, "open files": opened}
        print(
            f"{options.epochs} epochs: host memory {means[0]:.0f} MiB early, {means[1]:.0f} MiB late; open files at "
            f"most {opened[0]} early, {opened[1]} late"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
