"""Convolutions as matrix products, where that is faster on a CPU.

Letters: B images, H×W the size of features, k×k the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.resize import resize

_Slices = tuple[slice, slice, slice]


class Conv2d(nn.Conv2d):
    """A convolution padded to keep the size (up to the stride).

    On a CPU, in float32 and ``channels_last``, a 1×1 kernel is one matrix product, and a kernel whose dilation is more
    than a third of the feature map one for each tap, over those positions where the tap sees more than padding. Sums
    are the same but for their order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _in_rows(x):
            return super().forward(x)
        if self.kernel_size == (1, 1):
            rows = _nhwc(x)[:, :: self.stride[0], :: self.stride[1]]
            return F.linear(rows, _nhwc(self.weight).flatten(0, 2), self.bias).permute(0, 3, 1, 2)
        if self.stride == (1, 1) and self.bias is None and 3 * self.dilation[0] > max(x.shape[-2:]):
            return _TapByTap.apply(x, self.weight, self.dilation[0])
        return super().forward(x)


def convolve_joined(convolution: Conv2d, low: Tensor, high: Tensor) -> Tensor:
    """``convolution``, 3×3 without bias, of low-level features joined with smaller ones that are resized to their size.

    On a CPU, in float32 and ``channels_last``, the taps of ``high`` are multiplied before the resize instead of after
    it, which is fewer products by the number of pixels that the resize makes of one. Both are linear, so that the sums
    are the same but for their order.

    Args:
        low: (B, L, H, W).
        high: (B, K, h, w).

    Returns:
        (B, outputs, H, W).
    """
    height, width = low.shape[-2:]
    if not (_in_rows(low) and _in_rows(high)) or high.shape[-2:] == low.shape[-2:]:
        return convolution(torch.cat([low, resize(high, (height, width))], dim=1))
    of_low, of_high = _nhwc(convolution.weight).split([low.shape[1], high.shape[1]], dim=3)
    rows, (batch, _, h, w), outputs = _nhwc(high), high.shape, len(of_high)
    lines = []  # what each row of the kernel makes of the rows of high, as wide as low
    for kernel in of_high.unbind(1):  # (outputs, 3, K)
        taps = F.linear(rows, kernel.transpose(0, 1).flatten(0, 1))  # (B, h, w, 3·outputs)
        line = _resize_and_add(w, width) @ taps.view(batch * h, 3 * w, outputs)
        lines.append(line.view(batch, h, width * outputs))
    joined = _resize_and_add(h, height) @ torch.stack(lines, dim=2).flatten(1, 2)  # (B, H, W·outputs)
    joined = joined.view(batch, height, width, outputs).permute(0, 3, 1, 2)
    joined += F.conv2d(low, of_low.permute(0, 3, 1, 2), padding=1)
    return joined


def _resize_and_add(small: int, large: int) -> Tensor:
    """A matrix (large, 3·small). It takes a line of ``small`` places, each with the products of a kernel's three taps,
    resizes the line of every tap to ``large``, and adds them as a convolution with padding 1 does.
    """
    resized = resize(torch.eye(small)[None, None], (small, large))[0, 0]  # (small, large)
    return F.pad(resized, (1, 1)).unfold(1, large, 1).permute(2, 0, 1).flatten(1)  # (large, small·3)


def _in_rows(x: Tensor) -> bool:
    """Whether each pixel of (B, C, H, W) is a row of C numbers that a CPU multiplies as they are. A compiler is given
    plain convolutions: over these products it thinks for many minutes.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and not torch.compiler.is_compiling() and x.is_contiguous(memory_format=torch.channels_last)


def _nhwc(tensor: Tensor) -> Tensor:
    """(N, C, H, W) → (N, H, W, C), as it lies in memory."""
    return tensor.permute(0, 2, 3, 1)


def _taps(height: int, width: int, size: int, dilation: int) -> Iterator[tuple[tuple[int, int], _Slices, _Slices]]:
    """The taps around the centre of a size×size kernel that see more than padding: (row, column), what they read, where
    they write.
    """
    for row, column in itertools.product(range(size), repeat=2):
        down, right = (row - size // 2) * dilation, (column - size // 2) * dilation
        if (down or right) and abs(down) < height and abs(right) < width:
            reads = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
            writes = slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right))
            yield (row, column), (slice(None), *reads), (slice(None), *writes)


class _TapByTap(torch.autograd.Function):
    """(B, inputs, H, W), (outputs, inputs, k, k) → (B, outputs, H, W), all ``channels_last``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        x, kernel = _nhwc(x), weight.permute(2, 3, 0, 1)
        size = len(kernel)
        result = x @ kernel[size // 2, size // 2].t()
        for tap, reads, writes in _taps(*x.shape[1:3], size, dilation):
            result[writes] += x[reads] @ kernel[tap].t()
        return result.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        x, gradient, kernel = _nhwc(x), _nhwc(gradient), weight.permute(2, 3, 0, 1)
        size = len(kernel)
        centre, taps = (size // 2, size // 2), list(_taps(*x.shape[1:3], size, ctx.dilation))
        of_weight = (torch.empty_like if len(taps) == size**2 - 1 else torch.zeros_like)(weight)
        of_kernel = of_weight.permute(2, 3, 0, 1)
        of_x = gradient @ kernel[centre]
        torch.mm(gradient.flatten(0, 2).t(), x.flatten(0, 2), out=of_kernel[centre])
        for tap, reads, writes in taps:
            part, seen = gradient[writes].flatten(0, 2), x[reads]
            of_x[reads] += (part @ kernel[tap]).view_as(seen)
            torch.mm(part.t(), seen.flatten(0, 2), out=of_kernel[tap])
        return of_x.permute(0, 3, 1, 2), of_weight, None
