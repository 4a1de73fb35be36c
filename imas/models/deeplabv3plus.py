"""DeepLabV3+: encoder, ASPP decoder with one low-level skip, optional auxiliary head.

Letters: B images, H×W their size, h×w the size of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.resize import resize
from .conv import Conv2d, convolve_joined
from .resnet import ResNet


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1, bias: bool = False) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [
        Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=bias),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def _logits(head: nn.Sequential, features: Tensor) -> Tensor:
    """The last layer, which a softmax follows, in float32 whatever autocast makes of the others."""
    features = head[:-1](features)
    with torch.autocast(features.device.type, enabled=False):
        return head[-1](features.float()).contiguous()


class ASPP(nn.Module):
    """Five parallel views of the deepest features: the whole image, 1×1, and three dilated 3×3."""

    def __init__(self, inputs: int, planes: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_bn_relu(inputs, planes, 1))
        self.conv2 = nn.Sequential(*_conv_bn_relu(inputs, planes, 1))
        self.conv3 = nn.Sequential(*_conv_bn_relu(inputs, planes, 3, dilations[0]))
        self.conv4 = nn.Sequential(*_conv_bn_relu(inputs, planes, 3, dilations[1]))
        self.conv5 = nn.Sequential(*_conv_bn_relu(inputs, planes, 3, dilations[2]))

    def forward(self, x: Tensor) -> Tensor:
        whole = resize(self.conv1(x), x.shape[-2:])
        return torch.cat([whole, self.conv2(x), self.conv3(x), self.conv4(x), self.conv5(x)], dim=1)


class Decoder(nn.Module):
    """ASPP on x4, joined with a thin projection of x1, and a classifier at 1/4 of the image."""

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        num_classes: int,
        inner_planes: int = 256,
        low_conv_planes: int = 48,
        dilations: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        self.low_conv = nn.Sequential(*_conv_bn_relu(low_channels, low_conv_planes, 1, bias=True))
        self.aspp = ASPP(high_channels, inner_planes, dilations)
        self.head = nn.Sequential(*_conv_bn_relu(5 * inner_planes, inner_planes, 1))
        self.classifier = nn.Sequential(
            *_conv_bn_relu(low_conv_planes + inner_planes, inner_planes, 3),
            *_conv_bn_relu(inner_planes, inner_planes, 3),
            Conv2d(inner_planes, num_classes, 1),
        )

    def forward(self, x1: Tensor, x4: Tensor) -> Tensor:
        low = self.low_conv(x1)
        joined = convolve_joined(self.classifier[0], low, self.head(self.aspp(x4)))
        return _logits(self.classifier[1:], joined)


class AuxiliaryHead(nn.Module):
    """A second, shallower classifier on x3, there to help training."""

    def __init__(self, inputs: int, num_classes: int, planes: int = 256) -> None:
        super().__init__()
        self.aux = nn.Sequential(*_conv_bn_relu(inputs, planes, 3), Conv2d(planes, num_classes, 1))

    def forward(self, x3: Tensor) -> Tensor:
        return _logits(self.aux, x3)


class DeepLabV3Plus(nn.Module):
    """The segmentation network of every experiment.

    Args:
        encoder: a ``ResNet``.
        num_classes: C.
        inner_planes, low_conv_planes, dilations: channels of the ASPP, of the low-level skip; ASPP dilations.
        aux: whether there is an auxiliary head (``auxor``).
    """

    def __init__(
        self,
        encoder: ResNet,
        num_classes: int,
        inner_planes: int = 256,
        low_conv_planes: int = 48,
        dilations: Sequence[int] = (6, 12, 18),
        aux: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder = encoder
        low, _, middle, high = encoder.channels
        self.decoder = Decoder(low, high, num_classes, inner_planes, low_conv_planes, dilations)
        self.auxor = AuxiliaryHead(middle, num_classes) if aux else None

    def coarse(self, images: Tensor, aux: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits before the last resize, (B, C, H/4, W/4) and (B, C, h, w), the latter None without ``aux``; float32.

        For callers that need only some of the images at full size, or one at a time.
        """
        x1, _, x3, x4 = self.encoder(images)
        return self.decoder(x1, x4), self.auxor(x3) if aux and self.auxor is not None else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) normalised images → (logits, aux_logits or None), each (B, C, H, W) float32."""
        size = images.shape[-2:]
        logits, aux_logits = DeepLabV3Plus.coarse(self, images)  # not compiled: whole images have many sizes
        return resize(logits, size), None if aux_logits is None else resize(aux_logits, size)
