"""ImageNet weight files for the encoder: three kinds exist in the wild, told apart by their keys."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .resnet import ResNet

log = logging.getLogger("imas")

# The scene-parsing files of MIT CSAIL spell the deep stem without a Sequential.
_MIT_STEM = {
    "conv1": "conv1.0",
    "bn1": "conv1.1",
    "conv2": "conv1.3",
    "bn2": "conv1.4",
    "conv3": "conv1.6",
    "bn3": "bn1",
}
_SHOWN = 8


def load_encoder(encoder: ResNet, path: str | Path) -> None:
    """Load ImageNet weights of any known kind, and log how many tensors matched and which did not.

    The kinds (spec, ImageNet files): the authors' own files; the MIT CSAIL files, the same network with another
    spelling of the stem; torchvision's, for an encoder with ``deep_stem=False``. ``fc.*`` is left out.

    Raises:
        FileNotFoundError: no such file. ValueError: no weight file, or nothing in it fits.
    """
    state = read_weights(path)
    if "conv3.weight" in state:
        state = {_renamed(name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    own = encoder.state_dict()
    misshapen = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    if not fitting:
        raise ValueError(
            f"{path}: none of its {len(state)} tensors fits this encoder (first names: {', '.join(list(state)[:4])}); "
            "is it a weight file of this ResNet, and is net.encoder.kwargs.deep_stem right?"
        )
    # num_batches_tracked is missing from files of old PyTorch versions and steers nothing here.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    encoder.load_state_dict(fitting, strict=False)
    log.info("encoder weights from %s: %d of %d tensors matched", path, len(fitting), len(own))
    for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            log.warning("  %d %s: %s%s", len(names), what, ", ".join(names[:_SHOWN]), more)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Named tensors of a weight file, loaded safely; a ``state_dict`` entry is unpacked.

    Raises:
        FileNotFoundError, ValueError: see ``load_safely``; or a file that holds something else.
    """
    state = load_safely(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dict of named tensors")
    return state


def load_safely(path: str | Path) -> Any:
    """``torch.load`` to the CPU that executes nothing.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that is torn, foreign or not safe to load.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes torch raise almost anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path}: torn, foreign or not safe to load ({reason})") from None


def _renamed(name: str) -> str:
    module, _, rest = name.partition(".")
    return f"{_MIT_STEM[module]}.{rest}" if module in _MIT_STEM else name
