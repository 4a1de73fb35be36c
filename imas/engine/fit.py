"""The training loop: batches, learning rate, step, teacher; evaluation and saving at the end of an epoch."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from .. import distributed
from ..config import Config
from ..data.catalog import CATALOGS
from ..data.loaders import Lists, TrainingData, evaluation_loader
from ..data.normalise import Normalise
from ..methods.base import Batch, Method, Progress
from ..ops.metrics import ConfusionMatrix
from ..strict import UserError
from . import checkpoint
from .evaluate import evaluate, format_table
from .log import RunLog
from .optim import build_optimizer, learning_rate
from .pictures import prediction_sheet

log = logging.getLogger("imas")

_LOGS_PER_EPOCH = 8


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite; the last checkpoint is from before."""

    status = 1


@dataclass
class Standing:
    """How far a run is, beside its weights."""

    epoch: int = 0  # epochs done
    best: dict[str, float] | None = None  # best mIoU in percent of each network


def fit(method: Method, config: Config, lists: Lists, *, seed: int, device: torch.device) -> None:
    """Train, evaluate, log and save, from the start or from the last checkpoint (``saver.auto_resume``).

    Args:
        method: on ``device``, with fresh weights.
        seed: with the configuration and the number of processes it determines the run.

    Raises:
        NonFiniteLoss: naming the iteration and the losses.
    """
    data = TrainingData(config, lists, seed, distributed.rank(), distributed.world_size())
    trainer = config.trainer
    optimizer = build_optimizer(method.param_groups(), trainer.optimizer)
    standing = _resume(method, optimizer, config, seed)
    wrapped = distributed.wrap(method, device, config.net.sync_bn)
    run_log = RunLog(config.log_dir, config.saver.use_tb, standing.epoch)
    evaluation = Evaluation(config, lists, device)
    log.info(
        "%d labeled, %d unlabeled, %d validation images; %d epochs of %d iterations, batch %d on %d process(es), %s",
        len(lists.labeled), len(lists.unlabeled), len(lists.val), trainer.epochs, len(data),
        config.dataset.train.batch_size, distributed.world_size(), device,
    )  # fmt: skip

    matrices: dict[str, ConfusionMatrix] = {}
    for epoch in range(standing.epoch, trainer.epochs):
        losses = _train_epoch(wrapped, method, data, optimizer, config, lists, run_log, epoch, seed, device)
        row, improved = dict(losses), False
        if (epoch + 1) % trainer.eval_every == 0 or epoch + 1 == trainer.epochs:
            matrices = evaluation(method.networks())
            results, improved = _note_results(standing, matrices, epoch)
            row |= results
        standing.epoch = epoch + 1
        # Rows come before the checkpoint: a run that is cut off between the two drops them when it resumes.
        run_log.metrics(row | {"epoch": epoch})
        if distributed.is_main():
            _save(method, optimizer, config, standing, seed, improved)
        run_log.scalars({f"epoch/{name}": value for name, value in row.items()}, standing.epoch * len(data))
    if not matrices:
        log.info("all %d epochs were done before; to train anew, use another saver.snapshot_dir", trainer.epochs)
        matrices = evaluation(method.networks())
    evaluation.report(matrices, method.networks(), run_log, standing.epoch * len(data))
    run_log.close()


def _train_epoch(
    wrapped: nn.Module,
    method: Method,
    data: TrainingData,
    optimizer: torch.optim.Optimizer,
    config: Config,
    lists: Lists,
    run_log: RunLog,
    epoch: int,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """One epoch; returns the mean of each logged scalar."""
    normalise = Normalise(config.dataset.mean, config.dataset.std, device)
    scheduler, total = config.trainer.lr_scheduler, config.trainer.epochs * len(data)
    log_every = max(1, len(data) // _LOGS_PER_EPOCH)
    meter = Meter()
    scores: list[tuple[Tensor, Tensor]] = []
    method.train()
    bar = tqdm(
        data.epoch(epoch, method.needs_unlabeled(epoch)),
        desc=f"epoch {epoch + 1}/{config.trainer.epochs}",
        total=len(data), unit="it", leave=False, mininterval=1.0, dynamic_ncols=True,
        disable=not distributed.is_main(),
    )  # fmt: skip
    for step, tensors in enumerate(bar):
        iteration = epoch * len(data) + step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(scheduler, group["base_lr"], iteration, total, len(data))
        batch = _to_device(tensors, normalise, device)
        progress = Progress(epoch, iteration, len(data), _generator(seed, iteration))

        output = wrapped(batch, progress)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        optimizer.step()
        method.after_step(progress)

        meter.add(output.scalars)
        if output.score is not None:
            scores.append((batch.index, output.score))
        if (step + 1) % log_every == 0 or step + 1 == len(data):
            window = meter.window(iteration)
            rates = {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
            run_log.scalars(window | rates, iteration)
            bar.set_postfix_str(f"loss {window['loss_lb'] + window.get('loss_ub', 0.0):.3f}")
            bar.clear()
            log.info(
                "epoch %d, iteration %d/%d: %s", epoch, step + 1, len(data),
                ", ".join(f"{name} {value:.5f}" for name, value in (window | rates).items()),
            )  # fmt: skip
    _write_scores(run_log, lists, scores, epoch)
    return meter.means()


class Meter:
    """Scalars of an epoch, read from the device only when a window of them is asked for."""

    def __init__(self) -> None:
        self.waiting: list[dict[str, Tensor]] = []
        self.read: list[dict[str, float]] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        self.waiting.append(scalars)

    def window(self, iteration: int) -> dict[str, float]:
        """Means over the steps since the last call, over all ranks. ``iteration``: that of the last step.

        Raises:
            NonFiniteLoss: at the first step of the window with a scalar that is not finite.
        """
        names = list(self.waiting[0])
        values = torch.stack([torch.stack([step[name].float() for name in names]) for step in self.waiting])
        first = iteration + 1 - len(values)
        for offset, step in enumerate(values.tolist()):
            bad = [f"{name} = {value}" for name, value in zip(names, step) if not math.isfinite(value)]
            if bad:
                every = ", ".join(f"{name} = {value:.5g}" for name, value in zip(names, step))
                raise NonFiniteLoss(
                    f"iteration {first + offset}: {' and '.join(bad)} (all: {every}). The last checkpoint is from "
                    "before; a lower trainer.optimizer.kwargs.lr, or a look at the data, may help."
                )
        mean = distributed.sum_over_ranks(values.mean(0)) / distributed.world_size()
        self.read += [dict(zip(names, mean.tolist()))] * len(values)
        self.waiting.clear()
        return dict(zip(names, mean.tolist()))

    def means(self) -> dict[str, float]:
        """Means over the epoch."""
        return {name: sum(step[name] for step in self.read) / len(self.read) for name in self.read[0]}


class Evaluation:
    """Everything an evaluation of a configuration's validation images needs."""

    def __init__(self, config: Config, lists: Lists, device: torch.device) -> None:
        self.config, self.device = config, device
        self.catalog = CATALOGS[config.dataset.type]
        self.normalise = Normalise(config.dataset.mean, config.dataset.std, device)
        self.loader = evaluation_loader(config, lists.val, distributed.rank(), distributed.world_size())

    def __call__(self, networks: dict[str, nn.Module]) -> dict[str, ConfusionMatrix]:
        return evaluate(
            networks,
            self.loader,
            self.normalise,
            num_classes=self.config.net.num_classes,
            crop=self.config.dataset.val.crop.size,
            ignore_index=self.config.dataset.ignore_label,
            device=self.device,
        )

    def report(
        self, matrices: dict[str, ConfusionMatrix], networks: dict[str, nn.Module], run_log: RunLog, iteration: int
    ) -> None:
        """The table of each network, the pictures, and where everything lies."""
        if not distributed.is_main():
            return
        name, matrix = next(iter(matrices.items()))
        log.info("%s after the last epoch, in percent:\n%s", name, format_table(matrix, self.catalog.class_names))
        sheet = prediction_sheet(
            networks,
            self.loader.dataset,
            self.normalise,
            crop=self.config.dataset.val.crop.size,
            class_names=self.catalog.class_names,
            palette=self.catalog.palette,
            device=self.device,
        )
        path = self.config.log_dir / "predictions.png"
        sheet.save(path)
        run_log.image("predictions", TF.pil_to_tensor(sheet), iteration)
        log.info("pictures:     %s", path)
        log.info("checkpoints:  %s, %s", self.config.snapshot_dir / checkpoint.BEST, checkpoint.LAST)
        log.info("curves:       %s, %s", self.config.log_dir / "metrics.csv", self.config.log_dir / "scores.csv")
        if self.config.saver.use_tb:
            log.info("TensorBoard:  tensorboard --logdir %s", self.config.log_dir / "tensorboard")


def _note_results(
    standing: Standing, matrices: dict[str, ConfusionMatrix], epoch: int
) -> tuple[dict[str, float], bool]:
    """The columns of an evaluation, and whether it is the best so far; ``standing`` keeps the best."""
    results = {name: 100 * matrix.miou for name, matrix in matrices.items()}
    selecting = next(iter(results))
    best = standing.best or dict.fromkeys(results, -1.0)
    improved = results[selecting] > best[selecting]
    standing.best = {name: max(best[name], results[name]) for name in results}
    log.info(
        "epoch %d: %s", epoch,
        ", ".join(f"{name} mIoU {value:.2f} (best {standing.best[name]:.2f})" for name, value in results.items()),
    )  # fmt: skip
    columns = {"miou_stu": results["student"], "best": standing.best[selecting], "best-stu": standing.best["student"]}
    if "teacher" in results:
        columns["miou_tea"] = results["teacher"]
    return columns, improved


def _save(
    method: Method, optimizer: torch.optim.Optimizer, config: Config, standing: Standing, seed: int, improved: bool
) -> None:
    state = {
        "epoch": standing.epoch,
        **checkpoint.network_states(method.networks()),
        "optimizer_state": optimizer.state_dict(),
        "best_miou": standing.best and next(iter(standing.best.values())),
        "best": standing.best,
        "seed": seed,
        "config": config.to_dict(),
    }
    checkpoint.save(state, config.snapshot_dir / checkpoint.LAST)
    if improved:
        checkpoint.save(state, config.snapshot_dir / checkpoint.BEST)


def _resume(method: Method, optimizer: torch.optim.Optimizer, config: Config, seed: int) -> Standing:
    """Continue from the last checkpoint, if there is one and the configuration wants it."""
    path = config.snapshot_dir / checkpoint.LAST
    if not path.is_file():
        return Standing()
    if not config.saver.auto_resume:
        raise UserError(
            f"{path}: an earlier run has left its checkpoint here. Continue it with saver.auto_resume: true, or name "
            "another saver.snapshot_dir"
        )
    state = checkpoint.read(path)
    if state.get("seed") != seed:
        raise UserError(
            f"{path}: that run had the seed {state.get('seed')}, this one has {seed}. Continue it with its own seed, "
            "or name another saver.snapshot_dir"
        )
    for name, network in method.networks().items():
        checkpoint.load_network(network, name, state, path)
    optimizer.load_state_dict(state["optimizer_state"])
    log.info("resumed after epoch %d from %s", state["epoch"] - 1, path)
    return Standing(state["epoch"], state["best"])


def _to_device(tensors: dict[str, Tensor], normalise: Normalise, device: torch.device) -> Batch:
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return Batch(
        **{name: normalise(tensor) if tensor.dtype == torch.uint8 else tensor for name, tensor in moved.items()}
    )


def _generator(seed: int, iteration: int) -> torch.Generator:
    """This rank's own random numbers for this iteration."""
    words = (seed * 1_000_003 + iteration) * 4096 + distributed.rank()
    return torch.Generator().manual_seed(words % 2**63)


def _write_scores(run_log: RunLog, lists: Lists, scores: list[tuple[Tensor, Tensor]], epoch: int) -> None:
    """The last score of each unlabeled image in this epoch, from all ranks, in the order of the list."""
    if not scores:
        return
    index, score = (torch.cat(parts).tolist() for parts in zip(*scores))
    gathered: dict[int, float] = {}
    for pairs in distributed.gather(list(zip(index, score))):
        gathered.update(pairs)
    run_log.scores((epoch, lists.unlabeled[number], gathered[number]) for number in sorted(gathered))
