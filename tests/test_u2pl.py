"""U2PL: its own files, its needs, what its step does beyond the golden figures, the banks, and the exact resume."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, meeting, run_ranks, start
from first_step import batch_for, progress, small

import train_semi
from imas import load_config
from imas.engine import checkpoint
from imas.engine.interrupt import Interrupted, Interruption
from imas.errors import ConfigError
from imas.methods.u2pl import U2PL, Contrastive, Options, reliable_mean
from imas.ops import contrast, mixing

# A Cityscapes file with the keys and the spelling of the authors.
THEIRS = """\
dataset:
  type: cityscapes_semi
  train:
    data_root: ../../../../data/cityscapes
    data_list: ../../../../data/splits/cityscapes/744/labeled.txt
    flip: True
    GaussianBlur: False
    rand_resize: [0.5, 2.0]
    crop:
      type: rand
      size: [769, 769]
  val:
    data_root: ../../../../data/cityscapes
    data_list: ../../../../data/splits/cityscapes/val.txt
    crop:
      type: center
      size: [769, 769]
  batch_size: 2
  n_sup: 744
  noise_std: 0.1
  workers: 2
  mean: [123.675, 116.28, 103.53]
  std: [58.395, 57.12, 57.375]
  ignore_label: 255
trainer:
  epochs: 200
  eval_on: True
  sup_only_epoch: 0
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
    TTA: False
    drop_percent: 80
    apply_aug: cutmix
  contrastive:
    negative_high_entropy: True
    low_rank: 3
    high_rank: 20
    current_class_threshold: 0.3
    current_class_negative_threshold: 1
    unsupervised_entropy_ignore: 80
    low_entropy_threshold: 20
    num_negatives: 50
    num_queries: 256
    temperature: 0.5
saver:
  snapshot_dir: checkpoints
  pretrain: ''
criterion:
  type: ohem
  kwargs:
    thresh: 0.7
    min_kept: 100000
net:
  num_classes: 19
  sync_bn: True
  ema_decay: 0.99
  aux_loss:
    aux_plane: 1024
    loss_weight: 0.4
  encoder:
    type: u2pl.models.resnet.resnet101
    kwargs:
      multi_grid: True
      zero_init_residual: True
      fpn: True
      replace_stride_with_dilation: [False, True, True]
  decoder:
    type: u2pl.models.decoder.dec_deeplabv3_plus
    kwargs:
      inner_planes: 256
      dilations: [12, 24, 36]
"""


def _written(folder: Path, raw: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_their_file_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(THEIRS)
    config = load_config(path)
    assert config.method == "u2pl" and config.options == Options()
    train, net = config.dataset.train, config.net
    assert (train.batch_size, train.resize_base_size, train.crop.size) == (2, (1024, 2048), (769, 769))
    assert (net.embedding, net.encoder.type, net.encoder.pretrain) == (256, "resnet101", "pretrained/resnet101.pth")
    dead = "trainer.contrastive.unsupervised_entropy_ignore", "trainer.unsupervised.TTA", "dataset.noise_std"
    for key in (*dead, "dataset.train.GaussianBlur", "trainer.eval_on"):
        assert f"{key}: has no meaning any more" in config.translated
    assert "net.embedding: 256, as in U2PL's code" in config.translated
    again = load_config(_written(tmp_path, config.to_dict()))
    assert again == config and not again.translated


def test_their_pascal_file_is_silent_about_one_epoch_of_warm_up(tmp_path: Path) -> None:
    raw = yaml.safe_load(THEIRS)
    raw["dataset"]["type"], raw["net"]["num_classes"] = "pascal_semi", 21
    raw["criterion"] = {"type": "CELoss", "kwargs": {"use_weight": False}}
    raw["net"]["decoder"]["kwargs"]["rep_head"] = True
    del raw["trainer"]["sup_only_epoch"], raw["trainer"]["unsupervised"]["apply_aug"]
    words = ["trainer.contrastive.loss_weight=1", "trainer.unsupervised.drop_percent=75"]
    config = load_config(_written(tmp_path, raw), words)
    expected = Options(drop_percent=75.0, use_cutmix=False, sup_only_epoch=1, contrastive=Contrastive(loss_weight=1.0))
    assert config.options == expected and config.net.embedding == 256
    assert config.dataset.train.resize_base_size == 500
    assert sum(line.startswith("trainer.sup_only_epoch: 1") for line in config.translated) == 1


def test_their_baseline_loads(tmp_path: Path) -> None:
    raw = yaml.safe_load(THEIRS)
    del raw["trainer"]["unsupervised"], raw["trainer"]["contrastive"]
    raw["net"]["decoder"]["kwargs"]["rep_head"] = False
    config = load_config(_written(tmp_path, raw))
    assert (config.method, config.net.embedding, config.dataset.train.batch_size) == ("sup_only", None, 2)


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        ("contrastive", "anchor_ema", True, "only False is supported"),
        ("contrastive", "binary", {}, "unknown key"),
        ("unsupervised", "apply_aug", "cutout", "'cutout' is not a value that this former key could have"),
    ],
)
def test_what_their_code_cannot_do_or_ours_does_not(section, key, value, sentence, tmp_path: Path) -> None:
    raw = yaml.safe_load(THEIRS)
    raw["trainer"][section][key] = value
    with pytest.raises(ConfigError, match=rf"trainer\.{section}\.{key}: {sentence}"):
        load_config(_written(tmp_path, raw))


CONTRASTIVE = {"low_rank": 1, "num_queries": 8, "num_negatives": 4, "capacity": 40, "max_new_keys": 7}
TODAY = {
    "u2pl": {"sup_only_epoch": 1, "contrastive": {**CONTRASTIVE, "first_capacity": 50}},
    "dataset": {**TINY["dataset"], "train": {"batch_size": 4, "flip": True}},
    "trainer": TINY["trainer"],
    "net": {**TINY["net"], "embedding": 6},
    "saver": TINY["saver"],
}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["u2pl.contrastive.low_rank=4"], "low_rank: expected fewer than the 4 classes, got 4.*set it to 1"),
        (["u2pl.contrastive.high_rank=1"], "high_rank: expected more than low_rank, 1, got 1"),
        (["net.embedding=null"], "net.embedding: missing; u2pl compares representations"),
        (["u2pl.sup_only_epoch=3"], "sup_only_epoch: expected fewer than the 3 epochs, got 3"),
        (["dataset.train.batch_size=1"], "batch_size: expected at least 2, got 1: BatchNorm cannot train"),
        (["u2pl=null", "sup_only={}"], "net.embedding: sup_only does not train it: .*it is for u2pl"),
    ],
)
def test_needs_that_are_not_met(words: list[str], sentence: str, tmp_path: Path) -> None:
    path = _written(tmp_path, TODAY)
    load_config(path)
    with pytest.raises(ConfigError, match=sentence):
        load_config(path, words)


def test_evaluation_does_not_compute_representations(monkeypatch: pytest.MonkeyPatch) -> None:
    method = _small()
    monkeypatch.setattr(type(method.student), "represent", None)
    assert method.student.eval()(golden.randn(1, 2, 3, 33, 33))[0].shape == (2, 4, 33, 33)
    assert "decoder.representation.8.weight" in method.student.state_dict()


def _small(warm_up: int = 0, **contrastive) -> U2PL:
    return small("u2pl", sup_only_epoch=warm_up, contrastive=Contrastive(**{"low_rank": 1, **contrastive}))


def _buffers(network: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in network.buffers()]


def _same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_warm_up_is_supervised_and_the_teacher_a_copy() -> None:
    method, (labeled, unlabeled) = _small(warm_up=2), batch_for(U2PL.wants(None))
    assert not method.needs_unlabeled(1) and method.needs_unlabeled(2)
    step = method(labeled, None, progress(1, 7))
    coarse, aux = method.student.coarse(labeled.image)
    torch.testing.assert_close(step.loss, method.supervised(coarse, aux, labeled.label))
    step.loss.backward()
    assert all(parameter.grad is not None for parameter in method.student.parameters())
    assert all((parameter.grad == 0).all() for parameter in method.student.decoder.representation.parameters())
    assert not _same(_buffers(method.teacher), _buffers(method.student))
    method.after_step(progress(1, 7))
    assert _same(list(method.teacher.state_dict().values()), list(method.student.state_dict().values()))

    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.01)
    method(labeled, unlabeled, progress(2, 10))  # from here on the statistics of BatchNorm are the teacher's own
    before = _buffers(method.teacher)
    method.after_step(progress(2, 10))
    assert _same(list(method.teacher.parameters()), list(method.student.parameters()))
    assert _same(before, _buffers(method.teacher)) and not _same(before, _buffers(method.student))


def test_the_teacher_labels_in_eval_mode_and_learns_its_statistics_in_train_mode() -> None:
    method, batch = _small(), batch_for(U2PL.wants(None))
    before, modes = _buffers(method.teacher), []
    method.teacher.encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    method(*batch, progress(3, 15))
    assert modes == [False, True] and not method.teacher.training and method.student.training
    moved = [not torch.equal(a, b) for a, b in zip(before, method.teacher.buffers())]
    assert any(moved)
    before, banks = _buffers(method.teacher), [bank.clone() for bank in method.banks]
    with torch.no_grad():
        columns = method.look(*batch, progress(3, 15))
    assert "pseudo label (grey: dropped)" in columns
    assert _same(before, _buffers(method.teacher)) and _same(banks, method.banks)


def test_a_step_without_anything_to_learn_from_is_0_and_finite() -> None:
    """No label in the batch, and entropies that are all the same, so that nothing is kept and every pixel is high."""
    method, (labeled, unlabeled) = _small(), batch_for(U2PL.wants(None))
    with torch.no_grad():
        for network in method.networks().values():
            network.decoder.classifier[-1].weight.zero_()
            network.decoder.classifier[-1].bias.zero_()
    step = method(labeled._replace(label=torch.full_like(labeled.label, 255)), unlabeled, progress(3, 15))
    step.loss.backward()
    assert step.loss == 0 and step.scalars["pseudo"] == 0
    assert all(parameter.grad is not None for parameter in method.student.parameters())
    assert reliable_mean(torch.tensor(0.0), torch.tensor(0), 10) == 0


@pytest.mark.parametrize("images", [1, 2])
def test_one_class_alone_or_one_image_a_process(images: int) -> None:
    method, (labeled, unlabeled) = _small(), batch_for(U2PL.wants(None), size=images)
    with torch.no_grad():
        method.teacher.decoder.classifier[-1].weight.zero_()
        method.teacher.decoder.classifier[-1].bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0]))
    alone = labeled._replace(label=torch.full_like(labeled.label, 2))
    method.boxes = lambda *shape: torch.tensor([[0, 0, 20, 20]] * images)
    for batch, positive in ((alone, False), (labeled, True)):  # then of several classes
        step = method(batch, unlabeled, progress(3, 15))
        assert step.loss.isfinite() and (step.scalars["loss_contrastive"] > 0) == positive
        step.loss.backward()
        assert all(parameter.grad is not None for parameter in method.student.parameters())
    if images == 1:
        assert torch.equal(method.mix(unlabeled.weak, labeled.label, None)[0], unlabeled.weak)


def test_another_ignore_label_is_no_class() -> None:
    method, (labeled, _) = _small(), batch_for(U2PL.wants(None))
    sizes = []
    for ignored in (255, 200):
        method.banks = []
        label = labeled.label.clone()
        label[:, :20] = ignored
        taught = golden.randn(8, 8, 4, 9, 9)
        sure = method.divide(golden.rand(9, 4, 33, 33), progress(3, 15))
        roles = method.roles(taught, label, labeled.label, sure)
        sizes.append([mask.sum(1).tolist() for mask in roles])
        assert not roles.positives.view(4, 8, 9, 9)[:, :4, :5].any()  # rows 0 to 19 of 33 are rows 0 to 5 of 9
    assert sizes[0] == sizes[1]


def test_roles_by_hand() -> None:
    """One labeled and one unlabeled image of two pixels, three classes."""
    label = torch.tensor([[[0, 255]], [[1, 2]]])
    probability = torch.tensor(
        [[[0.2, 0.3, 0.5], [0.9, 0.06, 0.04]], [[0.5, 0.4, 0.1], [0.2, 0.2001, 0.5999]]]
    ).permute(0, 2, 1).unsqueeze(2)  # fmt: skip
    low, high = torch.tensor([[[True, False]], [[True, True]]]), torch.tensor([[[True, False]], [[True, False]]])
    roles = contrast.roles(label, probability, low, high, 1, (1, 2), 0.3, 1.0)
    assert roles.positives.int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert roles.anchors.int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]  # 0.2 is no more than 0.3
    # The labeled pixel is 0 and most likely 2: a negative of 2. The unlabeled one of high entropy has 1 at rank 1.
    assert roles.negatives.int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]


def test_info_nce_by_hand() -> None:
    anchors, positive = torch.tensor([[2.0, 0.0]]), torch.tensor([3.0, 0.0])
    negatives = torch.tensor([[[0.0, 1.0], [-5.0, 0.0]]])
    expected = -np.log(np.e**2 / (np.e**2 + 1 + np.e**-2))  # similarities 1, 0 and −1, divided by 0.5
    assert contrast.info_nce(anchors, positive, negatives, 0.5).item() == pytest.approx(expected)


def test_percentiles_are_those_of_numpy() -> None:
    values = golden.rand(3, 5, 7, 11)
    valid = golden.rand(4, 5, 7, 11) < 0.7
    percents = (0.0, 3.7, 50.0, 99.75, 100.0)
    expected = np.percentile(values[valid].double().numpy(), percents)
    np.testing.assert_allclose(contrast.percentiles(values, valid, percents).numpy(), expected, rtol=1e-6)
    assert not (values >= contrast.percentiles(values, torch.zeros_like(valid), (50.0,))).any()


def test_boxes_have_half_of_the_area_and_fall_for_half_of_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = mixing.half_boxes(500, 40, 60, generator)
    height, width = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    assert boxes.min() >= 0 and (boxes[:, 2] <= 40).all() and (boxes[:, 3] <= 60).all()
    assert (width.min(), width.max()) == (31, 59) and ((height * width - 1200).abs() <= width / 2).all()
    assert torch.equal(mixing.box_mask(boxes, 40, 60).sum((1, 2)), height * width)
    method = _small()
    fired = [method.boxes(2, 9, 9, generator) is not None for _ in range(600)]
    assert abs(sum(fired) / 600 - 0.5) < 0.08
    off = small("u2pl", use_cutmix=False, contrastive=Contrastive(low_rank=1))
    assert all(off.boxes(2, 9, 9, generator) is None for _ in range(20))


def test_the_cap_draws_different_keys_and_none_keeps_all() -> None:
    method, batch = _small(max_new_keys=5, capacity=12, first_capacity=14), batch_for(U2PL.wants(None))
    method(*batch, progress(3, 15))
    assert [len(bank) for bank in method.banks] == [5, 5, 5, 5]
    assert method.after_step(progress(3, 15))["keys"] == 20
    for _ in range(2):
        method(*batch, progress(3, 16))
    assert [len(bank) for bank in method.banks] == [14, 12, 12, 12]
    chosen = method.choose(100, 30, torch.Generator().manual_seed(1)).tolist()
    assert len(set(chosen)) == 30 and chosen == sorted(chosen) and max(chosen) < 100
    assert method.choose(30, 30, torch.Generator()).tolist() == list(range(30))
    paper = _small(max_new_keys=None)
    paper(*batch, progress(3, 15))
    assert min(len(bank) for bank in paper.banks) > 5


def test_the_banks_are_extra_state_of_no_network_and_no_buffer() -> None:
    method, batch = _small(max_new_keys=9), batch_for(U2PL.wants(None))
    method(*batch, progress(3, 15))
    assert not any(buffer.shape[-1:] == (8,) and buffer.ndim == 2 for buffer in method.buffers())
    states = checkpoint.method_states(method)
    assert list(states["method_state"]) == ["_extra_state"]
    again = _small(max_new_keys=9)
    again.load_state_dict(states["method_state"], strict=False)
    assert _same(again.banks, method.banks)
    assert method.extra_bytes() == 4 * 8 * (50_000 + 3 * 30_000)


def test_short_formats_compare_in_float32() -> None:
    method, batch = _small(), batch_for(U2PL.wants(None))
    with torch.autocast("cpu", torch.bfloat16):
        step = method(*batch, progress(3, 15))
    assert step.scalars["loss_contrastive"].dtype == torch.float32 == method.banks[0].dtype
    step.loss.backward()
    assert step.loss.isfinite()


def _stopped(path: Path, before: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interruption, "stops_before", lambda self, iteration: iteration == before)
        with pytest.raises(Interrupted):
            train_semi.main(["--config", str(path)])


def _assert_same_end(one: Path, two: Path) -> None:
    """Networks, momentum, banks and curves."""
    states = [checkpoint.read(path.parent / "checkpoints" / "ckpt.pth") for path in (one, two)]
    tensors = [list(_tensors({key: state[key] for key in state if key.endswith("_state")})) for state in states]
    assert len(tensors[0]) > 200 and _same(*tensors)
    banks = states[0]["method_state"]["_extra_state"]["banks"]
    assert [len(bank) for bank in banks] == [50, 40, 40, 40]
    curves = [(path.parent / "log" / "metrics.csv").read_text() for path in (one, two)]
    assert curves[0] == curves[1]


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for part in parts for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_killed_in_every_phase_the_run_is_the_same(tmp_path: Path) -> None:
    """In warm-up, in epoch E0, where the teacher is the student, and after it."""
    (tmp_path / "straight").mkdir()
    straight = _written(tmp_path / "straight", TODAY)
    train_semi.main(["--config", str(straight)])
    (tmp_path / "killed").mkdir()
    killed = _written(tmp_path / "killed", TODAY)
    for iteration in (2, 6, 9):
        _stopped(killed, iteration)
        assert checkpoint.read(killed.parent / "checkpoints" / "ckpt.pth")["step"] > 0
    train_semi.main(["--config", str(killed)])
    _assert_same_end(straight, killed)


def test_two_processes_share_one_bank_and_resume_exactly(tmp_path: Path) -> None:
    long = TODAY | {"dataset": TODAY["dataset"] | {"train": TODAY["dataset"]["train"] | {"epoch_size": 96}}}
    paths = []
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        paths.append(_written(tmp_path / name, long))
    ended = run_ranks("train_semi.py", "--config", paths[0])
    assert all(each.returncode == 0 for each in ended), ended[0].stderr
    where = meeting()
    ranks = [start("train_semi.py", "--config", paths[1], RANK=str(i), LOCAL_RANK=str(i), **where) for i in range(2)]
    log, deadline = paths[1].parent / "log" / "train.log", time.monotonic() + 120
    while not (log.is_file() and "epoch 1: teacher" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks[0].terminate()
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    ended = run_ranks("train_semi.py", "--config", paths[1])
    assert "resumed after epoch 1" in ended[0].stdout, ended[0].stderr
    _assert_same_end(*paths)


def test_ranks_of_unequal_keys_end_with_equal_banks(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import torch
        from first_step import small
        from imas import distributed
        from imas.methods.u2pl import Contrastive
        from imas.ops.contrast import Roles

        with distributed.process_group():
            rank = distributed.rank()
            tensor = torch.arange(3 * rank).view(-1, 1) + 10
            assert distributed.concat(tensor, [0, 3]).flatten().tolist() == [10, 11, 12]
            assert distributed.concat(tensor[:0], [0, 0]).shape == (0, 1)
            method = small("u2pl", contrastive=Contrastive(max_new_keys=4, capacity=6, first_capacity=6))
            mask = torch.zeros(4, 8, dtype=torch.bool)
            none = mask.clone()
            mask[0, : 3 + 3 * rank] = True  # 3 keys, and 6 that are cut to 4
            mask[1, 5] = rank == 1  # one rank alone
            teacher = (torch.arange(8.0) + 100 * rank).view(1, 1, 2, 4)
            loss = method.contrast(teacher, teacher, Roles(none, none, mask), torch.Generator().manual_seed(rank))
            assert loss == 0
            banks = distributed.gather([bank.flatten().tolist() for bank in method.banks])
            assert banks[0] == banks[1] and banks[0][1:] == [[105.0], [], []]
            first = banks[0][0]
            assert first[:2] == [1.0, 2.0] and len(first) == 6 and set(first[2:]) < {{100.0 + i for i in range(6)}}
            print("equal")
        """)
    )
    ended = run_ranks(script)
    assert all(each.returncode == 0 and "equal" in each.stdout for each in ended), ended[0].stderr + ended[1].stderr
