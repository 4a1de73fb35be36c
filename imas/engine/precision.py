"""Computation of a training step: number format, memory layout, compilation, recomputation (section ``trainer``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UserError
from ..methods.base import Method
from ..models.deeplabv3plus import PARTS
from ..schema import Trainer


def prepare(method: Method, trainer: Trainer, device: torch.device) -> None:
    """Set up a method's networks, in place; names and shapes of their tensors stay.

    Raises:
        UserError: ``compile`` where nothing can be compiled.
    """
    if trainer.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        except Exception as error:  # whatever a missing compiler makes of itself
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"trainer.compile: torch.compile does not work here ({reason}); set it to false") from None
    for network in method.networks().values():
        prepare_network(network, trainer)
        network.encoder.recompute = trainer.checkpoint_encoder
        if trainer.compile:
            for part in PARTS:
                setattr(network, part, torch.compile(getattr(network, part)))


def prepare_network(network: nn.Module, trainer: Trainer) -> None:
    """Memory layout and TF32 alone: as networks are evaluated, in training and by ``eval.py``."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = trainer.tf32
    if trainer.channels_last:
        network.to(memory_format=torch.channels_last)


def autocast(trainer: Trainer, device: torch.device) -> torch.autocast:
    """The context of a forward pass. Logits leave the networks in float32, so that scores and losses are float32."""
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, formats.get(trainer.amp), enabled=trainer.amp is not None)


def make_scaler(trainer: Trainer, device: torch.device) -> torch.amp.GradScaler:
    """Keeps small float16 gradients from vanishing, and skips updates of infinite ones; idle without fp16."""
    return torch.amp.GradScaler(device.type, enabled=trainer.amp == "fp16")


@contextmanager
def tuned_kernels() -> Iterator[None]:
    """Let cuDNN time its kernels, once for each size: for training steps, whose sizes are few; not where runs are to
    repeat bitwise.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False
