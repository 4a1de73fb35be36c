"""From sections of a configuration to networks and methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import read_net
from .errors import UserError
from .methods import METHODS
from .methods.base import Method
from .models.deeplabv3plus import DeepLabV3Plus
from .models.pretrained import load_encoder
from .models.resnet import ResNet
from .ops.losses import cross_entropy, ohem_cross_entropy
from .schema import Config, Net


def build_model(net: Net | Mapping[str, Any], pretrained: bool = True) -> DeepLabV3Plus:
    """The network of a ``net`` section: ``forward(images) -> (logits, aux_logits | None)``.

    Args:
        net: ``Config.net``, or a plain dict in the schema of the published experiments.
        pretrained: load ``encoder.pretrain`` where it is given; False for a network whose weights come from elsewhere.

    Raises:
        ConfigError: a dict with mistakes. UserError: a weight file that does not fit.
    """
    if not isinstance(net, Net):
        net = read_net(dict(net))
    encoder = ResNet(net.encoder.type, **vars(net.encoder.kwargs))
    if pretrained and net.encoder.pretrain is not None:
        try:
            load_encoder(encoder, net.encoder.pretrain)
        except FileNotFoundError as error:
            raise UserError(
                f"net.encoder.pretrain: {error} (looked in {Path.cwd()}). pretrained/README.md says where to get it; "
                "to start from random weights instead, say so: --set net.encoder.pretrain=null"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"net.encoder.pretrain: {error}") from None
    aux, embedding = net.aux_loss is not None, net.embedding
    return DeepLabV3Plus(encoder, net.num_classes, **vars(net.decoder.kwargs), aux=aux, embedding=embedding)


def build_method(config: Config, kind: type[Method] | None = None, pretrained: bool = True) -> Method:
    """The method of a configuration, or of another class with the same options.

    Args:
        kind: a class of ``imas.methods``; default: that of the configuration.
        pretrained: see ``build_model``.
    """
    kind = kind or METHODS[config.method]
    return kind(config.options, partial(build_model, config.net, pretrained), supervised_loss(config))


def supervised_loss(config: Config) -> partial[Tensor]:
    """(logits, auxiliary logits or None, labels) → the supervised loss that the configuration describes."""
    ignore = config.dataset.ignore_label
    if config.criterion.type == "ce":
        criterion = partial(cross_entropy, ignore_index=ignore)
    else:
        criterion = partial(ohem_cross_entropy, **vars(config.criterion.kwargs), ignore_index=ignore)
    weight = config.net.aux_loss.loss_weight if config.net.aux_loss is not None else 0.0
    return partial(main_and_auxiliary, criterion, weight)


def main_and_auxiliary(
    criterion: partial[Tensor], weight: float, coarse: Tensor, coarse_aux: Tensor | None, label: Tensor
) -> Tensor:
    """The criterion of main and auxiliary logits, (B, C, h, w) before the last resize (spec, Losses)."""
    loss = criterion(coarse, label)
    return loss if coarse_aux is None else loss + weight * criterion(coarse_aux, label)
