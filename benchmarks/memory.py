"""Peak memory of a process in a training step of a recipe, on random images; on a GPU its time, too.

    python -m benchmarks.memory exps/pascal_psmt/config.yaml --set dataset.train.crop.size=257

On a CPU it is the process's own peak, on a GPU the memory allocated there. Times are from the end of a step to that of
the next. Neither data nor weights are read. The step of a staged method is that of its main stage.
"""

from __future__ import annotations

import argparse
import statistics
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
    """Two steps, since the first one makes the momentum; on a GPU ten more, which are timed."""
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
        ends = []
        with precision.tuned_kernels():
            for i in range(12 if device.type == "cuda" else 2):
                progress = Progress(last, config.trainer.epochs, last * 100 + i, 100, torch.Generator().manual_seed(i))
                optimizer.zero_grad(set_to_none=True)
                with precision.autocast(config.trainer, device):
                    step = method(labeled, unlabeled if method.needs_unlabeled(last) else None, progress)
                step.loss.backward()
                optimizer.step()
                method.after_step(progress)
                if device.type == "cuda":
                    ends.append(torch.cuda.Event(enable_timing=True))
                    ends[-1].record()
        took = ""
        if ends:
            ends[-1].synchronize()
            times = [before.elapsed_time(end) for before, end in zip(ends[1:], ends[2:])]
            took = f", {statistics.median(times):.0f} ({min(times):.0f}..{max(times):.0f}) ms a step"
        peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()) / 2**20
    print(f"{config.method}: {peak:,.0f} MiB on {device}, batch {batch} + {batch} of {height}×{width}{took}")


if __name__ == "__main__":
    main()
