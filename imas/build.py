"""From sections of a configuration to networks and methods. Below this file, code gets plain named arguments."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .config import read_net
from .methods.base import Criterion, Method
from .methods.imas import IMAS
from .methods.sup_only import SupOnly
from .models.deeplabv3plus import DeepLabV3Plus
from .models.pretrained import load_encoder
from .models.resnet import ResNet
from .ops.losses import cross_entropy, ohem_cross_entropy
from .schema import Config, Net
from .strict import UserError


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
    kwargs = net.encoder.kwargs
    encoder = ResNet(
        net.encoder.type,
        replace_stride_with_dilation=kwargs.replace_stride_with_dilation,
        multi_grid=kwargs.multi_grid,
        zero_init_residual=kwargs.zero_init_residual,
        deep_stem=kwargs.deep_stem,
        width=kwargs.width,
    )
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
    decoder = net.decoder.kwargs
    return DeepLabV3Plus(
        encoder,
        net.num_classes,
        inner_planes=decoder.inner_planes,
        low_conv_planes=decoder.low_conv_planes,
        dilations=decoder.dilations,
        aux=net.aux_loss is not None,
    )


def build_method(config: Config, pretrained: bool = True) -> Method:
    """The method of a configuration, around a student with ImageNet weights, or random ones if not ``pretrained``."""
    return METHODS[config.method](config, build_model(config.net, pretrained))


def _build_sup_only(config: Config, student: DeepLabV3Plus) -> SupOnly:
    return SupOnly(student, _criterion(config), _aux_weight(config))


def _build_imas(config: Config, student: DeepLabV3Plus) -> IMAS:
    return IMAS(
        student,
        _criterion(config),
        _aux_weight(config),
        unsupervised=config.trainer.unsupervised,
        hardness=config.dataset.train.hardness_aware,
        sup_only_epoch=config.trainer.sup_only_epoch,
        ema_decay=config.net.ema_decay,
    )


METHODS = {"imas": _build_imas, "sup_only": _build_sup_only}


def _criterion(config: Config) -> Criterion:
    ignore = config.dataset.ignore_label
    if config.criterion.type == "ce":
        return partial(cross_entropy, ignore_index=ignore)
    kwargs = config.criterion.kwargs
    return partial(ohem_cross_entropy, thresh=kwargs.thresh, min_kept=kwargs.min_kept, ignore_index=ignore)


def _aux_weight(config: Config) -> float:
    return config.net.aux_loss.loss_weight if config.net.aux_loss is not None else 0.0
