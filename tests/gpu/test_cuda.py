"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, meeting
from first_step import batch_for, gradients, on, progress, ready, small, step_of
from test_methods import CONTRACT
from torch import nn

from imas import ConfusionMatrix, distributed
from imas.config import load_config
from imas.engine import precision
from imas.engine.optim import build_optimizer, param_groups
from imas.models.sync_bn import synchronise
from imas.schema import Config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@contextmanager
def waiting_is(what: str) -> Iterator[None]:
    """Inside, the host's waits for the device are an ``error``, or something to ``warn`` of."""
    torch.cuda.set_sync_debug_mode(what)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def ends_alike(*configs: Path) -> tuple[dict, dict]:
    """The last checkpoints of two runs, whose networks are bitwise equal."""
    one, two = (torch.load(path.parent / "checkpoints/ckpt.pth", weights_only=True) for path in configs)
    for key in ("model_state", "teacher_state"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])
    return one, two


@pytest.fixture
def tiny(experiment: Callable[..., Path]) -> Callable[..., Config]:
    """The tiny experiment's configuration with an auxiliary head, OHEM and overrides."""
    net = copy.deepcopy(TINY["net"]) | {"aux_loss": {}}
    criterion = {"type": "ohem", "kwargs": {"min_kept": 500}}
    return lambda *words: load_config(experiment(net=net, criterion=criterion), words)


@pytest.mark.parametrize(
    ("word", "loss", "gradient"),
    [
        ("channels_last=true", 1e-4, 0.05),
        ("channels_last=false", 1e-4, 0.05),
        ("checkpoint_encoder=true", 1e-4, 0.05),
        ("compile=true", 1e-4, 0.05),
        ("tf32=true", 1e-2, 0.3),
        ("amp=bf16", 5e-2, 0.7),
        ("amp=fp16", 1e-2, 0.3),
    ],
)
def test_a_step_on_the_gpu_is_that_of_the_cpu(tiny, word: str, loss: float, gradient: float) -> None:
    plain, batch = ready(tiny(), CPU)
    expected = step_of(tiny(), CPU, plain, batch)
    config = tiny(f"trainer.{word}")
    method, batch = ready(config, CUDA)
    step = step_of(config, CUDA, method, batch)
    for name, value in expected.scalars.items():
        torch.testing.assert_close(step.scalars[name].cpu(), value, rtol=loss, atol=loss)
    difference = gradients(method) - gradients(plain)
    assert difference.norm() <= gradient * gradients(plain).norm()
    assert list(method.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("words", [(), ("trainer.amp=fp16",), ("trainer.amp=bf16", "trainer.checkpoint_encoder=true")])
def test_a_step_waits_for_the_device_only_to_decide_on_cutmix(tiny, words: tuple[str, ...]) -> None:
    """Without a CutMix that follows the score nothing waits at all; else ``mean(h).item()`` does."""
    config = tiny("imas.hardness.trigger_cutmix=false", *words)
    method, batch = ready(config, CUDA)
    optimizer = build_optimizer(param_groups(method.trained()), config.trainer.optimizer)
    scaler = precision.make_scaler(config.trainer, CUDA)

    now = progress(2, 9, 4, seed=1)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast(config.trainer, CUDA):
            step = method(*batch, now)
        scaler.scale(step.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        method.after_step(now)

    update()  # makes momentum and scale
    with waiting_is("error"):
        update()


@pytest.mark.parametrize("words", [(), ("trainer.amp=fp16",)])
def test_a_deterministic_run_goes_on_bitwise(experiment: Callable[..., Path], words: tuple[str, ...]) -> None:
    def train(path: Path) -> None:
        options = [word for each in (*words, "trainer.epochs=2", "saver.use_tb=false") for word in ("--set", each)]
        command = [sys.executable, "train_semi.py", "--config", str(path), "--deterministic", *options]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)

    straight, resumed = experiment("straight"), experiment("resumed")
    train(straight)
    (resumed.parent / "checkpoints").mkdir()
    shutil.copy(straight.parent / "checkpoints" / "ckpt_prev.pth", resumed.parent / "checkpoints" / "ckpt.pth")
    train(resumed)
    one, two = ends_alike(straight, resumed)
    assert bool(one["scaler_state"]) == bool(words) and one["scaler_state"] == two["scaler_state"]


@pytest.mark.parametrize("name", CONTRACT)
def test_how_often_a_step_of_any_method_waits(name: str) -> None:
    """None of these follows the score with CutMix. What is pasted and drawn is sent without a wait, too. U2PL asks once
    for the number of pixels of each class.
    """
    method = small(name, **CONTRACT[name]).to(CUDA)
    batch = on(batch_for(method.wants(method.options)), CUDA)
    method(*batch, progress(3, 15)).loss.backward()
    with warnings.catch_warnings(record=True) as waits, waiting_is("warn"):
        warnings.simplefilter("always")
        method(*batch, progress(3, 15)).loss.backward()
        method.after_step(progress(3, 15))
    waits = [each for each in waits if "synchronizing CUDA operation" in str(each.message)]
    assert len(waits) == (1 if name == "u2pl" else 0), [f"{each.filename}:{each.lineno}" for each in waits]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_sync_bn_of_equal_ranks_is_batch_norm(
    monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format, dtype: torch.dtype, tolerance: float
) -> None:
    """One GPU in the place of two, whose images are the same: the arithmetic and its waits, without NCCL."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_rows", lambda row: torch.stack([row, row]))
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda tensor: 2 * tensor)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(32)).to(CUDA)
    ours = copy.deepcopy(plain)
    synchronise(ours)
    image = (2 * torch.randn(3, 32, 33, 33, device=CUDA) + 5).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn_like(image)
    results = []
    for module in (plain, ours):
        (module(image) * weight).sum().backward()  # what a first call makes may wait
        module.zero_grad()
        mine = image.clone().requires_grad_()
        with waiting_is("error"):
            output = module(mine)
            (output * weight).sum().backward()
        results.append([output, mine.grad, module[0].running_mean, module[0].weight.grad / weight.numel()])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def start_ranks(*words: str | Path) -> list[subprocess.Popen]:
    """A script on two ranks through NCCL. Where there is one GPU both take it: NCCL refuses that to ranks of one host,
    so each gets a host's name of its own.
    """
    where, ranks = meeting() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}, []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if torch.cuda.device_count() == 1:
            own |= {"LOCAL_RANK": "0", "NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo"}
        command = [sys.executable, *map(str, words)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **where, **own}))
    return ranks


def ended(ranks: list[subprocess.Popen]) -> list[int]:
    """Their statuses."""
    try:
        return [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_sync_bn_through_nccl_waits_for_nothing_and_is_compiled_in_one_graph() -> None:
    assert ended(start_ranks("tests/gpu/sync_bn_nccl.py")) == [0, 0]


def test_ranks_are_one_process_with_the_whole_batch() -> None:
    assert ended(start_ranks("tests/sync_bn_ranks.py")) == [0, 0]


def test_two_ranks_stop_together_and_go_on_bitwise(experiment: Callable[..., Path]) -> None:
    """Told by the rank that writes nothing."""
    words = ["--deterministic", "--set", "net.sync_bn=true", "--set", "saver.use_tb=false"]
    words += ["--set", "trainer.epochs=20"]
    straight, stopped = experiment("straight"), experiment("stopped")
    assert ended(start_ranks("train_semi.py", "--config", straight, *words)) == [0, 0]
    ranks = start_ranks("train_semi.py", "--config", stopped, *words)
    log, patience = stopped.parent / "log/train.log", time.monotonic() + 120
    while "epoch 3: " not in (log.read_text() if log.is_file() else "") and time.monotonic() < patience:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    assert ended(ranks) == [75, 75]
    assert ended(start_ranks("train_semi.py", "--config", stopped, *words)) == [0, 0]
    ends_alike(straight, stopped)


def test_counts_are_those_of_the_cpu_in_one_piece() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 19, (1, 1024, 2048), generator=generator).byte()
    target = torch.randint(0, 20, (1, 1024, 2048), generator=generator).byte()
    target[target == 19] = 255
    matrices = [ConfusionMatrix(19, device=device) for device in (CPU, CUDA)]
    for matrix in matrices:
        matrix.update(predicted.to(matrix.counts.device), target.to(matrix.counts.device))
    assert torch.equal(matrices[0].counts, matrices[1].counts.cpu())
