"""Former names: the files of the authors, and of this project before each method had a section of its own.

Tables from former dotted keys to today's are applied to a raw file before it is read. Whoever starts anew never meets
them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from .strict import MISSING, Reader, get, put, show

# Names of networks as the authors' files have them; those of any other network follow from its name.
STATE_KEYS = {"student": "model_state", "teacher": "teacher_state"}  # in checkpoints
COLUMNS = {"student": "miou_stu", "teacher": "miou_tea"}  # in metrics.csv

# Former prefix or name of a value → today's. The authors' files name Python classes: only the class name counts.
_MODULE = re.compile(r"^(augseg|imas|u2pl)\.(\w+\.)*")
_SPELLINGS = {
    "dataset.type": {"pascal_semi": "pascal", "cityscapes_semi": "cityscapes"},
    "net.encoder.type": {},
    "net.decoder.type": {"dec_deeplabv3_plus": "deeplabv3plus"},
    "criterion.type": {"CELoss": "ce", "OHEM": "ohem"},
}

# Keys that steer nothing any more → the values that they may have, None for any.
_IGNORED: dict[str, tuple | None] = {
    "dataset.val.crop.type": ("rand", "center"),
    "trainer.evaluate_student": (True, False),  # both networks are evaluated
    "saver.pretrain": None,
    "criterion.kwargs.use_weight": (False,),
    "net.encoder.kwargs.fpn": (True,),
    "net.encoder.kwargs.pretrained": None,
}

# Former key or section → today's, in this order. A section brings all of its keys along.
_IMAS = {
    "trainer.unsupervised": "imas",
    "dataset.train.hardness_aware": "imas.hardness",
    "trainer.sup_only_epoch": "imas.sup_only_epoch",
    "net.ema_decay": "imas.ema_decay",
    "imas.flag_ema_pseudo": "imas.teacher_pseudo",
    "imas.hardness.flag_using_v1": "imas.hardness.version",
    "imas.hardness.flag_hardness_weighted_loss": "imas.hardness.weight_loss",
    "imas.hardness.flag_cal_iou_weighted": "imas.hardness.class_weighted",
    "imas.hardness.flag_cal_iou_ignore_bg": "imas.hardness.ignore_background",
    "imas.hardness.flag_cmix_trigger_by_hard": "imas.hardness.trigger_cutmix",
    "imas.hardness.flag_augs_mixup_by_hard": "imas.hardness.blend",
    "imas.hardness.flag_mapping_random": "imas.hardness.scale_box",
    "imas.hardness.flag_mapping_gaussian": "imas.hardness.gaussian_box",
}
_SUP_ONLY = {"dataset.train.strong_aug.labeled": "sup_only.strong_views"}
_AUGSEG = {
    "trainer.unsupervised.threshold": "augseg.threshold",
    "trainer.unsupervised": "augseg",
    "trainer.sup_only_epoch": "augseg.sup_only_epoch",
    "net.ema_decay": "augseg.ema_decay",
    "augseg.flag_extra_weak": "augseg.extra_weak",
    "dataset.train.strong_aug.flag_use_random_num_sampling": "dataset.train.strong_aug.random_number",
}
_FORMER = {"augseg": _AUGSEG, "imas": _IMAS, "sup_only": _SUP_ONLY}
_VALUES: dict[str, Callable[[Any], Any]] = {
    "imas.hardness.flag_using_v1": {True: 1, False: 2}.__getitem__,
    "trainer.unsupervised.threshold": lambda value: max(value, 0.0),  # AugSeg's: below 0 every pixel is kept
}

# What AugSeg's files mean by a section of strong views that lacks these keys.
_AUGSEG_CODE = {"dataset.train.strong_aug.type": "narrow_pool", "dataset.train.strong_aug.random_number": True}
# Keys that only AugSeg's files have.
_OF_AUGSEG = (
    "trainer.unsupervised.use_cutmix_adaptive",
    "trainer.unsupervised.flag_extra_weak",
    "dataset.train.strong_aug.flag_use_random_num_sampling",
)

# UniMatch's own files, which have no sections but ``criterion``: key → today's.
_UNIMATCH = {
    "dataset": "dataset.type",
    "nclass": "net.num_classes",
    "crop_size": "dataset.train.crop.size",
    "data_root": "dataset.train.data_root",
    "epochs": "trainer.epochs",
    "batch_size": "dataset.train.batch_size",
    "lr": "trainer.optimizer.kwargs.lr",
    "lr_multi": "trainer.optimizer.head_lr_times",
    "criterion.name": "criterion.type",
    "criterion.kwargs.ignore_index": "dataset.ignore_label",
    "criterion.kwargs.thresh": "criterion.kwargs.thresh",
    "criterion.kwargs.min_kept": "criterion.kwargs.min_kept",
    "conf_thresh": "unimatch.threshold",
    "backbone": "net.encoder.type",
    "replace_stride_with_dilation": "net.encoder.kwargs.replace_stride_with_dilation",
    "dilations": "net.decoder.kwargs.dilations",
}
# What is in UniMatch's code instead.
_UNIMATCH_CODE = {
    "dataset.train.flip": True,
    "dataset.train.rand_resize": [0.5, 2.0],
    "dataset.train.strong_aug": {"type": "jitter"},
    "trainer.optimizer.kwargs.weight_decay": 1e-4,
    "trainer.reference_batch": 8,
    "net.sync_bn": True,
}

# U2PL's own files, also those of its baseline.
_SUP_ONLY["dataset.batch_size"] = "dataset.train.batch_size"
_FORMER["u2pl"] = {
    "trainer.unsupervised.apply_aug": "u2pl.use_cutmix",
    "trainer.unsupervised": "u2pl",
    "trainer.contrastive": "u2pl.contrastive",
    "trainer.sup_only_epoch": "u2pl.sup_only_epoch",
    "net.ema_decay": "u2pl.ema_decay",
    "dataset.batch_size": "dataset.train.batch_size",
}
_VALUES["trainer.unsupervised.apply_aug"] = {"cutmix": True, False: False, None: False}.__getitem__
_U2PL_IGNORED: dict[str, tuple | None] = {  # its code does not read them, or only with other values
    "dataset.noise_std": None,
    "dataset.train.noise_std": None,
    "dataset.train.GaussianBlur": (False,),
    "trainer.eval_on": None,
    "trainer.unsupervised.TTA": None,
    "trainer.contrastive.unsupervised_entropy_ignore": None,
    "trainer.contrastive.anchor_ema": (False,),
}
# What is in U2PL's code instead, or where a key is not there.
_U2PL_CODE = {"trainer.sup_only_epoch": 1, "trainer.unsupervised.apply_aug": False, "net.embedding": 256}
_U2PL_SIZES = {"pascal": 500, "cityscapes": [1024, 2048]}  # of nearly all images, which are resized from their own

# Keys that former files of a method may have although it has no use for them.
_IGNORED_BY: dict[str, dict[str, tuple | None]] = {
    "imas": {"dataset.train.strong_aug.labeled": None},
    "u2pl": _U2PL_IGNORED,
    "sup_only": _U2PL_IGNORED
    | {
        "trainer.sup_only_epoch": None,
        "net.ema_decay": None,
        "trainer.unsupervised": None,
        "dataset.train.hardness_aware": None,
        "dataset.train.strong_aug.flag_use_random_num_sampling": None,
    },
}


def method_of(raw: dict[str, Any]) -> str:
    """The method of a file that has no section of a method: its ``method`` key, or what follows from its other keys."""
    named = raw.get("method")
    if named is not None:
        return str(named)
    if get(raw, "trainer.contrastive") not in (MISSING, None):
        return "u2pl"
    if get(raw, "trainer.unsupervised") in (MISSING, None):
        return "sup_only"
    types = (str(get(raw, key)) for key in _SPELLINGS)
    own = any(get(raw, key) is not MISSING for key in _OF_AUGSEG) or any(type_.startswith("augseg.") for type_ in types)
    return "augseg" if own else "imas"


def unfolded(raw: dict[str, Any], reader: Reader) -> tuple[dict[str, Any], list[str]]:
    """A file of UniMatch's in sections, and a remark for each key; any other file as it is."""
    if "nclass" not in raw or not isinstance(raw.get("dataset"), str):
        return raw, []
    sections: dict[str, Any] = {"unimatch": {}}
    remarks: list[str] = []
    implied = dict(_UNIMATCH_CODE)
    if raw["dataset"] == "cityscapes":
        implied |= {"dataset.train.resize_base_size": [1024, 2048], "dataset.val.crop.size": raw.get("crop_size")}
    else:
        implied["dataset.train.resize_base_size"] = 500
    implied["net.encoder.pretrain"] = f"pretrained/{raw.get('backbone')}.pth"
    for key, today in _UNIMATCH.items():
        value = _pop(raw, key)
        if value is not MISSING:
            _move(sections, key, today, value, reader, remarks)
    for key in ("criterion.kwargs", "criterion"):
        if get(raw, key) == {}:
            _pop(raw, key)
    for key, value in raw.items():  # what is no key of theirs
        _move(sections, key, key, value, reader, [])
    for key, value in implied.items():
        if value is not None:
            _imply(sections, key, value, "as in UniMatch's code", remarks)
    return sections, remarks


def translate(raw: dict[str, Any], method: str, former: bool, reader: Reader) -> tuple[dict[str, Any], list[str]]:
    """A raw file with today's keys, and a remark for each that was translated.

    Args:
        raw: nested dicts, changed in place.
        method: the method's name.
        former: whether the file is of the time before methods had sections.
        reader: gets the mistakes; it learns how the user wrote each key.
    """
    remarks: list[str] = []
    of_u2pl = former and _is_of_u2pl(raw, method)
    for key, names in _SPELLINGS.items():
        value = get(raw, key)
        if isinstance(value, str):
            plain = _MODULE.sub("", value)
            today = names.get(plain, plain)
            if today != value:
                put(raw, key, today)
                remarks.append(f"{key}: {value} → {today}")
    for key, allowed in (_IGNORED | (_IGNORED_BY.get(method, {}) if former else {})).items():
        value = _pop(raw, key)
        if value is MISSING:
            continue
        if allowed is not None and value not in allowed:
            reader.error(key, f"only {' or '.join(map(show, allowed))} is supported, got {show(value)}")
        else:
            dead = key in _IGNORED | _U2PL_IGNORED
            remarks.append(f"{key}: " + ("has no meaning any more" if dead else f"means nothing to {method}"))
    head = _pop(raw, "net.decoder.kwargs.rep_head")
    if head is not MISSING and head not in (True, False):
        reader.error("net.decoder.kwargs.rep_head", f"expected true or false, got {show(head)}")
    elif head is not MISSING:
        _move(raw, "net.decoder.kwargs.rep_head", "net.embedding", 256 if head else None, reader, remarks)
    if of_u2pl:
        _fill_in(raw, method, remarks)
    if former:
        raw.pop("method", None)
        sup_only = method == "sup_only" and get(raw, "dataset.type") == "cityscapes"
        if sup_only and isinstance(get(raw, "dataset.train"), dict):
            why = "as the authors train on Cityscapes without unlabeled images"
            _imply(raw, "dataset.train.drop_last", True, why, remarks)
    for key, today in _FORMER.get(method, {}).items():
        value, section = _pop(raw, key), today.rpartition(".")[0]
        if value is not MISSING:
            _move(raw, key, today, value, reader, remarks)
        if section in reader.written:
            reader.former.setdefault(section, []).append(key.rpartition(".")[2])
    if former and method == "augseg" and isinstance(get(raw, "dataset.train.strong_aug"), dict):
        for key, value in _AUGSEG_CODE.items():
            _imply(raw, key, value, "as in AugSeg's code", remarks)
    return raw, remarks


def todays_key(key: str, method: str) -> str:
    """Where ``translate`` puts a dotted key."""
    for former, today in _FORMER.get(method, {}).items():
        if key == former or key.startswith(f"{former}."):
            key = today + key.removeprefix(former)
    return key


def _move(raw: dict[str, Any], key: str, today: str, value: Any, reader: Reader, remarks: list[str]) -> None:
    """Give a value its key of today; a section joins what is there already."""
    there = get(raw, today)
    if isinstance(value, dict) and isinstance(there, dict):
        for name, item in value.items():
            _move(raw, f"{key}.{name}", f"{today}.{name}", item, reader, remarks)
        return
    written = reader.written.get(key, key)
    for old, new in _with_children(key, today, value):
        reader.written.setdefault(new, reader.written.get(old, old))
        if old in reader.lines:
            reader.lines.setdefault(new, reader.lines[old])
    if there is not MISSING:
        reader.error(written, f"this is the former name of {today}, which is set as well: keep one")
        return
    if key in _VALUES:
        try:
            value = _VALUES[key](value)
        except (KeyError, TypeError, ValueError):
            reader.error(
                written, f"{show(value)} is not a value that this former key could have", reader.lines.get(key)
            )
            return
    with contextlib.suppress(ValueError):  # not a section: the reader reports it
        put(raw, today, value)
    remarks.append(f"{written} → {today}" + ("" if isinstance(value, dict) else f": {show(value)}"))


def _is_of_u2pl(raw: dict[str, Any], method: str) -> bool:
    """Whether a raw file is a whole one of U2PL's; its baselines differ from those of iMAS in what they leave out."""
    if method == "u2pl":
        return "net" in raw and get(raw, "trainer.contrastive") is not MISSING
    own = str(get(raw, "net.encoder.type")).startswith("u2pl.") and method == "sup_only"
    return own and get(raw, "dataset.train.resize_base_size") is MISSING and "dataset" in raw


def _fill_in(raw: dict[str, Any], method: str, remarks: list[str]) -> None:
    """Set the keys that a file of U2PL's leaves to its code."""
    type_, encoder = get(raw, "dataset.type"), get(raw, "net.encoder.type")
    implied = (_U2PL_CODE if method == "u2pl" else {}) | {"net.encoder.pretrain": f"pretrained/{encoder}.pth"}
    if get(raw, "dataset.train.rand_resize") not in (MISSING, None) and type_ in _U2PL_SIZES:
        implied["dataset.train.resize_base_size"] = _U2PL_SIZES[type_]
    for key, value in implied.items():
        _imply(raw, key, value, "as in U2PL's code", remarks)


def _imply(raw: dict[str, Any], key: str, value: Any, why: str, remarks: list[str]) -> None:
    """Set a key that is not there."""
    if get(raw, key) is MISSING:
        with contextlib.suppress(ValueError):  # not a section: the reader reports it
            put(raw, key, value)
        remarks.append(f"{key}: {show(value)}, {why}")


def _with_children(key: str, today: str, value: Any) -> Iterator[tuple[str, str]]:
    yield key, today
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _with_children(f"{key}.{name}", f"{today}.{name}", item)


def _pop(raw: dict[str, Any], key: str) -> Any:
    parents, _, last = key.rpartition(".")
    section = get(raw, parents) if parents else raw
    return section.pop(last, MISSING) if isinstance(section, dict) else MISSING
