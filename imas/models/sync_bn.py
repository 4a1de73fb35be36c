"""BatchNorm over the images of all processes, on any device and backend, without waiting for the device."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed

log = logging.getLogger("imas")


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose batch, in training, is that of all processes; these may have different numbers of images.

    torch's own needs CUDA, makes the host wait for the device three times a layer, and cannot be compiled.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape and type. In training all processes have to call it."""
        if not self.training:
            return super().forward(features)
        with torch.no_grad():
            mean, variance, count = _statistics(features.to(self.running_mean.dtype))
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return _Normalised.apply(features, self.weight, self.bias, mean, variance, count, self.eps)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over all processes, each (C,), and the number of values. The means' differences
    come in as squares, so that nothing is lost where a mean is far larger than its deviation.
    """
    channels = features.shape[1]
    variance, mean = torch.var_mean(features, (0, 2, 3), correction=0)
    count = mean.new_full((1,), features.numel() // channels)
    rows = distributed.gather_rows(torch.cat([mean, variance, count]))
    means, variances, counts = rows.split([channels, channels, 1], dim=1)
    total = counts.sum()
    shares = counts / total
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), total


class _Normalised(torch.autograd.Function):
    """The features normalised by statistics that depend on all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(features, weight, mean, variance, count)
        ctx.eps = eps
        return torch.batch_norm(features, weight, bias, mean, variance, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, variance, count = ctx.saved_tensors
        # As if the statistics were constants; then what flows through them, of which each process knows a part. Both
        # pairs are mean and spread: CUDA reads either, by the memory layout, and a CPU the first.
        inverse = (variance + ctx.eps).rsqrt()
        of_features, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, features, weight, mean, variance, mean, inverse, False, ctx.eps, [True, True, True]
        )
        through = distributed.sum_over_ranks(torch.cat([of_weight, of_bias])) / count
        through_variance, through_mean = through.chunk(2)
        slope = weight * inverse.square() * through_variance
        offset = weight * inverse * through_mean - slope * mean
        of_features = of_features - torch.addcmul(offset[:, None, None], features, slope[:, None, None])
        return of_features.to(features.dtype), of_weight, of_bias, None, None, None, None


def synchronise(module: nn.Module) -> None:
    """Turn every BatchNorm inside into a ``SyncBatchNorm``, in place, where there are several processes. Parameters and
    buffers stay the same objects under the same names.
    """
    if distributed.world_size() == 1:
        log.info("net.sync_bn: plain BatchNorm, since there is one process")
        return
    for each in module.modules():
        if type(each) is nn.BatchNorm2d:
            each.__class__ = SyncBatchNorm
