"""SupOnly, the baseline: labeled images only, no teacher (spec, SupOnly)."""

from __future__ import annotations

import torch

from .base import Batch, Method, Progress, Step


class SupOnly(Method):
    """Supervised training. Where the batch brings strong views of the labeled images, they are trained on as well."""

    def forward(self, batch: Batch, progress: Progress) -> Step:
        images, labels = batch.images, batch.labels
        if batch.images_strong is not None:
            images, labels = torch.cat([images, batch.images_strong]), torch.cat([labels, labels])
        loss = self.supervised_loss(*self.student.coarse(images), labels)
        return Step(loss, {"loss_lb": loss.detach()})
