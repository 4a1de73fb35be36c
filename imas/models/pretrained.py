"""ImageNet weight files for the encoder: three kinds, which differ in their keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
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
_FIRST = "layer1.0.conv1.weight"  # every ResNet has it
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")  # keys below which files have their tensors

# What NumPy's numbers and arrays of numbers are pickled with, by the names of its two generations.
_NUMPY = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd")]
_MULTIARRAY = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
_NUMPY += [
    (getattr(_MULTIARRAY, name), f"numpy.{core}.multiarray.{name}")
    for name in ("scalar", "_reconstruct")
    for core in ("core", "_core")
]
# First bytes of files that people have in the place of weights.
_FOREIGN = {
    b"<!doctype": "is a web page: the download has failed",
    b"<html": "is a web page: the download has failed",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: get it with git lfs pull",
}


def load_encoder(encoder: ResNet, source: str | Path) -> None:
    """Load ImageNet weights of any known kind, and log how many tensors matched and which did not.

    The kinds (spec, ImageNet files) differ in the names of their tensors: the authors' own files; the MIT CSAIL files,
    the same network with another spelling of the stem; torchvision's, for an encoder with ``deep_stem=False``. ``fc.*``
    is left out.

    Args:
        source: a weight file, or ``torchvision``, which fetches its own weights (to torch's cache, once).

    Raises:
        FileNotFoundError: no such file. ValueError: no weight file, one for another stem, or nothing in it fits.
        OSError: torchvision's weights cannot be fetched.
    """
    state = fetch_torchvision(encoder.name) if source == "torchvision" else read_weights(source)
    prefix = next((name.removesuffix(_FIRST) for name in state if name.endswith(_FIRST)), "")
    if prefix:
        log.info("%s: of its tensors, those whose names begin with %s", source, prefix)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    kind = "the authors'"
    if "conv3.weight" in state:
        kind, state = "MIT CSAIL's", {_renamed(name): tensor for name, tensor in state.items()}
    elif "conv1.weight" in state:
        kind = "torchvision's"
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    own = encoder.state_dict()
    plain, deep = "conv1.weight" in state, "conv1.0.weight" in state
    if (plain and "conv1.weight" not in own) or (deep and "conv1.0.weight" not in own):
        raise ValueError(
            f"{source}: a file of {kind} kind, for another stem than this encoder's; set net.encoder.kwargs.deep_stem "
            f"to {'true' if deep else 'false'}, or take another file (see pretrained/README.md)"
        )
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    if not fitting:
        raise ValueError(
            f"{source}: none of its {len(state)} tensors fits this encoder (first: {', '.join(list(state)[:4])}). "
            "Is it a weight file of this ResNet?"
        )
    need_finite(fitting, source)
    encoder.load_state_dict(fitting, strict=False)
    log.info("encoder weights from %s (%s kind): %d of %d tensors matched", source, kind, len(fitting), len(own))
    # num_batches_tracked is missing from files of old PyTorch versions and steers nothing here.
    for line in misfits(own, state, "num_batches_tracked"):
        log.warning("  %s", line)


def need_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ``ValueError`` with the names of tensors that hold NaN or infinite numbers."""
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source}: NaN or infinite numbers in {len(broken)} tensors: {', '.join(broken[:_SHOWN])}")


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], optional: str | None = None) -> list[str]:
    """What keeps ``given`` from being the state ``own`` of a network, a line each for names that are missing,
    unexpected, and misshapen. Names that end in ``optional`` may be missing.
    """
    shapes = [(name, tuple(given[name].shape), tuple(own[name].shape)) for name in own if name in given]
    kinds = {
        "missing": [name for name in own if name not in given and not (optional and name.endswith(optional))],
        "unexpected": [name for name in given if name not in own],
        "misshapen": [f"{name} {got}, expected {expected}" for name, got, expected in shapes if got != expected],
    }
    lines = []
    for what, names in kinds.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines += [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"] if names else []
    return lines


def fetch_torchvision(name: str) -> dict[str, Tensor]:
    """torchvision's best ImageNet weights of a ResNet, downloaded once into torch's cache.

    Raises:
        OSError: they are not there and cannot be downloaded.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise OSError(
            f"torchvision could not fetch {weights.url} ({error}); put the file into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or name a weight file"
        ) from None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Named tensors of a weight file, loaded safely; a ``state_dict``, ``model``, ... entry is unpacked.

    Raises:
        FileNotFoundError, ValueError: see ``load_safely``; or a file that holds something else.
    """
    state = load_safely(path)
    for key in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dict of named tensors")
    return state


def load_safely(path: str | Path) -> Any:
    """``torch.load`` to the CPU that executes nothing. NumPy's numbers and arrays of numbers are let in, too.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that is torn, foreign or not safe to load.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path}: the file is empty")
    for words, what in _FOREIGN.items():
        if start.lstrip().lower().startswith(words):
            raise ValueError(f"{path}: {what}")
    try:
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes torch raise almost anything
        objects = re.search(r"GLOBAL ([\w.]+)", str(error))
        if objects:
            raise ValueError(
                f"{path}: not safe to load, since it holds objects beside tensors ({objects[1]}), as a whole pickled "
                "network does; save its state_dict() instead"
            ) from None
        reason = re.split(r"\n|\. |\x1b", str(error).strip())[0] or type(error).__name__  # torch advises unsafe loading
        raise ValueError(f"{path}: torn, foreign or not safe to load ({reason})") from None


def _renamed(name: str) -> str:
    module, _, rest = name.partition(".")
    return f"{_MIT_STEM[module]}.{rest}" if module in _MIT_STEM else name
