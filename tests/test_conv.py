"""Convolutions as matrix products, against plain ones: results, gradients, and that they take fewer operations."""

from __future__ import annotations

import golden
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imas.models.conv import Conv2d, convolve_joined
from imas.ops.resize import resize


def _in_rows(seed: int, *shape: int) -> Tensor:
    return golden.randn(seed, *shape).contiguous(memory_format=torch.channels_last).requires_grad_()


def _compare(ours: Conv2d, outputs: tuple[Tensor, Tensor], inputs: list[Tensor]) -> None:
    """Outputs, and gradients of inputs, weight and bias, of (ours, plain). Our gradient of the weight lies in memory as
    the weight does, so that neither autograd nor DDP copies it.
    """
    result, expected = outputs
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    given = golden.randn(9, *expected.shape)  # a gradient in another memory layout
    leaves = [*inputs, *ours.parameters()]
    gradients, plain = (torch.autograd.grad(output, leaves, given, retain_graph=True) for output in outputs)
    for ours_, theirs in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-4)
    assert gradients[len(inputs)].stride() == ours.weight.stride()


def _flops(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(("kernel", "stride", "dilation", "bias"), [
    (1, 1, 1, False), (1, 1, 1, True), (1, 2, 1, False),
    (3, 1, 1, False), (3, 2, 1, False), (3, 1, 3, True),
    (3, 1, 2, False), (3, 1, 3, False), (3, 1, 4, False), (3, 1, 6, False), (3, 1, 8, False), (3, 1, 18, False),
    (5, 1, 3, False),
])  # fmt: skip
def test_a_convolution_is_the_plain_one(kernel: int, stride: int, dilation: int, bias: bool) -> None:
    torch.manual_seed(0)
    padding = dilation * (kernel // 2)
    ours = Conv2d(6, 4, kernel, stride, padding, dilation, bias=bias).to(memory_format=torch.channels_last)
    x = _in_rows(1, 2, 6, 9, 7)
    _compare(ours, (ours(x), nn.Conv2d.forward(ours, x)), [x])


def test_taps_that_see_only_padding_are_not_computed() -> None:
    x = _in_rows(1, 2, 6, 9, 7)
    for dilation, seen in ((4, (9 + 2 * 5) * (7 + 2 * 3)), (6, (9 + 2 * 3) * (7 + 2)), (18, 9 * 7)):
        ours = Conv2d(6, 4, 3, padding=dilation, dilation=dilation, bias=False)
        ours.to(memory_format=torch.channels_last)
        assert _flops(ours, x) == 2 * 2 * seen * 6 * 4
        assert _flops(nn.Conv2d.forward, ours, x) == 2 * 2 * (9 * 7 * 9) * 6 * 4


@pytest.mark.parametrize("small", [(5, 3), (1, 1), (1, 3), (17, 3), (17, 13)])
def test_taps_before_the_resize_are_those_after_it(small: tuple[int, int]) -> None:
    torch.manual_seed(0)
    convolution = Conv2d(2 + 6, 4, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    low, high = _in_rows(1, 2, 2, 17, 13), _in_rows(2, 2, 6, *small)

    def plain() -> Tensor:
        return nn.Conv2d.forward(convolution, torch.cat([low, resize(high, (17, 13))], dim=1))

    _compare(convolution, (convolve_joined(convolution, low, high), plain()), [low, high])


def test_taps_before_the_resize_are_fewer() -> None:
    convolution = Conv2d(2 + 30, 30, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    low, high = _in_rows(1, 2, 2, 33, 33), _in_rows(2, 2, 30, 9, 9)
    plain = _flops(convolution, torch.cat([low, resize(high, (33, 33))], dim=1))
    assert _flops(convolve_joined, convolution, low, high) < 0.4 * plain
    assert _flops(convolve_joined, convolution, low.contiguous(), high) == plain  # elsewhere as it was


def test_a_compiler_is_given_plain_convolutions() -> None:
    named: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        named.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    ours = Conv2d(6, 4, 1).to(memory_format=torch.channels_last)
    x = _in_rows(1, 2, 6, 9, 7)
    torch.testing.assert_close(torch.compile(ours, backend=backend)(x), ours(x))
    assert any("conv2d" in name for name in named) and not any("linear" in name for name in named)
    torch._dynamo.reset()
