"""How much memory a training step needs, estimated from a small one on the CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..methods.base import Batch, Method, Progress
from ..schema import Config
from .optim import AVERAGES

_SIDE, _BATCH = 129, 2  # of the small step


class StepMemory(NamedTuple):
    """Bytes that a training step of one process holds."""

    weights: int  # parameters and buffers of all networks
    gradients: int
    optimizer: int
    activations: int  # what the forward pass saves for the backward pass

    @property
    def total(self) -> int:
        return sum(self)


def estimate_step(config: Config, build: Callable[[Config], Method]) -> StepMemory:
    """Memory of one float32 training step, from a step with random images on the CPU.

    Activations are counted exactly in the small step (what autograd saves, once each) and scaled by the number of
    pixels; the largest step counts, in which CutMix fires. Left out: workspaces of cuDNN, gradients of activations and
    what the allocator does not give back, which take some more on CUDA.

    Args:
        build: makes the method of a configuration.
    """
    method = build(_largest(config)).train()
    train, unsupervised = config.dataset.train, config.trainer.unsupervised
    height, width = train.crop.size if train.crop is not None else (config.dataset.shapes.size,) * 2
    small = (_BATCH, min(height, _SIDE), min(width, _SIDE))

    def images() -> Tensor:
        return torch.randn(small).unsqueeze(1).repeat(1, 3, 1, 1)

    labels = torch.randint(0, config.net.num_classes, small)
    strong = train.strong_aug
    tensors = Batch(images(), labels, images_strong=images() if strong is not None and strong.labeled else None)
    if unsupervised is not None:
        tensors = tensors._replace(
            weak=images(), strong=None if strong is None else images(), index=torch.arange(_BATCH)
        )
    epoch = config.trainer.sup_only_epoch
    saved = saved_bytes(method, tensors, Progress(epoch, epoch, 1, torch.Generator().manual_seed(0)))

    trainable = _bytes([parameter for parameter in method.parameters() if parameter.requires_grad])
    averages = AVERAGES[config.trainer.optimizer.type]
    scale = train.batch_size * height * width / math.prod(small)
    weights = _bytes([*method.parameters(), *method.buffers()])
    return StepMemory(weights, trainable, averages * trainable, int(saved * scale))


def saved_bytes(method: Method, batch: Batch, progress: Progress) -> int:
    """Bytes that one forward pass saves for the backward pass, weights left out, each storage once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in method.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method(batch, progress)
    return sum(sizes.values())


def _largest(config: Config) -> Config:
    """The configuration with a CutMix that always fires."""
    train, trainer = config.dataset.train, config.trainer
    if trainer.unsupervised is None:
        return config
    if train.hardness_aware is not None:
        hardness = dataclasses.replace(train.hardness_aware, trigger_cutmix=False)
        dataset = dataclasses.replace(config.dataset, train=dataclasses.replace(train, hardness_aware=hardness))
        config = dataclasses.replace(config, dataset=dataset)
    unsupervised = dataclasses.replace(trainer.unsupervised, use_cutmix_trigger_prob=1.0)
    return dataclasses.replace(config, trainer=dataclasses.replace(trainer, unsupervised=unsupervised))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
