"""ResNet encoders with a deep stem, dilation and multi-grid (the spec of the authors' encoder).

Module names equal the authors', so ImageNet files and checkpoints made for their code load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def _conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions (ResNet-18 and 34)."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, planes, stride, dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, 1, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.relu(x)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with the stride on the 3×3 (ResNet-50, 101 and 152)."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        return self.relu(x)


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A ResNet that returns the features of its four stages.

    Args:
        name: a key of ``RESNETS``.
        replace_stride_with_dilation: for layer2, 3 and 4, whether dilation takes the place of the stride:
            (F, F, F) is output stride 32, (F, F, T) 16, (F, T, T) 8.
        multi_grid: multiply the dilations of layer4's blocks by (2, 2, 4).
        zero_init_residual: start the last BatchNorm of every residual branch at weight 0.
        deep_stem: three 3×3 convolutions (the authors' encoders); otherwise torchvision's single 7×7.
        width: channels of the first stage, 64 in every published ResNet. All other channels scale with it.

    ``name`` is kept; ``channels`` holds the channels of x1..x4. ``recompute``: keep a block's input alone for the
    backward pass, and compute the block once more there.
    """

    def __init__(
        self,
        name: str,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        multi_grid: bool = False,
        zero_init_residual: bool = False,
        deep_stem: bool = True,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.name = name
        self.recompute = False
        block, depths = RESNETS[name]
        if deep_stem:
            stem = 2 * width
            self.conv1: nn.Module = nn.Sequential(
                _conv3x3(3, width, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                _conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                _conv3x3(width, stem),
            )  # fmt: skip
        else:
            stem = width
            self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        # A plain stem stands for torchvision's network, which floors; the authors' pooling ceils.
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=deep_stem)

        inputs, dilation = stem, 1
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            stride = 1 if stage == 0 else 2
            first_dilation = dilation
            if stage > 0 and replace_stride_with_dilation[stage - 1]:
                dilation, stride = dilation * 2, 1
            # torchvision's rule: the first block of a dilated stage keeps the previous dilation.
            dilations = [first_dilation] + [dilation] * (depth - 1)
            if stage == 3 and multi_grid:
                dilations = [d * grid for d, grid in zip(dilations, (2, 2, 4))]
            layer = _stage(block, inputs, planes, stride, dilations)
            self.add_module(f"layer{stage + 1}", layer)
            inputs = planes * block.expansion
        self.channels = tuple(width * 2**stage * block.expansion for stage in range(4))
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    nn.init.zeros_(module.last_norm.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) → x1 (1/4), x2, x3, x4, with ``channels`` channels."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x1 = self._run(self.layer1, x)
        x2 = self._run(self.layer2, x1)
        x3 = self._run(self.layer3, x2)
        x4 = self._run(self.layer4, x3)
        return x1, x2, x3, x4

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return stage(x)
        for block in stage:
            contexts = partial(_first_and_second_pass, block)
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return x


def _first_and_second_pass(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Running statistics take in each batch once, though its activations are computed twice."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, stride: int, dilations: list[int]
) -> nn.Sequential:
    outputs = planes * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    blocks = [block(inputs, planes, stride, dilations[0], downsample)]
    blocks += [block(outputs, planes, 1, dilation, None) for dilation in dilations[1:]]
    return nn.Sequential(*blocks)
