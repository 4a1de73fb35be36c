"""Supervised and unsupervised losses (paper, Eq. 2, 3 and 10; spec, Losses).

Letters: B images, H×W their size, h×w the size of the logits, which are resized to H×W, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .resize import resize, rows_of


class _PixelCrossEntropy(torch.autograd.Function):
    """Cross-entropy of every pixel, with the logits of one image at full size at a time.

    Kept for the backward pass are the logits as they came and each pixel's log-sum-exp. The gradient
    (softmax − one-hot)·grad is made of the logits, resized once more.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        ignored = target == ignore_index
        target = target.masked_fill(ignored, 0)
        loss = torch.empty(target.shape, device=logits.device)
        normaliser = torch.empty_like(loss)
        for number in range(len(logits)):
            full = resize(logits[number : number + 1], target.shape[-2:])[0]
            for rows in rows_of(full):
                block, classes = full[:, rows], target[number, rows].unsqueeze(0)
                normaliser[number, rows] = block.logsumexp(dim=0)
                loss[number, rows] = normaliser[number, rows] - block.gather(0, classes)[0]
        ctx.save_for_backward(logits, target, ignored, normaliser)
        return loss.masked_fill_(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, target, ignored, normaliser = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0)
        result = torch.empty_like(logits)
        for number in range(len(logits)):
            image = logits[number : number + 1].detach().requires_grad_()
            with torch.enable_grad():
                full = resize(image, target.shape[-2:])
            same = full is image
            at_full_size = result[number : number + 1] if same else torch.empty_like(full)
            for rows in rows_of(full[0]):
                block = (full[0, :, rows].detach() - normaliser[number, rows]).exp_()
                classes = target[number, rows].unsqueeze(0)
                block.scatter_(0, classes, block.gather(0, classes) - 1)
                torch.mul(block, grad[number, rows], out=at_full_size[0, :, rows])
            if not same:
                result[number : number + 1] = torch.autograd.grad(full, image, at_full_size)[0]
        return result, None, None


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of every pixel, 0 where it is ignored: (B, C, h, w), (B, H, W) int64 → (B, H, W) float32."""
    return _PixelCrossEntropy.apply(logits.float(), target, ignore_index)


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0 where there is none.

    Args:
        logits: (B, C, h, w).
        target: (B, H, W) int64, classes or ``ignore_index``.
    """
    total = pixel_cross_entropy(logits, target, ignore_index).sum()
    return total / (target != ignore_index).sum().clamp(min=1)


def ohem_cross_entropy(
    logits: Tensor, target: Tensor, thresh: float = 0.7, min_kept: int = 100_000, ignore_index: int = 255
) -> Tensor:
    """Cross-entropy over the hard pixels of the whole batch (online hard example mining; spec, Losses).

    With p the probability of the true class (1 for an ignored pixel) and q the ``min_kept``-th smallest p, the
    valid pixels with p <= max(q, thresh) are kept. With fewer than ``min_kept`` valid pixels all of them are.

    Args:
        logits: (B, C, h, w).
        target: (B, H, W) int64, classes or ``ignore_index``.
        thresh: in [0, 1].
        min_kept: at least 1, over the batch.

    Returns:
        A scalar; 0 for a batch without a valid pixel.
    """
    loss = pixel_cross_entropy(logits, target, ignore_index)
    p = loss.detach().neg().exp()
    valid = target != ignore_index
    hard = (p <= _limit(p.flatten(), thresh, min_kept)) | (valid.sum() < min_kept)
    kept = valid & hard
    return (loss * kept).sum() / kept.sum().clamp(min=1)


def _limit(p: Tensor, thresh: float, min_kept: int) -> Tensor:
    """max(q, thresh), q the ``min_kept``-th smallest of p or the largest."""
    number = min(min_kept, p.numel())
    if p.device.type != "cpu":  # always selecting costs less there than waiting for a count
        return p.topk(number, largest=False, sorted=False).values.max().clamp(min=thresh)
    if (p <= thresh).sum() >= number:
        return p.new_tensor(thresh)
    return p.kthvalue(number).values


def consistency_loss(
    logits: Tensor, pseudo_label: Tensor, confidence: Tensor, threshold: float, score: Tensor | None = None
) -> Tensor:
    """Cross-entropy against confident pseudo labels, weighted by image (paper, Eq. 10; spec, Losses).

    Pixels with ``confidence >= threshold`` take part; the mean runs over **all** H·W pixels of an image, is
    multiplied by the image's score, and averaged over the batch. No argument is modified.

    Args:
        logits: (B, C, h, w) of the student.
        pseudo_label: (B, H, W) int64.
        confidence: (B, H, W) in [0, 1].
        threshold: τ in [0, 1].
        score: (B,) in [0, 1], or None for no weights.
    """
    pixel_loss = pixel_cross_entropy(logits, pseudo_label)
    image_loss = (pixel_loss * (confidence >= threshold)).mean(dim=(1, 2))
    return (image_loss if score is None else score * image_loss).mean()
