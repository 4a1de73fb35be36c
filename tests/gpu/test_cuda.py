"""What only a GPU can show; skipped where there is none. Written without one at hand: bounds are estimates."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from first_step import gradients, progress, ready, step_of

from imas.config import load_config
from imas.engine import precision
from imas.engine.optim import build_optimizer, param_groups
from imas.schema import Config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    ends = (path.parent / "checkpoints" / "ckpt.pth" for path in (straight, resumed))
    one, two = (torch.load(path, weights_only=True) for path in ends)
    assert bool(one["scaler_state"]) == bool(words) and one["scaler_state"] == two["scaler_state"]
    for key in ("model_state", "teacher_state"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])
