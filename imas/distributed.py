"""Processes and devices: quietly rank 0 of 1 where no launcher has started several."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from .errors import UserError

log = logging.getLogger("imas")

_PATIENCE = timedelta(minutes=10)  # with a rank that does not come, or does not answer
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
_CHECKING = timedelta(hours=1)  # the same with rank 0, which looks at all data before it comes
_AHEAD = {"gloo": 1, "nccl": 2}  # of an iteration that a rank is about to begin, the next that no rank can have begun
_PAIRS = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer")  # in gloo's messages
_SHOWN = 6
_NVIDIA = Path("/dev")  # where the driver's devices are
_store: dist.Store | None = None  # of the processes, while they are joined


def for_summary(main: Callable[[], None]) -> Callable[[], None]:
    """A script's ``main``, whose error is shown in torchrun's summary where torchrun has started it."""
    return record(main) if "TORCHELASTIC_ERROR_FILE" in os.environ else main


def read_launcher() -> None:
    """Take rank, world size and address from SLURM, where ``srun`` and no other launcher has started this process."""
    environment = os.environ
    for name in _LAUNCHER:
        if not environment.get(name):
            environment.pop(name, None)
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or "1"
    if "RANK" in environment or "WORLD_SIZE" in environment or tasks == "1":
        _need(_LAUNCHER, "WORLD_SIZE" if "WORLD_SIZE" in environment else "RANK", "a launcher (torchrun, srun)")
        return
    _need(_SLURM, "SLURM_STEP_NUM_TASKS", "srun")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host(environment["SLURM_STEP_NODELIST"])
    number = int(environment["SLURM_JOB_ID"]) + 7919 * int(environment.get("SLURM_STEP_ID", 0))  # of each step its own
    environment.setdefault("MASTER_PORT", str(20_000 + number % 20_000))


def _need(names: tuple[str, ...], given: str, launcher: str) -> None:
    """See that all variables of a launcher are set where ``given``, one of them, is.

    Raises:
        UserError: one is missing, or is no number.
    """
    value = os.environ.get(given)
    if value is None or (given == "WORLD_SIZE" and value == "1"):
        return
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{given} is {value}, but {', '.join(missing)} is not set: {launcher} sets all of them. Start with it, or "
            f"unset {given} for a run on one process"
        )
    for name in (name for name in names if name not in ("MASTER_ADDR", "SLURM_STEP_NODELIST")):
        if not os.environ[name].isdigit():
            raise UserError(f"{name} is {os.environ[name]!r}; expected a number, as {launcher} sets it")


def _first_host(nodes: str) -> str:
    """Of SLURM's short form of a list of nodes, such as ``gpu[03-05,07]``.

    Raises:
        UserError: the list cannot be read; that node has no address, for which torch would ask for minutes.
    """
    host = nodes.split(",")[0]
    if "[" in nodes:
        try:
            shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"SLURM_STEP_NODELIST {nodes}: scontrol cannot tell its hosts ({error}); set MASTER_ADDR"
            ) from None
        host = shown.stdout.split()[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(
            f"the node {host} has no address on {platform.node()} ({error.strerror}); set MASTER_ADDR to the NodeAddr "
            f"or NodeHostName that scontrol show node {host} prints"
        ) from None
    return host


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` or ``srun`` started, if one did; gives this process's device.

    NCCL on CUDA, gloo on the CPU. The device follows LOCAL_RANK.

    Raises:
        UserError: CUDA that cannot be used, too few GPUs, a port in use, a rank that does not come or comes twice,
            ranks with other versions.
    """
    device = _device()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    _join(device)
    try:
        agree({"python": platform.python_version(), "torch": torch.__version__})
        yield device
    except RuntimeError as error:
        _leave(failed=True)
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in _PAIRS):
            raise
        raise UserError(
            f"lost the others: one of them has ended, or did not answer for {_PATIENCE.seconds // 60} minutes; the "
            f"cause is in its output ({str(error).splitlines()[0]})"
        ) from None
    except BaseException:
        _leave(failed=True)
        raise
    _leave(failed=False)


def _device() -> torch.device:
    """This process's GPU, by LOCAL_RANK; the CPU where there is none."""
    if not torch.cuda.is_available():
        refuse_unusable_cuda()
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("SLURM_LOCALID") == str(local):
        local = 0  # srun --gpus-per-task=1: each task sees its own GPU alone
    if local >= count:
        raise UserError(
            f"local rank {local}, but {platform.node()} has {count} GPU(s): start as many processes a node as it has "
            "GPUs (NGPU, --nproc_per_node, --ntasks-per-node)"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def refuse_unusable_cuda() -> None:
    """Raise ``UserError`` where there is a GPU that torch cannot use: a run that was given GPUs does not train on the
    CPU instead, which would take months.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = [name for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE") if os.environ.get(name)]
    if torch.version.cuda is None or visible in ("", "-1"):
        return
    if visible is not None:
        given.insert(0, "CUDA_VISIBLE_DEVICES")
    signs = [f"{name}={os.environ[name]}" for name in given] + list(map(str, _NVIDIA.glob("nvidia[0-9]*")))
    if not signs:
        return
    try:
        torch.cuda.init()
        reason = "no device was found"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(
        f"there is a GPU ({signs[0]}), but torch {torch.__version__} cannot use it: {reason}. Mend the driver, or "
        "install a torch made for it; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
    )


def _join(device: torch.device) -> None:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT."""
    global _store
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    who, minutes = f"rank {rank()} of {os.environ['WORLD_SIZE']}", _PATIENCE.seconds // 60
    log.info("%s waits for the others at %s, %d minutes at most", who, where, minutes)
    try:
        patience = _PATIENCE if is_main() else _CHECKING
        store, own_rank, world = next(dist.rendezvous("env://", timeout=patience))
        _store = dist.PrefixStore(f"attempt {_attempt()}", store)
        _come_once(own_rank)
        _store.wait(["rank 0"], _CHECKING)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=_store, rank=own_rank, world_size=world,
            timeout=_PATIENCE, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        hint = (
            "that port is in use: choose another MASTER_PORT (--rdzv-endpoint)"
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
            else f"did all {os.environ['WORLD_SIZE']} ranks start, can they reach that address, does its port pass?"
        )
        raise UserError(f"cannot join the others at {where}: {hint} ({reason})") from None


def _come_once(own_rank: int) -> None:
    """Two runs at one address would take each other's ranks for their own."""
    me = f"{platform.node()}, pid {os.getpid()}"
    there = _store.compare_set(f"rank {own_rank}", "", me).decode()
    if there != me:
        raise UserError(
            f"rank {own_rank} is here already ({there}): another run uses this address, so choose another MASTER_PORT "
            "(RDZV_ENDPOINT, RDZV_ID); or, after a restart on several nodes, an earlier attempt has left it, so start "
            "torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as single_run.sh does"
        )


def _leave(failed: bool) -> None:
    """Leave the others. NCCL may wait for ranks that never come: after a failure it ends once the cause is printed."""
    if failed and dist.get_backend() == "nccl":
        atexit.register(getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group))
    else:
        time.sleep(0.1)  # gloo of torch 2.6 ends its threads with the GIL held, for which they wait after a collective
        dist.destroy_process_group()


def _attempt() -> str:
    """Which restart of torchrun this is. On one node all of them share a store, and what the last one left in it would
    stop or hang this one. Several nodes count by themselves; ``single_run.sh`` makes them begin with a new store.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"


def agree(run: Mapping[str, Any]) -> None:
    """See that this is the same on all ranks, which otherwise compute other things, hang, or are of two runs.

    Raises:
        UserError: on every rank, naming what differs, with ranks and hosts.
    """
    everyone = gather((platform.node(), dict(run)))
    first = everyone[0][1]
    names = dict.fromkeys(name for _, each in everyone for name in each)
    different = [name for name in names if any(each.get(name) != first.get(name) for _, each in everyone)]
    if not different:
        return
    lines = []
    for name in different[:_SHOWN]:
        values: dict[str, list[str]] = {}
        for i, (host, each) in enumerate(everyone):
            values.setdefault(str(each.get(name)), []).append(f"rank {i} on {host}")
        shown = (f"{value} ({', '.join(ranks[:2])}{', ...' * (len(ranks) > 2)})" for value, ranks in values.items())
        lines.append(f"{name}: {' / '.join(shown)}")
    if len(different) > _SHOWN:
        lines.append(f"and {len(different) - _SHOWN} more")
    raise UserError(
        f"the ranks differ, so nothing is trained: {'; '.join(lines)}. Start all of them by one command, in one "
        "environment, with one run folder"
    )


def devices() -> list[str]:
    """What this machine has to compute on, a line a device."""
    lines = [f"CPU, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(i))
        lines.append(f"GPU {i}, {torch.cuda.get_device_name(i)}, {total:.1f} GiB, {free:.1f} of them free")
    return lines


def rank() -> int:
    """Rank of this process; before the process group is initialised, the launcher's RANK, else 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process logs and saves."""
    return rank() == 0


def announce(iteration: int) -> None:
    """Tell all ranks, from one that is about to begin this iteration, before which one all of them stop.

    On gloo no rank is beyond this iteration, whose gradients need this one; on NCCL none is beyond the next (``Pace``).
    """
    _store.compare_set("imas/stop", "", str(iteration + _AHEAD[dist.get_backend()]))


def announced() -> int | None:
    """The iteration before which all ranks stop, if one was announced."""
    return int(_store.get("imas/stop")) if _store.check(["imas/stop"]) else None


class Pace:
    """Called after every update: keeps the host at most one update ahead of its GPU, so that ranks stay close."""

    def __init__(self, device: torch.device) -> None:
        self.events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" and world_size() > 1 else None

    def __call__(self) -> None:
        if self.events is not None:
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 1:
                self.events.popleft().synchronize()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is true on any rank."""
    return flag if world_size() == 1 else bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item())


def wrap(module: nn.Module, device: torch.device, sync_bn: bool) -> nn.Module:
    """The module in DistributedDataParallel where there are several processes, else as it is.

    All ranks begin with the parameters and buffers of rank 0. Its buffers go to all before each forward, too, but not
    with ``sync_bn``, where all compute the same.
    """
    if world_size() == 1:
        return module
    devices = [device.index] if device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = not sync_bn  # as an argument it would leave them unequal at the beginning
    return wrapped


def gradients_shared(wrapped: nn.Module, share: bool) -> AbstractContextManager:
    """Whether a backward pass inside shares its gradients with the other ranks; accumulation shares the last alone."""
    if share or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def same_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, whose networks are saved: BatchNorm statistics differ between ranks."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def concat(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every rank's tensor, joined along the first dimension in the order of the ranks; of one process: its own.

    Args:
        tensor: (length, …), all else equal on all ranks.
        lengths: of every rank, the same list on all of them.
    """
    if world_size() == 1:
        return tensor
    longest = max(lengths)
    if longest == 0:
        return tensor
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def gather_rows(row: Tensor) -> Tensor:
    """Every rank's (N,) tensor as a row, on every rank: (ranks, N)."""
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
