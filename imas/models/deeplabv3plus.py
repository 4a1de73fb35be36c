"""DeepLabV3+: encoder, ASPP decoder with one low-level skip, optional auxiliary head.

Letters: B images, H×W their size, h×w the size of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.resize import resize
from .resnet import ResNet

PARTS = ("encode", "fuse", "classify", "represent", "auxiliary")  # the functions that training passes are made of


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1, bias: bool = False) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=bias),
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
    """The layers on x1 and x4: a thin projection, ASPP and its head, and the classifier at 1/4 of the image. With
    ``embedding``, a representation of each pixel beside the classifier.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        num_classes: int,
        inner_planes: int = 256,
        low_conv_planes: int = 48,
        dilations: Sequence[int] = (6, 12, 18),
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        self.low_conv = nn.Sequential(*_conv_bn_relu(low_channels, low_conv_planes, 1, bias=True))
        self.aspp = ASPP(high_channels, inner_planes, dilations)
        self.head = nn.Sequential(*_conv_bn_relu(5 * inner_planes, inner_planes, 1))
        self.classifier = nn.Sequential(
            *_conv_bn_relu(low_conv_planes + inner_planes, inner_planes, 3),
            *_conv_bn_relu(inner_planes, inner_planes, 3),
            nn.Conv2d(inner_planes, num_classes, 1),
        )
        self.representation = None
        if embedding is not None:  # idle layers where U2PL's release has dropout: the others keep their names
            self.representation = nn.Sequential(
                *_conv_bn_relu(low_conv_planes + inner_planes, embedding, 3, bias=True),
                nn.Identity(),
                *_conv_bn_relu(embedding, embedding, 3, bias=True),
                nn.Identity(),
                nn.Conv2d(embedding, embedding, 1),
            )


class AuxiliaryHead(nn.Module):
    """A second, shallower classifier on x3, there to help training."""

    def __init__(self, inputs: int, num_classes: int, planes: int = 256) -> None:
        super().__init__()
        self.aux = nn.Sequential(*_conv_bn_relu(inputs, planes, 3), nn.Conv2d(planes, num_classes, 1))


class DeepLabV3Plus(nn.Module):
    """The segmentation network of every experiment, in parts that a method may call one by one (``PARTS``).

    Args:
        encoder: a ``ResNet``.
        num_classes: C.
        inner_planes, low_conv_planes, dilations: channels of the ASPP, of the low-level skip; ASPP dilations.
        aux: whether there is an auxiliary head (``auxor``).
        embedding: D, the width of a pixel's representation; None for a network without.
    """

    def __init__(
        self,
        encoder: ResNet,
        num_classes: int,
        inner_planes: int = 256,
        low_conv_planes: int = 48,
        dilations: Sequence[int] = (6, 12, 18),
        aux: bool = False,
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder = encoder
        low, _, middle, high = encoder.channels
        self.decoder = Decoder(low, high, num_classes, inner_planes, low_conv_planes, dilations, embedding)
        self.auxor = AuxiliaryHead(middle, num_classes) if aux else None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) normalised images → the encoder's features x1 (1/4 of the size), x3 and x4."""
        x1, _, x3, x4 = self.encoder(images)
        return x1, x3, x4

    def fuse(self, x1: Tensor, x4: Tensor) -> Tensor:
        """The features that are classified, (B, ``low_conv_planes`` + ``inner_planes``, H/4, W/4): first those of x1,
        then those of x4, resized to the size of x1.
        """
        decoder = self.decoder
        low, high = decoder.low_conv(x1), decoder.head(decoder.aspp(x4))
        return torch.cat([low, resize(high, low.shape[-2:])], dim=1)

    def classify(self, fused: Tensor) -> Tensor:
        """The result of ``fuse`` → logits before the last resize, (B, C, H/4, W/4) float32."""
        return _logits(self.decoder.classifier, fused)

    def represent(self, fused: Tensor) -> Tensor:
        """The result of ``fuse`` → a representation of each pixel, (B, D, H/4, W/4) float32, not normalised.

        Of a network with ``embedding`` alone; ``coarse`` and ``forward`` do without.
        """
        return _logits(self.decoder.representation, fused)

    def auxiliary(self, x3: Tensor) -> Tensor | None:
        """Logits of the auxiliary head before the last resize, (B, C, h, w) float32; None for a network without one."""
        return None if self.auxor is None else _logits(self.auxor.aux, x3)

    def coarse(self, images: Tensor, aux: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits before the last resize, of ``classify`` and of ``auxiliary``; the latter None without ``aux``.

        For callers that need only some of the images at full size, or one at a time.
        """
        x1, x3, x4 = self.encode(images)
        return self.classify(self.fuse(x1, x4)), self.auxiliary(x3) if aux else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) normalised images → (logits, aux_logits or None), each (B, C, H, W) float32.

        Never compiled, since whole images have many sizes: the parts of the class are called, not those that
        ``trainer.compile`` puts into the instance.
        """
        size, cls = images.shape[-2:], DeepLabV3Plus
        x1, x3, x4 = cls.encode(self, images)
        logits, aux_logits = cls.classify(self, cls.fuse(self, x1, x4)), cls.auxiliary(self, x3)
        return resize(logits, size), None if aux_logits is None else resize(aux_logits, size)
