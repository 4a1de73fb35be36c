"""From a YAML file to a checked ``Config``: every mistake is found here, and nothing below asks for defaults again."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

from . import legacy
from .data.catalog import DATASETS, catalog_of, unlabeled_beside
from .errors import ConfigError
from .methods import DEFAULT, METHODS
from .schema import Config, Net
from .strict import MISSING, Reader, get, keys_of, parse_override, put, read_yaml, replaced, show


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
    return _checked(*read_yaml(path), path, overrides)


def carried_config(raw: Any, path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration that a checkpoint carries, as ``Config.to_dict`` gave it.

    Args:
        raw: nested dicts; None of a checkpoint that carries none.
        path: the checkpoint, for messages.
        overrides: see ``load_config``.

    Raises:
        ConfigError: None; see ``load_config``.
    """
    if raw is None:
        raise ConfigError(
            f"{path}: carries no configuration, as those of the authors' code; name one with --config, in Python with "
            "recipe=load_config(...)"
        )
    return _checked(raw, Reader(str(path)), Path(path), overrides)


def _checked(raw: Any, reader: Reader, path: Path, overrides: Iterable[str]) -> Config:
    if not isinstance(raw, dict):
        got = "an empty file" if raw is None else type(raw).__name__
        raise ConfigError(f"{path}: expected sections (dataset, trainer, net, ...), got {got}")
    raw, remarks = _with_todays_keys(_copied(raw), [parse_override(word) for word in overrides], reader)
    method = _method_section(raw, reader)
    options = reader.section(METHODS[method].Options, raw.pop(method, None), method)
    sections = keys_of(Config)
    for key in raw.keys() - sections:
        reader.unknown(str(key), str(key), [*sections, *METHODS], f" (methods: {', '.join(METHODS)})")
    config = reader.section(Config, raw)
    config = dataclasses.replace(config, method=method, options=options, path=path, translated=tuple(remarks))
    with _unreadable(reader):
        config = dataclasses.replace(config, wants=METHODS[method].wants(options))
    with _unreadable(reader):
        _check_net(config.net, reader)
    for check in (_check_type, _check_classes, _check_method, _check_criterion, _check_schedule, _check_data):
        with _unreadable(reader):
            check(config, reader)
    reader.finish()
    return _with_derived(config)


def _unreadable(reader: Reader) -> contextlib.suppress:
    """Passes over what a check may do to a value that could not be read."""
    return contextlib.suppress(*((AttributeError, KeyError, TypeError) if reader.errors else ()))


def _with_todays_keys(raw: dict, words: list[tuple[str, Any]], reader: Reader) -> tuple[dict, list[str]]:
    """A raw file with today's keys, overrides included, and a remark for each key that was translated."""
    raw, unfolded = legacy.unfolded(raw, reader)
    together = _copied(raw)
    for key, value in words:
        _override(together, key, value)
    former = not METHODS.keys() & raw.keys()  # a file from before methods had sections, or without one
    method = legacy.method_of(together) if former else next(name for name in raw if name in METHODS)
    if method not in METHODS:
        reader.error("method", f"expected a method ({', '.join(METHODS)}), got {show(method)}")
    raw, remarks = legacy.translate(raw, method, former, reader)
    if former:
        raw.setdefault(method if method in METHODS else DEFAULT, {})
    for key, value in words:
        today = legacy.todays_key(key, method)
        if key not in METHODS:
            own, more = legacy.translate(_override({}, key, _copied(value)), method, former, reader)
            value = get(own, today)
            remarks += more
        reader.lines.pop(today, None)
        sections = itertools.accumulate(today.split("."), "{}.{}".format)
        reader.overridden.add(next((section for section in sections if get(raw, section) is MISSING), today))
        if value is not MISSING:
            _override(raw, today, value)
    return raw, unfolded + remarks


def _override(raw: dict, key: str, value: Any) -> dict:
    """Set a dotted key. A whole section of a method takes the place of the file's method; null takes it away."""
    if key in METHODS:
        for name in METHODS if value is not None else [key]:
            raw.pop(name, None)
    if key not in METHODS or value is not None:
        try:
            put(raw, key, value)
        except ValueError as error:
            raise ConfigError(f"--set {key}={show(value)}: {error}") from None
    return raw


def _method_section(raw: dict, reader: Reader) -> str:
    """The one method that has a section in the raw file; without any it is the baseline."""
    named = [name for name in raw if name in METHODS]
    for other in named[1:]:
        reader.error(other, f"an experiment has one method, and this one has the sections {' and '.join(named)}")
        raw.pop(other)
    return named[0] if named else DEFAULT


def _copied(raw: Any) -> Any:
    """A section that a YAML alias names in two places becomes two, so that a change of one leaves the other alone."""
    return {key: _copied(value) for key, value in raw.items()} if isinstance(raw, dict) else raw


def read_net(raw: dict) -> Net:
    """A ``net`` section from a plain dict in the schema of this project or of the published experiments."""
    reader = Reader("net section")
    raw, _ = legacy.translate({"net": _copied(raw)}, DEFAULT, True, reader)
    net = reader.section(Net, raw["net"], "net")
    reader.finish()
    _check_net(net, reader)
    reader.finish()
    return net


def _with_derived(config: Config) -> Config:
    """Fill in what follows from other keys, so that the resolved recipe shows it."""
    derived = {
        "trainer.optimizer.head_lr_times": catalog_of(config.dataset).head_lr_times,
        "dataset.train.unlabeled_list": _unlabeled_beside(config),
    }
    if config.criterion.type == "ohem":
        derived |= {"criterion.kwargs.thresh": 0.7, "criterion.kwargs.min_kept": 100_000}
    missing = {key: value for key, value in derived.items() if attrgetter(key)(config) is None}
    return replaced(config, missing | {"options": METHODS[config.method].resolved(config)})


def _unlabeled_beside(config: Config) -> str | None:
    """The unlabeled list beside the labeled one, where it is needed and not given."""
    train, catalog = config.dataset.train, catalog_of(config.dataset)
    in_folders = catalog.files is not None and catalog.find is not None  # the unlabeled images are those of no list
    needed = config.wants.unlabeled and not in_folders
    if not needed or train.data_list is None or train.unlabeled_list is not None:
        return None
    return str(unlabeled_beside(Path(train.data_list)))


def _check_net(net: Net, reader: Reader) -> None:
    kwargs = net.encoder.kwargs
    stages = list(kwargs.replace_stride_with_dilation)
    if stages not in ([False, False, False], [False, False, True], [False, True, True]):
        reader.error(
            "net.encoder.kwargs.replace_stride_with_dilation",
            "expected [false, false, false] (output stride 32), [false, false, true] (16) or [false, true, true] (8), "
            f"got {stages}",
        )
    expansion = 1 if net.encoder.type in ("resnet18", "resnet34") else 4
    middle = 4 * kwargs.width * expansion
    if net.encoder.pretrain == "torchvision" and (kwargs.deep_stem or kwargs.width != 64):
        reader.error(
            "net.encoder.pretrain",
            "torchvision's weights are for another stem; set kwargs.deep_stem to false and leave kwargs.width at 64",
        )
    if net.aux_loss is not None and net.aux_loss.aux_plane not in (None, middle):
        reader.error(
            "net.aux_loss.aux_plane",
            f"x3 of {net.encoder.type} has {middle} channels, got {net.aux_loss.aux_plane}; leave the key out",
        )


def _check_type(config: Config, reader: Reader) -> None:
    """The data set exists, and what only one data set has is given for that one alone."""
    dataset = config.dataset
    if dataset.type not in DATASETS:
        near = difflib.get_close_matches(str(dataset.type), DATASETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        reader.error("dataset.type", f"expected {' or '.join(DATASETS)}, got {dataset.type!r}{hint}")
    for field in dataclasses.fields(dataset):
        if field.name not in DATASETS or field.default is not None:
            continue
        key, given = f"dataset.{field.name}", getattr(dataset, field.name)
        if given is None and dataset.type == field.name:
            reader.error(key, f"missing; the data set type {field.name} is described by this section")
        elif given is not None and dataset.type != field.name:
            reader.error(key, f"only the data set type {field.name} has this section, and it is {dataset.type}")


def _check_classes(config: Config, reader: Reader) -> None:
    dataset, given = config.dataset, config.net.num_classes
    expected = len(catalog_of(dataset).class_names)
    if given != expected:
        reader.error("net.num_classes", f"{dataset.type} has {expected} classes, got {given}")
    if dataset.ignore_label < given:
        reader.error(
            "dataset.ignore_label",
            f"{dataset.ignore_label} is one of the {given} classes. Where masks mean 'leave out' by 0 (ADE20K), save "
            "them less 1, as 8-bit numbers: 0 becomes 255, and the classes begin with 0",
        )


def _check_method(config: Config, reader: Reader) -> None:
    if config.net.embedding is not None and not METHODS[config.method].trains_embedding:
        trained = ", ".join(name for name, method in METHODS.items() if method.trains_embedding)
        reader.error("net.embedding", f"{config.method} does not train it: leave the key out (it is for {trained})")
    for key, problem in METHODS[config.method].check(config).items():
        reader.error(key, problem)


def _check_criterion(config: Config, reader: Reader) -> None:
    if config.criterion.type != "ohem":
        for name in ("thresh", "min_kept"):
            if getattr(config.criterion.kwargs, name) is not None:
                reader.error(
                    f"criterion.kwargs.{name}", f"only ohem has it, and criterion.type is {config.criterion.type}"
                )


def _check_schedule(config: Config, reader: Reader) -> None:
    trainer, scheduler = config.trainer, config.trainer.lr_scheduler
    if scheduler.mode == "milestones" and not scheduler.kwargs.milestones:
        reader.error("trainer.lr_scheduler.kwargs.milestones", "missing; the mode milestones needs epochs here")
    if trainer.scale_lr and trainer.reference_batch is None:
        reader.error("trainer.reference_batch", "missing; trainer.scale_lr needs the batch that the rate was made for")
    if trainer.compile and trainer.checkpoint_encoder:
        reader.error("trainer.checkpoint_encoder", "cannot be combined with trainer.compile")


def _check_data(config: Config, reader: Reader) -> None:
    dataset, train, catalog = config.dataset, config.dataset.train, catalog_of(config.dataset)
    if train.rand_resize is not None and train.resize_base_size is None:
        reader.error("dataset.train.resize_base_size", "missing; dataset.train.rand_resize needs it")
    if not config.wants.pseudo_label:
        reads = f"only for a method that reads pseudo labels from files, which {config.method} does not"
        if train.pseudo_labels is not None:
            reader.error("dataset.train.pseudo_labels", reads)
        if train.strong_aug is not None and train.strong_aug.cutout:
            reader.error("dataset.train.strong_aug.cutout", reads)
    if train.crop is None and (train.rand_resize is not None or catalog.side is None):
        reader.error("dataset.train.crop", "missing; images of different sizes need a crop to be batched")
    largest = _largest_image(config)
    if train.crop is not None and largest is not None and max(train.crop.size) > largest:
        reader.error(
            "dataset.train.crop.size",
            f"{list(train.crop.size)} is larger than any image gets by dataset.train.resize_base_size and rand_resize "
            f"(its longer side is at most {largest} pixels): every crop would be padded",
        )
    if _unlabeled_beside(config) is not None and "labeled.txt" not in Path(train.data_list).name:
        reader.error(
            "dataset.train.unlabeled_list",
            f"missing; it follows only from a data_list named labeled.txt, and that is {train.data_list}",
        )
    if catalog.find is None:
        for name, section in (("train", train), ("val", dataset.val)):
            if section.data_list is None:
                reader.error(f"dataset.{name}.data_list", "missing; expected the path of a list file")
    if catalog.files is not None and train.data_root is None:
        reader.error("dataset.train.data_root", f"missing; expected the folder of {dataset.type}")
    for key, message in catalog.problems.items():
        reader.error(key, message)


def _largest_image(config: Config) -> int | None:
    """The longest side that a training image can have after resizing, where it follows from the configuration alone."""
    train = config.dataset.train
    if train.rand_resize is not None and train.resize_base_size is not None:
        base = train.resize_base_size
        return int((base if isinstance(base, int) else max(base)) * train.rand_resize[1])
    return catalog_of(config.dataset).side
