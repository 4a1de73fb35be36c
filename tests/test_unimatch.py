"""FixMatch and UniMatch: what the golden figures do not show."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
import yaml
from conftest import ROOT

from imas.build import build_model, main_and_auxiliary
from imas.config import load_config
from imas.errors import ConfigError
from imas.methods.base import Labeled, Progress, Unlabeled
from imas.methods.fixmatch import FixMatch
from imas.methods.fixmatch import Options as FixMatchOptions
from imas.methods.unimatch import Options, UniMatch
from imas.ops.losses import cross_entropy

NET: dict[str, Any] = {
    "num_classes": 4,
    "encoder": {"type": "resnet18", "kwargs": {"width": 8, "replace_stride_with_dilation": [False, False, True]}},
    "decoder": {"kwargs": {"inner_planes": 8, "low_conv_planes": 4, "dilations": [1, 2, 3]}},
    "aux_loss": {"loss_weight": 0.4},
}
FLAVOURS = {
    "fixmatch": (FixMatch, FixMatchOptions(threshold=0)),
    "fixmatch of a teacher": (FixMatch, FixMatchOptions(threshold=0, teacher=True)),
    "unimatch": (UniMatch, Options(threshold=0)),
    "unimatch of a teacher": (UniMatch, Options(threshold=0, teacher=True)),
    "unimatch with complementary dropout": (UniMatch, Options(threshold=0, complementary_dropout=True)),
    "unimatch V2": (UniMatch, Options(threshold=0, teacher=True, complementary_dropout=True)),
}
flavours = pytest.mark.parametrize("flavour", FLAVOURS)


def _method(flavour: str) -> FixMatch:
    torch.manual_seed(0)
    kind, options = FLAVOURS[flavour]
    return kind(options, partial(build_model, NET), partial(main_and_auxiliary, cross_entropy, 0.4)).train()


def _batch(views: int, images: int = 4) -> tuple[Labeled, Unlabeled]:
    labeled = Labeled(golden.randn(1, images, 3, 33, 33), golden.randint(2, 4, images, 33, 33))
    weak = golden.randn(3, images, 3, 33, 33)
    strong = tuple(golden.randn(4 + view, images, 3, 33, 33) for view in range(views))
    return labeled, Unlabeled(weak, strong, torch.ones(images, 33, 33, dtype=torch.bool), torch.arange(images))


def _progress(iteration: int = 0) -> Progress:
    return Progress(0, 2, iteration, 4, torch.Generator().manual_seed(7))


@flavours
@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_trainable_parameter_gets_a_gradient(flavour: str, format: torch.dtype) -> None:
    method = _method(flavour)
    with torch.autocast("cpu", torch.bfloat16, enabled=format == torch.bfloat16):
        step = method(*_batch(method.strong_views), _progress())
    step.loss.backward()
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert len(parameters) == len(list(method.student.parameters()))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)
    assert step.loss.dtype == torch.float32
    assert not any(value.requires_grad for value in step.scalars.values())


@flavours
def test_a_batch_of_padding_alone_costs_nothing(flavour: str) -> None:
    """The release divides 0 by 0."""
    method = _method(flavour)
    labeled, unlabeled = _batch(method.strong_views)
    labeled = labeled._replace(label=torch.full_like(labeled.label, 255))
    unlabeled = unlabeled._replace(valid=torch.zeros_like(unlabeled.valid))
    step = method(labeled, unlabeled, _progress())
    assert step.loss == 0
    assert step.scalars["pseudo"] == 0
    assert step.scalars["predicted"].sum() == 0


@flavours
def test_padding_does_not_steer_the_loss(flavour: str) -> None:
    """Logits there are as free as those of ignored labels: the loss of real pixels is their mean."""
    method = _method(flavour)
    coarse = golden.randn(9, 2, 4, 33, 33)
    _, unlabeled = _batch(method.strong_views, 2)
    valid = unlabeled.valid.clone()
    valid[1, 20:] = False
    target = method.target(golden.randn(10, 2, 4, 33, 33), unlabeled._replace(valid=valid))
    changed = torch.where(valid.unsqueeze(1), coarse, 100 * coarse)
    loss = method.consistency(changed, target)
    expected = torch.nn.functional.cross_entropy(coarse, target.label.masked_fill(~valid, 255), ignore_index=255)
    torch.testing.assert_close(loss, expected)


@flavours
def test_patches_are_of_another_image_of_the_batch(flavour: str) -> None:
    """In the release they are of the same image."""
    method = _method(flavour)
    _, unlabeled = _batch(method.strong_views)
    numbers = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 33, 33)
    unlabeled = unlabeled._replace(strong=(numbers,) * method.strong_views)
    boxes = [torch.zeros(4, 33, 33, dtype=torch.bool).index_fill(1, torch.tensor([view]), True) for view in range(2)]
    method.boxes = lambda valid, generator: boxes[: method.strong_views]
    _, _, _, strong = method.prepared(unlabeled, torch.Generator())
    for view, images in enumerate(strong):
        assert images[:, 0, view, 0].tolist() == [3, 2, 1, 0]
        assert images[:, 0, 5, 0].tolist() == [0, 1, 2, 3]


def test_boxes_of_two_views_are_drawn_apart_and_repeat_with_the_generator() -> None:
    method = _method("unimatch")
    valid = torch.ones(4, 33, 33, dtype=torch.bool)
    first, second = method.boxes(valid, torch.Generator().manual_seed(1))
    again, _ = method.boxes(valid, torch.Generator().manual_seed(1))
    assert (first == again).all() and (first != second).any()


@pytest.mark.parametrize(
    ("flavour", "encoder", "decoder", "images"),
    [("fixmatch", 2, 2, 8), ("unimatch", 2, 2, 16), ("fixmatch of a teacher", 1, 1, 8), ("unimatch V2", 2, 2, 4)],
)
def test_passes_of_a_step(flavour: str, encoder: int, decoder: int, images: int) -> None:
    """Train-mode passes of encoder and decoder, and how many images the decoder sees first."""
    method, seen = _method(flavour), []
    method.student.decoder.head[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    method(*_batch(method.strong_views), _progress())
    state = method.student.state_dict()
    assert state["encoder.bn1.num_batches_tracked"] == encoder
    assert state["decoder.head.1.num_batches_tracked"] == decoder
    assert seen[-decoder] == images  # without a teacher a pass in eval mode comes first


def test_perturbation_drops_half_of_the_channels_and_doubles_the_others() -> None:
    method = _method("unimatch")
    x1, x4 = torch.zeros(3, 400, 1, 1), torch.zeros(3, 400, 1, 1)
    low, high = method.perturbation(x1, x4, torch.Generator().manual_seed(0))
    for factors in (low, high):
        assert set(factors.flatten().tolist()) == {0, 2}
        assert abs(factors.mean() - 1) < 0.12
    assert (low != high).any() and (low[0] != low[1]).any()


def test_complementary_dropout_gives_each_view_what_the_other_loses() -> None:
    """In half of the images, the same of x1 and x4, whose masks differ; the other half keeps all."""
    method = _method("unimatch V2")
    x1, x4 = torch.zeros(8, 6, 1, 1), torch.zeros(8, 40, 1, 1)
    low, high = method.complement(x1, x4, torch.Generator().manual_seed(0))
    assert low.shape == (8, 6) and high.shape == (8, 40)
    untouched = []
    for factors in (low, high):
        first, second = factors.chunk(2)
        assert (first + second == 2).all()
        untouched.append((first == 1).all(1))
    assert (untouched[0] == untouched[1]).all() and untouched[0].sum() == 2


def test_the_teacher_follows_and_selects() -> None:
    """It is the student after the first iteration, and their mean after the second; it is never in train mode."""
    method = _method("unimatch V2")
    assert list(method.scored()) == ["teacher", "student"]
    assert list(method.trained()) == ["student"]
    assert not method.teacher.training
    before = method.teacher.decoder.head[0].weight.clone()
    with torch.no_grad():
        method.student.decoder.head[0].weight.add_(1)
    assert method.after_step(_progress(1)) == {"decay": 0.5}
    torch.testing.assert_close(method.teacher.decoder.head[0].weight, before + 0.5)
    assert method.after_step(_progress(0)) == {"decay": 0.0}
    torch.testing.assert_close(method.teacher.decoder.head[0].weight, method.student.decoder.head[0].weight)
    assert method.after_step(_progress(10**6)) == {"decay": 0.996}
    assert list(_method("unimatch").networks()) == ["student"]


@flavours
def test_a_look_shows_each_view_and_changes_nothing(flavour: str) -> None:
    method = _method(flavour)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    look = method.look(*_batch(method.strong_views), _progress())
    views = ["CutMix view", "its label"]
    if method.strong_views == 2:
        views = ["CutMix view 1", "its label 1", "CutMix view 2", "its label 2"]
    assert list(look) == ["weak view", "pseudo label (grey: unsure)", *views]
    assert {tuple(column.shape[-2:]) for column in look.values()} == {(33, 33)}
    assert all((tensor == before[name]).all() for name, tensor in method.state_dict().items())
    assert method.student.training


@pytest.mark.parametrize("name", ["fixmatch", "unimatch"])
@pytest.mark.parametrize(
    ("word", "key", "says"),
    [
        ("dataset.train.strong_aug=null", "dataset.train.strong_aug", "trains on strong views"),
        ("dataset.train.batch_size=1", "dataset.train.batch_size", "other images of a batch"),
    ],
)
def test_what_the_methods_need(name: str, word: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "exps" / f"shapes_{name}" / "config.yaml", [word])
    assert key in str(caught.value) and says in str(caught.value)


# Files of UniMatch's repository

THEIRS = """\
# arguments for dataset
dataset: cityscapes
nclass: 19
crop_size: 801
data_root: Your/Cityscapes/Path

# arguments for training
epochs: 240
batch_size: 2 # equivalent to 2 labeled + 2 unlabeled images, respectively
lr: 0.005
lr_multi: 1.0
criterion:
  name: OHEM
  kwargs:
    ignore_index: 255
    thresh: 0.7
    min_kept: 200000
conf_thresh: 0

# arguments for model
backbone: resnet50
replace_stride_with_dilation: [False, False, True]
dilations: [6, 12, 18]
"""
LISTS = [
    "dataset.train.data_root=data/cityscapes",
    "dataset.train.data_list=data/splits/cityscapes/186/labeled.txt",
    "dataset.val.data_list=data/splits/cityscapes/val.txt",
    "dataset.workers=4",
]


def _theirs(folder: Path, content: str = THEIRS) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(content)
    return path


def test_their_file_with_lists_is_our_recipe(tmp_path: Path) -> None:
    assert load_config(_theirs(tmp_path), LISTS) == load_config(ROOT / "exps/cityscapes_unimatch/config.yaml")
    text = THEIRS.replace("cityscapes", "pascal").replace("nclass: 19", "nclass: 21").replace("801", "321")
    text = (
        text.replace("epochs: 240", "epochs: 80").replace("lr: 0.005", "lr: 0.001").replace("multi: 1.0", "multi: 10")
    )
    text = text.replace("name: OHEM", "name: CELoss").replace("    thresh: 0.7\n    min_kept: 200000\n", "")
    text = text.replace("thresh: 0", "thresh: 0.95").replace("resnet50", "resnet101")
    words = [word.replace("cityscapes", "pascal").replace("186", "92") for word in LISTS]
    words[0] = "dataset.train.data_root=data/VOC2012"
    assert load_config(_theirs(tmp_path, text), words) == load_config(ROOT / "exps/pascal_unimatch/config.yaml")


def test_their_file_says_what_it_still_needs_and_each_key_that_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_theirs(tmp_path))
    assert "dataset.train.data_list: missing" in str(caught.value)
    assert "dataset.val.data_list: missing" in str(caught.value)
    assert "2 errors" in str(caught.value)
    translated = "\n".join(load_config(_theirs(tmp_path), LISTS).translated)
    for key in yaml.safe_load(THEIRS).keys() - {"criterion"}:
        assert f"{key} → " in translated, key
    with pytest.raises(ConfigError, match="conf_tresh: unknown key"):
        load_config(_theirs(tmp_path, THEIRS.replace("conf_thresh", "conf_tresh")), LISTS)
