"""The training loop: batches, learning rate, step; evaluation and saving at the end of an epoch."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import time
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import distributed
from ..data.normalise import Normalise
from ..data.splits import describe_lists
from ..legacy import COLUMNS
from ..models.sync_bn import synchronise
from ..ops.metrics import ConfusionMatrix
from . import checkpoint, precision, provenance
from .evaluate import Evaluation
from .health import Health
from .interrupt import Interrupted
from .log import RunLog, one_line, spoken, tag
from .meter import Clock, NonFiniteLoss
from .optim import explain_batch, learning_rate
from .run import Run, save, to_device
from .show import show_progress, show_results, write_scores

log = logging.getLogger("imas")

_LOGS_PER_EPOCH = 8  # but none more often than every ten iterations


def fit(run: Run, keep: Collection[int]) -> None:
    """Train, evaluate, log and save.

    Args:
        keep: numbers of epochs, from 1, after which the trained networks are saved to stay (``checkpoint.kept``).

    Raises:
        NonFiniteLoss: naming the iteration and the losses.
    """
    config, length = run.config, len(run.data)
    done = run.epoch * length + run.step
    board = config.folder / config.stage if config.saver.use_tb else None
    run_log = RunLog(config.log_dir, board, run.epoch, map(column, run.method.scored()), done)
    bar = tqdm(
        total=config.trainer.epochs * length, initial=done, unit="it", leave=False, dynamic_ncols=True,
        mininterval=1.0, disable=None if distributed.is_main() else True,
    )  # fmt: skip
    with contextlib.closing(run_log), bar:
        _announce(run, run_log)
        _run_all(run, run_log, bar, keep)


def _run_all(run: Run, run_log: RunLog, bar: tqdm, keep: Collection[int]) -> None:
    """Every epoch, and its end."""
    config, method, data, epochs = run.config, run.method, run.data, run.config.trainer.epochs
    if config.net.sync_bn:
        synchronise(method)
    wrapped = distributed.wrap(method, run.device, config.net.sync_bn)
    evaluation = Evaluation(config, run.lists, run.device)
    selecting = column(next(iter(method.scored())))
    health = Health(config, len(data), evaluation.catalog.class_names, selecting, run_log.rows)
    matrices: dict[str, ConfusionMatrix] = {}
    for epoch in range(run.epoch, epochs):
        evaluates, improved = _is_due(config.trainer.eval_every, epoch + 1, epochs), False
        with _saved(run):
            updates = data.epoch(epoch, method.needs_unlabeled(epoch), run.step)
            with precision.tuned_kernels(), contextlib.closing(updates):  # its workers end, however the epoch ends
                row = _train_epoch(run, wrapped, run_log, bar, epoch, updates)
            if evaluates:  # a run that ends here has done all updates of the epoch, and not yet its end
                bar.clear()
                distributed.same_buffers(method)
                began = time.monotonic()
                matrices = evaluation(method.scored(), partial(run.interruption.asked, (epoch + 1) * len(data)))
                run.evaluating = time.monotonic() - began
        run.epoch, run.step, run.scores = epoch + 1, 0, []
        run.meter.clear()
        if evaluates:
            results, improved = _note_results(run, run_log, matrices, epoch)
            row |= results
        # Rows come before the checkpoint: a run that is cut off between the two drops them when it resumes.
        run_log.metrics(row | {"epoch": epoch})
        run_log.training({"epoch": epoch} | row)
        for warning in health.look({"epoch": epoch} | row):
            run_log.warn(epoch, warning)
        if epoch + 1 in keep and distributed.is_main():  # first: a run that is cut off in between repeats the epoch
            state = {"epoch": epoch + 1, **checkpoint.network_states(method.trained()), "config": config.to_dict()}
            checkpoint.save(state, config.snapshot_dir / checkpoint.kept(epoch + 1))
        if evaluates:
            save(run, improved)
        if run_log.writer is not None and _is_due(config.saver.pictures_every, run.epoch, epochs):
            show_progress(run, evaluation, run_log)
    if not matrices:
        log.info("all %d epochs were done before; to train anew, name another folder with --out", epochs)
        matrices = evaluation(method.scored())
    if distributed.is_main():
        bar.clear()
        show_results(run, matrices, evaluation)


def _is_due(every: int | None, epoch: int, epochs: int) -> bool:
    """Whether something is due after this number of epochs: every so often, and at the end."""
    return every is not None and (epoch % every == 0 or epoch == epochs)


@contextlib.contextmanager
def _saved(run: Run) -> Iterator[None]:
    """Save where an error ends the run; not with several processes, of which the others wait in the middle of an
    update, nor within an update, nor networks that have become NaN.
    """
    try:
        yield
    except NonFiniteLoss:
        raise
    except Interrupted as stop:
        save(run, False)
        distributed.barrier()  # launchers kill what still runs some seconds after the first rank has ended
        raise stop.with_traceback(None) from None  # which lets go of the loader, and its workers end
    except Exception:
        if distributed.world_size() == 1 and run.whole:
            try:
                save(run, False)
            except Exception as other:
                log.warning("no checkpoint could be written: %s", other)
        raise


def _announce(run: Run, run_log: RunLog) -> None:
    """Record and log what is trained, on what, and what differs from the recipe's batch."""
    config, lists, world = run.config, run.lists, distributed.world_size()
    if distributed.is_main():
        provenance.record(config, run.description)
    for remark in explain_batch(config, world):
        if run.epoch == 0:
            run_log.warn(0, remark)
        else:  # it may be on other processes than before
            log.warning("%s", remark)
    log.info(describe_lists(lists.labeled, lists.unlabeled, lists.val))
    log.info("%s, %s", provenance.in_numbers(config, lists, len(run.data), world), run.device)


def _train_epoch(
    run: Run, wrapped: nn.Module, run_log: RunLog, bar: tqdm, epoch: int, data: Iterator
) -> dict[str, float]:
    """One epoch of ``wrapped``, the method as the processes share it; gives its row of ``training.csv``."""
    config, method, length = run.config, run.method, len(run.data)
    normalise = Normalise(config.dataset.mean, config.dataset.std, run.device)
    log_every = max(10, length // _LOGS_PER_EPOCH)
    replaced: Counter[str] = Counter()
    method.train()
    clock, pace = Clock(), distributed.Pace(run.device)
    for step, batches in enumerate(clock.waits(data), run.step):
        iteration = epoch * length + step
        run.stop_if_asked(iteration)
        for problem in filter(None, chain(*(batch["skipped"] for batch in batches))):
            if problem not in replaced:
                log.warning("replaced by another sample: %s", problem)
            replaced[problem] += 1
        run.meter.add(_update(run, wrapped, normalise, batches, iteration))
        pace()
        run.step, run.whole = step + 1, True
        bar.update()
        logs = (iteration + 1) % log_every == 0
        if logs or step + 1 == length:
            window = run.meter.window(iteration)
        if logs:
            window |= run.rates | _learning_rates(run) | clock.means()
            run_log.scalars({tag(name): value for name, value in window.items()}, iteration + 1)
            bar.clear()
            left = _time_left(run, iteration, window["seconds"])
            log.info("epoch %d [%d/%d]: %s, %s", epoch, step + 1, length, one_line(window), left)
            if run.save_due() and step + 1 < length:
                save(run, False)
    run.stop_if_asked((epoch + 1) * length)
    if config.dataset.on_error == "skip":
        _report_replaced(distributed.gather(replaced), epoch)
    write_scores(run, run_log, epoch)
    return run.meter.means() | run.rates | _learning_rates(run) | clock.means() | {"memory_mib": _memory(run.device)}


def _update(
    run: Run, wrapped: nn.Module, normalise: Normalise, batches: list[dict[str, Any]], iteration: int
) -> dict[str, Tensor]:
    """One update from ``trainer.accumulate`` batches of the loader; gives the means of their scalars."""
    trainer, length = run.config.trainer, len(run.data)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(trainer.lr_scheduler, group["base_lr"], iteration, trainer.epochs * length, length)
    run.optimizer.zero_grad(set_to_none=True)
    outputs = []
    for i, batch in enumerate(batches):
        labeled, unlabeled = to_device(batch, normalise, run.device)
        progress = run.progress(iteration, i)
        with distributed.gradients_shared(wrapped, i + 1 == len(batches)):
            with precision.autocast(trainer, run.device):
                step = wrapped(labeled, unlabeled, progress)
            run.scaler.scale(step.loss / len(batches)).backward()
        outputs.append(step.scalars)
        if step.score is not None:
            run.scores.append((unlabeled.index, step.score))
    run.whole = False
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.rates = run.method.after_step(progress)
    return {name: sum(scalars[name] for scalars in outputs) / len(outputs) for name in outputs[0]}


def _learning_rates(run: Run) -> dict[str, float]:
    """``lr`` where all parts of the networks have one rate, else one of each part."""
    rates = {f"lr_{group['part']}": group["lr"] for group in run.optimizer.param_groups}
    return rates if len(set(rates.values())) > 1 else {"lr": rates["lr_encoder"]}


def _memory(device: torch.device) -> int:
    """The most memory in MiB until now: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def _time_left(run: Run, iteration: int, seconds: float) -> str:
    """Time until the end of training, or of its stage, roughly: of iterations as long as lately, and evaluations.

    Args:
        seconds: an iteration took in this epoch.
    """
    trainer, length = run.config.trainer, len(run.data)
    epoch = iteration // length
    run.pace = seconds if run.pace is None else (run.pace + seconds) / 2
    evaluations = -(-trainer.epochs // trainer.eval_every) - epoch // trainer.eval_every
    left = (trainer.epochs * length - iteration - 1) * run.pace + evaluations * run.evaluating
    slower_later = run.method.needs_unlabeled(trainer.epochs - 1) and not run.method.needs_unlabeled(epoch)
    return "over " * slower_later + f"{spoken(left)} left" + " of this stage" * bool(run.config.stage)


def column(name: str) -> str:
    """The name of a network's mIoU in ``metrics.csv`` and the log."""
    return COLUMNS.get(name, f"miou_{name}")


def _note_results(
    run: Run, run_log: RunLog, matrices: dict[str, ConfusionMatrix], epoch: int
) -> tuple[dict[str, float], bool]:
    """The columns of an evaluation, and whether it is the best so far; the run keeps the best."""
    results = {name: 100 * matrix.miou for name, matrix in matrices.items()}
    selecting = next(iter(results))
    before = run.best or {}
    run.best = {name: float(np.fmax(before.get(name, math.nan), value)) for name, value in results.items()}
    figures = (f"{name} mIoU {value:.2f} (best {run.best[name]:.2f})" for name, value in results.items())
    log.info("epoch %d: %s", epoch, ", ".join(figures))
    columns = {column(name): value for name, value in results.items()}
    ious = zip(run.meter.class_names, matrices[selecting].iou.tolist())
    ious = {name: 100 * value for name, value in ious if value == value}  # no class absent from the truth
    columns |= {f"iou/{name}": value for name, value in ious.items()}
    tags = {"val/mIoU" + f"_{name}" * (name != selecting): value for name, value in results.items()}
    run_log.scalars(tags | {f"val/IoU/{name}": value for name, value in ious.items()}, run.epoch * len(run.data))
    columns["best"] = run.best[selecting]
    others = [name for name in results if name != selecting] or [selecting]
    columns |= {column(name).replace("miou_", "best-"): run.best[name] for name in others}
    return columns, run.best[selecting] > float(np.fmax(before.get(selecting, -1.0), -1.0))


def _report_replaced(replaced: list[Counter[str]], epoch: int) -> None:
    """Of all ranks; each has named its own, but the log is rank 0's."""
    for problem in dict.fromkeys(problem for each in replaced[1:] for problem in each):
        if problem not in replaced[0]:
            log.warning("replaced by another sample: %s", problem)
    if any(replaced):
        count = sum(each.total() for each in replaced)
        log.warning("epoch %d: %d broken images were replaced by others (dataset.on_error)", epoch, count)
