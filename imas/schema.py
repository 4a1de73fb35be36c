"""Every section and key of an experiment, with type, default and allowed values, as frozen dataclasses.

The section of the method is not here: each method has its options beside its code (``Method.Options``). Former names of
keys are in ``legacy.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .strict import derived, option, to_plain

POSITIVE = (lambda value: value > 0, "a number above 0")
AT_LEAST_ONE = (lambda value: value >= 1, "an integer of at least 1")
NOT_NEGATIVE = (lambda value: value >= 0, "a number of at least 0")
FRACTION = (lambda value: 0 <= value <= 1, "a number between 0 and 1")
RANGE = (lambda pair: 0 < pair[0] <= pair[1], "[low, high] with 0 < low <= high")


class Wants(NamedTuple):
    """The parts of a batch that a method needs."""

    unlabeled: bool = False  # unlabeled images, in weak views
    strong: int = 0  # strong views of each unlabeled crop
    labeled_strong: int = 0  # strong views of each labeled crop
    pseudo_label: bool = False  # labels of the unlabeled images, from files


def _pair(value: Any) -> Any:
    return [value, value] if type(value) is int else value


def _side(value: Any) -> Any:
    """[n, n] → n, for the evaluation window, of which one number is used for both sides."""
    square = isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]
    return value[0] if square else value


@dataclass(frozen=True)
class Crop:
    size: tuple[int, int] = option(convert=_pair, check=(lambda size: min(size) >= 1, "a side or [height, width]"))
    type: Literal["rand", "center"] = "rand"


@dataclass(frozen=True)
class ValCrop:
    size: int = option(769, convert=_side, check=(lambda side: side >= 2, "one side of at least 2, for both sides"))


@dataclass(frozen=True)
class StrongAug:
    """A strong view; ``data/strong.py`` has a function for each kind."""

    type: Literal["pool", "narrow_pool", "jitter"] = "pool"
    num_augs: int = option(2, check=AT_LEAST_ONE)  # of the pools: operations of a view
    random_number: bool = False  # of the pools: 1 to num_augs operations, each number as often
    cutout: bool = False  # noise in a box of half the views, which their pseudo label leaves out


@dataclass(frozen=True)
class TrainData:
    data_root: str | None = None
    data_list: str | None = None  # the labeled images
    unlabeled_list: str | None = None  # default: beside data_list, labeled.txt → unlabeled.txt
    batch_size: int = option(2, check=AT_LEAST_ONE)  # per process, labeled and again unlabeled
    epoch_size: int | None = option(None, check=AT_LEAST_ONE)  # images an epoch; default: one pass over the list
    drop_last: bool = False  # leave out the last short batch of labeled images; always so with unlabeled ones
    flip: bool = False
    rand_resize: tuple[float, float] | None = option(None, check=RANGE)
    resize_base_size: int | tuple[int, int] | None = option(
        None,
        check=(lambda base: (base if type(base) is int else min(base)) >= 1, "the longer side, or [height, width]"),
    )
    crop: Crop | None = None
    strong_aug: StrongAug | None = None
    pseudo_labels: str | None = None  # a folder of labels of the unlabeled images, for a method that reads such


@dataclass(frozen=True)
class ValData:
    data_root: str | None = None  # default: train.data_root
    data_list: str | None = None
    batch_size: int = option(1, check=AT_LEAST_ONE)
    crop: ValCrop = option(ValCrop)


@dataclass(frozen=True)
class Shapes:
    """The embedded set: how many images are drawn, of which size, from which seed."""

    seed: int = option(0, check=NOT_NEGATIVE)
    size: int = option(64, check=(lambda side: side >= 32, "a side of at least 32 pixels"))
    labeled: int = option(10, check=AT_LEAST_ONE)
    unlabeled: int = option(600, check=AT_LEAST_ONE)
    val: int = option(200, check=AT_LEAST_ONE)


_COLOUR = (lambda colour: all(0 <= value <= 255 for value in colour), "[red, green, blue], each in 0..255")
_COLOURS = (lambda colours: all(map(_COLOUR[0], colours)), "a colour a class, [red, green, blue] in 0..255")


@dataclass(frozen=True)
class Folder:
    """Own data, below ``data_root``. Without lists, images with a mask are labeled, all others unlabeled."""

    class_names: tuple[str, ...] = option(
        check=(
            lambda names: len(set(names)) == len(names) >= 2,
            "two or more class names, in the order of their numbers",
        )
    )
    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""  # images/a.jpg → masks/a<mask_suffix>.png
    unlabeled: str | None = None  # a folder of further images, without masks
    binary: bool = False  # masks hold 0 and 255 for the classes 0 and 1
    palette: tuple[tuple[int, int, int], ...] | None = option(None, check=_COLOURS)  # masks are pictures in these
    ignore_colour: tuple[int, int, int] | None = option(None, check=_COLOUR)  # of pixels to leave out, with a palette
    colours: tuple[tuple[int, int, int], ...] | None = option(None, check=_COLOURS)  # to draw the classes in


@dataclass(frozen=True)
class Dataset:
    type: str = option()  # a name in DATASETS of data/catalog.py
    train: TrainData = option()
    val: ValData = option(ValData)
    shapes: Shapes = option(Shapes)
    folder: Folder | None = None
    n_sup: int | None = option(None, check=AT_LEAST_ONE)
    workers: int = option(2, check=NOT_NEGATIVE)
    cache: bool = False  # decode every image once, and keep it in memory
    on_error: Literal["stop", "skip"] = "stop"  # at a broken image in the middle of training
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of values in 0..1; above 1: of values in 0..255
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), check=(lambda std: min(std) > 0, "numbers above 0"))
    ignore_label: int = option(255, check=(lambda label: 0 <= label <= 255, "an integer in 0..255"))


@dataclass(frozen=True)
class OptimizerKwargs:
    lr: float = option(check=POSITIVE)  # of the encoder
    momentum: float = option(0.9, check=FRACTION)
    weight_decay: float = option(0.0, check=NOT_NEGATIVE)
    decay: Literal["all", "convolutions"] = "all"  # what weight_decay is for: convolutions leaves out BatchNorm, biases


@dataclass(frozen=True)
class Optimizer:
    kwargs: OptimizerKwargs = option()
    type: Literal["SGD", "adam"] = "SGD"
    head_lr_times: float | None = option(None, check=POSITIVE)  # of lr; default: 10 on Pascal, 1 elsewhere


@dataclass(frozen=True)
class SchedulerKwargs:
    power: float = option(0.9, check=POSITIVE)  # poly
    targetlr: float = option(0.0, check=NOT_NEGATIVE)  # cosine
    milestones: tuple[int, ...] = ()  # epochs; each divides the rate by 10


@dataclass(frozen=True)
class Scheduler:
    mode: Literal["poly", "cosine", "milestones"] = "poly"
    kwargs: SchedulerKwargs = option(SchedulerKwargs)


@dataclass(frozen=True)
class Trainer:
    optimizer: Optimizer = option()
    epochs: int = option(check=AT_LEAST_ONE)
    eval_every: int = option(1, check=AT_LEAST_ONE)  # epochs between evaluations, each of which ends with a checkpoint
    accumulate: int = option(1, check=AT_LEAST_ONE)  # batches whose gradients make one update
    reference_batch: int | None = option(None, check=AT_LEAST_ONE)  # labeled images an update that the recipe is for
    scale_lr: bool = False  # lr · (processes · batch_size · accumulate) / reference_batch
    start_from: str | None = None  # a checkpoint whose networks training starts with, at epoch 0
    amp: Literal["bf16", "fp16"] | None = None  # networks in a shorter format; losses and scores stay float32
    tf32: bool = False  # on CUDA: float32 convolutions with 10 bits of mantissa
    channels_last: bool = True  # NHWC in memory
    compile: bool = False  # the networks by torch.compile
    checkpoint_encoder: bool = False  # keep no activations within the encoder's blocks; compute them twice
    lr_scheduler: Scheduler = option(Scheduler)


@dataclass(frozen=True)
class Saver:
    snapshot_dir: str = "checkpoints"  # beside the YAML
    use_tb: bool = True
    pictures_every: int | None = option(10, check=AT_LEAST_ONE)  # epochs between pictures in TensorBoard
    auto_resume: bool = False
    save_every: float | None = option(30.0, check=POSITIVE)  # minutes between checkpoints within an epoch


@dataclass(frozen=True)
class CriterionKwargs:
    thresh: float | None = option(None, check=FRACTION)  # of ohem, default 0.7
    min_kept: int | None = option(None, check=AT_LEAST_ONE)  # of ohem, default 100,000


@dataclass(frozen=True)
class Criterion:
    type: Literal["ce", "ohem"] = "ce"
    kwargs: CriterionKwargs = option(CriterionKwargs)


@dataclass(frozen=True)
class AuxLoss:
    loss_weight: float = option(0.4, check=POSITIVE)
    aux_plane: int | None = option(None, check=AT_LEAST_ONE)  # channels of x3: follows from the encoder


@dataclass(frozen=True)
class EncoderKwargs:
    replace_stride_with_dilation: tuple[bool, bool, bool] = (False, False, False)
    multi_grid: bool = False
    zero_init_residual: bool = False
    deep_stem: bool = True
    width: int = option(64, check=AT_LEAST_ONE)


@dataclass(frozen=True)
class Encoder:
    type: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = option()
    pretrain: str | None = None  # a weight file, or torchvision: its own weights, fetched
    kwargs: EncoderKwargs = option(EncoderKwargs)


@dataclass(frozen=True)
class DecoderKwargs:
    inner_planes: int = option(256, check=AT_LEAST_ONE)
    low_conv_planes: int = option(48, check=AT_LEAST_ONE)
    dilations: tuple[int, int, int] = option((6, 12, 18), check=(lambda all_: min(all_) >= 1, "three dilations >= 1"))


@dataclass(frozen=True)
class Decoder:
    type: Literal["deeplabv3plus"] = "deeplabv3plus"
    kwargs: DecoderKwargs = option(DecoderKwargs)


@dataclass(frozen=True)
class Net:
    num_classes: int = option(check=(lambda count: 2 <= count <= 255, "an integer in 2..255"))
    encoder: Encoder = option()
    decoder: Decoder = option(Decoder)
    aux_loss: AuxLoss | None = None
    embedding: int | None = option(None, check=AT_LEAST_ONE)  # width of a representation of each pixel, for U2PL
    sync_bn: bool = False


@dataclass(frozen=True)
class Config:
    """One experiment."""

    dataset: Dataset = option()
    trainer: Trainer = option()
    net: Net = option()
    criterion: Criterion = option(Criterion)
    saver: Saver = option(Saver)
    method: str = derived("")  # the name of the method's section
    options: Any = derived(None)  # that section: the method's ``Options``
    wants: Wants = derived(Wants())
    path: Path = derived(Path(), compare=False)  # the YAML file
    out: Path | None = derived(None, compare=False)  # ``train_semi.py --out``
    stage: str = derived("", compare=False)  # of a method of several stages
    translated: tuple[str, ...] = derived((), compare=False)  # a remark for each former key

    @property
    def folder(self) -> Path:
        """Where the outputs go: ``out``, by default the folder of the YAML."""
        return self.path.parent if self.out is None else self.out

    @property
    def snapshot_dir(self) -> Path:
        """Where the checkpoints of this stage go."""
        return self.folder / self.saver.snapshot_dir / self.stage

    @property
    def log_dir(self) -> Path:
        """Where the log lines, CSV files and pictures of this stage go."""
        return self.folder / "log" / self.stage

    def to_dict(self) -> dict:
        """Plain nested dicts: what ``load_config`` reads back as an equal configuration."""
        return to_plain(self) | {self.method: to_plain(self.options)}
