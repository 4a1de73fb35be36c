"""Optimisers, and learning rates as pure functions of the iteration (spec, Schedule and optimiser)."""

from __future__ import annotations

import math

import torch

from ..config import Optimizer, Scheduler


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


def milestone_lr(base_lr: float, epoch: int, milestones: tuple[int, ...]) -> float:
    """base·0.1^m with m the milestones (epochs, from 0) that have come."""
    return base_lr * 0.1 ** sum(milestone <= epoch for milestone in milestones)


def learning_rate(
    scheduler: Scheduler, base_lr: float, iteration: int, total_iterations: int, iterations_per_epoch: int
) -> float:
    """The rate in iteration i of a parameter group that starts at ``base_lr``."""
    kwargs = scheduler.kwargs
    if scheduler.mode == "poly":
        return poly_lr(base_lr, iteration, total_iterations, kwargs.power)
    if scheduler.mode == "cosine":
        return cosine_lr(base_lr, iteration, total_iterations, kwargs.targetlr)
    return milestone_lr(base_lr, iteration // iterations_per_epoch, kwargs.milestones)


def build_optimizer(groups: list[dict], options: Optimizer) -> torch.optim.Optimizer:
    """SGD or Adam over the groups of ``Method.param_groups``: the encoder at lr, the heads at lr·head_lr_times."""
    kwargs = options.kwargs
    for group in groups:
        times = 1.0 if group["name"] == "encoder" else options.head_lr_times
        group["base_lr"] = group["lr"] = kwargs.lr * times
    if options.type == "adam":
        return torch.optim.Adam(groups, weight_decay=kwargs.weight_decay)
    return torch.optim.SGD(groups, momentum=kwargs.momentum, weight_decay=kwargs.weight_decay)
