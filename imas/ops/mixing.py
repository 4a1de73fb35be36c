"""Instance-adaptive augmentation: blending and CutMix (paper, section 3.3; spec, steps 5 and 6).

Letters: B images, H×W their size. ``score`` is the h of ``ops/hardness.py``: (B,), 1 easy, 0 hard.
Every random function takes the CPU generator that it draws from. Masks are made where they are used: a few numbers an
image are sent to the ``device``, no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from statistics import NormalDist

import torch
from torch import Tensor


def adaptive_blend(strong: Tensor, weak: Tensor, score: Tensor) -> Tensor:
    """h·strong + (1 − h)·weak, image by image (paper, Eq. 8 in the direction of its erratum).

    An easy image keeps its strong view, a hard one falls back to its weak view.

    Args:
        strong, weak: (B, 3, H, W) views of the same crops.
        score: (B,) in [0, 1].
    """
    h = score.view(-1, 1, 1, 1).to(strong.dtype)
    return h * strong + (1 - h) * weak


def random_choice(strong: Tensor, weak: Tensor, score: Tensor, generator: torch.Generator) -> Tensor:
    """Each image's strong view with probability h, else its weak view (the unblended form of step 5)."""
    draws = torch.rand(len(score), generator=generator).to(score.device, non_blocking=True)
    return torch.where((draws < score).view(-1, 1, 1, 1), strong, weak)


def cutmix_partners(score: Tensor) -> Tensor:
    """Whose patch each image takes: the i-th easiest from the i-th hardest, and the other way round.

    (B,) score → (B,) int64, ``partner[order[i]] == order[B - 1 - i]`` for the ascending order of scores.
    """
    order = score.argsort(stable=True)
    partner = torch.empty_like(order)
    partner[order] = order.flip(0)
    return partner


def box_side(
    low: float,
    high: float,
    mean_score: float,
    generator: torch.Generator,
    *,
    scaled_by_score: bool = False,
    gaussian: bool = False,
) -> float:
    """The box side as a fraction of the image's, one for the batch (spec, step 6).

    Uniform in [low, high]; ``scaled_by_score`` multiplies the random part by the mean score; ``gaussian`` draws
    from a normal truncated to [low, high] with mean low + (high − low)·mean_score.
    """
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    if gaussian:
        return _truncated_normal(low, high, low + (high - low) * mean_score, uniform)
    return low + (high - low) * uniform * (mean_score if scaled_by_score else 1.0)


def _truncated_normal(low: float, high: float, mean: float, uniform: float) -> float:
    """The ``uniform``-quantile of N(mean, σ) cut to [low, high], σ = max(mean − low, high − mean) / 3."""
    sigma = max(mean - low, high - mean) / 3
    if sigma == 0:
        return mean
    normal = NormalDist(mean, sigma)
    first, last = normal.cdf(low), normal.cdf(high)
    return min(max(normal.inv_cdf(first + (last - first) * uniform), low), high)


def beta_side(generator: torch.Generator, alpha: float = 4.0, beta: float = 4.0) -> float:
    """√(1 − λ) with λ ~ Beta(α, β): the box side of the classic CutMix (spec, ``use_cutmix_beta``) and of AugSeg."""
    concentrations = torch.tensor([alpha, beta], dtype=torch.float64)
    gammas = torch._standard_gamma(concentrations, generator=generator)
    return math.sqrt(1 - (gammas[0] / gammas.sum()).item())


def cutmix_mask(
    batch: int,
    height: int,
    width: int,
    side: float,
    generator: torch.Generator,
    *,
    border: int = 16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One box per image, True inside: (B, H, W) bool (spec, step 6).

    A box is int(H·side) × int(W·side) around a centre that is uniform in [H//border, H) × [W//border, W),
    clipped to the image.

    Args:
        side: fraction of the image's, in (0, 1], one for the batch.
        device: of the mask.
    """
    rows = torch.randint(height // border, height, (batch,), generator=generator)
    columns = torch.randint(width // border, width, (batch,), generator=generator)
    centres = torch.stack([rows, columns]).to(device, non_blocking=True)
    return centred_boxes(height, width, side, *centres)


def centred_boxes(height: int, width: int, side: float, rows: Tensor, columns: Tensor) -> Tensor:
    """The boxes of ``cutmix_mask`` around given centres, each (B,) int64; an odd side loses a pixel."""
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    boxes = torch.stack([rows - half_h, columns - half_w, rows + half_h, columns + half_w], dim=1)
    return box_mask(boxes, height, width)


def area_box(height: int, width: int, draw: Callable[[], float]) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) inside the image (FixMatch, UniMatch).

    Its area is uniform in [0.02, 0.4] of the image's. Ratio and place are drawn anew until the box fits, so that none
    is clipped.

    Args:
        draw: gives uniform numbers in [0, 1): for the area; then for ratio, left and top of each try.
    """
    area = (0.02 + 0.38 * draw()) * height * width
    while True:
        ratio = 0.3 + (1 / 0.3 - 0.3) * draw()
        box_width, box_height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        left, top = int(draw() * width), int(draw() * height)
        if left + box_width <= width and top + box_height <= height:
            return top, left, box_height, box_width


def area_mask(
    batch: int,
    height: int,
    width: int,
    generator: torch.Generator,
    probability: float = 0.5,
    device: torch.device | str = "cpu",
) -> Tensor:
    """An ``area_box`` in each image with this probability, True inside: (B, H, W) bool."""

    def draw() -> float:
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    boxes = [area_box(height, width, draw) if draw() < probability else (0, 0, 0, 0) for _ in range(batch)]
    ends = [(top, left, top + box_height, left + box_width) for top, left, box_height, box_width in boxes]
    return box_mask(torch.tensor(ends).to(device, non_blocking=True), height, width)


def share_boxes(
    height: int, width: int, share: Tensor, exponent: Tensor, position: Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Boxes of a share of the image's area, in any shape and place (CPS, PS-MT on Cityscapes).

    With a share q and an exponent e a box is √(1/3)·q^e of the image high and √(1/3)·q^(1 − e) wide, rounded to whole
    pixels. It is always inside the image.

    Args:
        share: (B, K) float64 of K boxes in each image, in (0, 1].
        exponent: (B, K) float64 in [0, 1].
        position: (B, K, 2) float64 in [0, 1]: of the box's top among all that are possible, and of its left side.
        device: of the result. The arguments are on the CPU, whose rounding of the sides counts.

    Returns:
        (B, K, H, W) bool, True inside.
    """
    high = share**exponent
    size = share.new_tensor([height, width])
    sides = (torch.stack([high, share / high], dim=-1) * math.sqrt(1 / 3) * size).round()
    first = ((size - sides) * position).round()
    boxes = torch.cat([first, first + sides], dim=-1)
    return box_mask(boxes.to(device, non_blocking=True), height, width)


def toggled(boxes: Tensor) -> Tensor:
    """(B, K, H, W) boxes, each of which toggles what it covers: an overlap of two is outside again (CPS). (B, H, W)."""
    return reduce(torch.logical_xor, boxes.unbind(1))


def toggled_mask(
    batch: int, height: int, width: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Three ``toggled`` boxes in each image, every share uniform in [0.25, 0.5]: (B, H, W) bool."""
    draws = torch.rand(batch, 3, 4, generator=generator, dtype=torch.float64)
    share, exponent, position = 0.25 + 0.25 * draws[..., 0], draws[..., 1], draws[..., 2:]
    return toggled(share_boxes(height, width, share, exponent, position, device))


def half_boxes(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A box of half of the image's area in each image (U2PL).

    Returns:
        (B, 4) int64 on the CPU: top, left, and behind the last row and column.
    """
    boxes = []
    for _ in range(batch):
        box_width = int(torch.randint(int(width / 2 + 1), width, (), generator=generator))
        box_height = round(height * width / 2 / box_width)
        top = int(torch.randint(height - box_height + 1, (), generator=generator))
        left = int(torch.randint(width - box_width + 1, (), generator=generator))
        boxes.append([top, left, top + box_height, left + box_width])
    return torch.tensor(boxes)


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """(…, 4) boxes (top, left, and behind the last row and column) → (…, H, W) bool, True inside, on their device."""
    top, left, bottom, right = boxes[..., None, None].unbind(-3)
    y = torch.arange(height, device=boxes.device).unsqueeze(1)
    x = torch.arange(width, device=boxes.device)
    return ((y >= top) & (y < bottom)) & ((x >= left) & (x < right))  # a row and a column first, then the whole


def paste(base: Tensor, partner: Tensor, mask: Tensor) -> Tensor:
    """``base`` with each image's box taken from its partner (CutMix; spec, step 6).

    Args:
        base: images (B, 3, H, W), labels or confidences (B, H, W).
        partner: (B,) int64, of ``cutmix_partners``, or any permutation.
        mask: (B, H, W) bool, True where the partner is seen.
    """
    return put(base, base[partner], mask)


def put(base: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """``base`` with what ``patch`` has inside the mask: both (B, …, H, W), the mask (B, H, W) bool."""
    return torch.where(mask.unsqueeze(1) if base.ndim == 4 else mask, patch, base)
