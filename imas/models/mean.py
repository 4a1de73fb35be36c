"""Several networks as one."""

from __future__ import annotations

from torch import Tensor, nn


class MeanOfLogits(nn.Module):
    """Networks of which the mean logits count. It has no state of its own, and is made where it is needed.

    Args:
        networks: each gives a tuple that begins with its logits, all of one shape.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, 3, H, W) normalised images → (logits (B, C, H, W), None), as from a single network."""
        return sum(network(images)[0] for network in self.networks) / len(self.networks), None
