"""How a step computes: clever operations against plain twins, and what each option of the trainer may change."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import golden
import pytest
import torch
from conftest import TINY, run
from first_step import gradients, ready, step_of
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import ways
from benchmarks.clock import Clock
from benchmarks.step import difference
from imas import ohem_cross_entropy
from imas.config import load_config
from imas.engine import checkpoint
from imas.engine.optim import build_optimizer, param_groups
from imas.errors import ConfigError, UserError
from imas.methods.base import Method, Step
from imas.ops.counting import count
from imas.ops.losses import pixel_cross_entropy
from imas.ops.pseudo import predict
from imas.ops.resize import resize
from imas.schema import Config

CPU = torch.device("cpu")


@pytest.mark.parametrize("side", [(9, 7), (33, 25)])
@pytest.mark.parametrize("rows", [1, 10**6])
def test_pixel_losses_are_those_of_resized_logits(side: tuple[int, int], rows: int, monkeypatch) -> None:
    """Losses and gradients, with logits of both sizes, in blocks of one row and in one block."""
    monkeypatch.setattr("imas.ops.resize._BLOCK", rows)
    logits, weight = 3 * golden.randn(1, 2, 5, *side), golden.rand(2, 2, 33, 25)
    target = golden.randint(3, 5, 2, 33, 25)
    target[golden.rand(4, 2, 33, 25) < 0.2] = 255
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = pixel_cross_entropy(ours, target)
    expected = F.cross_entropy(resize(plain, (33, 25)), target, ignore_index=255, reduction="none")
    torch.testing.assert_close(loss, expected)
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    probability, label = resize(logits, (33, 25)).softmax(1).max(1)
    prediction = predict(logits, (33, 25))
    assert torch.equal(prediction.label, label)
    torch.testing.assert_close(prediction.confidence, probability)


def _saved_bytes(function: Callable[[], Tensor]) -> int:
    """What autograd saves for the backward pass, each storage once."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage takes another's place

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(sizes.values())


def test_losses_keep_nothing_at_full_size_but_a_number_a_pixel() -> None:
    logits, labels = golden.randn(1, 2, 19, 16, 16).requires_grad_(), golden.randint(2, 19, 2, 64, 64)
    kept = _saved_bytes(lambda: ohem_cross_entropy(logits, labels, 0.7, 50))
    plain = _saved_bytes(lambda: F.cross_entropy(resize(logits, (64, 64)), labels))
    assert kept / labels.numel() < 4 * 19 / 2 < plain / labels.numel()


def test_counts_are_those_of_bincount_and_leave_out_other_values() -> None:
    values = golden.randint(1, 300, 3, 20, 30)
    expected = torch.stack([image.flatten().bincount(minlength=300)[:250] for image in values])
    assert torch.equal(count(values, 250), expected.double())


@pytest.fixture
def tiny(experiment: Callable[..., Path]) -> Callable[..., Config]:
    """The tiny experiment's configuration with an auxiliary head, bottlenecks and overrides."""
    net = copy.deepcopy(TINY["net"]) | {"aux_loss": {}}
    net["encoder"]["type"] = "resnet50"
    return lambda *words: load_config(experiment(net=net), words)


def _step(config: Config) -> tuple[Method, Step]:
    """The method after its first step."""
    method, batch = ready(config, CPU)
    return method, step_of(config, CPU, method, batch)


# Bounds: relative, of losses and of the whole gradient. The network is random, and so are images and labels: gradients
# nearly cancel, and a short format turns some of them round.
@pytest.mark.parametrize(
    ("word", "loss", "gradient"),
    [
        ("channels_last=false", 5e-4, 0.2),
        ("checkpoint_encoder=true", 0, 0),
        ("tf32=true", 0, 0),  # means nothing to a CPU
        ("amp=bf16", 5e-2, 0.7),
        ("amp=fp16", 1e-2, 0.3),
    ],
)
def test_options_change_rounding_alone(tiny, word: str, loss: float, gradient: float) -> None:
    words = ["net.encoder.type=resnet18"] if word.startswith("amp") else []
    (plain, expected), (method, step) = _step(tiny(*words)), _step(tiny(*words, f"trainer.{word}"))
    for name, value in expected.scalars.items():
        assert step.scalars[name].dtype == value.dtype
        torch.testing.assert_close(step.scalars[name], value, rtol=loss, atol=loss)
    assert step.loss.dtype == torch.float32 and step.score.dtype == torch.float32
    ours, theirs = gradients(method), gradients(plain)
    assert (ours - theirs).norm() <= gradient * theirs.norm()
    for name, tensor in plain.student.named_buffers():  # each batch counted once, also where it is computed twice
        torch.testing.assert_close(method.student.get_buffer(name), tensor, rtol=max(loss, 1e-6), atol=loss)
    assert list(method.state_dict()) == list(plain.state_dict())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def test_recomputed_blocks_keep_their_inputs_alone(tiny) -> None:
    def activations(*words: str) -> int:
        method, batch = ready(tiny(*words), CPU)
        return _saved_bytes(lambda: method.student.coarse(batch[0].image)[0])

    assert activations("trainer.checkpoint_encoder=true") < 0.8 * activations()


def test_compiled_networks_keep_names_and_results(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    smaller = "net.encoder.type=resnet18"
    (plain, expected), (method, step) = _step(tiny(smaller)), _step(tiny(smaller, "trainer.compile=true"))
    torch.testing.assert_close(step.loss, expected.loss)
    torch.testing.assert_close(gradients(method), gradients(plain), rtol=1e-3, atol=1e-4)
    assert list(method.state_dict()) == list(plain.state_dict())
    torch._dynamo.reset()


def test_a_missing_compiler_is_explained(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable) -> Callable:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"trainer\.compile.*no C\+\+ compiler"):
        _step(tiny("trainer.compile=true"))


def test_options_that_make_no_sense_are_refused(tiny) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.amp"):
        tiny("trainer.amp=int8")
    with pytest.raises(ConfigError, match=r"trainer\.checkpoint_encoder: cannot be combined with trainer\.compile"):
        tiny("trainer.compile=true", "trainer.checkpoint_encoder=true")


def test_momentum_takes_on_the_memory_layout_of_its_weights(tiny, tmp_path: Path) -> None:
    """Fused SGD reads both as they lie: a checkpoint of another layout must not mix them up."""
    ends = []
    for word in ("channels_last=true", "channels_last=false"):
        config = tiny()
        method, _ = _step(config)
        optimizer = build_optimizer(param_groups(method.trained()), config.trainer.optimizer)
        optimizer.step()
        state = {**checkpoint.method_states(method), "optimizer_state": optimizer.state_dict(), "epoch": 1}
        other = tiny(f"trainer.{word}")
        resumed, _ = _step(other)
        optimizer = build_optimizer(param_groups(resumed.trained()), other.trainer.optimizer)
        checkpoint.resume(state, tmp_path / "ckpt.pth", resumed, optimizer)
        for mine, theirs in zip(resumed.student.parameters(), method.student.parameters()):
            mine.grad = torch.empty_like(mine).copy_(theirs.grad)
        optimizer.step()
        ends.append({name: tensor.contiguous() for name, tensor in resumed.student.state_dict().items()})
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_fused_sgd_is_the_textbooks(tiny) -> None:
    weight = nn.Parameter(golden.randn(1, 5))
    options = tiny("trainer.optimizer.kwargs.weight_decay=0.1").trainer.optimizer
    groups = [{"name": "encoder", "part": "encoder", "params": [weight]}]
    optimizer = build_optimizer(groups, options)
    expected, momentum = weight.detach().clone(), torch.zeros(5)
    for seed in range(3):
        weight.grad = golden.randn(seed, 5)
        momentum = 0.9 * momentum + weight.grad + 0.1 * expected
        expected = expected - options.kwargs.lr * momentum
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_an_update_that_float16_skips_leaves_no_momentum(tiny: Callable[..., Config]) -> None:
    weight = nn.Parameter(golden.randn(1, 1000))
    before = weight.detach().clone()
    optimizer = build_optimizer([{"name": "encoder", "part": "encoder", "params": [weight]}], tiny().trainer.optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (math.inf, 0.0):
        scaler.scale(torch.tensor(1.0))
        weight.grad = torch.full_like(weight, gradient)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(weight.detach(), before)


def test_a_float16_run_goes_on_bitwise_with_its_scale(experiment: Callable[..., Path]) -> None:
    """From the checkpoint before the last one to the same end; the scale is part of it."""
    path = experiment("straight")
    words = ("--set", "trainer.amp=fp16", "--set", "trainer.epochs=2", "--set", "saver.use_tb=false")
    assert run("train_semi.py", "--config", path, *words).returncode == 0
    other = experiment("resumed")
    (other.parent / "checkpoints").mkdir()
    shutil.copy(path.parent / "checkpoints" / "ckpt_prev.pth", other.parent / "checkpoints" / "ckpt.pth")
    assert "resumed after epoch 0" in run("train_semi.py", "--config", other, *words).stdout
    one, two = (torch.load(each.parent / "checkpoints" / "ckpt.pth", weights_only=True) for each in (path, other))
    assert one["scaler_state"]["scale"] > 0 and one["scaler_state"] == two["scaler_state"]
    for key in ("model_state", "teacher_state"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])


def test_our_step_is_the_plain_twins() -> None:
    """The comparison of benchmarks/step.py, with a small network and OHEM that selects."""
    words = ["net.encoder.type=resnet18", "net.encoder.kwargs.width=8", "criterion.kwargs.min_kept=3000"]
    config = ways.recipe_config("tiny", [*words, "dataset.train.crop.size=65"])
    batch = ways.make_batch(config)
    twin, ours = (ways.Way(name, config, batch, CPU, Clock(CPU)) for name in (ways.TWIN, "ours"))
    expected, result = twin.run(False)[1], ours.run(False)[1]
    assert 0.05 < expected.score.min() < 0.95
    found = difference(ours, result, twin, expected)
    assert max(found["loss_lb"], found["loss_ub"], found["score"]) < 1e-4 and found["update"] < 0.05, found
