"""What unlabeled images are worth on the embedded set: ``python -m imas.compare`` with the controls that this takes.

    python -m benchmarks.shapes                              # the table of docs/results.md
    python -m benchmarks.shapes --seeds 7 8 9 10 --jobs 4    # all words but --configs and --arm are of imas.compare
    python -m benchmarks.shapes --set dataset.shapes.labeled=12 --out runs/shapes_12

Every run has its own draw of the data, and all arms train the same network on one thread. The control does all that
iMAS does without a new image: its unlabeled images are the labeled ones. The rates of the YAML files were found with
``python -m imas.compare`` and an ``--arm`` for each rate, on search seeds that no table has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from imas.compare.__main__ import main as compare
from imas.compare.__main__ import parse
from imas.config import load_config
from imas.data.lists import read_lists
from imas.errors import run_script

ROOT = Path(__file__).parents[1]
IMAS, SUP = (str(ROOT / "exps" / name / "config.yaml") for name in ("shapes_imas", "shapes_sup"))
STRONG = ["dataset.train.strong_aug={num_augs: 2}", "sup_only.strong_views=true"]
DEFAULTS = ["--seeds", "101", "102", "103", "104", "105", "106"]
DEFAULTS += ["--out", "runs/benchmark_shapes", "--baseline", "control", "--set", "dataset.shapes.seed={seed}"]


def main(words: Sequence[str]) -> None:
    """Write the list of the control, and compare. Of a word that is given twice the last one counts."""
    words = [*DEFAULTS, *words]
    options = parse(words)
    config = load_config(IMAS, [word for word in options.set if "{seed}" not in word])
    shapes, listed = config.dataset.shapes, options.out / "control.txt"
    options.out.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(read_lists(config).labeled) + "\n")
    size = config.dataset.train.epoch_size or shapes.unlabeled
    arms = {
        "SupOnly": [SUP],
        "SupOnly, strong views": [SUP, *STRONG],
        "control": [IMAS, f"dataset.train.unlabeled_list={listed}", f"dataset.train.epoch_size={size}"],
        "iMAS": [IMAS],
        "ceiling": [SUP, f"dataset.shapes.labeled={shapes.labeled + shapes.unlabeled}"],
    }
    for name, arm in arms.items():
        words += ["--arm", name, *arm]
    compare([*words, "--mixed"])  # the ceiling has other labels


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
