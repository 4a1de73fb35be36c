"""What a run shows of itself: scores, pictures every few epochs, and everything at its end. By the main process."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torchvision.transforms import functional as TF

from .. import distributed
from ..data.dataset import Draw, stacked
from ..data.source import DataError
from ..files import replacing
from ..ops.metrics import ConfusionMatrix
from . import checkpoint
from .evaluate import Evaluation, figures, format_table
from .log import RunLog, last_scores
from .pictures import prediction_sheet, views_sheet
from .run import Run

log = logging.getLogger("imas")

_HANDFUL = 4  # unlabeled images that are shown
_EXTREMES = 3  # of the hardest and of the easiest
_STREAM = 5  # of random numbers, beside those of ``data.loaders``


def write_scores(run: Run, run_log: RunLog, epoch: int) -> None:
    """The last score of each unlabeled image in this epoch, from all ranks, in the order of the list."""
    if not run.scores:
        return
    index, score = (torch.cat(parts).tolist() for parts in zip(*run.scores))
    gathered: dict[int, float] = {}
    for pairs in distributed.gather(list(zip(index, score))):
        gathered.update(pairs)
    names = run.lists.unlabeled
    run_log.scores((epoch, names[number], gathered[number]) for number in sorted(gathered))
    run_log.histogram("scores", list(gathered.values()), (epoch + 1) * len(run.data))


def show_progress(run: Run, evaluation: Evaluation, run_log: RunLog) -> None:
    """Some unlabeled and some validation images, always the same, to TensorBoard."""
    iteration, pool = run.epoch * len(run.data), len(run.lists.unlabeled)
    chosen = sorted({number * pool // _HANDFUL for number in range(_HANDFUL)}) if pool else []
    with _optional():
        sheet = _views(run, evaluation, {index: run.lists.unlabeled[index] for index in chosen})
        if sheet is not None:
            run_log.image("views", TF.pil_to_tensor(sheet), iteration)
        run_log.image("predictions", TF.pil_to_tensor(_predictions(run, evaluation)), iteration)


def report(run: Run, matrices: dict[str, ConfusionMatrix], evaluation: Evaluation, run_log: RunLog) -> None:
    """At the end: the table of the selecting network, all figures, pictures, and where everything lies."""
    config, names = run.config, evaluation.catalog.class_names
    name, matrix = next(iter(matrices.items()))
    log.info("%s after the last epoch, in percent:\n%s", name, format_table(matrix, names))
    everything = {
        "protocol": {"epoch": run.epoch, "images": len(run.lists.val)} | evaluation.protocol.to_dict(),
        "networks": {name: figures(matrix, names) for name, matrix in matrices.items()},
    }
    with replacing(config.log_dir / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with _optional():
        _predictions(run, evaluation).save(config.log_dir / "predictions.png")
        views = _views(run, evaluation, _extremes(last_scores(config.log_dir), run.lists.unlabeled))
        if views is not None:
            views.save(config.log_dir / "views.png")
    log.info("pictures:     %s", ", ".join(map(str, sorted(config.log_dir.glob("*.png")))))
    log.info("checkpoints:  %s, %s", config.snapshot_dir / checkpoint.BEST, checkpoint.LAST)
    log.info("curves:       %s, training.csv, scores.csv", config.log_dir / "metrics.csv")
    if config.saver.use_tb:
        log.info("TensorBoard:  tensorboard --logdir %s", config.log_dir / "tensorboard")


def _extremes(scores: dict[str, tuple[int, float]], names: Sequence[str]) -> dict[int, str]:
    """Captions of the unlabeled images whose last score was lowest and highest, by index."""
    order = sorted(
        (index for index, name in enumerate(names) if name in scores), key=lambda index: scores[names[index]][1]
    )
    chosen = [("hardest", index) for index in order[:_EXTREMES]]
    chosen += [("easiest", index) for index in order[_EXTREMES:][: -_EXTREMES - 1 : -1]]
    captions = {}
    for kind, index in chosen:
        epoch, score = scores[names[index]]
        captions[index] = f"{names[index]}: {kind}, {score:.2f} in epoch {epoch}; here"
    return captions


def _views(run: Run, evaluation: Evaluation, captions: dict[int, str]) -> Image.Image | None:
    """A sheet of unlabeled images by index, cropped and coloured the same way at every call."""
    if run.data.unlabeled is None or not captions or not run.method.needs_unlabeled(run.epoch):
        return None
    try:
        dataset = run.data.unlabeled.dataset
        drawn = [dataset[Draw(index, (run.seed, _STREAM, index))] for index in captions]
    except DataError as error:
        log.warning("no pictures of unlabeled images: %s", error)
        return None
    captions = [captions.get(int(sample["index"]), "in the place of a broken image") for sample in drawn]
    samples, unsupervised = stacked(drawn), run.config.trainer.unsupervised
    return views_sheet(
        run.method,
        samples["weak"].to(run.device),
        samples["strong"].to(run.device) if "strong" in samples else None,
        captions,
        evaluation.normalise,
        threshold=0.0 if unsupervised is None else unsupervised.threshold,
        class_names=evaluation.catalog.class_names,
        palette=evaluation.catalog.palette,
        generator=torch.Generator().manual_seed(run.seed),
    )


def _predictions(run: Run, evaluation: Evaluation) -> Image.Image:
    return prediction_sheet(
        run.method.networks(),
        evaluation.loader.dataset,
        evaluation.normalise,
        predictor=evaluation.predictor,
        class_names=evaluation.catalog.class_names,
        palette=evaluation.catalog.palette,
    )


@contextmanager
def _optional() -> Iterator[None]:
    """No run is lost for want of a picture."""
    try:
        yield
    except Exception:
        log.exception("pictures could not be drawn; the run itself is whole")
