"""What ``test_cuda`` runs on two ranks: our SyncBatchNorm beside torch's, in three number formats, with its times."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from imas import distributed
from imas.models.sync_bn import synchronise

_STEPS = 20


def step(module: nn.Module, images: Tensor) -> Tensor:
    """Forward and backward; gives the gradient of the images."""
    images = images.detach().requires_grad_()
    module(images).backward(weight.to(images))
    return images.grad


def milliseconds(module: nn.Module, images: Tensor) -> float:
    """Of a step, on average."""
    step(module, images)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_STEPS):
        step(module, images)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / _STEPS


with distributed.process_group() as device:
    torch.manual_seed(distributed.rank())
    plain = nn.Sequential(*[nn.BatchNorm2d(256) for _ in range(4)]).to(device)
    theirs, ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)), copy.deepcopy(plain)
    synchronise(ours)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True)
    weight = torch.randn(4 + distributed.rank(), 256, 97, 97, device=device)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        images = (2 * torch.randn_like(weight) + 3).to(dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        expected = step(theirs, images)
        step(ours, images)  # makes what the first call makes
        torch.cuda.set_sync_debug_mode("error")
        got = step(ours, images)
        torch.cuda.set_sync_debug_mode("default")
        for each in (got, step(compiled, images)):
            torch.testing.assert_close(each, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        times = [milliseconds(module, images) for module in (theirs, ours, compiled)]
        if distributed.is_main():
            figures = "torch's {:.2f}, ours {:.2f}, ours compiled {:.2f}".format(*times)
            print(f"SyncBatchNorm: {str(dtype)[6:]}, 4 layers of 256 × 97², 4 + 5 images, ms a step: {figures}")
