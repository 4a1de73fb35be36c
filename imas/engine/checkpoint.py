"""Checkpoints: written whole or not at all, read safely, and explained where they do not fit."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import replacing
from ..legacy import STATE_KEYS
from ..methods.base import Method
from ..models.pretrained import load_safely, misfits, need_finite

log = logging.getLogger("imas")

LAST, PREVIOUS, BEST = "ckpt.pth", "ckpt_prev.pth", "ckpt_best.pth"
_FILES = 4  # on the disk at once: these, and the one that is being written
_OTHER_STATES = ("optimizer_state", "scaler_state", "method_state")  # of no network


def save(state: dict[str, Any], path: Path, twin: Path | None = None) -> None:
    """Write to a temporary file beside ``path``, flush to the disk, rename: a reader sees the old file or the new. The
    last checkpoint before this one stays as ``ckpt_prev.pth``.

    Args:
        twin: a file to which the same state has just been saved. It gets a second name where the file system can.

    Raises:
        UserError: a full disk, a folder that cannot be written to. The file that was there stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            if twin is None or not _linked(twin, temporary):
                with open(temporary, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            if path.name == LAST and path.is_file():
                os.replace(path, path.with_name(PREVIOUS))
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}). The last good checkpoint stays as it was") from None


def _linked(path: Path, name: Path) -> bool:
    """Whether the file could get the other name, too. Nothing ever writes into a checkpoint that has its name."""
    try:
        name.unlink(missing_ok=True)
        os.link(path, name)
    except OSError:
        return False
    return True


def need_space(folder: Path, method: Method, averages: int) -> None:
    """Raise ``UserError`` where the checkpoints of a run will not fit on the disk.

    Args:
        averages: running averages that the optimiser keeps of every trained parameter.
    """
    trained = [weight for weight in method.parameters() if weight.requires_grad]
    size = method.extra_bytes() + averages * sum(weight.nbytes for weight in trained)
    for network in method.networks().values():
        size += sum(tensor.nbytes for tensor in network.state_dict().values())
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < _FILES * size:
        raise UserError(
            f"{there}: {free / 1e9:.1f} GB are free, but the checkpoints of this run need {_FILES * size / 1e9:.1f} GB "
            f"({_FILES} files of {size / 1e9:.2f} GB)"
        )


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's dict, tensors on the CPU, by ``weights_only=True``.

    Raises:
        UserError: no such file, a file that is torn or not safe to load, or no checkpoint of ours.
    """
    try:
        state = load_safely(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"checkpoint {error}") from None
    if not isinstance(state, dict) or not network_names(state):
        keys = ", ".join(STATE_KEYS.values())
        raise UserError(f"{path}: not a training checkpoint; expected a dict with the state of a network ({keys}, ...)")
    return state


def kept(epoch: int) -> str:
    """The file of networks that stay after an epoch, counted from 1."""
    return f"ckpt_epoch{epoch:03d}.pth"


def network_states(networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The states of networks under their keys."""
    return {state_key(name): network.state_dict() for name, network in networks.items()}


def state_key(name: str) -> str:
    """The key of a network's state in a checkpoint."""
    return STATE_KEYS.get(name, f"{name}_state")


def network_names(state: dict[str, Any]) -> list[str]:
    """The networks whose states a checkpoint's dict holds."""
    names = {key: name for name, key in STATE_KEYS.items()}
    keys = [key for key in state if key.endswith("_state") and key not in _OTHER_STATES and state[key] is not None]
    return [names.get(key, key.removesuffix("_state")) for key in keys]


def method_states(method: Method) -> dict[str, dict[str, Any]]:
    """The state that a method is resumed with: its networks' states under their keys, and ``method_state``, which holds
    the rest.
    """
    networks = method.networks()
    prefixes = tuple(
        f"{name}." for name, module in method.named_modules() if any(module is each for each in networks.values())
    )
    own = {name: value for name, value in method.state_dict().items() if not name.startswith(prefixes)}
    return network_states(networks) | {"method_state": own}


def load_network(network: nn.Module, name: str, state: dict[str, Any], path: str | Path) -> None:
    """Load one network from a checkpoint's dict, by its name. A ``module.`` prefix is dropped.

    Raises:
        UserError: the checkpoint has no such network, or its tensors do not fit or are not finite; they are named.
    """
    if state.get(state_key(name)) is None:
        raise UserError(f"{path}: has no network {name}; it has {', '.join(network_names(state))}")
    weights = {key.removeprefix("module."): tensor for key, tensor in state[state_key(name)].items()}
    if lines := misfits(network.state_dict(), weights):
        head = f"{path}: its {name} does not fit the network of the configuration:"
        raise UserError("\n  ".join([head, *lines]))
    try:
        need_finite(weights, f"{path}, {name}")
    except ValueError as error:
        raise UserError(f"{error}. Take an earlier checkpoint") from None
    network.load_state_dict(weights)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that a run with this snapshot folder resumes, None for a new run.

    Args:
        resume: ``auto``: the folder's last checkpoint, if there is one; ``never``; or a checkpoint file.

    Raises:
        UserError: a new run, or one that continues another file, would overwrite the folder's checkpoints; no such
            file.
    """
    last = folder / LAST
    if resume == "auto":
        files = (last, folder / PREVIOUS)  # the latter alone where a run was killed between two renames
        return next((path for path in files if path.is_file()), None)
    chosen = None if resume == "never" else Path(resume)
    if chosen is not None and not chosen.is_file():
        raise UserError(f"--resume {chosen}: no such file; expected auto, never or a checkpoint")
    if last.is_file() and (chosen is None or chosen.resolve().parent != folder.resolve()):
        raise UserError(
            f"{last}: an earlier run has left its checkpoint here. Resume it with --resume auto, or name another "
            "folder with --out"
        )
    return chosen


def start_from(networks: dict[str, nn.Module], path: str | Path) -> None:
    """Give the networks the weights of a checkpoint, to start training with. A network that the checkpoint lacks gets
    those of its first one.

    Raises:
        UserError: see ``read`` and ``load_network``.
    """
    state = read(path)
    there = network_names(state)
    for name, network in networks.items():
        load_network(network, name if name in there else there[0], state, path)
    log.info("training starts from the networks of %s (epoch %s)", path, state.get("epoch"))


def resume(state: dict[str, Any], path: Path, method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Load a run's method and momentum. Rates come from the configuration.

    A checkpoint of the authors' code has neither our best figures nor, always, the order of our parameters: a warning
    names what cannot be taken over.

    Raises:
        UserError: see ``load_network``; a checkpoint without its epoch.
    """
    if type(state.get("epoch")) is not int:
        raise UserError(f"{path}: has no epoch; as a start for a new run, name it in trainer.start_from")
    for name, network in method.networks().items():
        load_network(network, name, state, path)
    method.load_state_dict(state.get("method_state") or {}, strict=False)  # the networks are loaded already
    _load_momentum(optimizer, state.get("optimizer_state"), path)
    if "best" not in state:  # None in ours, before the first evaluation
        log.warning("%s has no best mIoU of ours: the best starts anew", path)
    step = state.get("step", 0)
    done = [f"epoch {state['epoch'] - 1}"] if state["epoch"] else []
    done += [f"{step} updates"] if step or not done else []
    log.info("resumed after %s from %s", " and ".join(done), path)


def read_or_previous(path: Path) -> tuple[dict[str, Any], Path]:
    """A checkpoint; where it is torn or foreign, the one before it."""
    try:
        return read(path), path
    except UserError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != LAST or not previous.is_file():
            raise
        log.warning("%s\nusing the one before it: %s", error, previous)
        return read(previous), previous


def _load_momentum(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, path: Path) -> None:
    """The running averages of the optimiser, if they are of our parameters; else they start at zero."""
    own = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    averages = (state or {}).get("state", {})
    fits = set(averages) == set(range(len(parameters))) and all(
        average.shape == parameters[i].shape
        for i, values in averages.items()
        for average in values.values()
        if isinstance(average, Tensor) and average.dim() > 0
    )
    if fits:
        optimizer.load_state_dict(own | {"state": averages})
        for parameter, values in optimizer.state.items():
            optimizer.state[parameter] = _averages_like(parameter, values)
    else:
        log.warning("%s: its optimizer_state is not of these parameters in this order: momentum starts at zero", path)


def take_momentum(optimizer: torch.optim.Optimizer, path: Path, network: str) -> None:
    """Give an optimiser over ``optim.param_groups`` of one network the running averages that a checkpoint of several
    networks has of it.

    Raises:
        UserError: see ``read``.
    """
    state = read(path)["optimizer_state"]
    theirs = {group["name"]: group["params"] for group in state["param_groups"]}
    for group in optimizer.param_groups:
        for parameter, i in zip(group["params"], theirs[f"{network}.{group['name']}"], strict=True):
            if i in state["state"]:
                optimizer.state[parameter] = _averages_like(parameter, state["state"][i])


def _averages_like(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's values of a parameter, on its device and in its memory format, as fused kernels want them."""
    return {
        name: torch.empty_like(parameter).copy_(value) if isinstance(value, Tensor) and value.dim() > 0 else value
        for name, value in values.items()
    }
