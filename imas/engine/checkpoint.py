"""Checkpoints: written whole or not at all, read safely, and explained where they do not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.pretrained import load_safely
from ..strict import UserError

LAST, BEST = "ckpt.pth", "ckpt_best.pth"
_STATES = {"student": "model_state", "teacher": "teacher_state"}
_SHOWN = 6


def save(state: dict[str, Any], path: Path) -> None:
    """Write to a temporary file beside ``path``, flush to the disk, rename: a reader sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's dict, tensors on the CPU, by ``weights_only=True``.

    Raises:
        UserError: no such file, a file that is torn or not safe to load, or no checkpoint of ours.
    """
    try:
        state = load_safely(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"checkpoint {error}") from None
    if not isinstance(state, dict) or "model_state" not in state:
        raise UserError(
            f"{path}: not a training checkpoint; expected a dict with model_state and, of iMAS, teacher_state"
        )
    return state


def network_states(networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The states of ``Method.networks()`` under their keys in a checkpoint."""
    return {_STATES[name]: network.state_dict() for name, network in networks.items()}


def load_network(network: nn.Module, name: str, state: dict[str, Any], path: str | Path) -> None:
    """Load one network (``student`` or ``teacher``) from a checkpoint's dict. A ``module.`` prefix is dropped.

    Raises:
        UserError: the checkpoint has no such network, or its tensors do not fit; they are named.
    """
    if state.get(_STATES[name]) is None:
        raise UserError(f"{path}: holds no {name}")
    weights = {key.removeprefix("module."): tensor for key, tensor in state[_STATES[name]].items()}
    own = network.state_dict()
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}"
            for key in own
            if key in weights and weights[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        lines = [
            f"  {len(keys)} {what}: {', '.join(keys[:_SHOWN])}{' ...' if len(keys) > _SHOWN else ''}"
            for what, keys in problems.items()
            if keys
        ]
        raise UserError("\n".join([f"{path}: its {name} does not fit the network of the configuration:", *lines]))
    network.load_state_dict(weights)
