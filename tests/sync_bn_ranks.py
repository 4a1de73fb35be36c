"""What ``test_sync_bn`` runs on several ranks, on GPUs ``test_cuda``. Each compares with what it computes alone of the
whole batch.
"""

from __future__ import annotations

import copy

import torch
from first_step import NET, batch_for, gradients, on, progress, small
from torch import Tensor, nn

from imas import distributed
from imas.engine.optim import param_groups
from imas.methods.base import Labeled, Method, Unlabeled
from imas.methods.imas import HardnessOptions
from imas.models.sync_bn import SyncBatchNorm, synchronise
from imas.ops import mixing

IMAGES = {2: [2, 5], 3: [1, 4, 2]}  # of each rank

# Options with which nothing but BatchNorm makes one image depend on another, as far as options can say that.
ALONE = {
    "imas": {"threshold": 0.5, "hardness": HardnessOptions(blend=True)},
    "sup_only": {"strong_views": True},
    "fixmatch": {"threshold": 0.5, "teacher": True},
    "unimatch": {"threshold": 0.5},
    "augseg": {"threshold": 0.5, "use_cutmix": False, "extra_weak": True},
    "cps": {"use_cutmix": False},
    "psmt": {"threshold": 0.0, "assist": 2},
}


def share(tensor: Tensor, sizes: list[int]) -> Tensor:
    """This rank's images."""
    return tensor.split(sizes)[distributed.rank()]


def check_layer(compiled: bool, dtype: torch.dtype = torch.float32, tolerance: float | None = None) -> None:
    """Two steps on unequal batches, with means far larger than deviations."""
    sizes, tolerance = IMAGES[distributed.world_size()], tolerance or ROUNDING
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5, eps=1e-5)
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.normal_()
    plain.to(device)
    module = nn.Sequential(copy.deepcopy(plain))
    synchronise(module)
    assert isinstance(module[0], SyncBatchNorm) and list(module[0].state_dict()) == list(plain.state_dict())
    ours = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    for height in (6, 4):
        whole = (3 * torch.randn(7, 5, height, 6) + 100 * torch.rand(5, 1, 1)).to(device, dtype)
        weight = torch.randn_like(whole)
        mine = share(whole, sizes).contiguous(memory_format=torch.channels_last).requires_grad_()
        whole.requires_grad_()
        plain.zero_grad(), module.zero_grad()
        expected, got = plain(whole.float()).to(dtype), ours(mine)
        (expected * weight).sum().backward()
        (got * share(weight, sizes)).sum().backward()
        pairs = [(got, share(expected, sizes)), (mine.grad, share(whole.grad, sizes))]
        for a, b in zip(module.parameters(), plain.parameters()):
            pairs.append((distributed.sum_over_ranks(a.grad.clone()) / whole.numel(), b.grad / whole.numel()))
        pairs += zip(module.buffers(), plain.buffers())
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def without_mixing(method: Method) -> None:
    """No boxes, and noise and dropout that are the same for every image."""
    mixing.area_mask = lambda *shape_and_generator, device: torch.zeros(
        shape_and_generator[:3], dtype=torch.bool, device=device
    )
    method.perturbation = lambda *features_and_generator: [
        2.0 * (torch.arange(each.shape[1], device=device) % 2).expand(each.shape[:2])
        for each in features_and_generator[:2]
    ]
    method.draw_pastes = lambda images, generator: []
    method.draw_noise = lambda like, generator: (
        torch.arange(like[0].numel(), device=device).sin().view(like[0].shape).expand_as(like)
    )


def part(batch: tuple[Labeled, Unlabeled | None]) -> tuple[Labeled, Unlabeled | None]:
    """This rank's images of a batch, as many as any other rank's."""
    if isinstance(batch, Tensor):
        return batch.chunk(distributed.world_size())[distributed.rank()]
    if isinstance(batch, tuple):
        values = [part(each) for each in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    return batch


def check_step(name: str) -> None:
    """A step, its gradients and all buffers after the teachers' update."""
    alone, method = (small(name, NET | {"aux_loss": {}}, **ALONE[name]).to(device) for _ in range(2))
    labeled, unlabeled = on(batch_for(alone.wants(alone.options), 6), device)
    if unlabeled is not None:
        unlabeled = unlabeled._replace(valid=torch.ones_like(unlabeled.valid))
    synchronise(method)
    for each in (alone, method):
        without_mixing(each)
    expected = alone(labeled, unlabeled, progress(3, 15)).loss
    wrapped = distributed.wrap(method, device, True)
    assert not wrapped.broadcast_buffers and wrapped.gradient_as_bucket_view
    loss = wrapped(*part((labeled, unlabeled)), progress(3, 15)).loss
    for each, of_each in ((alone, expected), (method, loss)):
        of_each.backward()
        each.after_step(progress(3, 15))
    mean = distributed.sum_over_ranks(loss.detach()) / distributed.world_size()
    torch.testing.assert_close(mean, expected.detach(), rtol=ROUNDING, atol=0)
    difference = (gradients(method) - gradients(alone)).norm() / gradients(alone).norm()
    pairs = zip(method.buffers(), alone.buffers(), strict=True)
    buffers = max((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1) for ours, theirs in pairs)
    # Rounding is 1e-5 of the gradients; a pixel whose label it turns over can be hundreds of times as much.
    assert difference < 1e-2 and buffers < ROUNDING, (name, difference, buffers)


def check_twenty_steps() -> None:
    """With all that is drawn and mixed by each process on its own, the ranks' states stay bitwise the same."""
    method = small("imas", threshold=0.3, use_cutmix=True, hardness=HardnessOptions(blend=True, trigger_cutmix=True))
    synchronise(method.to(device))
    optimizer = torch.optim.SGD(param_groups(method.trained()), lr=0.01, momentum=0.9)
    wrapped = distributed.wrap(method, device, True)
    for iteration in range(20):
        batch = on(part(batch_for(method.wants(method.options), 4, 17)), device)
        now = progress(iteration // 5, iteration, seed=100 * distributed.rank() + iteration)
        optimizer.zero_grad()
        wrapped(*batch, now).loss.backward()
        optimizer.step()
        method.after_step(now)
    states = distributed.gather(method.state_dict())
    assert all(torch.equal(state[key], states[0][key]) for state in states for key in state)


with distributed.process_group() as device:
    ROUNDING = 1e-5 if device.type == "cpu" else 1e-4
    torch.backends.cudnn.allow_tf32 = False
    check_layer(compiled=False)
    check_layer(compiled=False, dtype=torch.bfloat16, tolerance=2e-2)
    for name in ALONE:
        check_step(name)
    if distributed.world_size() == 2:
        check_layer(compiled=True)
        check_twenty_steps()
