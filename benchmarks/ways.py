"""The ways to make a training step that ``benchmarks.step`` compares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data._utils.pin_memory import pin_memory as pin

from imas.build import build_method
from imas.config import load_config
from imas.data.normalise import Normalise
from imas.engine import precision
from imas.engine.optim import build_optimizer, param_groups
from imas.engine.run import to_device
from imas.methods.base import Progress
from imas.models.ema import teacher_decay
from imas.ops.resize import resize
from imas.schema import Config

from . import plain_step
from .clock import Clock

TWIN, FAITHFUL = "plain twin", "ours"
ROOT = Path(__file__).parents[1] / "exps"
_LARGEST = ("imas.hardness.trigger_cutmix=false", "imas.use_cutmix_trigger_prob=1.0")
RECIPES = {
    "tiny": ("cityscapes_imas372_r50_os16", "dataset.train.crop.size=129", "dataset.train.batch_size=2"),
    "pascal_r50": ("pascal_imas1323_r50_os16",),
    "cityscapes_r50": ("cityscapes_imas372_r50_os16",),
    "cityscapes_r101": ("cityscapes_imas372_r50_os16", "net.encoder.type=resnet101"),
}
PARTS = ("data", "weak predictions", "score", "mixing", "training forward", "losses", "logged shares", "backward")
PARTS += ("optimiser", "EMA", "rest")
_EPOCH, _ITERATION, _PER_EPOCH = 1, 1500, 1000  # where the teacher is an average


def recipe_config(recipe: str, options: list[str]) -> Config:
    """The configuration of a recipe, its CutMix always firing."""
    folder, *overrides = RECIPES[recipe]
    return load_config(ROOT / folder / "config.yaml", [*overrides, *_LARGEST, *options])


def start_weights(config: Config) -> dict[str, dict[str, Tensor]]:
    """Networks that are fairly sure and differ, so that scores lie between 0 and 1."""
    torch.manual_seed(0)
    method = build_method(config, pretrained=False)
    student, normalise = method.student.train(), Normalise(config.dataset.mean, config.dataset.std)
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # running statistics are to be those of a batch
        student.coarse(normalise(make_batch(config)["unlabeled"]["weak"][:2, :, :129, :129]))
        student.decoder.classifier[-1].weight.mul_(20)
        for ours, theirs in zip(method.teacher.parameters(), student.parameters()):
            ours.copy_(theirs * (1 + 0.005 * torch.randn_like(theirs)))
        for ours, theirs in zip(method.teacher.buffers(), student.buffers()):
            ours.copy_(theirs)
    return {name: network.state_dict() for name, network in method.networks().items()}


def make_batch(config: Config) -> dict[str, dict]:
    """Images as the loader gives them: uint8, smooth with some noise; a tenth of the labels is to be ignored."""
    train, generator = config.dataset.train, torch.Generator().manual_seed(1)
    batch, (height, width) = train.batch_size, train.crop.size

    def images() -> Tensor:
        coarse = 255 * torch.rand(batch, 3, height // 32 + 2, width // 32 + 2, generator=generator)
        noise = 8 * torch.randn(batch, 3, height, width, generator=generator)
        return (resize(coarse, (height, width)) + noise).clamp(0, 255).to(torch.uint8)

    labels = torch.randint(0, config.net.num_classes, (batch, height // 16 + 1, width // 16 + 1), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    labeled = {"image": images(), "label": labels.to(torch.uint8), "strong": []}
    real = torch.tensor([[height, width]] * batch)
    unlabeled = {"weak": images(), "strong": [images()], "real": real, "index": torch.arange(batch)}
    return {"labeled": labeled, "unlabeled": unlabeled}


class Way:
    """One way to make the step: its networks and optimiser, and how to bring them back to the start."""

    def __init__(self, name: str, config: Config, batch: dict[str, dict], device: torch.device, clock: Clock) -> None:
        self.name, self.config, self.device, self.clock = name, config, device, clock
        start = start_weights(config)
        method = build_method(config, pretrained=False).to(device).train()
        self.method, self.networks = method, method.networks()
        normalise = Normalise(config.dataset.mean, config.dataset.std, device)
        if name == TWIN:
            on_cpu = Normalise(config.dataset.mean, config.dataset.std)
            labeled, unlabeled = batch["labeled"], batch["unlabeled"]
            images = {"images": labeled["image"], "weak": unlabeled["weak"], "strong": unlabeled["strong"][0]}
            self.tensors = {"labels": labeled["label"].long()} | {key: on_cpu(each) for key, each in images.items()}
            plain = plain_step.PlainStep(config, method.student, method.teacher, clock)
            self.optimizer = plain.optimizer
            decay = teacher_decay(_EPOCH, _ITERATION, _PER_EPOCH, 0, config.options.ema_decay)
            self.step = lambda: plain(self.tensors, device, decay, self._progress().generator)
        else:
            precision.prepare(method, config.trainer, device)
            self.optimizer = build_optimizer(param_groups(method.trained()), config.trainer.optimizer)
            self.scaler = precision.make_scaler(config.trainer, device)
            self.tensors = pin(batch) if device.type == "cuda" else batch
            self.step = lambda: self._ours(normalise)
            student, coarse = method.student, method.student.coarse
            student.coarse = lambda images, aux=True: (
                clock._timed("training forward", coarse, images, aux) if student.training else coarse(images, aux)
            )
            clock.put_around(method, predict_weak="weak predictions", blend="mixing", cutmix="mixing")
            clock.put_around(method, supervised="losses", consistency="losses", after_step="EMA")
        self.start = {name: {k: v.to(device) for k, v in state.items()} for name, state in start.items()}

    @staticmethod
    def _progress() -> Progress:
        return Progress(_EPOCH, 2 * _EPOCH, _ITERATION, _PER_EPOCH, torch.Generator().manual_seed(3))

    def _ours(self, normalise: Normalise) -> plain_step.Losses:
        """An update as ``imas.engine.fit`` makes it."""
        progress, trainer = self._progress(), self.config.trainer
        self.optimizer.zero_grad(set_to_none=True)
        with self.clock("data"):
            labeled, unlabeled = to_device(self.tensors, normalise, self.device)
        with precision.autocast(trainer, self.device):
            output = self.method(labeled, unlabeled, progress)
        with self.clock("backward"):
            self.scaler.scale(output.loss).backward()
        with self.clock("optimiser"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.method.after_step(progress)
        return plain_step.Losses(output.scalars["loss_lb"], output.scalars["loss_ub"], output.score)

    def run(self, detailed: bool) -> tuple[Counter, plain_step.Losses]:
        """One step from the start: seconds by part, and what it gives."""
        with torch.no_grad():
            for name, network in self.networks.items():
                network.load_state_dict(self.start[name])
            for state in self.optimizer.state.values():
                state["momentum_buffer"].zero_()
        tf32 = self.config.trainer.tf32 and self.name != TWIN
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        with precision.tuned_kernels():
            return self.clock.measure(self.step, detailed)
