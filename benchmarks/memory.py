"""Peak memory of a process in one training step of a recipe, on random images.

    python -m benchmarks.memory exps/pascal_psmt/config.yaml --set dataset.train.crop.size=257

On a CPU it is the process's own peak, on a GPU the memory allocated there. Neither data nor weights are read.
The step of a staged method is that of its main stage.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from imas import distributed
from imas.build import build_method
from imas.config import load_config
from imas.engine import precision
from imas.engine.optim import build_optimizer, param_groups
from imas.methods.base import Labeled, Progress, Unlabeled

from .figures import resident_peak


def main() -> None:
    """Two steps, since the first one makes the momentum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    with distributed.process_group() as device:
        method = build_method(config, pretrained=False).to(device).train()
        precision.prepare(method, config.trainer, device)
        kwargs = config.trainer.optimizer.kwargs
        optimizer = build_optimizer(param_groups(method.trained(), kwargs.decay), config.trainer.optimizer)
        batch, (height, width) = config.dataset.train.batch_size, config.dataset.train.crop.size

        def images(count: int) -> tuple[torch.Tensor, ...]:
            return tuple(torch.randn(batch, 3, height, width, device=device) for _ in range(count))

        label = torch.randint(0, config.net.num_classes, (batch, height, width), device=device)
        labeled = Labeled(*images(1), label, images(config.wants.labeled_strong))
        valid, index = torch.ones_like(label, dtype=torch.bool), torch.arange(batch, device=device)
        pseudo = label if config.wants.pseudo_label else None
        unlabeled = Unlabeled(*images(1), images(config.wants.strong), valid, index, pseudo)
        last = config.trainer.epochs - 1  # after any warm-up
        for i in range(2):
            progress = Progress(last, config.trainer.epochs, last * 100 + i, 100, torch.Generator().manual_seed(i))
            optimizer.zero_grad(set_to_none=True)
            with precision.autocast(config.trainer, device):
                step = method(labeled, unlabeled if method.needs_unlabeled(last) else None, progress)
            step.loss.backward()
            optimizer.step()
            method.after_step(progress)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else resident_peak() / 2**20
    print(f"{config.method}: {peak:,.0f} MiB on {device}, batch {batch} + {batch} of {height}×{width}")


if __name__ == "__main__":
    main()
