"""``python -m imas``: versions, devices, and the commands that exist."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from . import __version__, distributed
from .engine.provenance import PACKAGES, git_commit

COMMANDS = {
    "sh single_run.sh": "train and evaluate on the embedded data set",
    "sh single_run.sh CONFIG": "train one experiment on all visible GPUs",
    "python train_semi.py --config CONFIG": "train; --check only looks",
    "python eval.py --checkpoint FILE": "evaluate a checkpoint; --images FOLDER --save-dir OUT predicts",
    "python -m imas.export CKPT OUT.pt2": "a trained network as a program that runs without this package",
    "python -m imas.report RUN": "a run, or several side by side, as one HTML page",
    "python -m imas.compare": "methods × seeds, and one table of them",
    "python -m imas.data check --config CONFIG": "what is wrong with the data",
    "python -m imas.data splits": "published split lists, or new ones",
    "python -m benchmarks.shapes": "what unlabeled images are worth; further ones in benchmarks/README.md",
    "sh tests/run.sh": "the test suite",
}


def main() -> None:
    """Print it."""
    print(f"iMAS {__version__}, commit {git_commit() or 'unknown'}")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    print(f"Python {platform.python_version()}, {cuda}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print("\n".join(distributed.devices()))
    width = max(map(len, COMMANDS))
    print("\ncommands, from the folder of this project; each but the shell scripts takes --help:")
    print("\n".join(f"  {command:{width}}  {purpose}" for command, purpose in COMMANDS.items()))


if __name__ == "__main__":
    main()
