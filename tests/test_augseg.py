"""AugSeg: its own files, its needs, what its mixing does, and the defects of the release that are mended."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY

from imas import load_config
from imas.config import ConfigError
from imas.data.strong import NARROW_OPERATIONS
from imas.methods.augseg import AugSeg, Draws, Options
from imas.methods.base import Labeled, Progress, Unlabeled
from imas.ops.losses import consistency_loss
from imas.ops.mixing import beta_side
from imas.ops.pseudo import Prediction, predict, predict_scored

# A Cityscapes file with the keys and the spelling of the authors.
THEIRS = """
dataset:
  type: cityscapes_semi
  train:
    data_root: ./data/cityscapes
    data_list: ./data/splitsall/cityscapes/372/labeled.txt
    flip: True
    rand_resize: [0.5, 2.0]
    resize_base_size: [1024, 2048]
    crop:
      type: rand
      size: [800, 800]
    strong_aug:
      flag_use_random_num_sampling: True
      num_augs: 3
    batch_size: 4
  val:
    data_list: ./data/splitsall/cityscapes/val.txt
    batch_size: 1
    crop:
      type: center
      size: [800, 800]
  n_sup: 372
  workers: 4
  mean: [123.675, 116.28, 103.53]
  std: [58.395, 57.12, 57.375]
  ignore_label: 255
trainer:
  epochs: 240
  sup_only_epoch: 0
  evaluate_student: True
  optimizer:
    type: SGD
    kwargs:
      lr: 0.01
      momentum: 0.9
      weight_decay: 0.0005
  lr_scheduler:
    mode: poly
    kwargs:
      power: 0.9
  unsupervised:
    threshold: -0.7
    use_cutmix: True
    use_cutmix_adaptive: True
    use_cutmix_trigger_prob: 1.0
    flag_extra_weak: True
    loss_weight: 2.0
saver:
  snapshot_dir: checkpoints
  pretrain: ''
  use_tb: False
criterion:
  type: ohem
  kwargs:
    thresh: 0.7
    min_kept: 100000
net:
  num_classes: 19
  sync_bn: True
  ema_decay: 0.996
  encoder:
    type: augseg.models.resnet.resnet50
    kwargs:
      multi_grid: True
      zero_init_residual: True
      fpn: True
      replace_stride_with_dilation: [False, False, True]
  decoder:
    type: augseg.models.decoder.dec_deeplabv3_plus
    kwargs:
      inner_planes: 256
      dilations: [6, 12, 18]
"""


def _written(folder: Path, raw: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_their_file_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(THEIRS)
    config = load_config(path)
    assert config.method == "augseg"
    assert config.options == Options(threshold=0.0, loss_weight=2.0, extra_weak=True, ema_decay=0.996)
    strong = config.dataset.train.strong_aug
    assert (strong.type, strong.num_augs, strong.random_number) == ("narrow_pool", 3, True)
    assert (config.net.encoder.type, config.net.decoder.type) == ("resnet50", "deeplabv3plus")
    assert "trainer.unsupervised.threshold → augseg.threshold: 0.0" in config.translated
    assert any(line.startswith("dataset.train.strong_aug.type") for line in config.translated)
    again = load_config(_written(tmp_path, config.to_dict()))
    assert again == config and not again.translated


def test_overrides_of_their_file_may_use_former_keys(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(THEIRS)
    words = [
        "trainer.unsupervised.threshold=-0.1",
        "trainer.unsupervised.use_cutmix_adaptive=false",
        "dataset.train.strong_aug.flag_use_random_num_sampling=false",
        "dataset.train.strong_aug.num_augs=2",
    ]
    config = load_config(path, words)
    assert (config.options.threshold, config.options.use_cutmix_adaptive) == (0.0, False)
    strong = config.dataset.train.strong_aug
    assert (strong.type, strong.num_augs, strong.random_number) == ("narrow_pool", 2, False)
    assert load_config(path, ["trainer.unsupervised=null"]).method == "sup_only"


@pytest.mark.parametrize("own", ["types", "keys"])
def test_what_tells_their_file_from_one_of_imas(own: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(THEIRS)
    if own == "types":
        del raw["trainer"]["unsupervised"]["use_cutmix_adaptive"], raw["trainer"]["unsupervised"]["flag_extra_weak"]
        del raw["dataset"]["train"]["strong_aug"]["flag_use_random_num_sampling"]
        assert load_config(_written(tmp_path, raw)).method == "augseg"
    raw["net"]["encoder"]["type"], raw["net"]["decoder"]["type"] = "resnet50", "deeplabv3plus"
    if own == "types":
        raw["trainer"]["unsupervised"]["threshold"] = 0.7
    assert load_config(_written(tmp_path, raw)).method == ("augseg" if own == "keys" else "imas")


def test_a_negative_threshold_is_a_mistake_in_a_file_of_today(tmp_path: Path) -> None:
    raw = copy.deepcopy(TODAY)
    raw["augseg"] = {"threshold": -0.7}
    with pytest.raises(ConfigError, match=r"augseg\.threshold.*between 0 and 1"):
        load_config(_written(tmp_path, raw))


TODAY = {
    "augseg": {},
    "dataset": {"type": "shapes", "train": {"strong_aug": {"type": "narrow_pool", "num_augs": 3}}},
    "trainer": {"epochs": 3, "optimizer": {"kwargs": {"lr": 0.01}}},
    "net": TINY["net"],
}


def test_needs_that_are_not_met(tmp_path: Path) -> None:
    raw = copy.deepcopy(TODAY)
    raw["augseg"]["sup_only_epoch"] = 3
    del raw["dataset"]["train"]["strong_aug"]
    with pytest.raises(ConfigError) as caught:
        load_config(_written(tmp_path, raw))
    assert "dataset.train.strong_aug: missing" in str(caught.value)
    assert "augseg.sup_only_epoch: expected fewer than the 3 epochs" in str(caught.value)


class _Network(torch.nn.Module):
    """One channel of the image is the logit of class 0; a pixel's value can be seen through it."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def coarse(self, images: torch.Tensor, aux: bool = True) -> tuple[torch.Tensor, None]:
        return self.scale * images[:, :2], None


def _method(**options: object) -> AugSeg:
    return AugSeg(Options(**options), _Network, lambda logits, aux, label: logits.mean()).train()


def _rectangle(rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, rows, columns] = True
    return mask.expand(2, -1, -1)


def test_a_labeled_patch_comes_through_the_partners_candidate() -> None:
    """Two images: the labeled box is the left half, the unlabeled one the upper half; only their corner is labeled."""
    method = _method()
    strong = torch.stack([torch.full((3, 4, 4), value) for value in (1.0, 2.0)])
    labeled = Labeled(strong + 10, torch.tensor([0, 200]).view(2, 1, 1).expand(2, 4, 4))  # 200: an ignored label
    pseudo = Prediction(torch.ones(2, 4, 4, dtype=torch.int64), torch.full((2, 4, 4), 0.5))
    boxes = _rectangle(slice(4), slice(2)), _rectangle(slice(2), slice(4))
    method.draw = lambda *_: Draws(torch.tensor([1, 0]), *boxes, torch.tensor([0.9, 0.1]))
    mixed = method.mix(labeled, strong, pseudo, torch.tensor([0.5, 0.5]), torch.Generator())
    assert mixed.injected.tolist() == [True, False]
    # Image 0 was injected, so its labeled patch (of image 1) arrives in image 1; image 0 gets plain unlabeled pixels.
    assert mixed.image[0, 0].tolist() == [[2.0] * 4] * 2 + [[1.0] * 4] * 2
    assert mixed.image[1, 0].tolist() == [[12.0, 12.0, 1.0, 1.0]] * 2 + [[2.0] * 4] * 2
    assert mixed.pseudo.label[1].tolist() == [[255, 255, 1, 1]] * 2 + [[1] * 4] * 2
    assert mixed.pseudo.confidence[1].tolist() == [[1.0, 1.0, 0.5, 0.5]] * 2 + [[0.5] * 4] * 2
    assert (mixed.pseudo.label[0] == 1).all() and (mixed.pseudo.confidence[0] == 0.5).all()


@pytest.mark.parametrize(
    "options", [{"use_cutmix": False}, {"use_cutmix_adaptive": False}, {"use_cutmix_trigger_prob": 0.0}]
)
def test_without_the_mixing_strong_views_are_as_they_were(options: dict) -> None:
    strong, pseudo = torch.randn(2, 3, 4, 4), Prediction(torch.ones(2, 4, 4).long(), torch.ones(2, 4, 4))
    labeled = Labeled(strong + 10, torch.zeros(2, 4, 4).long())
    mixed = _method(**options).mix(labeled, strong, pseudo, torch.zeros(2), torch.Generator().manual_seed(0))
    assert mixed.image is strong and mixed.pseudo is pseudo and not mixed.injected.any()


def test_the_surer_the_teacher_the_rarer_a_labeled_patch() -> None:
    """Probability 1 − score."""
    strong, pseudo = torch.zeros(4, 3, 4, 4), Prediction(torch.zeros(4, 4, 4).long(), torch.ones(4, 4, 4))
    labeled, method = Labeled(strong, torch.zeros(4, 4, 4).long()), _method()
    score, generator = torch.tensor([0.0, 0.25, 0.75, 1.0]), torch.Generator().manual_seed(0)
    mixes = [method.mix(labeled, strong, pseudo, score, generator).injected for _ in range(600)]
    share = torch.stack(mixes).float().mean(0)
    torch.testing.assert_close(share, 1 - score, atol=0.06, rtol=0)
    assert share[3] == 0


def test_ranks_draw_numbers_of_their_own() -> None:
    """In the release all ranks share a seed; here the numbers are those of the rank's generator."""
    method, strong = _method(), torch.zeros(4, 3, 32, 32)
    first, second, again = (method.draw(strong, torch.Generator().manual_seed(seed)) for seed in (0, 1, 0))
    assert not torch.equal(first.unlabeled_box, second.unlabeled_box)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_labeled_patches_are_small_and_unlabeled_ones_large() -> None:
    generator = torch.Generator().manual_seed(0)
    areas = [torch.tensor([beta_side(generator, *of) ** 2 for _ in range(4000)]) for of in ((8.0, 2.0), (4.0, 4.0))]
    assert areas[0].mean().item() == pytest.approx(0.2, abs=0.01)  # 1 − λ, λ ~ Beta(8, 2)
    assert areas[1].mean().item() == pytest.approx(0.5, abs=0.01)
    assert areas[0].std().item() == pytest.approx(math.sqrt(8 * 2 / (100 * 11)), abs=0.01)


def test_score_is_confidence_times_certainty() -> None:
    """max p · (1 − entropy / ln C), averaged over the image, at full size; label and confidence are ``predict``'s."""
    logits = 3 * torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    full = torch.nn.functional.interpolate(logits, size=(25, 33), mode="bilinear", align_corners=True)
    p = full.softmax(1)
    entropy = -(p * (p + 1e-10).log()).sum(1)
    expected = (p.max(1).values * (1 - entropy / math.log(5))).mean((1, 2))
    prediction, score = predict_scored(logits, (25, 33))
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(prediction, predict(logits, (25, 33)), strict=True):
        assert torch.equal(ours, theirs)
    sure = torch.zeros(1, 5, 4, 4)
    sure[:, 2] = 1000
    assert predict_scored(sure)[1].item() == 1 and predict_scored(torch.zeros(1, 5, 4, 4))[1].item() < 1e-6


def test_the_teacher_sees_weak_views_alone_and_does_not_learn() -> None:
    method = _method(threshold=0.0)
    seen: list[torch.Tensor] = []
    coarse = method.teacher.coarse
    method.teacher.coarse = lambda images, aux=True: seen.append(images) or coarse(images, aux)
    weak, strong = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    label = torch.zeros(2, 4, 4, dtype=torch.int64)
    unlabeled = Unlabeled(weak, (strong,), torch.ones(2, 4, 4, dtype=torch.bool), torch.arange(2))
    progress = Progress(1, 2, 3, 2, torch.Generator().manual_seed(0))
    method(Labeled(strong, label), unlabeled, progress).loss.backward()
    assert len(seen) == 1 and seen[0] is weak and not method.teacher.training
    assert method.teacher.scale.grad is None and method.student.scale.grad is not None
    assert not method(Labeled(strong, label), None, progress).scalars.keys() - {"loss_lb"}  # warm-up


def test_dropped_pixels_count_in_the_denominator_and_nothing_is_modified() -> None:
    logits, label = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 1, 255, 0]]])
    confidence = torch.tensor([[[0.9, 0.9, 1.0, 0.1]]])
    before = label.clone()
    assert consistency_loss(logits, label, confidence, 0.5).item() == pytest.approx(2 * math.log(2) / 4)
    assert torch.equal(label, before)


def test_the_pool_has_no_inversion() -> None:
    assert len(NARROW_OPERATIONS) == 11 and "invert" not in NARROW_OPERATIONS
