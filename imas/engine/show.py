"""Scores of a run, pictures every few epochs, and a summary at its end, by the main process."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from .. import distributed
from ..data.dataset import Draw, stacked
from ..data.source import DataError
from ..models.modes import evaluating
from ..ops.metrics import ConfusionMatrix
from . import checkpoint
from .evaluate import Evaluation, figures, format_table, write_json
from .log import RunLog, last_scores
from .pictures import look_sheet, prediction_sheet, spread
from .run import Run, to_device

log = logging.getLogger("imas")

_HANDFUL = 4  # unlabeled images to look at during training
_EXTREMES = 3  # at the end: of the hardest and of the easiest
_STREAM = 5  # of random numbers, beside those of ``data.loaders``


def write_scores(run: Run, run_log: RunLog, epoch: int) -> None:
    """Log the last score of each unlabeled image in this epoch, from all ranks, in the order of the list."""
    if not run.scores:
        return
    index, score = (torch.cat(parts).tolist() for parts in zip(*run.scores))
    gathered: dict[int, float] = {}
    for pairs in distributed.gather(list(zip(index, score))):
        gathered.update(pairs)
    run_log.scores((epoch, run.lists.unlabeled[index], gathered[index]) for index in sorted(gathered))
    if run_log.writer is not None:
        run_log.writer.add_histogram("train/scores", torch.tensor(list(gathered.values())), (epoch + 1) * len(run.data))


def show_progress(run: Run, evaluation: Evaluation, run_log: RunLog) -> None:
    """Write pictures of some training and some validation images, always the same, to TensorBoard."""

    def show(name: str, sheet: Image.Image) -> None:
        group = "val" if name == "predictions" else "train"
        run_log.writer.add_image(f"{group}/{name}", TF.pil_to_tensor(sheet), run.epoch * len(run.data))

    _draw(run, evaluation, {}, show)


def show_results(run: Run, matrices: dict[str, ConfusionMatrix], evaluation: Evaluation) -> None:
    """At the end: log the table of the selecting network and all paths; write all figures and pictures."""
    config, names = run.config, evaluation.catalog.class_names
    selecting = next(iter(matrices))
    log.info("%s after the last epoch, in percent:\n%s", selecting, format_table(matrices[selecting], names))
    protocol = {"epoch": run.epoch, "images": len(run.lists.val)} | evaluation.protocol.to_dict()
    networks = {name: figures(matrix, names) for name, matrix in matrices.items()}
    write_json(config.log_dir / "evaluation.json", {"protocol": protocol, "networks": networks})
    scores = last_scores(config.log_dir)
    _draw(run, evaluation, scores, lambda name, sheet: sheet.save(config.log_dir / f"{name}.png"))
    log.info("pictures:     %s", ", ".join(map(str, sorted(config.log_dir.glob("*.png")))))
    written = [name for name in (checkpoint.BEST, checkpoint.LAST) if (config.snapshot_dir / name).is_file()]
    log.info("checkpoints:  %s", config.snapshot_dir / ", ".join(written))
    log.info("curves:       %s, training.csv, scores.csv", config.log_dir / "metrics.csv")
    if config.saver.use_tb:
        log.info("TensorBoard:  tensorboard --logdir %s", config.folder.parent)


def _draw(
    run: Run,
    evaluation: Evaluation,
    scores: dict[str, tuple[int, float]],
    show: Callable[[str, Image.Image], None],
) -> None:
    """Give ``show`` the sheets of predictions and views, by name. Pictures that fail do not end the run."""
    catalog, normalise = evaluation.catalog, evaluation.normalise
    try:
        networks, images = run.method.scored(), evaluation.loader.dataset
        show("predictions", prediction_sheet(networks, images, normalise, evaluation.predictor, catalog))
        columns, captions = _look(run, evaluation, scores)
        sheet = look_sheet(columns, captions, normalise, catalog)
        if sheet is not None:
            show("views", sheet)
    except DataError as error:
        log.warning("no pictures of training images: %s", error)
    except Exception:
        log.exception("pictures could not be drawn; the run itself is whole")


def _chosen(names: list[str], scores: dict[str, tuple[int, float]]) -> dict[int, str]:
    """Captions of the images with the lowest and the highest scores, or of a handful of images, by index."""
    order = sorted((i for i, name in enumerate(names) if name in scores), key=lambda i: scores[names[i]][1])
    if not order:
        return {i: names[i] for i in spread(len(names), _HANDFUL)}
    extremes = [("hardest", i) for i in order[:_EXTREMES]]
    extremes += [("easiest", i) for i in order[_EXTREMES:][: -_EXTREMES - 1 : -1]]
    return {i: "{0}: {3}, {2:.2f} in epoch {1}; here".format(names[i], *scores[names[i]], kind) for kind, i in extremes}


@torch.no_grad()
def _look(
    run: Run, evaluation: Evaluation, scores: dict[str, tuple[int, float]]
) -> tuple[dict[str, Tensor], list[str]]:
    """The method's look at some training images, cropped and coloured the same way at every call, and captions.

    Args:
        scores: epoch and score of unlabeled images by name; those with extreme scores are shown.
    """
    lists, data, method = run.lists, run.data, run.method
    progress = run.progress(max(0, run.epoch * len(data) - 1))  # of the last step
    progress = progress._replace(generator=torch.Generator().manual_seed(run.seed))
    uses = data.unlabeled is not None and method.needs_unlabeled(progress.epoch)
    captions = _chosen(lists.unlabeled, scores) if uses else _chosen(lists.labeled, {})
    shown = {"labeled": [i * len(lists.labeled) // len(captions) for i in range(len(captions))]}
    shown |= {"unlabeled": list(captions)} if uses else {}
    batch = {
        name: stacked([getattr(data, name).dataset[Draw(i, (run.seed, _STREAM, i))] for i in indices])
        for name, indices in shown.items()
    }
    labeled, unlabeled = to_device(batch, evaluation.normalise, run.device)
    # Not compiled: batches of other sizes would be compiled anew, while the other ranks wait.
    with evaluating(method), torch.compiler.set_stance("force_eager"):
        columns = method.look(labeled, unlabeled, progress)
    drawn = captions if unlabeled is None else unlabeled.index.tolist()
    return columns, [captions.get(i, "in the place of a broken image") for i in drawn]
