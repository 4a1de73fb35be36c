"""Optimisers, and learning rates as pure functions of the iteration (spec, Schedule and optimiser)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..models.deeplabv3plus import DeepLabV3Plus
from ..schema import Config, Optimizer, Scheduler


def poly_lr(base_lr: float, iteration: int, total_iterations: int, power: float = 0.9) -> float:
    """base·(1 − i/N)^power.

    Args:
        iteration: i, counted from 0.
        total_iterations: N of the whole training.
    """
    return base_lr * (1 - iteration / total_iterations) ** power


def cosine_lr(base_lr: float, iteration: int, total_iterations: int, target_lr: float = 0.0) -> float:
    """target + (base − target)·(1 + cos(πi/N)) / 2."""
    return target_lr + (base_lr - target_lr) * (1 + math.cos(math.pi * iteration / total_iterations)) / 2


def learning_rate(
    scheduler: Scheduler, base_lr: float, iteration: int, total_iterations: int, iterations_per_epoch: int
) -> float:
    """The rate in iteration i of a parameter group that starts at ``base_lr``; by milestones base·0.1^m with m of
    them (epochs, from 0) passed.
    """
    kwargs = scheduler.kwargs
    if scheduler.mode == "poly":
        return poly_lr(base_lr, iteration, total_iterations, kwargs.power)
    if scheduler.mode == "cosine":
        return cosine_lr(base_lr, iteration, total_iterations, kwargs.targetlr)
    epoch = iteration // iterations_per_epoch
    return base_lr * 0.1 ** sum(milestone <= epoch for milestone in kwargs.milestones)


def total_batch(config: Config, world: int) -> int:
    """Labeled images whose gradients make one update, over all processes."""
    return world * config.dataset.train.batch_size * config.trainer.accumulate


def lr_factor(config: Config, world: int) -> float:
    """The factor of every rate by ``trainer.scale_lr``: total batch / reference batch, else 1."""
    return total_batch(config, world) / config.trainer.reference_batch if config.trainer.scale_lr else 1.0


def explain_batch(config: Config, world: int) -> list[str]:
    """Differences from the batch that the recipe was made for, each with its remedy."""
    trainer, batch = config.trainer, config.dataset.train.batch_size
    total, reference, lines = total_batch(config, world), trainer.reference_batch, []
    if trainer.accumulate > 1:
        lines.append(
            f"an update accumulates {trainer.accumulate} batches: scores, CutMix, OHEM and BatchNorm still see {batch} "
            "labeled and as many unlabeled images of a process at a time"
        )
    if trainer.scale_lr:
        lines.append(f"learning rates times {lr_factor(config, world):g} (trainer.scale_lr)")
    if reference is not None and total != reference:
        made_of = f"{world} process(es) × {batch} × accumulate {trainer.accumulate}"
        line = f"total batch {total} ({made_of}), but this recipe is for {reference}. Results will differ."
        times, rest = divmod(reference, world * batch)
        if times > 1 and rest == 0:
            line += f" trainer.accumulate={times} makes up for it, except in BatchNorm and the scores."
        if not trainer.scale_lr:
            line += f" trainer.scale_lr=true multiplies the learning rates by {total / reference:g}."
        lines.append(line)
    return lines


AVERAGES = {"SGD": 1, "adam": 2}  # running averages that an optimiser keeps of every trained parameter


def param_groups(networks: Mapping[str, DeepLabV3Plus], decay: str = "all") -> list[dict]:
    """The parameters of ``Method.trained()``: for each network a group of the encoder and one of the heads.

    The groups of a network that is alone are named ``encoder`` and ``heads``, those of several ``NETWORK.encoder`` and
    ``NETWORK.heads``; ``part`` is the name without the network's.

    Args:
        decay: ``all``, or ``convolutions``: BatchNorm's parameters and biases then form groups of their own, named
            ``encoder.undecayed`` and so on, without weight decay.
    """
    groups = []
    for name, network in networks.items():
        heads = [weight for key, weight in network.named_parameters() if not key.startswith("encoder.")]
        for part, weights in (("encoder", [*network.encoder.parameters()]), ("heads", heads)):
            title = f"{name}.{part}" if len(networks) > 1 else part
            decayed = [weight for weight in weights if decay == "all" or weight.ndim == 4]
            groups.append({"name": title, "part": part, "params": decayed})
            if decay == "convolutions":
                rest = [weight for weight in weights if weight.ndim != 4]
                groups.append({"name": f"{title}.undecayed", "part": part, "params": rest, "weight_decay": 0.0})
    return groups


def build_optimizer(groups: list[dict], options: Optimizer, factor: float = 1.0) -> torch.optim.Optimizer:
    """SGD or Adam over the groups of ``param_groups``: the encoders at lr, the heads at lr·head_lr_times, both times
    ``factor``.
    """
    kwargs = options.kwargs
    for group in groups:
        times = 1.0 if group["part"] == "encoder" else options.head_lr_times
        group["base_lr"] = group["lr"] = kwargs.lr * times * factor
    if options.type == "adam":
        return torch.optim.Adam(groups, weight_decay=kwargs.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=kwargs.momentum, weight_decay=kwargs.weight_decay, fused=True)
    if kwargs.momentum > 0:  # as the first update would; but one that fp16 skips would leave it uninitialised
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
