"""What an experiment is: sections as frozen dataclasses, read from YAML and checked once, in ``load_config``.

The schema is the one of the published experiments. Where a key has a better name today, its former one (``old=``)
still loads, and the run says once what was translated. Nothing below this module asks for defaults again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from .strict import ConfigError, Reader, apply_overrides, option, read_yaml, to_plain

NUM_CLASSES = {"pascal": 21, "cityscapes": 19, "shapes": 4}

_POSITIVE = (lambda value: value > 0, "a number above 0")
_AT_LEAST_ONE = (lambda value: value >= 1, "an integer of at least 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "a number of at least 0")
_FRACTION = (lambda value: 0 <= value <= 1, "a number between 0 and 1")
_RANGE = (lambda pair: 0 < pair[0] <= pair[1], "[low, high] with 0 < low <= high")


def _spelling(**former: str) -> Callable[[Any], Any]:
    """Today's spelling of a name: ``imas.models.resnet.resnet50`` → ``resnet50``. For a table, never an import."""

    def today(name: Any) -> Any:
        if not isinstance(name, str):
            return name
        name = re.sub(r"^(imas|u2pl)\.(\w+\.)*", "", name)
        return former.get(name, name)

    return today


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
    MEANINGLESS: ClassVar = {"type": ("rand", "center")}


@dataclass(frozen=True)
class StrongAug:
    num_augs: int = option(2, check=_AT_LEAST_ONE)
    labeled: bool = False  # sup_only: train on the strong views of the labeled images, too


@dataclass(frozen=True)
class HardnessAware:
    """What the score decides (spec, The score; steps 5 and 6)."""

    version: Literal[1, 2] = option(1, old="flag_using_v1", old_value={True: 1, False: 2}.__getitem__)
    weight_loss: bool = option(True, old="flag_hardness_weighted_loss")
    class_weighted: bool = option(True, old="flag_cal_iou_weighted")
    ignore_background: bool = option(True, old="flag_cal_iou_ignore_bg")
    trigger_cutmix: bool = option(False, old="flag_cmix_trigger_by_hard")
    blend: bool = option(False, old="flag_augs_mixup_by_hard")
    scale_box: bool = option(False, old="flag_mapping_random")
    gaussian_box: bool = option(False, old="flag_mapping_gaussian")


@dataclass(frozen=True)
class TrainData:
    data_root: str | None = None
    data_list: str | None = None  # the labeled images
    unlabeled_list: str | None = None  # default: beside data_list, labeled.txt → unlabeled.txt
    batch_size: int = option(2, check=_AT_LEAST_ONE)  # per process, labeled and again unlabeled
    epoch_size: int | None = option(None, check=_AT_LEAST_ONE)  # images an epoch; default: one pass over the list
    flip: bool = False
    rand_resize: tuple[float, float] | None = option(None, check=_RANGE)
    resize_base_size: int | tuple[int, int] | None = option(
        None,
        check=(lambda base: (base if type(base) is int else min(base)) >= 1, "the longer side, or [height, width]"),
    )
    crop: Crop | None = None
    strong_aug: StrongAug | None = None
    hardness_aware: HardnessAware | None = None


@dataclass(frozen=True)
class ValData:
    data_root: str | None = None  # default: train.data_root
    data_list: str | None = None
    batch_size: int = option(1, check=_AT_LEAST_ONE)
    crop: ValCrop = option(ValCrop)


@dataclass(frozen=True)
class Shapes:
    """The embedded set: how many images are drawn, of which size, from which seed."""

    seed: int = option(0, check=_NOT_NEGATIVE)
    size: int = option(64, check=(lambda side: side >= 32, "a side of at least 32 pixels"))
    labeled: int = option(10, check=_AT_LEAST_ONE)
    unlabeled: int = option(600, check=_AT_LEAST_ONE)
    val: int = option(200, check=_AT_LEAST_ONE)


@dataclass(frozen=True)
class Dataset:
    type: Literal["pascal", "cityscapes", "shapes"] = option(
        spelling=_spelling(pascal_semi="pascal", cityscapes_semi="cityscapes")
    )
    train: TrainData = option()
    val: ValData = option(ValData)
    shapes: Shapes = option(Shapes)
    n_sup: int | None = option(None, check=_AT_LEAST_ONE)
    workers: int = option(2, check=_NOT_NEGATIVE)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of values in 0..1; above 1: of values in 0..255
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), check=(lambda std: min(std) > 0, "numbers above 0"))
    ignore_label: int = option(255, check=(lambda label: 0 <= label <= 255, "an integer in 0..255"))


@dataclass(frozen=True)
class OptimizerKwargs:
    lr: float = option(check=_POSITIVE)  # of the encoder
    momentum: float = option(0.9, check=_FRACTION)
    weight_decay: float = option(0.0, check=_NOT_NEGATIVE)


@dataclass(frozen=True)
class Optimizer:
    kwargs: OptimizerKwargs = option()
    type: Literal["SGD", "adam"] = "SGD"
    head_lr_times: float | None = option(None, check=_POSITIVE)  # of lr; default: 10 on Pascal, 1 elsewhere


@dataclass(frozen=True)
class SchedulerKwargs:
    power: float = option(0.9, check=_POSITIVE)  # poly
    targetlr: float = option(0.0, check=_NOT_NEGATIVE)  # cosine
    milestones: tuple[int, ...] = ()  # epochs; each divides the rate by 10


@dataclass(frozen=True)
class Scheduler:
    mode: Literal["poly", "cosine", "milestones"] = "poly"
    kwargs: SchedulerKwargs = option(SchedulerKwargs)


@dataclass(frozen=True)
class Unsupervised:
    threshold: float = option(0.95, check=_FRACTION)
    loss_weight: float = option(1.0, check=_NOT_NEGATIVE)
    teacher_pseudo: bool = option(True, old="flag_ema_pseudo")
    use_cutmix: bool = False
    use_cutmix_beta: bool = False
    use_cutmix_range: tuple[float, float] = option(
        (0.1, 0.9),
        convert=lambda pair: (
            sorted(pair) if isinstance(pair, list) and all(type(x) in (int, float) for x in pair) else pair
        ),
        check=(lambda pair: 0 < pair[0] <= pair[1] <= 1, "[low, high] with 0 < low <= high <= 1"),
    )
    use_cutmix_trigger_prob: float = option(1.0, check=_FRACTION)


@dataclass(frozen=True)
class Trainer:
    optimizer: Optimizer = option()
    epochs: int = option(check=_AT_LEAST_ONE)
    sup_only_epoch: int = option(0, check=_NOT_NEGATIVE)
    eval_every: int = option(1, check=_AT_LEAST_ONE)  # epochs between evaluations, each of which ends with a checkpoint
    lr_scheduler: Scheduler = option(Scheduler)
    unsupervised: Unsupervised | None = None


@dataclass(frozen=True)
class Saver:
    snapshot_dir: str = "checkpoints"  # beside the YAML
    use_tb: bool = True
    auto_resume: bool = False
    MEANINGLESS: ClassVar = {"pretrain": None}


@dataclass(frozen=True)
class CriterionKwargs:
    thresh: float = option(0.7, check=_FRACTION)
    min_kept: int = option(100_000, check=_AT_LEAST_ONE)
    MEANINGLESS: ClassVar = {"use_weight": (False,)}


@dataclass(frozen=True)
class Criterion:
    type: Literal["ce", "ohem"] = option("ce", spelling=_spelling(CELoss="ce"))
    kwargs: CriterionKwargs = option(CriterionKwargs)


@dataclass(frozen=True)
class AuxLoss:
    loss_weight: float = option(0.4, check=_POSITIVE)
    aux_plane: int | None = option(None, check=_AT_LEAST_ONE)  # channels of x3: follows from the encoder


@dataclass(frozen=True)
class EncoderKwargs:
    replace_stride_with_dilation: tuple[bool, bool, bool] = (False, False, False)
    multi_grid: bool = False
    zero_init_residual: bool = False
    deep_stem: bool = True
    width: int = option(64, check=_AT_LEAST_ONE)
    MEANINGLESS: ClassVar = {"fpn": (True,), "pretrained": None}


@dataclass(frozen=True)
class Encoder:
    type: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = option(spelling=_spelling())
    pretrain: str | None = None  # a weight file
    kwargs: EncoderKwargs = option(EncoderKwargs)


@dataclass(frozen=True)
class DecoderKwargs:
    inner_planes: int = option(256, check=_AT_LEAST_ONE)
    low_conv_planes: int = option(48, check=_AT_LEAST_ONE)
    dilations: tuple[int, int, int] = option((6, 12, 18), check=(lambda all_: min(all_) >= 1, "three dilations >= 1"))
    MEANINGLESS: ClassVar = {"rep_head": (False,)}


@dataclass(frozen=True)
class Decoder:
    type: Literal["deeplabv3plus"] = option("deeplabv3plus", spelling=_spelling(dec_deeplabv3_plus="deeplabv3plus"))
    kwargs: DecoderKwargs = option(DecoderKwargs)


@dataclass(frozen=True)
class Net:
    num_classes: int = option(check=(lambda count: 2 <= count <= 255, "an integer in 2..255"))
    encoder: Encoder = option()
    decoder: Decoder = option(Decoder)
    aux_loss: AuxLoss | None = None
    sync_bn: bool = False
    ema_decay: float = option(0.996, check=_FRACTION)


@dataclass(frozen=True)
class Config:
    """One experiment. ``method`` follows from ``trainer.unsupervised`` where it is not given."""

    dataset: Dataset = option()
    trainer: Trainer = option()
    net: Net = option()
    criterion: Criterion = option(Criterion)
    saver: Saver = option(Saver)
    method: Literal["imas", "sup_only"] | None = None
    path: Path = dataclasses.field(default=Path(), init=False, compare=False)  # the YAML file
    translated: tuple[str, ...] = dataclasses.field(default=(), init=False, compare=False)

    @property
    def folder(self) -> Path:
        """Where the outputs go: the folder of the YAML."""
        return self.path.parent

    @property
    def snapshot_dir(self) -> Path:
        """Where checkpoints go."""
        return self.folder / self.saver.snapshot_dir

    @property
    def log_dir(self) -> Path:
        """Where log lines, CSV files, pictures and TensorBoard files go."""
        return self.folder / "log"

    def to_dict(self) -> dict:
        """Plain nested dicts: what ``load_config`` reads back as an equal configuration."""
        return to_plain(self)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read and check one experiment.

    Args:
        path: a YAML file in the schema of the published experiments or of this module.
        overrides: ``dotted.key=value`` words, which win over the file, typed as YAML types them.

    Raises:
        ConfigError: all mistakes at once, each with file, line, dotted key, what was expected and what came. No
            path that the file names is looked at: see ``imas.data.check``.
    """
    path = Path(path)
    raw, reader = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections (dataset, trainer, net, ...), got {type(raw).__name__}")
    overrides = list(overrides)
    for word in overrides:
        reader.lines.pop(word.partition("=")[0], None)
    config = reader.section(Config, apply_overrides(raw, overrides))
    for check in _CHECKS:
        with contextlib.suppress(AttributeError, KeyError, TypeError) if reader.errors else contextlib.nullcontext():
            check(config, reader)  # which may need what could not be read
    reader.finish()
    config = _with_derived(config)
    object.__setattr__(config, "path", path)
    object.__setattr__(config, "translated", tuple(reader.translated))
    return config


def read_net(raw: dict) -> Net:
    """A ``net`` section from a plain dict in the schema of the published experiments."""
    reader = Reader("net section")
    net = reader.section(Net, raw)
    reader.finish()
    _check_net(net, reader)
    reader.finish()
    return net


def _with_derived(config: Config) -> Config:
    """Fill in what follows from other keys, so that the resolved recipe says it."""
    optimizer = config.trainer.optimizer
    if optimizer.head_lr_times is None:
        times = 10.0 if config.dataset.type == "pascal" else 1.0
        optimizer = dataclasses.replace(optimizer, head_lr_times=times)
    method = config.method or ("imas" if config.trainer.unsupervised else "sup_only")
    return dataclasses.replace(
        config, method=method, trainer=dataclasses.replace(config.trainer, optimizer=optimizer)
    )  # fmt: skip


def _check_net(net: Net, reader: Reader, prefix: str = "") -> None:
    kwargs = net.encoder.kwargs
    stages = list(kwargs.replace_stride_with_dilation)
    if stages not in ([False, False, False], [False, False, True], [False, True, True]):
        reader.error(
            f"{prefix}encoder.kwargs.replace_stride_with_dilation",
            "expected [false, false, false] (output stride 32), [false, false, true] (16) or [false, true, true] (8), "
            f"got {stages}",
        )
    expansion = 1 if net.encoder.type in ("resnet18", "resnet34") else 4
    middle = 4 * kwargs.width * expansion
    if net.aux_loss is not None and net.aux_loss.aux_plane not in (None, middle):
        reader.error(
            f"{prefix}aux_loss.aux_plane",
            f"x3 of {net.encoder.type} has {middle} channels, got {net.aux_loss.aux_plane}; leave the key out",
        )


def _check_classes(config: Config, reader: Reader) -> None:
    expected, given = NUM_CLASSES[config.dataset.type], config.net.num_classes
    if given != expected:
        reader.error("net.num_classes", f"{config.dataset.type} has {expected} classes, got {given}")
    if config.dataset.ignore_label < given:
        reader.error("dataset.ignore_label", f"{config.dataset.ignore_label} is one of the {given} classes")


def _check_method(config: Config, reader: Reader) -> None:
    unsupervised, train = config.trainer.unsupervised, config.dataset.train
    if config.method == "imas" and unsupervised is None:
        reader.error("trainer.unsupervised", "missing; the method imas needs this section")
    if config.method == "sup_only" and unsupervised is not None:
        reader.error("trainer.unsupervised", "the method sup_only has no such section; set it to null")
    if unsupervised is None and train.hardness_aware is not None:
        reader.error("dataset.train.hardness_aware", "there is nothing to score without trainer.unsupervised")
    if unsupervised is not None and train.strong_aug is not None and train.strong_aug.labeled:
        reader.error("dataset.train.strong_aug.labeled", "only sup_only trains on strong views of labeled images")


def _check_schedule(config: Config, reader: Reader) -> None:
    trainer, scheduler = config.trainer, config.trainer.lr_scheduler
    if trainer.unsupervised is not None and trainer.sup_only_epoch >= trainer.epochs:
        reader.error(
            "trainer.sup_only_epoch",
            f"expected fewer than the {trainer.epochs} epochs, got {trainer.sup_only_epoch}: no epoch is left for iMAS",
        )
    if scheduler.mode == "milestones" and not scheduler.kwargs.milestones:
        reader.error("trainer.lr_scheduler.kwargs.milestones", "missing; the mode milestones needs epochs here")


def _check_data(config: Config, reader: Reader) -> None:
    dataset, train = config.dataset, config.dataset.train
    if train.rand_resize is not None and train.resize_base_size is None:
        reader.error("dataset.train.resize_base_size", "missing; dataset.train.rand_resize needs it")
    in_files = dataset.type in ("pascal", "cityscapes")
    if train.crop is None and (train.rand_resize is not None or in_files):
        reader.error("dataset.train.crop", "missing; images of different sizes need a crop to be batched")
    if in_files:
        for name, section in (("train", train), ("val", dataset.val)):
            if section.data_list is None:
                reader.error(f"dataset.{name}.data_list", "missing; expected the path of a list file")
        if train.data_root is None:
            reader.error("dataset.train.data_root", f"missing; expected the folder of {dataset.type}")


def _check_boxes(config: Config, reader: Reader) -> None:
    hardness = config.dataset.train.hardness_aware
    if hardness is not None and hardness.scale_box and hardness.gaussian_box:
        reader.error("dataset.train.hardness_aware.gaussian_box", "cannot be combined with scale_box")


# Sections that contradict each other.
_CHECKS: tuple[Callable[[Config, Reader], None], ...] = (
    lambda config, reader: _check_net(config.net, reader, "net."),
    _check_classes,
    _check_method,
    _check_schedule,
    _check_data,
    _check_boxes,
)
