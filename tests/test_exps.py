"""Every shipped experiment is loaded, built, stepped and held against the published logs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from first_step import progress
from PIL import Image

from imas import load_config
from imas.build import build_method
from imas.data.labels import label_path, write_labels
from imas.data.lists import Lists, read_lists
from imas.data.loaders import TrainingData
from imas.data.normalise import Normalise
from imas.engine.fit import to_device
from imas.engine.optim import build_optimizer, learning_rate, lr_factor, total_batch
from imas.errors import ConfigError
from imas.schema import Config

CONFIGS = sorted((ROOT / "exps").glob("*/*.yaml"))
RECIPES = [path for path in CONFIGS if re.search(r"_(imas|sup)\d", path.parent.name)]  # those with logs of the authors
PUBLISHED = golden.read("published_runs")
TRAIN_IMAGES = {"pascal": 10582, "cityscapes": 2975}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_shipped_experiments_load_and_say_only_what_differs(path: Path, tmp_path: Path) -> None:
    """In today's spelling, round trips are exact, and no key could be left out."""
    config = load_config(path)
    assert config.translated == ()
    copy = tmp_path / "config.yaml"
    copy.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(copy) == config

    raw = yaml.safe_load(path.read_text())
    leaves = list(_leaves(raw))
    assert len(leaves) > 5
    for section, key in leaves:
        value = section.pop(key)
        if section:  # a lone key stands for its section
            copy.write_text(yaml.safe_dump(raw))
            with contextlib.suppress(ConfigError):
                assert load_config(copy) != config, f"{key} repeats the default"
        section[key] = value


def _leaves(section: dict) -> list[tuple[dict, str]]:
    found = []
    for key, value in section.items():
        found += _leaves(value) if isinstance(value, dict) else [(section, key)]
    return found


# What a step of a recipe is made of, apart from its lists: one step of each kind is enough.
def _kind(path: Path) -> str:
    config = load_config(path)
    train = dataclasses.replace(config.dataset.train, data_list=None, unlabeled_list=None, batch_size=2)
    return repr(
        (dataclasses.replace(config.dataset, train=train, n_sup=None), config.net, config.criterion, config.options)
    )


KINDS = list({_kind(path): path for path in CONFIGS}.values())


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.parent.name)
def test_shipped_experiments_step(path: Path, tmp_path: Path) -> None:
    """On small images in the real layouts, at a small crop."""
    config = load_config(path)
    if config.dataset.type != "shapes":
        config = load_config(path, _small_tree(tmp_path, config))
    lists = read_lists(config)
    if config.wants.pseudo_label:
        size = (64, 64) if config.dataset.type == "shapes" else (70, 90)
        for name in lists.unlabeled:
            write_labels(label_path(tmp_path / "labels", name), np.ones(size, np.uint8), ())
        train = dataclasses.replace(config.dataset.train, pseudo_labels=str(tmp_path / "labels"))
        config = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, train=train))
    data = TrainingData(config, lists, seed=0, rank=0, world=1)
    method = build_method(config).train()
    epoch = config.trainer.epochs - 1  # after any warm-up
    (tensors,) = next(data.epoch(epoch, method.needs_unlabeled(epoch)))
    batch = to_device(tensors, Normalise(config.dataset.mean, config.dataset.std), torch.device("cpu"))
    step = method(*batch, progress(epoch, epoch * len(data), len(data), epochs=config.trainer.epochs))
    step.loss.backward()
    assert step.loss.isfinite()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def _small_tree(root: Path, config: Config) -> list[str]:
    """Two labeled and two unlabeled images where a recipe looks for them; the overrides that point there."""
    names = {
        "pascal": [f"2007_{number:06d}" for number in range(4)],
        "cityscapes": [f"leftImg8bit/train/ulm/ulm_00000{number}_000019_leftImg8bit.png" for number in range(4)],
        "camvid": [f"train/0001TP_00669{number}.png" for number in range(4)],
    }[config.dataset.type]
    for number, name in enumerate(names):
        files = {
            "pascal": (f"JPEGImages/{name}.jpg", f"SegmentationClassAug/{name}.png"),
            "cityscapes": (
                name,
                name.replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit", "_gtFine_labelTrainIds"),
            ),
            "camvid": (name, name.replace("train/", "trainannot/")),
        }[config.dataset.type]
        noise = np.random.default_rng(number)
        for file, shape in zip(files, ((70, 90, 3), (70, 90)) if number < 2 else ((70, 90, 3),)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 11, shape).astype(np.uint8)).save(root / file)
    (root / "labeled.txt").write_text("\n".join(names[:2]))
    (root / "unlabeled.txt").write_text("\n".join(names[2:]))
    settings = {"data_root": root, "data_list": root / "labeled.txt", "batch_size": 2, "crop.size": 65}
    words = [f"dataset.train.{key}={value}" for key, value in settings.items()]
    return [*words, f"dataset.val.data_list={root / 'labeled.txt'}", "dataset.workers=0", "net.encoder.pretrain=null"]


def _lists(config: Config) -> Lists:
    """Names as many as the published lists have."""
    labeled, total = config.dataset.n_sup, TRAIN_IMAGES[config.dataset.type]
    unlabeled = total - labeled if config.wants.unlabeled else 0
    return Lists([f"{i}" for i in range(labeled)], [f"{i}" for i in range(labeled, labeled + unlabeled)], ["0"])


@pytest.mark.parametrize("log", PUBLISHED, ids=lambda log: log["log"])
def test_recipes_repeat_the_published_logs(log: dict) -> None:
    """Hyper-parameters, iterations per epoch and every logged learning rate, to the log's five decimals.

    A line of iteration i of theirs shows the rate of iteration i - 1: so all 440 values fit, and golden/schedule.json
    tells that iteration 0 runs at the base rate.
    """
    config = load_config(ROOT / "exps" / log["recipe"] / "config.yaml", log["set"])
    train, net, trainer = config.dataset.train, config.net, config.trainer
    dilated = net.encoder.kwargs.replace_stride_with_dilation
    base = train.resize_base_size
    ours = {
        "dataset": config.dataset.type,
        "labeled": config.dataset.n_sup,
        "encoder": net.encoder.type,
        "output_stride": 32 // 2 ** sum(dilated),
        "multi_grid": net.encoder.kwargs.multi_grid,
        "aspp_dilations": list(net.decoder.kwargs.dilations),
        "low_conv_planes": net.decoder.kwargs.low_conv_planes,
        "aux_loss_weight": net.aux_loss.loss_weight if net.aux_loss else None,
        "criterion": {"ce": "CELoss", "ohem": "ohem"}[config.criterion.type],
        "crop": list(train.crop.size),
        "resize_base": base if isinstance(base, int) else list(base),
        "resize_range": list(train.rand_resize),
        "batch_per_gpu": train.batch_size,
        "epochs": trainer.epochs,
        "poly_power": trainer.lr_scheduler.kwargs.power,
        "optimizer": {**dataclasses.asdict(trainer.optimizer.kwargs), "type": trainer.optimizer.type},
    }
    assert ours["optimizer"].pop("decay") == "all"
    if config.method == "imas":
        ours |= {
            "ema_decay": config.options.ema_decay,
            "threshold": config.options.threshold,
            "unsupervised_loss_weight": config.options.loss_weight,
            "cutmix_range": list(config.options.use_cutmix_range),
            "num_augs": train.strong_aug.num_augs,
            "ignore_background": config.options.hardness.ignore_background,
        }
    assert {key: log.get(key) for key in ours} == ours
    assert total_batch(config, log["gpus"]) == trainer.reference_batch

    data = TrainingData(config, _lists(config), seed=2, rank=log["gpus"] - 1, world=log["gpus"])
    length = len(data)
    assert length == log["iterations_per_epoch"]
    assert sum(1 for _ in data.labeled_sampler) == length
    assert len(log["lr"]) == 10
    for epoch, iteration, rate in log["lr"]:
        now = epoch * length + iteration - 1
        lr = learning_rate(trainer.lr_scheduler, trainer.optimizer.kwargs.lr, now, trainer.epochs * length, length)
        assert round(lr, 5) == rate, (epoch, iteration)


def test_every_recipe_has_a_log_or_says_that_it_is_inferred() -> None:
    logged = {log["recipe"] for log in PUBLISHED}
    for path in RECIPES:
        assert ("Inferred" in path.read_text()) == (path.parent.name not in logged), path
    assert len(PUBLISHED) == 44 and logged <= {path.parent.name for path in RECIPES}


def test_the_table_of_experiments_says_what_recipes_and_logs_say() -> None:
    """exps/README.md: a row a recipe, and a row for every further log."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "exps" / "README.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    recipes, further = [row for row in rows if len(row) == 10], [row for row in rows if len(row) == 5]
    assert sorted(row[0].strip("`") for row in recipes) == [path.parent.name for path in RECIPES]
    by_name = {log["log"].removeprefix("logs-"): log for log in PUBLISHED}
    seen = []

    def figures(log: dict) -> list[str]:
        if "best" in log:
            return ["—", f"{log['best'][0]:.2f} ({log['best'][1]})"]
        return [f"{mious[0]:.2f} ({mious[1]})" for mious in (log["best_teacher"], log["best_student"])]

    def logged(cell: str, recipe: str) -> dict:
        (name,) = re.findall("`(.*?)`", cell)
        seen.append(name)
        log = by_name[name]
        assert log["recipe"] == recipe
        complete = log["last_epoch_logged"] + 1 == log["epochs"]
        assert cell == f"`{name}`" + ("" if complete else f", ends in epoch {log['last_epoch_logged']}")
        return log

    for row in recipes:
        recipe = row[0].strip("`")
        config = load_config(ROOT / "exps" / recipe / "config.yaml")
        gpus, batch = map(int, row[5].split(" × "))
        length = len(TrainingData(config, _lists(config), seed=0, rank=0, world=gpus))
        assert row[1].split()[0].lower() == config.dataset.type and row[1].endswith(f" {config.dataset.n_sup}")
        assert row[2:4] == [{"imas": "iMAS", "sup_only": "SupOnly"}[config.method], f"R{config.net.encoder.type[6:]}"]
        assert row[4] == str(32 // 2 ** sum(config.net.encoder.kwargs.replace_stride_with_dilation))
        assert (batch, row[6]) == (config.dataset.train.batch_size, str(length))
        if row[9] == "inferred":
            assert row[7:9] == ["—", "—"]
            continue
        log = logged(row[9], recipe)
        assert log["set"] == [] and log["gpus"] == gpus and row[7:9] == figures(log)
    for recipe, differs, teacher, student, cell in further:
        log = logged(cell, recipe.strip("`"))
        assert log["set"] == re.findall("`(.*?)`", differs) and [teacher, student] == figures(log)
    assert sorted(seen) == sorted(by_name)


def test_one_gpu_with_accumulation_has_the_published_updates() -> None:
    """Iterations and rates of four GPUs on one, by accumulation; the linear rule where it is asked for."""
    path = ROOT / "exps" / "pascal_imas662_r50_os16" / "config.yaml"
    config = load_config(path, ["trainer.accumulate=4", "trainer.scale_lr=true"])
    assert len(TrainingData(config, _lists(config), seed=0, rank=0, world=1)) == 620
    assert total_batch(config, 1) == 16 and lr_factor(config, 1) == 1
    config = load_config(path, ["trainer.scale_lr=true"])
    groups = [
        {"name": name, "part": name, "params": [torch.zeros(1, requires_grad=True)]} for name in ("encoder", "heads")
    ]
    optimizer = build_optimizer(groups, config.trainer.optimizer, lr_factor(config, 2))
    rates = [group["base_lr"] for group in optimizer.param_groups]
    assert math.isclose(rates[0], 0.0005) and math.isclose(rates[1], 0.005)


def test_baseline_and_imas_differ_in_nothing_but_the_method() -> None:
    ours, baseline = (load_config(ROOT / "exps" / name / "config.yaml") for name in ("shapes_imas", "shapes_sup"))
    assert ours.net.encoder == baseline.net.encoder and ours.net.decoder == baseline.net.decoder
    assert read_lists(ours).labeled == read_lists(baseline).labeled
    assert read_lists(ours).val == read_lists(baseline).val
    assert not set(read_lists(ours).unlabeled) & {*read_lists(ours).labeled, *read_lists(ours).val}
    lengths = [
        config.trainer.epochs * len(TrainingData(config, read_lists(config), 0, 0, 1)) for config in (ours, baseline)
    ]
    assert lengths[0] == lengths[1]
