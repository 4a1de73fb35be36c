"""What ``test_fake_device`` runs: whole training steps on a device that is not there, in a process of its own.

Tensors have shapes and a device but no numbers, so that devices, waits and copies are seen, and values are not.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from first_step import progress
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from imas import distributed
from imas.build import build_method
from imas.config import load_config
from imas.data.normalise import Normalise
from imas.engine import precision
from imas.engine.optim import build_optimizer, param_groups
from imas.engine.run import to_device
from imas.methods.base import Method
from imas.methods.u2pl import U2PL
from imas.models.sync_bn import synchronise
from imas.schema import Wants

_setup_privateuseone_for_python_backend("gpu")  # for the rest of the process
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # which torch.autocast(enabled=False) asks for
CPUGenerator = torch.Generator
torch.Generator = lambda device="cpu": CPUGenerator()  # that of the device would need its random numbers
GPU, SIDE = torch.device("gpu", 0), 65

# U2PL draws on the device, whose generator is not there.
U2PL.draw = lambda self, count, shape, generator: torch.zeros(shape, dtype=torch.int64, device=GPU)
U2PL.choose = lambda self, count, cap, generator: torch.zeros(min(count, cap), dtype=torch.int64, device=GPU)

# Two processes, as far as SyncBatchNorm sees.
distributed.world_size = lambda: 2
distributed.gather_rows = lambda row: torch.stack([row, row])
distributed.concat = lambda tensor, lengths: torch.cat([tensor] * len(lengths))
distributed.sum_over_ranks = lambda tensor: tensor


class Watch(TorchDispatchMode):
    """Counts what makes the host wait, and notes how many numbers each copy to the device has."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.copies: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._number(args[0])
        if function is torch.ops.aten._to_copy.default:
            args[0].constant = None  # numbers that a fake tensor made of a list keeps, and a copy would want to move
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self._copied(args[0], result)
        elif function is torch.ops.aten.copy_.default:
            self._copied(args[1], args[0])
        return result

    def _number(self, tensor: Tensor) -> float | int:
        self.waits += tensor.device.type != "cpu"
        if not tensor.is_floating_point():
            return 1
        return 0.4 if tensor.device.type == "cpu" else 0.5  # what is drawn is below a probability: CutMix fires

    def _copied(self, source: Tensor, target: Tensor) -> None:
        if source.device.type == "cpu" != target.device.type:
            self.copies.append(source.numel())
        self.waits += source.device.type != "cpu" == target.device.type


def to_gpu(method: Method) -> None:
    """The parameters and buffers of a method that is on no device, in their memory formats."""
    for named in (each for module in method.modules() for each in (module._parameters, module._buffers)):
        for name, old in [(name, old) for name, old in named.items() if old is not None]:
            new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=GPU)
            named[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def batch_of(wants: Wants, size: int) -> dict[str, Any]:
    """As a loader gives it."""

    def views(count: int) -> list[Tensor]:
        return [torch.zeros(size, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in range(count)]

    label = torch.zeros(size, SIDE, SIDE, dtype=torch.uint8)
    batch = {"labeled": {"image": views(1)[0], "label": label, "strong": views(wants.labeled_strong)}}
    if wants.unlabeled:
        real, index = torch.zeros(size, 2, dtype=torch.int64), torch.arange(size)
        batch["unlabeled"] = {"weak": views(1)[0], "strong": views(wants.strong), "real": real, "index": index}
        if wants.pseudo_label:
            batch["unlabeled"]["label"] = label
    return batch


def step_of(path: str, *words: str) -> dict[str, Any]:
    """A whole step of a configuration: its waits, and the largest copy to the device."""
    config = load_config(path, words)
    with torch.device("meta"):
        method = build_method(config, pretrained=False).train()
        precision.prepare(method, config.trainer, torch.device("cpu"))
    if config.net.sync_bn:
        synchronise(method)
    normalise, watch, now = Normalise(config.dataset.mean, config.dataset.std), Watch(), progress(2, 9, 4)
    with FakeTensorMode():
        to_gpu(method)
        groups = param_groups(method.trained(), config.trainer.optimizer.kwargs.decay)
        optimizer = build_optimizer(groups, config.trainer.optimizer)
        for group in optimizer.param_groups:
            group["fused"] = False  # which has no fake kernel
        normalise.mean, normalise.std = torch.empty(3, 1, 1, device=GPU), torch.empty(3, 1, 1, device=GPU)
        labeled, unlabeled = to_device(batch_of(config.wants, config.dataset.train.batch_size), normalise, GPU)
        with watch:
            step = method(labeled, unlabeled if method.needs_unlabeled(2) else None, now)
            step.loss.backward()
            optimizer.step()
            method.after_step(now)
    without = [name for name, weight in method.named_parameters() if weight.requires_grad and weight.grad is None]
    elsewhere = [name for name, value in step.scalars.items() if value.device != GPU]
    return {
        "waits": watch.waits,
        "largest copy": max(watch.copies, default=0),
        "without gradient": without,
        "on another device": elsewhere,
    }


for line in sys.stdin:
    try:
        print(json.dumps(step_of(*line.split())), flush=True)
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), flush=True)
