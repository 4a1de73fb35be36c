"""What the published recipes cost on paper: FLOPs, hours on one GPU, bytes between GPUs. Nothing here is measured.

    python -m benchmarks.scale                        # the tables of benchmarks/README.md
    python -m benchmarks.scale --peak 989 --share 0.35

FLOPs are counted by ``torch.utils.flop_counter`` on the ``meta`` device, which computes nothing. Iterations follow from
the recipes in ``exps/`` and the sizes of the data sets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from imas.build import build_model
from imas.config import load_config
from imas.schema import Config, Net

EXPS = Path(__file__).parents[1] / "exps"
_IMAGES = {"pascal": 10582, "cityscapes": 2975}  # training images with published split lists
_GPUS = (1, 4, 8, 64)
_NODE = 8  # GPUs that NVLink joins
_NVLINK, _NETWORK = 300e9, 40e9  # bytes/s a GPU and direction, assumed: two thirds of NVLink 4, 80 % of 400 Gbit/s
_LATENCY = {True: 20e-6, False: 40e-6}  # seconds a small collective, within a node or not, assumed


def _model(net: Net) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(net, pretrained=False).train()


@lru_cache
def network_flops(net: Net, side: tuple[int, int], images: int, training: bool) -> int:
    """FLOPs of the network's pass over images, forward and backward if ``training``, else without auxiliary head."""
    model, inputs = _model(net), torch.empty(images, 3, *side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        logits, aux = model.coarse(inputs, aux=training)
        if training:
            (logits.sum() + (0 if aux is None else aux.sum())).backward()
    return counter.get_total_flops()


def step_flops(config: Config, mixed: bool = True) -> int:
    """FLOPs of one step of one process: the training pass over 4B views (3B without CutMix; B in SupOnly) and two weak
    predictions of B.
    """
    train = config.dataset.train
    if config.method == "sup_only":
        return network_flops(config.net, train.crop.size, train.batch_size, True)
    views = (4 if mixed else 3) * train.batch_size
    training = network_flops(config.net, train.crop.size, views, True)
    return training + 2 * network_flops(config.net, train.crop.size, train.batch_size, False)


def processes(config: Config) -> int:
    """GPUs that the recipe was published with."""
    return config.trainer.reference_batch // config.dataset.train.batch_size


def iterations(config: Config) -> int:
    """Updates of the whole training (spec, Schedule and optimiser; SupOnly)."""
    batch, world, labeled = config.dataset.train.batch_size, processes(config), config.dataset.n_sup
    if config.method == "imas":
        unlabeled = _IMAGES[config.dataset.type] - labeled
        return config.trainer.epochs * (math.ceil(unlabeled / world) // batch)
    share = math.ceil(labeled / world) / batch
    return config.trainer.epochs * (math.ceil(share) if config.dataset.type == "pascal" else math.floor(share))


def recipes() -> Iterator[tuple[str, Config]]:
    """Folder and configuration of every experiment on Pascal and Cityscapes."""
    for path in sorted(EXPS.glob("*/config.yaml")):
        config = load_config(path)
        if config.dataset.type in _IMAGES:
            yield path.parent.name, config


def print_hours(peak: float, share: float) -> None:
    """A line for each recipe."""
    print(f"Hours on one GPU at {100 * share:.0f} % of {peak / 1e12:.0f} TFLOP/s: computed, not measured\n")
    print("| recipe | iterations | images an iteration | TFLOP an iteration, with CutMix (without) | hours | ms |")
    print("|---|---|---|---|---|---|")
    for name, config in recipes():
        world = processes(config)
        most, least = (world * step_flops(config, mixed) for mixed in (True, False))
        images = world * config.dataset.train.batch_size * (2 if config.method == "imas" else 1)
        seconds = most / (peak * share)
        without = f" ({least / 1e12:.1f})" if config.method == "imas" else ""
        hours = iterations(config) * seconds / 3600
        print(
            f"| `{name}` | {iterations(config):,} | {images} | {most / 1e12:.1f}{without} | {hours:.1f} "
            f"| {1e3 * seconds:.0f} |"
        )


def print_traffic(peak: float, share: float) -> None:
    """What DDP and SyncBN move in a step, and how long that takes, for two networks."""
    print("\nBytes that each GPU sends in a step, and seconds under the assumptions: computed, not measured\n")
    print(
        "| network | GPUs | DDP, MB (gradients, ring all-reduce) | ms | SyncBN, MB | its collectives | ms "
        "| step, ms | traffic / step, nothing hidden |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for encoder in ("resnet50", "resnet101"):
        config = load_config(EXPS / "cityscapes_imas372_r50_os16/config.yaml", [f"net.encoder.type={encoder}"])
        model = _model(config.net)
        gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
        norms = [module.num_features for module in model.modules() if isinstance(module, _BatchNorm)]
        step = step_flops(config) / (peak * share)
        for gpus in _GPUS:
            within = gpus <= _NODE
            bandwidth = _NVLINK if within else _NETWORK
            ring = 2 * (gpus - 1) / gpus
            ddp = ring * gradients
            # forward: every rank gathers mean, inverse deviation and count of all; backward: two sums are all-reduced
            sync = 4 * ((gpus - 1) * sum(2 * channels + 1 for channels in norms) + ring * 2 * sum(norms))
            calls = 2 * len(norms) if gpus > 1 else 0
            waits = calls * _LATENCY[within] + sync / bandwidth
            traffic = ddp / bandwidth + waits
            print(
                f"| {encoder} | {gpus} | {ddp / 1e6:.0f} | {1e3 * ddp / bandwidth:.1f} | {sync / 1e6:.1f} | {calls} "
                f"| {1e3 * waits:.1f} | {1e3 * step:.0f} | {100 * traffic / step:.0f} % |"
            )
        channels = f"{len(norms)} BatchNorm layers, {sum(norms):,} channels"
        print(f"| | | {encoder}: {gradients / 1e6:.0f} MB of float32 gradients, {channels} | | | | | | |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989, help="the GPU's dense bf16 TFLOP/s (default 989: H200)")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that is reached, assumed (default 0.35)")
    options = parser.parse_args()
    print_hours(1e12 * options.peak, options.share)
    print_traffic(1e12 * options.peak, options.share)


if __name__ == "__main__":
    main()
