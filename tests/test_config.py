"""Configuration files: the published schema loads unchanged, round trips are exact, every mistake is explained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from imas.config import carried_config, load_config, read_net
from imas.errors import ConfigError
from imas.schema import Config

# Every key of the published schema, with values that differ from the defaults where they can.
OLD_PASCAL = """\
dataset:
  type: pascal_semi
  train:
    data_root: ./data/VOC2012
    data_list: ./data/splits/pascal/662/labeled.txt
    batch_size: 4
    flip: True
    rand_resize: [0.5, 2.0]
    resize_base_size: 500
    crop:
      type: rand
      size: [513, 513]
    strong_aug:
      num_augs: 3
    hardness_aware:
      flag_using_v1: False
      flag_hardness_weighted_loss: False
      flag_cal_iou_weighted: False
      flag_cal_iou_ignore_bg: False
      flag_cmix_trigger_by_hard: True
      flag_augs_mixup_by_hard: True
      flag_mapping_random: True
      flag_mapping_gaussian: False
  val:
    data_root: ./data/VOC2012_val
    data_list: ./data/splits/pascal/val.txt
    batch_size: 3
    crop:
      type: center
      size: [513, 513]
  n_sup: 662
  workers: 4
  mean: [123.675, 116.28, 103.53]
  std: [58.395, 57.12, 57.375]
  ignore_label: 254
trainer:
  epochs: 80
  sup_only_epoch: 1
  optimizer:
    type: SGD
    kwargs:
      lr: 0.001
      momentum: 0.8
      weight_decay: 1e-4
  lr_scheduler:
    mode: poly
    kwargs:
      power: 0.8
  unsupervised:
    flag_ema_pseudo: False
    threshold: 0.9
    use_cutmix: True
    use_cutmix_beta: True
    use_cutmix_range: [0.2, 0.8]
    use_cutmix_trigger_prob: 0.5
    loss_weight: 1.5
saver:
  snapshot_dir: ckpts
  use_tb: False
  auto_resume: True
  pretrain: ''
criterion:
  type: CELoss
  kwargs:
    use_weight: False
net:
  num_classes: 21
  sync_bn: True
  ema_decay: 0.99
  aux_loss:
    aux_plane: 1024
    loss_weight: 0.3
  encoder:
    type: imas.models.resnet.resnet50
    pretrain: ./pretrained/resnet50.pth
    kwargs:
      multi_grid: True
      zero_init_residual: True
      fpn: True
      replace_stride_with_dilation: [False, False, True]
      pretrained: True
  decoder:
    type: imas.models.decoder.dec_deeplabv3_plus
    kwargs:
      inner_planes: 128
      low_conv_planes: 32
      dilations: [6, 12, 24]
      rep_head: False
"""

OLD_PASCAL_TODAY = {
    "imas": {
        "teacher_pseudo": False,
        "threshold": 0.9,
        "use_cutmix": True,
        "use_cutmix_beta": True,
        "use_cutmix_range": [0.2, 0.8],
        "use_cutmix_trigger_prob": 0.5,
        "loss_weight": 1.5,
        "sup_only_epoch": 1,
        "ema_decay": 0.99,
        "hardness": {
            "version": 2,
            "weight_loss": False,
            "class_weighted": False,
            "ignore_background": False,
            "trigger_cutmix": True,
            "blend": True,
            "scale_box": True,
            "gaussian_box": False,
        },
    },
    "dataset": {
        "type": "pascal",
        "train": {
            "data_root": "./data/VOC2012",
            "data_list": "./data/splits/pascal/662/labeled.txt",
            "unlabeled_list": "data/splits/pascal/662/unlabeled.txt",
            "batch_size": 4,
            "epoch_size": None,
            "drop_last": False,
            "flip": True,
            "rand_resize": [0.5, 2.0],
            "resize_base_size": 500,
            "crop": {"type": "rand", "size": [513, 513]},
            "strong_aug": {"type": "pool", "num_augs": 3, "random_number": False, "cutout": False},
            "pseudo_labels": None,
        },
        "val": {
            "data_root": "./data/VOC2012_val",
            "data_list": "./data/splits/pascal/val.txt",
            "batch_size": 3,
            "crop": {"size": 513},
        },
        "shapes": {"seed": 0, "size": 64, "labeled": 10, "unlabeled": 600, "val": 200},
        "folder": None,
        "n_sup": 662,
        "workers": 4,
        "cache": False,
        "on_error": "stop",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "ignore_label": 254,
    },
    "trainer": {
        "epochs": 80,
        "eval_every": 1,
        "accumulate": 1,
        "reference_batch": None,
        "scale_lr": False,
        "start_from": None,
        "amp": None,
        "tf32": False,
        "channels_last": True,
        "compile": False,
        "checkpoint_encoder": False,
        "optimizer": {
            "type": "SGD",
            "head_lr_times": 10.0,
            "kwargs": {"lr": 0.001, "momentum": 0.8, "weight_decay": 0.0001, "decay": "all"},
        },
        "lr_scheduler": {"mode": "poly", "kwargs": {"power": 0.8, "targetlr": 0.0, "milestones": []}},
    },
    "saver": {
        "snapshot_dir": "ckpts",
        "use_tb": False,
        "pictures_every": 10,
        "auto_resume": True,
        "save_every": 30.0,
    },
    "criterion": {"type": "ce", "kwargs": {"thresh": None, "min_kept": None}},
    "net": {
        "num_classes": 21,
        "sync_bn": True,
        "embedding": None,
        "aux_loss": {"aux_plane": 1024, "loss_weight": 0.3},
        "encoder": {
            "type": "resnet50",
            "pretrain": "./pretrained/resnet50.pth",
            "kwargs": {
                "multi_grid": True,
                "zero_init_residual": True,
                "replace_stride_with_dilation": [False, False, True],
                "deep_stem": True,
                "width": 64,
            },
        },
        "decoder": {
            "type": "deeplabv3plus",
            "kwargs": {"inner_planes": 128, "low_conv_planes": 32, "dilations": [6, 12, 24]},
        },
    },
}

# The same as version 0.1 of this project wrote it down, before methods had sections.
OLD_PASCAL_OF_0_1 = {
    "method": "imas",
    "dataset": {
        "type": "pascal",
        "train": {
            "data_root": "./data/VOC2012",
            "data_list": "./data/splits/pascal/662/labeled.txt",
            "unlabeled_list": "data/splits/pascal/662/unlabeled.txt",
            "batch_size": 4,
            "epoch_size": None,
            "flip": True,
            "rand_resize": [0.5, 2.0],
            "resize_base_size": 500,
            "crop": {"type": "rand", "size": [513, 513]},
            "strong_aug": {"num_augs": 3, "labeled": False},
            "hardness_aware": {
                "version": 2,
                "weight_loss": False,
                "class_weighted": False,
                "ignore_background": False,
                "trigger_cutmix": True,
                "blend": True,
                "scale_box": True,
                "gaussian_box": False,
            },
        },
        "val": {
            "data_root": "./data/VOC2012_val",
            "data_list": "./data/splits/pascal/val.txt",
            "batch_size": 3,
            "crop": {"size": 513},
        },
        "shapes": {"seed": 0, "size": 64, "labeled": 10, "unlabeled": 600, "val": 200},
        "folder": None,
        "n_sup": 662,
        "workers": 4,
        "cache": False,
        "on_error": "stop",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "ignore_label": 254,
    },
    "trainer": {
        "epochs": 80,
        "sup_only_epoch": 1,
        "eval_every": 1,
        "accumulate": 1,
        "reference_batch": None,
        "scale_lr": False,
        "start_from": None,
        "amp": None,
        "tf32": False,
        "channels_last": True,
        "compile": False,
        "checkpoint_encoder": False,
        "optimizer": {
            "type": "SGD",
            "head_lr_times": 10.0,
            "kwargs": {"lr": 0.001, "momentum": 0.8, "weight_decay": 0.0001},
        },
        "lr_scheduler": {"mode": "poly", "kwargs": {"power": 0.8, "targetlr": 0.0, "milestones": []}},
        "unsupervised": {
            "teacher_pseudo": False,
            "threshold": 0.9,
            "use_cutmix": True,
            "use_cutmix_beta": True,
            "use_cutmix_range": [0.2, 0.8],
            "use_cutmix_trigger_prob": 0.5,
            "loss_weight": 1.5,
        },
    },
    "saver": {
        "snapshot_dir": "ckpts",
        "use_tb": False,
        "pictures_every": 10,
        "auto_resume": True,
        "save_every": 30.0,
    },
    "criterion": {"type": "ce", "kwargs": {"thresh": None, "min_kept": None}},
    "net": {
        "num_classes": 21,
        "sync_bn": True,
        "ema_decay": 0.99,
        "aux_loss": {"aux_plane": 1024, "loss_weight": 0.3},
        "encoder": {
            "type": "resnet50",
            "pretrain": "./pretrained/resnet50.pth",
            "kwargs": {
                "multi_grid": True,
                "zero_init_residual": True,
                "replace_stride_with_dilation": [False, False, True],
                "deep_stem": True,
                "width": 64,
            },
        },
        "decoder": {
            "type": "deeplabv3plus",
            "kwargs": {"inner_planes": 128, "low_conv_planes": 32, "dilations": [6, 12, 24]},
        },
    },
}

OLD_PASCAL_TRANSLATED = {
    "dataset.type",
    "trainer.unsupervised",
    "trainer.sup_only_epoch",
    "net.ema_decay",
    "dataset.train.hardness_aware",
    "dataset.train.hardness_aware.flag_using_v1",
    "dataset.train.hardness_aware.flag_hardness_weighted_loss",
    "dataset.train.hardness_aware.flag_cal_iou_weighted",
    "dataset.train.hardness_aware.flag_cal_iou_ignore_bg",
    "dataset.train.hardness_aware.flag_cmix_trigger_by_hard",
    "dataset.train.hardness_aware.flag_augs_mixup_by_hard",
    "dataset.train.hardness_aware.flag_mapping_random",
    "dataset.train.hardness_aware.flag_mapping_gaussian",
    "dataset.val.crop.type",
    "trainer.unsupervised.flag_ema_pseudo",
    "saver.pretrain",
    "criterion.type",
    "criterion.kwargs.use_weight",
    "net.encoder.type",
    "net.encoder.kwargs.fpn",
    "net.encoder.kwargs.pretrained",
    "net.decoder.type",
    "net.decoder.kwargs.rep_head",
}

OLD_CITYSCAPES = """\
dataset:
  type: cityscapes_semi
  train:
    data_root: ./data/cityscapes
    data_list: ./data/splits/cityscapes/744/labeled.txt
    flip: True
    rand_resize: [0.5, 2]
    resize_base_size: [1024, 2048]
    crop: {type: center, size: 769}
    hardness_aware: {}
  val:
    data_list: ./data/splits/cityscapes/val.txt
trainer:
  epochs: 240
  optimizer: {type: adam, kwargs: {lr: 1e-3}}
  lr_scheduler: {mode: cosine, kwargs: {targetlr: 1.0e-5}}
  unsupervised: {threshold: 0.7, use_cutmix_range: [0.9, 0.1]}
saver: {snapshot_dir: checkpoints}
criterion: {type: ohem, kwargs: {thresh: 0.6, min_kept: 50000}}
net:
  num_classes: 19
  encoder: {type: u2pl.models.resnet.resnet101, pretrain: null}
  decoder: {type: u2pl.models.decoder.dec_deeplabv3_plus}
"""

# The shortest configurations in today's schema.
SHAPES = {
    "imas": {"use_cutmix": True, "hardness": {"blend": True}},
    "dataset": {"type": "shapes", "train": {"strong_aug": {"num_augs": 2}}},
    "trainer": {"epochs": 3, "optimizer": {"kwargs": {"lr": 0.01}}},
    "net": {"num_classes": 4, "encoder": {"type": "resnet18"}},
}
SUP_ONLY = {
    "sup_only": {},
    "dataset": {
        "type": "cityscapes",
        "train": {"data_root": "data/cityscapes", "data_list": "186/labeled.txt", "crop": {"size": [64, 128]}},
        "val": {"data_list": "val.txt"},
    },
    "trainer": {
        "epochs": 3,
        "optimizer": {"kwargs": {"lr": 0.01}},
        "lr_scheduler": {"mode": "milestones", "kwargs": {"milestones": [1, 2]}},
    },
    "net": {"num_classes": 19, "encoder": {"type": "resnet34"}},
}
BASES = {"old": yaml.safe_load(OLD_PASCAL), "shapes": SHAPES, "sup_only": SUP_ONLY}
DROP = object()


def _written(folder: Path, content: str | dict) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _edited(base: str, edits: dict) -> dict:
    """A base configuration with dotted keys set, or left out."""
    raw = copy.deepcopy(BASES[base])
    for dotted, value in edits.items():
        *parents, last = dotted.split(".")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is DROP:
            del section[last]
        else:
            section[last] = value
    return raw


def _complaint(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# The published schema


def test_only_the_authors_cityscapes_baseline_drops_the_last_short_batch(tmp_path: Path) -> None:
    """A former file means what it meant; a file of today says so itself."""
    former = OLD_CITYSCAPES.replace("    hardness_aware: {}\n", "").replace("  unsupervised: {", "  # {")
    assert load_config(_written(tmp_path, former)).dataset.train.drop_last
    assert not load_config(_written(tmp_path, OLD_PASCAL)).dataset.train.drop_last
    assert not load_config(_written(tmp_path, SUP_ONLY)).dataset.train.drop_last


def test_published_pascal_file_loads_with_every_value_translated(tmp_path: Path) -> None:
    """Compared as a whole, so that no key can be read and dropped."""
    assert load_config(_written(tmp_path, OLD_PASCAL)).to_dict() == OLD_PASCAL_TODAY


def test_a_file_and_a_checkpoint_of_version_0_1_mean_the_same(tmp_path: Path) -> None:
    path = _written(tmp_path, OLD_PASCAL_OF_0_1)
    assert load_config(path).to_dict() == OLD_PASCAL_TODAY
    carried = carried_config(copy.deepcopy(OLD_PASCAL_OF_0_1), tmp_path / "ckpt.pth")
    assert carried.to_dict() == OLD_PASCAL_TODAY


def test_translated_names_each_former_key_and_no_other(tmp_path: Path) -> None:
    """One line a former key or spelling, and nothing about keys that still mean what they meant."""
    translated = load_config(_written(tmp_path, OLD_PASCAL)).translated
    assert {line.partition(" → ")[0].partition(": ")[0] for line in translated} == OLD_PASCAL_TRANSLATED
    assert len(translated) == len(OLD_PASCAL_TRANSLATED)
    assert "dataset.train.hardness_aware.flag_using_v1 → imas.hardness.version: 2" in translated
    assert "net.encoder.type: imas.models.resnet.resnet50 → resnet50" in translated


def test_published_cityscapes_file_loads_with_the_defaults_of_the_schema(tmp_path: Path) -> None:
    """The other spellings (u2pl, ohem, adam, cosine, pair base, one-number crop) and what absent keys mean."""
    config = load_config(_written(tmp_path, OLD_CITYSCAPES))
    train, val, trainer, net = config.dataset.train, config.dataset.val, config.trainer, config.net
    assert (config.method, config.dataset.type) == ("imas", "cityscapes")
    assert (train.batch_size, train.rand_resize, train.resize_base_size) == (2, (0.5, 2.0), (1024, 2048))
    assert (train.crop.type, train.crop.size, train.strong_aug) == ("center", (769, 769), None)
    hardness = config.options.hardness
    assert (hardness.version, hardness.weight_loss, hardness.class_weighted) == (1, True, True)
    assert hardness.ignore_background is True
    assert not any((hardness.trigger_cutmix, hardness.blend, hardness.scale_box, hardness.gaussian_box))
    assert (val.batch_size, val.crop.size, val.data_root) == (1, 769, None)
    assert config.dataset.ignore_label == 255
    assert (config.options.sup_only_epoch, trainer.optimizer.type, trainer.optimizer.kwargs.lr) == (0, "adam", 0.001)
    assert trainer.optimizer.head_lr_times == 1.0
    assert (trainer.lr_scheduler.mode, trainer.lr_scheduler.kwargs.targetlr) == ("cosine", 1e-5)
    unsupervised = config.options
    assert (unsupervised.teacher_pseudo, unsupervised.threshold, unsupervised.loss_weight) == (True, 0.7, 1.0)
    assert (unsupervised.use_cutmix, unsupervised.use_cutmix_beta) == (False, False)
    assert unsupervised.use_cutmix_trigger_prob == 1.0
    assert unsupervised.use_cutmix_range == (0.1, 0.9)  # sorted
    assert config.saver.auto_resume is False
    assert (config.criterion.type, config.criterion.kwargs.thresh, config.criterion.kwargs.min_kept) == (
        "ohem", 0.6, 50_000,
    )  # fmt: skip
    assert (net.encoder.type, net.encoder.pretrain, net.decoder.type) == ("resnet101", None, "deeplabv3plus")
    assert net.aux_loss is None


@pytest.mark.parametrize("package", ["imas", "u2pl"])
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_published_encoder_spelling_is_known(package: str, depth: int) -> None:
    net = read_net({"num_classes": 21, "encoder": {"type": f"{package}.models.resnet.resnet{depth}"}})
    assert net.encoder.type == f"resnet{depth}"


def test_without_an_unsupervised_section_the_method_is_sup_only(tmp_path: Path) -> None:
    """Absent and null are the same, in the published schema and in today's."""
    old = _edited("old", {"dataset.type": "pascal", "dataset.train.hardness_aware": DROP})
    for value in (DROP, None):
        raw = copy.deepcopy(old)
        if value is DROP:
            del raw["trainer"]["unsupervised"]
        else:
            raw["trainer"]["unsupervised"] = None
        assert load_config(_written(tmp_path, raw)).method == "sup_only"
    assert load_config(_written(tmp_path, SUP_ONLY)).method == "sup_only"


def test_outputs_lie_beside_the_yaml(tmp_path: Path) -> None:
    """The folder of the YAML, whatever the current one is."""
    config = load_config(_written(tmp_path, OLD_PASCAL))
    assert config.snapshot_dir == tmp_path / "ckpts"
    assert config.log_dir == tmp_path / "log"


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as a string."""
    assert yaml.safe_load("1e-4") == "1e-4"
    config = load_config(_written(tmp_path, OLD_CITYSCAPES), ["trainer.optimizer.kwargs.weight_decay=5e-4"])
    assert config.trainer.optimizer.kwargs.lr == 0.001
    assert config.trainer.optimizer.kwargs.weight_decay == 0.0005


# Round trips


@pytest.mark.parametrize(
    "content", [OLD_PASCAL, OLD_CITYSCAPES, SUP_ONLY, SHAPES], ids=["imas", "ohem", "sup", "shapes"]
)
def test_round_trip_through_yaml_gives_an_equal_configuration(tmp_path: Path, content: str | dict) -> None:
    """load → to_dict → YAML → load; and what a run writes down needs no translation."""
    first = load_config(_written(tmp_path, content))
    second = load_config(_written(tmp_path, first.to_dict()))
    assert isinstance(second, Config)
    assert second == first
    assert second.to_dict() == first.to_dict()
    assert second.translated == ()


def test_configurations_with_different_values_are_unequal(tmp_path: Path) -> None:
    """Else the round trip would pin nothing."""
    path = _written(tmp_path, SHAPES)
    assert load_config(path) != load_config(path, ["trainer.epochs=4"])


# Overrides


def test_overrides_win_and_are_typed_as_yaml_types_them(tmp_path: Path) -> None:
    path = _written(tmp_path, OLD_PASCAL)
    words = [
        "trainer.epochs=7",
        "dataset.train.flip=no",
        "trainer.optimizer.kwargs.lr=1e-2",
        "dataset.train.crop.size=[64, 96]",
        "net.aux_loss=null",
        "saver.snapshot_dir=a=b",
        "dataset.train.hardness_aware.flag_using_v1=true",
        "net.encoder={type: resnet18, kwargs: {multi_grid: true}}",
    ]
    config = load_config(path, words)
    assert config.trainer.epochs == 7
    assert config.dataset.train.flip is False
    assert config.trainer.optimizer.kwargs.lr == 0.01
    assert config.dataset.train.crop.size == (64, 96)
    assert config.net.aux_loss is None
    assert config.saver.snapshot_dir == "a=b"
    assert config.options.hardness.version == 1
    assert (config.net.encoder.type, config.net.encoder.kwargs.multi_grid) == ("resnet18", True)
    assert config.dataset.train.batch_size == 4  # the rest stays


def test_sections_that_share_an_alias_are_changed_one_by_one(tmp_path: Path) -> None:
    """By an override, and by the translation, which takes ``type`` out of the second."""
    train, val = (f"    crop:\n      type: {kind}\n      size: [513, 513]\n" for kind in ("rand", "center"))
    assert OLD_PASCAL.count(train) == OLD_PASCAL.count(val) == 1
    text = OLD_PASCAL.replace(train, "    crop: &crop {type: center, size: [513, 513]}\n")
    text = text.replace(val, "    crop: *crop\n")
    config = load_config(_written(tmp_path, text), ["dataset.train.crop.size=[64, 96]"])
    assert config.dataset.train.crop.size == (64, 96) and config.dataset.train.crop.type == "center"
    assert config.dataset.val.crop.size == 513


def test_overrides_make_sections_that_the_file_lacks(tmp_path: Path) -> None:
    config = load_config(_written(tmp_path, SHAPES), ["dataset.shapes.unlabeled=40", "dataset.val.batch_size=5"])
    assert config.dataset.shapes.unlabeled == 40
    assert config.dataset.val.batch_size == 5


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trainer.epochs=0", ["trainer.epochs", "at least 1", "got 0"]),
        ("trainer.epochs=ten", ["trainer.epochs", "integer", "'ten'"]),
        ("trainer.epochs=", ["trainer.epochs", "integer", "null"]),
        ("trainer.epoch=3", ["trainer.epoch:", "unknown key", "epochs"]),
        ("trainer.epochs", ["trainer.epochs", "dotted.key=value"]),
        ("=3", ["--set =3", "dotted.key=value"]),
        ("trainer.epochs.more=3", ["trainer.epochs.more=3", "epochs is not a section"]),
        ("trainer.epochs=[1", ["trainer.epochs=[1", "not YAML"]),
        ("saver.snapshot_dir=!!python/object/apply:os.getcwd []", ["saver.snapshot_dir", "not YAML"]),
    ],
)  # fmt: skip
def test_wrong_overrides_are_explained(tmp_path: Path, word: str, expected: list[str]) -> None:
    message = _complaint(_written(tmp_path, SHAPES), (word,))
    for part in expected:
        assert part in message


# Mistakes

# (base, dotted keys set or dropped, the key that the message must name, what it must say)
WRONG_VALUES = {
    # wrong types
    "text for an integer": ("old", {"trainer.epochs": "eighty"}, "trainer.epochs", "an integer of at least 1"),
    "float for an integer": ("old", {"trainer.epochs": 80.5}, "trainer.epochs", "an integer"),
    "bool for an integer": ("old", {"dataset.train.batch_size": True}, "dataset.train.batch_size", "an integer"),
    "text for a number": ("old", {"trainer.optimizer.kwargs.lr": "fast"}, "trainer.optimizer.kwargs.lr", "above 0"),
    "bool for a number": ("old", {"net.ema_decay": True}, "net.ema_decay", "a number between 0 and 1"),
    "integer for a bool": ("old", {"net.sync_bn": 1}, "net.sync_bn", "true or false"),
    "text for a bool": ("old", {"dataset.train.flip": "sure"}, "dataset.train.flip", "true or false"),
    "list for a text": ("old", {"saver.snapshot_dir": ["a"]}, "saver.snapshot_dir", "a text"),
    "value for a section": ("old", {"net.encoder": "resnet50"}, "net.encoder", "a section"),
    "list for a section": ("old", {"trainer.unsupervised": [1, 2]}, "trainer.unsupervised", "a section"),
    "two of three means": ("old", {"dataset.mean": [0.5, 0.5]}, "dataset.mean", "a list of 3, each a number"),
    "null for a number": ("old", {"trainer.epochs": None}, "trainer.epochs", "an integer"),
    "text among numbers": ("old", {"dataset.train.rand_resize": [0.5, "two"]}, "dataset.train.rand_resize", "[low, h"),
    # names that are not in the table
    "unknown data set": ("old", {"dataset.type": "ade20k"}, "dataset.type", "pascal or cityscapes or camvid or f"),
    "unknown optimiser": ("old", {"trainer.optimizer.type": "lion"}, "trainer.optimizer.type", "SGD or adam"),
    "unknown scheduler": ("old", {"trainer.lr_scheduler.mode": "step"}, "trainer.lr_scheduler.mode", "poly or cosine"),
    "unknown criterion": ("old", {"criterion.type": "dice"}, "criterion.type", "ce or ohem"),
    "unknown encoder": ("old", {"net.encoder.type": "resnet51"}, "net.encoder.type", "resnet50"),
    "unknown decoder": ("old", {"net.decoder.type": "imas.models.decoder.unet"}, "net.decoder.type", "deeplabv3plus"),
    "somebody else's encoder": ("old", {"net.encoder.type": "torchvision.models.resnet50"}, "net.encoder.type", "50"),
    "misspelt data set": ("old", {"dataset.type": "cityscape"}, "dataset.type", "did you mean cityscapes?"),
    "unknown method": ("shapes", {"imas": DROP, "method": "mixmatch"}, "method", "imas, sup_only"),
    "unknown method's section": ("shapes", {"mixmatch": {}}, "mixmatch", "methods: imas, sup_only"),
    "unknown crop type": ("old", {"dataset.train.crop.type": "random"}, "dataset.train.crop.type", "rand or center"),
    # out of range
    "no epochs": ("old", {"trainer.epochs": 0}, "trainer.epochs", "at least 1"),
    "negative rate": ("old", {"trainer.optimizer.kwargs.lr": -0.1}, "trainer.optimizer.kwargs.lr", "above 0"),
    "infinite rate": ("old", {"trainer.optimizer.kwargs.lr": float("inf")}, "trainer.optimizer.kwargs.lr", "number"),
    "rate not a number": ("old", {"trainer.optimizer.kwargs.lr": float("nan")}, "trainer.optimizer.kwargs.lr", "above"),
    "mean not a number": ("old", {"dataset.mean": [float("nan"), 0.4, 0.4]}, "dataset.mean", "number"),
    "threshold above 1": ("old", {"trainer.unsupervised.threshold": 95}, "trainer.unsupervised.threshold", "0 and 1"),
    "negative warm-up": ("old", {"trainer.sup_only_epoch": -1}, "trainer.sup_only_epoch", "at least 0"),
    "scale upside down": ("old", {"dataset.train.rand_resize": [2.0, 0.5]}, "dataset.train.rand_resize", "low <= high"),
    "scale 0": ("old", {"dataset.train.rand_resize": [0, 2]}, "dataset.train.rand_resize", "0 < low"),
    "base 0": ("old", {"dataset.train.resize_base_size": 0}, "dataset.train.resize_base_size", ""),
    "crop 0": ("old", {"dataset.train.crop.size": 0}, "dataset.train.crop.size", "a side or [height, width]"),
    "oblong window": ("old", {"dataset.val.crop.size": [513, 769]}, "dataset.val.crop.size", "one side"),
    "window of one": ("old", {"dataset.val.crop.size": 1}, "dataset.val.crop.size", "at least 2"),
    "no operations": ("old", {"dataset.train.strong_aug.num_augs": 0}, "dataset.train.strong_aug.num_augs", "least 1"),
    "box above 1": (
        "old", {"trainer.unsupervised.use_cutmix_range": [0.1, 1.5]}, "trainer.unsupervised.use_cutmix_range", "<= 1",
    ),
    "deviation 0": ("old", {"dataset.std": [0.2, 0.0, 0.2]}, "dataset.std", "above 0"),
    "ignore label 256": ("old", {"dataset.ignore_label": 256}, "dataset.ignore_label", "0..255"),
    "negative workers": ("old", {"dataset.workers": -1}, "dataset.workers", "at least 0"),
    "one class": ("old", {"net.num_classes": 1}, "net.num_classes", "2..255"),
    "dilation 0": ("old", {"net.decoder.kwargs.dilations": [0, 6, 12]}, "net.decoder.kwargs.dilations", ">= 1"),
    "decay above 1": ("old", {"net.ema_decay": 1.01}, "net.ema_decay", "between 0 and 1"),
    "tiny shapes": ("shapes", {"dataset.shapes.size": 8}, "dataset.shapes.size", "at least 32"),
    # former keys with values that they could not have
    "fpn off": ("old", {"net.encoder.kwargs.fpn": False}, "net.encoder.kwargs.fpn", "only True"),
    "rep_head on": ("old", {"net.decoder.kwargs.rep_head": True}, "net.decoder.kwargs.rep_head", "does not train it"),
    "class weights": ("old", {"criterion.kwargs.use_weight": True}, "criterion.kwargs.use_weight", "only False"),
    "former flag with a text": (
        "old", {"trainer.unsupervised.flag_ema_pseudo": "yep"}, "trainer.unsupervised.flag_ema_pseudo", "true or false",
    ),
    "former and new name": (
        "old", {"dataset.train.hardness_aware.version": 1}, "dataset.train.hardness_aware.flag_using_v1", "version",
    ),
    # unknown keys, with the nearest known one
    "near miss": ("old", {"trainer.unsupervised.treshold": 0.9}, "trainer.unsupervised.treshold", "mean threshold?"),
    "near miss of a former key": (
        "old", {"trainer.unsupervised.flag_ema_pseud": True}, "trainer.unsupervised.flag_ema_pseud", "flag_ema_pseudo?",
    ),
    "near miss of a section": ("old", {"criterium": {}}, "criterium", "did you mean criterion?"),
    "nothing near": ("old", {"saver.zzz": 1}, "saver.zzz", "auto_resume, pictures_every, save_every, snapshot_dir"),
    "key in the wrong section": ("old", {"trainer.num_classes": 21}, "trainer.num_classes", "unknown key"),
    "number as a key": ("old", {"7": 1}, "7", "unknown key"),
    # missing keys
    "no epochs key": ("old", {"trainer.epochs": DROP}, "trainer.epochs", "missing; expected an integer"),
    "no trainer": ("old", {"trainer": DROP}, "trainer", "missing; expected a section"),
    "no encoder type": ("old", {"net.encoder.type": DROP}, "net.encoder.type", "missing"),
    "no rate": ("old", {"trainer.optimizer.kwargs.lr": DROP}, "trainer.optimizer.kwargs.lr", "missing"),
    "no labeled list": ("old", {"dataset.train.data_list": DROP}, "dataset.train.data_list", "missing"),
    "no validation list": ("old", {"dataset.val.data_list": DROP}, "dataset.val.data_list", "missing"),
    "no data folder": ("old", {"dataset.train.data_root": DROP}, "dataset.train.data_root", "missing"),
    "no crop": ("old", {"dataset.train.crop": DROP}, "dataset.train.crop", "missing"),
    # sections that contradict each other
    "wrong class count": ("old", {"net.num_classes": 20}, "net.num_classes", "21 classes, got 20"),
    "wrong class count of shapes": ("shapes", {"net.num_classes": 21}, "net.num_classes", "4 classes, got 21"),
    "wrong aux_plane": ("old", {"net.aux_loss.aux_plane": 512}, "net.aux_loss.aux_plane", "1024 channels, got 512"),
    "aux_plane of another depth": (
        "old", {"net.encoder.type": "u2pl.models.resnet.resnet18"}, "net.aux_loss.aux_plane", "256 channels, got 1024",
    ),
    "bad strides": (
        "old",
        {"net.encoder.kwargs.replace_stride_with_dilation": [True, False, True]},
        "net.encoder.kwargs.replace_stride_with_dilation",
        "[false, true, true] (8)",
    ),
    "two strides": (
        "old",
        {"net.encoder.kwargs.replace_stride_with_dilation": [False, True]},
        "net.encoder.kwargs.replace_stride_with_dilation",
        "a list of 3",
    ),
    "warm-up to the end": ("old", {"trainer.sup_only_epoch": 80}, "trainer.sup_only_epoch", "fewer than the 80 epochs"),
    "scale without a base": (
        "old", {"dataset.train.resize_base_size": DROP}, "dataset.train.resize_base_size", "missing",
    ),
    "former version with a text": (
        "old",
        {"dataset.train.hardness_aware.flag_using_v1": "v1"},
        "dataset.train.hardness_aware.flag_using_v1",
        "'v1'",
    ),
    "scale without a crop": (
        "shapes",
        {"dataset.train.rand_resize": [0.5, 2.0], "dataset.train.resize_base_size": 64},
        "dataset.train.crop",
        "missing",
    ),
    "OHEM's keys on CE": ("old", {"criterion.kwargs.thresh": 0.7}, "criterion.kwargs.thresh", "only ohem"),
    "OHEM's count on CE": ("old", {"criterion.kwargs.min_kept": 9}, "criterion.kwargs.min_kept", "only ohem"),
    "auxiliary head without a loss": (
        "old", {"net.aux_loss.loss_weight": 0}, "net.aux_loss.loss_weight", "a number above 0",
    ),
    "auxiliary loss without its head": ("old", {"net.loss_weight": 0.4}, "net.loss_weight", "unknown key"),
    "crop larger than any image": ("old", {"dataset.train.crop.size": 1001}, "dataset.train.crop.size", "1000 pixels"),
    "crop larger than a shape": (
        "shapes", {"dataset.train.crop": {"size": 65}}, "dataset.train.crop.size", "at most 64 pixels",
    ),
    "unlabeled list from nowhere": (
        "old", {"dataset.train.data_list": "lists/some.txt"}, "dataset.train.unlabeled_list", "lists/some.txt",
    ),
    "torchvision's weights for a deep stem": (
        "old", {"net.encoder.pretrain": "torchvision"}, "net.encoder.pretrain", "deep_stem",
    ),
    "scaling from nowhere": ("old", {"trainer.scale_lr": True}, "trainer.reference_batch", "missing"),
    "nothing to accumulate": ("old", {"trainer.accumulate": 0}, "trainer.accumulate", "at least 1"),
    "start from a number": ("old", {"trainer.start_from": 3}, "trainer.start_from", "a text or null"),
    "ignored class": ("old", {"dataset.ignore_label": 0}, "dataset.ignore_label", "one of the 21 classes"),
    "two methods": ("shapes", {"sup_only": {}}, "sup_only", "sections imas and sup_only"),
    "a key of another method": ("sup_only", {"sup_only.ema_decay": 0.99}, "sup_only.ema_decay", "unknown key"),
    "a former key of another method": ("sup_only", {"net.ema_decay": 0.99}, "net.ema_decay", "unknown key"),
    "a former section of another method": (
        "sup_only", {"dataset.train.hardness_aware": {}}, "dataset.train.hardness_aware", "unknown key",
    ),
    "strong views without their section": (
        "sup_only", {"sup_only.strong_views": True}, "dataset.train.strong_aug", "missing",
    ),
    "two box rules": (
        "old",
        {"dataset.train.hardness_aware.flag_mapping_gaussian": True},
        "dataset.train.hardness_aware.flag_mapping_gaussian",
        "scale_box",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_value_is_an_error_that_names_file_key_and_expectation(
    tmp_path: Path, case: tuple[str, dict, str, str]
) -> None:
    """The bases load, so each message comes from the edit alone."""
    base, edits, key, expected = case
    path = _written(tmp_path, _edited(base, edits))
    message = _complaint(path)
    lines = [line for line in message.splitlines() if f": {key}: " in line]
    assert lines, message
    assert lines[0].strip().startswith(str(path))
    assert expected in lines[0]


@pytest.mark.parametrize("base", BASES)
def test_the_bases_of_the_wrong_values_are_right(tmp_path: Path, base: str) -> None:
    assert load_config(_written(tmp_path, BASES[base])).trainer.epochs == BASES[base]["trainer"]["epochs"]


# (text, what the message must say besides the file)
WRONG_FILES = {
    "empty": ("", "expected sections"),
    "comments only": ("# nothing\n", "expected sections"),
    "a list": ("- dataset\n- trainer\n", "expected sections"),
    "a text": ("resnet50\n", "expected sections"),
    "broken YAML": ("dataset: {type: [pascal\n", "not a YAML file"),
    "tab": ("dataset:\n\ttype: pascal\n", "not a YAML file"),
    "two documents": ("a: 1\n---\nb: 2\n", "not a YAML file"),
    "runs a command": ("saver: !!python/object/apply:os.system ['touch {marker}']\n", "safely"),
    "makes an object": ("saver: !!python/object/new:pathlib.Path [x]\n", "safely"),
    "names a function": ("dataset: {type: !!python/name:os.system }\n", "safely"),
    "list as a key": ("? [a, b]\n: 3\n", "not a YAML file"),
    "repeated key": ("trainer:\n  epochs: 3\n  epochs: 4\n", ":3: trainer.epochs: this key is given twice"),
    "repeated section": ("net: {}\ntrainer: {}\nnet: {}\n", ":3: net: this key is given twice, first in line 1"),
    "impossible date": ("saver:\n  snapshot_dir: 2022-13-01\n", ""),
    "wrong tag": ("saver:\n  use_tb: !!bool perhaps\n", ""),
    "endless alias": ("saver: &again\n  more: *again\n", ""),
}


@pytest.mark.parametrize("case", WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_wrong_file_is_an_error_that_names_it(tmp_path: Path, case: tuple[str, str]) -> None:
    text, expected = case
    marker = tmp_path / "executed"
    path = _written(tmp_path, text.replace("{marker}", str(marker)))
    message = _complaint(path)
    assert str(path) in message
    assert expected in message
    assert not marker.exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Missing, a folder, and bytes that are no text."""
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80weights")
    for path in (tmp_path / "missing.yaml", tmp_path, binary):
        assert f"{path}: cannot read the configuration file" in _complaint(path)


def test_all_mistakes_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
dataset:
  type: pascal_semy
  train:
    batch_size: 0
    flipp: true
    crop: {size: [513]}
trainer:
  epochs: many
  unsupervised:
    threshold: 2
net:
  encoder:
    type: resnet50
    kwargs:
      fpn: false
"""
    path = _written(tmp_path, text)
    head, *errors = _complaint(path).splitlines()
    assert "9 errors" in head
    starts = [
        f"{path}:2: dataset.type: ",
        f"{path}:4: dataset.train.batch_size: ",
        f"{path}:5: dataset.train.flipp: unknown key; did you mean flip?",
        f"{path}:6: dataset.train.crop.size: ",
        f"{path}:8: trainer.epochs: ",
        f"{path}:10: trainer.unsupervised.threshold: ",
        f"{path}:15: net.encoder.kwargs.fpn: ",
        f"{path}: trainer.optimizer: missing",
        f"{path}: net.num_classes: missing",
    ]
    assert len(errors) == len(starts)
    for start in starts:
        assert sum(error.strip().startswith(start) for error in errors) == 1, start


def test_several_contradictions_come_at_once(tmp_path: Path) -> None:
    edits = {"trainer.sup_only_epoch": 99, "net.num_classes": 7, "net.aux_loss.aux_plane": 3}
    message = _complaint(_written(tmp_path, _edited("old", edits)))
    assert "3 errors" in message
    for key in edits:
        assert f" {key}: " in message


def test_contradictions_come_together_with_other_mistakes(tmp_path: Path) -> None:
    """Spec: all errors are reported together. A misspelt key must not hide a wrong class count."""
    message = _complaint(_written(tmp_path, _edited("old", {"saver.use_tbb": True, "net.num_classes": 7})))
    assert " saver.use_tbb: " in message
    assert " net.num_classes: " in message


def test_repeated_keys_come_together_with_other_mistakes(tmp_path: Path) -> None:
    """Spec: all errors are reported together, repeated keys among them."""
    message = _complaint(_written(tmp_path, OLD_PASCAL + "criterion: {}\ncriterium: {}\n"))
    assert "this key is given twice" in message
    assert " criterium: " in message


def test_net_section_alone_is_checked_as_strictly() -> None:
    """``read_net`` serves models that are built without an experiment."""
    raw = {"num_classes": 5, "encoder": {"type": "resnet18"}, "aux_loss": {"aux_plane": 1024}}
    with pytest.raises(ConfigError, match=r"aux_loss\.aux_plane: .*256 channels, got 1024"):
        read_net(raw)
    with pytest.raises(ConfigError, match=r"encoder\.typ: unknown key; did you mean type\?"):
        read_net({"num_classes": 5, "encoder": {"typ": "resnet18"}})
