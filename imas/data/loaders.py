"""From a configuration to batches: which images, in which order, drawn by which seeds.

Every random choice is a pure function of (run seed, stream, epoch, position in the epoch): no two ranks or workers
draw the same, any number of workers draws alike, and a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import functional as TF

from ..errors import UserError
from ..schema import Config
from .cache import CachedSource
from .catalog import open_source
from .dataset import Draw, EvaluationSet, LabeledSet, UnlabeledSet, stacked
from .labels import open_labels
from .lists import Lists, val_root
from .source import DataError, FileSource
from .weak import Geometry

_STREAMS = {"labeled": 0, "unlabeled": 1}
_OF_THE_MAIN_PROCESS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}  # see engine.interrupt
_OVERSAMPLING, _ORDER = 2, 3  # what else is drawn, as numbers beside those of the streams


def oversample(count: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` indices into a list of ``count``, drawn once per run, without replacement, from that list repeated
    ceil(wanted / count) times (spec, Sampling).
    """
    repeated = np.tile(np.arange(count), -(-wanted // count))
    rng = np.random.default_rng((seed, _OVERSAMPLING))
    return rng.permutation(repeated)[:wanted].tolist()


class EpochSampler(Sampler):
    """This rank's share of one epoch, as batches of ``Draw``.

    Passes over all items, each a new permutation, follow one another; an epoch is the next ``size`` of them, dealt to
    the ranks in turn. Each rank has ceil(size / world): where that does not divide, the first are dealt again.

    Args:
        items: indices into the data set.
        size: draws per epoch over all ranks.
        stream: a name in ``_STREAMS``.
        drop_last: leave out the last short batch. A batch of one image is always left out: BatchNorm cannot train
            on it.
    """

    def __init__(
        self,
        items: list[int],
        size: int,
        batch_size: int,
        seed: int,
        stream: str,
        rank: int,
        world: int,
        drop_last: bool = True,
    ) -> None:
        self.items, self.size, self.batch_size = items, size, batch_size
        self.seed, self.stream = seed, _STREAMS[stream]
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.epoch = 0
        self.start = 0  # batches to leave out

    def __iter__(self) -> Iterator[list[Draw]]:
        count, first = len(self.items), self.epoch * self.size
        passes = range(first // count, -(-(first + self.size) // count))
        orders = [np.random.default_rng((self.seed, _ORDER + self.stream, i)).permutation(count) for i in passes]
        order = np.concatenate(orders)[first - passes[0] * count :][: self.size]
        per_rank = -(-self.size // self.world)
        draws = [
            Draw(self.items[order[position % self.size]], (self.seed, self.stream, self.epoch, position))
            for position in range(self.rank, per_rank * self.world, self.world)
        ]
        for batch in range(self.start, len(self)):
            yield draws[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __len__(self) -> int:
        """Iterations per epoch."""
        whole, rest = divmod(-(-self.size // self.world), self.batch_size)
        return whole + (not self.drop_last and rest > 1)


class TrainingData:
    """The loaders of a run.

    ``data.epoch(number, unlabeled=True)`` yields, for each update, a list of ``trainer.accumulate`` dicts. Each holds
    ``labeled`` and, if wanted, ``unlabeled``, dicts of CPU tensors as ``dataset`` makes them, and ``skipped``, a
    message for each image that had to be replaced.
    """

    def __init__(self, config: Config, lists: Lists, seed: int, rank: int, world: int) -> None:
        train, workers = config.dataset.train, config.dataset.workers
        source = open_source(config.dataset, train.data_root)
        if config.dataset.cache and isinstance(source, FileSource):
            source = CachedSource(source, [*lists.labeled, *lists.unlabeled], lists.labeled)
        crop = (None, "rand") if train.crop is None else (train.crop.size, train.crop.type)
        geometry = Geometry(train.resize_base_size, train.rand_resize, train.flip, *crop, config.dataset.ignore_label)
        wants, strong_aug, labels = config.wants, train.strong_aug, None
        if wants.pseudo_label and train.pseudo_labels is not None:
            labels = open_labels(config.dataset, train.pseudo_labels)
        if strong_aug is None:
            wants = wants._replace(strong=0, labeled_strong=0)
        skip = config.dataset.on_error == "skip"
        labeled = LabeledSet(source, lists.labeled, geometry, wants.labeled_strong, strong_aug, skip)
        count, pool = len(lists.labeled), len(lists.unlabeled)
        items, size = list(range(count)), train.epoch_size or count
        if pool and train.epoch_size is None:
            items, size = oversample(count, pool, seed), pool
        drop_last = bool(pool) or train.drop_last
        self.labeled_sampler = EpochSampler(items, size, train.batch_size, seed, "labeled", rank, world, drop_last)
        self.labeled = _loader(labeled, workers, stacked, batch_sampler=self.labeled_sampler)
        self.unlabeled = None
        if pool:
            unlabeled = UnlabeledSet(source, lists.unlabeled, geometry, wants.strong, strong_aug, skip, labels)
            self.unlabeled_sampler = EpochSampler(
                list(range(pool)), train.epoch_size or pool, train.batch_size, seed, "unlabeled", rank, world
            )
            self.unlabeled = _loader(unlabeled, workers, stacked, batch_sampler=self.unlabeled_sampler)
        self.accumulate, self.drop_last = config.trainer.accumulate, drop_last
        if not len(self):
            batch = f"{self.accumulate} batches of " if self.accumulate > 1 else ""
            raise UserError(
                f"dataset.train.batch_size: {size} images an epoch over {world} process(es) do not fill one batch of "
                f"{batch}{train.batch_size}"
            )

    def __len__(self) -> int:
        """Updates per epoch: floor(ceil(U / world) / batch / accumulate) where there are unlabeled images."""
        whole, rest = divmod(len(self.labeled_sampler), self.accumulate)
        return whole + (not self.drop_last and rest > 0)

    def epoch(self, number: int, unlabeled: bool, done: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Batches of one epoch, update by update. Unlabeled images are read only if wanted, and none of the images of
        the first ``done`` updates, which are left out.
        """
        batches = self._batches(number, unlabeled, done * self.accumulate)
        for _ in range(done, len(self)):
            yield list(itertools.islice(batches, self.accumulate))

    def _batches(self, number: int, unlabeled: bool, start: int) -> Iterator[dict[str, Any]]:
        loaders = {"labeled": self.labeled} | ({"unlabeled": self.unlabeled} if unlabeled else {})
        for loader in loaders.values():
            loader.batch_sampler.epoch, loader.batch_sampler.start = number, start
        for parts in zip(*map(_clear_errors, loaders.values()), strict=True):
            skipped = [message for part in parts for message in part.pop("skipped", [])]
            yield {"skipped": skipped} | dict(zip(loaders, parts))


def evaluation_loader(config: Config, names: list[str], rank: int, world: int) -> DataLoader:
    """This rank's share of the validation images, every image once over all ranks, as lists of (image, label)."""
    dataset = EvaluationSet(open_source(config.dataset, val_root(config)), names[rank::world])
    return _loader(dataset, config.dataset.workers, list, batch_size=config.dataset.val.batch_size)


def whole_images(config: Config, names: Sequence[str]) -> Iterator[Tensor]:
    """Training images as they are, without their masks: (3, H, W) uint8 each."""
    source = open_source(config.dataset, config.dataset.train.data_root)

    def read(name: str) -> Tensor:
        return TF.pil_to_tensor(source.image(name))

    yield from _clear_errors(_loader(names, config.dataset.workers, read, batch_size=None))


def evaluation_batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, 3, H, W) and (B, H, W), both uint8: the loader's lists, stacked where sizes are equal."""
    for samples in _clear_errors(loader):
        by_size: dict[torch.Size, list] = {}
        for image, label in samples:
            by_size.setdefault(label.shape, []).append((image, label))
        for group in by_size.values():
            yield tuple(torch.stack(part) if len(part) > 1 else part[0].unsqueeze(0) for part in zip(*group))


def _loader(dataset: Any, workers: int, collate: Callable[[Any], Any], **batches: Any) -> DataLoader:
    """A loader whose worker processes are ours; ``batches``: torch's ``batch_size`` or ``batch_sampler``."""
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_prepare_worker,
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        **batches,
    )


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker by the SIGTERM of the process that has started it; others are for that one to act on."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _clear_errors(loader: DataLoader) -> Iterator:
    """The loader's batches; a mistake in the data leaves a worker without the worker's traceback.

    Workers are forked with signals blocked: a signal to the whole process group is the main process's to act on.
    Blocking them in the worker would be too late, since torch installs a handler that ends it first.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_MAIN_PROCESS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:  # torch's, where the system has ended a worker
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"{str(error).split('. ')[0]}. A bus error: make /dev/shm larger (of a container: --shm-size) or set fewer "
            "dataset.workers; killed: too little memory"
        ) from None
