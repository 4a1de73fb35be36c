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
from torchvision.models import resnet
from torchvision.models.resnet import Bottleneck, conv1x1, conv3x3


class BasicBlock(resnet.BasicBlock):
    """torchvision's block of two 3×3 convolutions (ResNet-18 and 34), which refuses dilation by itself."""

    def __init__(
        self, inputs: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, dilation: int = 1
    ) -> None:
        super().__init__(inputs, planes, stride, downsample)
        for convolution in (self.conv1, self.conv2):
            convolution.padding = convolution.dilation = (dilation, dilation)


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
                conv3x3(3, width, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                conv3x3(width, stem),
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

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
        downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    blocks = [block(inputs, planes, stride, downsample, dilation=dilations[0])]
    blocks += [block(outputs, planes, dilation=dilation) for dilation in dilations[1:]]
    return nn.Sequential(*blocks)
