"""The picture at the top of the README: unlabeled images of the embedded set on their way through one training step.

python -m benchmarks.picture        # trains for a minute, then writes docs/overview.png
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from imas.build import build_method
from imas.config import load_config
from imas.data.catalog import catalog_of
from imas.data.dataset import Draw, stacked
from imas.data.lists import read_lists
from imas.data.loaders import TrainingData
from imas.data.normalise import Normalise
from imas.engine import checkpoint
from imas.engine.log import last_scores
from imas.engine.pictures import look_sheet
from imas.engine.run import to_device
from imas.methods.base import Progress

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "trainer.epochs=90",
    "imas.sup_only_epoch=50",
    "trainer.eval_every=90",
    "saver.use_tb=false",
    "saver.auto_resume=true",
)


def train(folder: Path, settings: tuple[str, ...] = SETTINGS) -> Path:
    """Train the shipped experiment in ``folder``, or take what an earlier call has left there. Returns the YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    shutil.copy(ROOT / "exps" / "shapes_imas" / "config.yaml", config)
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run([sys.executable, "train_semi.py", "--config", str(config), *words], cwd=ROOT, check=True)
    return config


def draw(path: Path, rows: int = 3) -> Image.Image:
    """The views of ``rows`` unlabeled images, from the hardest to the easiest of the run's last epoch.

    Args:
        path: the YAML of a run.
    """
    config = load_config(path)
    lists = read_lists(config)
    method = build_method(config).train()
    checkpoint.start_from(method.networks(), config.snapshot_dir / checkpoint.LAST)
    known = last_scores(config.log_dir)
    last = max(epoch for epoch, _ in known.values())
    scores = {name: score for name, (epoch, score) in known.items() if epoch == last}
    order = sorted(scores, key=scores.__getitem__)
    names = [order[number * (len(order) - 1) // (rows - 1)] for number in range(rows)]
    data = TrainingData(config, lists, 0, 0, 1)
    indices = {"labeled": range(rows), "unlabeled": [lists.unlabeled.index(name) for name in names]}
    sets = {"labeled": data.labeled.dataset, "unlabeled": data.unlabeled.dataset}
    batch = {part: stacked([sets[part][Draw(i, (0, i))] for i in chosen]) for part, chosen in indices.items()}
    normalise = Normalise(config.dataset.mean, config.dataset.std)
    progress = Progress(last, last + 1, len(data) * (last + 1) - 1, len(data), torch.Generator().manual_seed(0))
    with torch.no_grad():
        columns = method.look(*to_device(batch, normalise, torch.device("cpu")), progress)
    return look_sheet(columns, names, normalise, catalog_of(config.dataset))


def main() -> None:
    """Train, draw, write, in 256 colours, which a README loads quickly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks" / "out" / "picture", help="folder of the run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "overview.png")
    options = parser.parse_args()
    draw(train(options.runs)).quantize(256).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
