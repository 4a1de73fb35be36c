"""Processes and devices: quietly rank 0 of 1 where no launcher has started several."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

log = logging.getLogger("imas")


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, if it did; gives this process's device.

    NCCL on CUDA, gloo on the CPU. The device follows LOCAL_RANK.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 without a process group. Before the group stands, the launcher's word counts."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process logs and saves."""
    return rank() == 0


def wrap(module: nn.Module, device: torch.device, sync_bn: bool) -> nn.Module:
    """The module in DistributedDataParallel where there are several processes, else as it is.

    ``sync_bn`` needs several CUDA processes, too; elsewhere BatchNorm stays plain.
    """
    if sync_bn and (world_size() == 1 or device.type != "cuda"):
        log.info("net.sync_bn: plain BatchNorm, since it needs several CUDA processes")
    if world_size() == 1:
        return module
    if sync_bn and device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return nn.parallel.DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def gradients_shared(wrapped: nn.Module, share: bool) -> AbstractContextManager:
    """Whether a backward pass inside shares its gradients with the other ranks; accumulation shares the last alone."""
    if share or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def same_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, whose networks are saved: BatchNorm statistics differ between ranks."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
