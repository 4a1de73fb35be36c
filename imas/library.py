"""What a trained network is used for from Python: load it from a checkpoint, predict an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from .build import build_method, build_model
from .config import carried_config
from .data.normalise import Normalise
from .data.source import as_rgb, upright
from .engine import checkpoint
from .engine.precision import prepare_network
from .engine.sliding import Predictor, Protocol
from .errors import UserError
from .models.modes import evaluating
from .schema import Config


def load_checkpoint(
    path: str | Path, network: str | None = None, recipe: Config | None = None
) -> tuple[nn.Module, Config]:
    """A network of a checkpoint, and the recipe of its run. Nothing is unpickled but tensors and plain values.

    Args:
        path: a file written by training (``ckpt_best.pth``), or by the authors' code.
        network: its name, as of ``eval.py --network``; default: the one that selected the best checkpoint.
        recipe: for a checkpoint that carries none, as those of the authors' code: ``load_config`` of its YAML.

    Returns:
        The network, on the CPU in eval mode: ``network(images) -> (logits, aux_logits or None)``, of normalised images
        (B, 3, H, W). Its attribute ``recipe`` is the recipe, which ``predict`` reads. And the recipe itself:
        ``recipe.dataset``, ``recipe.net``, ... torch's switches of TF32 are set as it has them.

    Raises:
        UserError: no such file, a torn or foreign one; no recipe; no network of this name, or one that does not fit.
    """
    state = checkpoint.read(path)
    recipe = recipe or carried_config(state.get("config"), path)
    loaded = network_of(state, path, recipe, network)[1]
    loaded.recipe = recipe
    return loaded, recipe


def network_of(
    state: dict[str, Any], path: str | Path, recipe: Config, name: str | None = None
) -> tuple[str, nn.Module]:
    """Name and network of ``load_checkpoint``, from a checkpoint's dict: one that the method scores, or any network of
    the checkpoint.

    Raises:
        UserError: no network of this name, or one that does not fit the recipe.
    """
    method, there = build_method(recipe, pretrained=False), checkpoint.network_names(state)
    networks = method.networks()
    scored = method.scored() if set(networks) <= set(there) else {}
    name = name or next(iter(scored), there[0])
    if name not in {*scored, *there}:
        names = ", ".join(dict.fromkeys([*scored, *there]))
        raise UserError(f"{path}: has no network {name}; it has {names}")
    if name not in scored:
        networks = {name: networks.get(name) or build_model(recipe.net, pretrained=False)}
    for each, network in networks.items():
        checkpoint.load_network(network, each, state, path)
        prepare_network(network, recipe.trainer)
    return name, {**networks, **scored}[name].eval()


def predict(network: nn.Module, image: np.ndarray | Tensor | Image.Image, recipe: Config | None = None) -> Tensor:
    """The likeliest class of every pixel of an image: what ``eval.py --images`` writes for it.

    The image is normalised as in training, and predicted in the windows of ``recipe.dataset.val.crop.size``, on the
    network's device, in eval mode; the network is left in the mode that it was in.

    Args:
        network: of ``load_checkpoint``, or of ``build_model``.
        image: RGB of any size: an (H, W, 3) uint8 array, a (3, H, W) uint8 tensor, or a PIL image of any mode, which is
            turned upright first if its EXIF data say so.
        recipe: default: that of the checkpoint that the network was loaded from.

    Returns:
        (H, W) uint8 on the CPU, numbers of the classes.

    Raises:
        ValueError: an image of another shape or type; a network without a recipe.
        UserError: a PIL image of more than 16 bits a channel; a device that is too small for a window.
    """
    recipe = recipe or getattr(network, "recipe", None)
    if recipe is None:
        raise ValueError("this network is not of load_checkpoint: give its recipe, predict(network, image, recipe)")
    device = next(network.parameters()).device
    normalise = Normalise(recipe.dataset.mean, recipe.dataset.std, device)
    predictor = Predictor(Protocol(recipe.dataset.val.crop.size), device)
    pixels = _pixels(image).unsqueeze(0).to(device)
    with evaluating(network):
        return predictor(network, normalise(pixels))[0].cpu()


def _pixels(image: np.ndarray | Tensor | Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    pixels = image
    if isinstance(image, Image.Image):
        pixels = TF.pil_to_tensor(as_rgb(upright(image.copy()), "image"))
    elif isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    if not (isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == 3):
        got = f"{type(image).__name__} {tuple(getattr(image, 'shape', ()))} {getattr(image, 'dtype', '')}".rstrip()
        raise ValueError(f"image must be an (H, W, 3) uint8 array, a (3, H, W) uint8 tensor or a PIL image, got {got}")
    return pixels
