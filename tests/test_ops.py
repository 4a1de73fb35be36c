"""The mathematics of the paper: golden figures, hand-computed cases, and slow plain twins of the clever pieces."""

from __future__ import annotations

import math

import golden
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from imas import (
    ConfusionMatrix,
    adaptive_blend,
    consistency_loss,
    cutmix_partners,
    hardness_scores,
    ohem_cross_entropy,
)
from imas.ops import mixing
from imas.ops.losses import cross_entropy
from imas.ops.pseudo import Prediction, logged_shares, predict


def _logits(case: dict) -> tuple[Tensor, Tensor]:
    if "note" in case:
        return torch.tensor(case["student"]), torch.tensor(case["teacher"])
    student = golden.made(case["student"])
    return student, golden.made(case["teacher"], student=student)


@pytest.mark.parametrize("case", golden.read("hardness"))
@pytest.mark.parametrize("version", [1, 2])
def test_hardness_equals_the_authors(case: dict, version: int) -> None:
    student, teacher = _logits(case)
    hardness = hardness_scores(
        student,
        teacher,
        case["threshold"],
        class_weighted=case["class_weighted"],
        ignore_background=case["ignore_background"],
        version=version,
    )
    expected = torch.tensor(case[f"hardness_v{version}"]).nan_to_num(0.0)  # mended: NaN is 0 in ours
    torch.testing.assert_close(hardness.score, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(hardness.student_confident, torch.tensor(case["student_confident_ratio"]))
    assert hardness.score.dtype == torch.float32


def _plain_score(
    student: Tensor, teacher: Tensor, threshold: float, *, class_weighted: bool, ignore_background: bool, version: int
) -> list[float]:
    """The score as the spec words it: one image, one class at a time."""
    scores = []
    for z_s, z_t in zip(student.softmax(1), teacher.softmax(1)):
        label_s, label_t = z_s.argmax(0).numpy(), z_t.argmax(0).numpy()
        classes = range(len(z_s))
        iou = {}
        for c in classes:
            union = ((label_s == c) | (label_t == c)).sum()
            if union:
                iou[c] = ((label_s == c) & (label_t == c)).sum() / union
        weighted = []
        for labels in (label_t, label_s):
            counts = {c: (labels == c).sum() for c in classes if not (ignore_background and c == 0)}
            total = sum(counts.values())
            if class_weighted:
                weighted.append(sum(counts[c] / total * iou[c] for c in counts if c in iou) if total else 0.0)
            else:
                weighted.append(sum(iou.values()) / len(iou))
        rho_t = (z_t.max(0).values >= threshold).float().mean().item()
        rho_s = (z_s.max(0).values >= threshold).float().mean().item()
        total = rho_t * weighted[0] + rho_s * weighted[1]
        divisor = 2 if version == 1 else rho_t + rho_s
        scores.append(total / divisor if divisor else 0.0)
    return scores


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ignore_background", [True, False])
@pytest.mark.parametrize("class_weighted", [True, False])
def test_hardness_equals_a_plain_twin(class_weighted: bool, ignore_background: bool, version: int) -> None:
    student = golden.randn(1, 4, 7, 23, 31) * 3
    teacher = student + golden.randn(2, 4, 7, 23, 31) * 2
    options = {"class_weighted": class_weighted, "ignore_background": ignore_background, "version": version}
    score = hardness_scores(student, teacher, 0.6, **options).score
    expected = _plain_score(student, teacher, 0.6, **options)
    np.testing.assert_allclose(score.numpy(), expected, atol=1e-6)
    assert score.min() > 0 and score.max() < 1


def test_equal_and_sure_networks_score_one() -> None:
    logits = 20 * F.one_hot(golden.randint(3, 4, 2, 8, 8), 4).permute(0, 3, 1, 2).float()
    for version in (1, 2):
        assert hardness_scores(logits, logits, 0.95, version=version).score.tolist() == [1.0, 1.0]


def test_unsure_networks_score_zero_in_both_versions() -> None:
    """Mended: the authors' version 2 divides 0 by 0 and poisons the loss."""
    logits = torch.zeros(2, 5, 4, 4)
    for version in (1, 2):
        assert hardness_scores(logits, logits, 0.7, version=version).score.tolist() == [0.0, 0.0]


def test_hardness_refuses_what_it_cannot_score() -> None:
    with pytest.raises(ValueError, match="one shape"):
        hardness_scores(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5), 0.7)
    with pytest.raises(ValueError, match="version"):
        hardness_scores(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), 0.7, version=3)


def test_predictions_are_those_of_the_softmax() -> None:
    logits = golden.randn(4, 2, 19, 9, 7) * 5
    confidence, label = logits.softmax(1).max(1)
    prediction = predict(logits)
    assert torch.equal(prediction.label, label)
    torch.testing.assert_close(prediction.confidence, confidence, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", golden.read("losses"), ids=lambda case: case["kind"])
def test_losses_equal_the_authors(case: dict) -> None:
    logits = golden.made(case["logits"]).requires_grad_()
    if case["kind"] == "ohem":
        target = golden.made(case["target"])
        loss = ohem_cross_entropy(logits, target, case["thresh"], case["min_kept"])
        assert math.isclose(cross_entropy(logits, target).item(), case["plain_cross_entropy"], rel_tol=1e-6)
    else:
        confidence, label = golden.made(case["teacher_logits"]).softmax(1).max(1)
        score = None if case["hardness"] is None else torch.tensor(case["hardness"])
        loss = consistency_loss(logits, label, confidence, case["threshold"], score)
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-6)
    loss.backward()
    record = case["grad"]
    values = logits.grad.flatten()[torch.tensor(record["index"])]
    torch.testing.assert_close(values, torch.tensor(record["value"]), atol=1e-7, rtol=1e-5)
    assert math.isclose(logits.grad.double().abs().sum().item(), record["abs_sum"], rel_tol=1e-5)


def _plain_ohem(logits: Tensor, target: Tensor, thresh: float, min_kept: int) -> Tensor:
    """OHEM as the spec words it, by a full sort."""
    loss = F.cross_entropy(logits, target, ignore_index=255, reduction="none").flatten()
    valid = (target != 255).flatten()
    if valid.sum() < min_kept:
        return loss[valid].mean() if valid.any() else loss.sum() * 0
    p = torch.where(valid, (-loss).exp(), torch.ones_like(loss))
    q = p.sort().values[min(len(p), min_kept) - 1]
    return loss[valid & (p <= max(q.item(), thresh))].mean()


@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("min_kept", [1, 40, 400, 10_000])
@pytest.mark.parametrize("thresh", [0.05, 0.7])
def test_ohem_equals_a_plain_twin(thresh: float, min_kept: int, ignored: float) -> None:
    logits = golden.randn(5, 2, 6, 17, 19) * 2
    target = golden.randint(6, 6, 2, 17, 19)
    target[golden.rand(7, 2, 17, 19) < ignored] = 255
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = ohem_cross_entropy(ours, target, thresh, min_kept), _plain_ohem(plain, target, thresh, min_kept)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy])
def test_a_batch_without_a_valid_pixel_costs_nothing(loss) -> None:
    """Mended: the authors' code gives NaN."""
    logits = golden.randn(8, 1, 3, 4, 4).requires_grad_()
    value = loss(logits, torch.full((1, 4, 4), 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize(("change", "message"), [
    ({"logits": torch.zeros(2, 3, 16)}, r"logits must be \(B, C, h, w\).*\(2, 3, 16\)"),
    ({"target": torch.zeros(3, 4, 4).long()}, r"of the same B.*\(3, 4, 4\)"),
    ({"logits": torch.zeros(2, 3, 4, 4).long()}, "floating point.*int64 and"),
    ({"target": torch.zeros(2, 4, 4)}, "target int64.*float32"),
    ({"target": torch.full((2, 4, 4), 3)}, "target has the value 3: expected classes from 0 to 2, or 255"),
    ({"target": torch.full((2, 4, 4), -1)}, "has the value -1"),
])  # fmt: skip
def test_losses_refuse_what_they_cannot_compare(change: dict, message: str) -> None:
    given = {"logits": torch.zeros(2, 3, 4, 4), "target": torch.zeros(2, 4, 4, dtype=torch.int64)} | change
    logits, target = given["logits"], given["target"]
    for loss in (cross_entropy, ohem_cross_entropy):
        with pytest.raises(ValueError, match=message):
            loss(logits, target)
    with pytest.raises(ValueError, match=message):
        consistency_loss(logits, target, torch.ones(target.shape), 0.5)


def test_consistency_refuses_other_weights() -> None:
    logits, label = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"confidence must be \(2, 4, 4\).*got \(2, 4\)"):
        consistency_loss(logits, label, torch.ones(2, 4), 0.5)
    with pytest.raises(ValueError, match=r"score must be \(2,\).*got \(2, 1\)"):
        consistency_loss(logits, label, torch.ones(2, 4, 4), 0.5, torch.ones(2, 1))


def test_consistency_by_hand() -> None:
    """Four pixels, two of them confident, uniform logits: CE is log 2 on half the pixels, times the score."""
    logits = torch.zeros(2, 2, 2, 2)
    label = torch.zeros(2, 2, 2, dtype=torch.int64)
    confidence = torch.tensor([[0.9, 0.9], [0.1, 0.1]]).expand(2, 2, 2)
    plain = consistency_loss(logits, label, confidence, 0.9)
    assert math.isclose(plain.item(), 0.5 * math.log(2), rel_tol=1e-6)
    weighted = consistency_loss(logits, label, confidence, 0.9, torch.tensor([1.0, 0.5]))
    assert math.isclose(weighted.item(), 0.75 * 0.5 * math.log(2), rel_tol=1e-6)


def test_consistency_leaves_its_arguments_alone() -> None:
    """Mended: the authors' code writes the ignore index into the pseudo labels."""
    logits, label, confidence = golden.randn(1, 1, 3, 4, 4), golden.randint(2, 3, 1, 4, 4), golden.rand(3, 1, 4, 4)
    before = logits.clone(), label.clone(), confidence.clone()
    consistency_loss(logits, label, confidence, 0.5, torch.ones(1))
    assert all(torch.equal(*pair) for pair in zip(before, (logits, label, confidence)))


def test_blend_by_hand() -> None:
    strong, weak = torch.ones(3, 3, 2, 2), torch.zeros(3, 3, 2, 2)
    blended = adaptive_blend(strong, weak, torch.tensor([0.0, 0.25, 1.0]))
    assert blended[:, 0, 0, 0].tolist() == [0.0, 0.25, 1.0]


def test_random_choice_takes_the_strong_view_as_often_as_the_score_says() -> None:
    generator = torch.Generator().manual_seed(0)
    strong, weak = torch.ones(4000, 1, 1, 1), torch.zeros(4000, 1, 1, 1)
    share = mixing.random_choice(strong, weak, torch.full((4000,), 0.3), generator).mean().item()
    assert abs(share - 0.3) < 0.03


def test_partners_pair_easy_with_hard() -> None:
    assert cutmix_partners(torch.tensor([0.9, 0.1, 0.5, 0.7])).tolist() == [1, 0, 3, 2]
    assert cutmix_partners(torch.tensor([0.3, 0.9, 0.1])).tolist() == [0, 2, 1]
    score = golden.rand(9, 16)
    order, partner = score.argsort(), cutmix_partners(score)
    assert torch.equal(partner[order], order.flip(0))


def test_boxes_lie_where_the_spec_says() -> None:
    """Centres from [H//16, H) × [W//16, W), int(H·v) × int(W·v) around them, clipped."""
    height, width, side = 48, 64, 0.25
    mask = mixing.cutmix_mask(3000, height, width, side, torch.Generator().manual_seed(1))
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows.unsqueeze(2) & columns.unsqueeze(1))  # every one a box
    assert rows.sum(1).max() == int(height * side)
    assert columns.sum(1).max() == int(width * side)
    top, left = rows.int().argmax(1), columns.int().argmax(1)
    assert top.min() == 0  # a centre near the border is clipped
    whole = (rows.sum(1) == 12) & (columns.sum(1) == 16)
    assert top[whole].max() == height - 12
    assert left[whole].max() == width - 16
    centre = top[whole] + 6
    assert centre.min() == 6 and abs(centre.float().mean().item() - (6 + 42) / 2) < 1  # uniform


def test_beta_boxes_are_drawn_from_an_eighth_on() -> None:
    mask = mixing.cutmix_mask(2000, 64, 64, 0.05, torch.Generator().manual_seed(2), border=8)
    assert mask.any(2).int().argmax(1).min() == 64 // 8 - 1  # centre 8, half of int(64·0.05) = 3 is 1
    sides = torch.tensor([mixing.beta_side(torch.Generator().manual_seed(seed)) for seed in range(2000)])
    squared = sides**2  # 1 − λ, λ ~ Beta(4, 4)
    assert abs(squared.mean().item() - 0.5) < 0.01
    assert abs(squared.var().item() - 1 / 36) < 0.003


@pytest.mark.parametrize("mean_score", [0.0, 0.3, 1.0])
def test_box_sides(mean_score: float) -> None:
    generator = torch.Generator().manual_seed(3)

    def sides(**options: bool) -> Tensor:
        return torch.tensor([mixing.box_side(0.1, 0.9, mean_score, generator, **options) for _ in range(3000)])

    uniform, scaled, gaussian = sides(), sides(scaled_by_score=True), sides(gaussian=True)
    assert abs(uniform.mean().item() - 0.5) < 0.02
    assert uniform.min() >= 0.1 and 0.88 < uniform.max() <= 0.9
    assert abs(scaled.mean().item() - (0.1 + 0.4 * mean_score)) < 0.02
    assert gaussian.min() >= 0.1 and gaussian.max() <= 0.9
    mean = 0.1 + 0.8 * mean_score
    sigma = max(mean - 0.1, 0.9 - mean) / 3
    inside = [x for x in (mean + sigma * golden.randn(5, 200_000)).tolist() if 0.1 <= x <= 0.9]
    assert abs(gaussian.mean().item() - np.mean(inside)) < 0.02
    assert abs(gaussian.std().item() - np.std(inside)) < 0.02


def test_paste_takes_the_partners_box() -> None:
    base = torch.arange(3).view(3, 1, 1).expand(3, 2, 2).clone()
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[:, 0] = True
    mixed = mixing.paste(base, torch.tensor([2, 1, 0]), mask)
    assert mixed[:, 0, 0].tolist() == [2, 1, 0]
    assert mixed[:, 1, 0].tolist() == [0, 1, 2]
    images = mixing.paste(base.unsqueeze(1).expand(3, 3, 2, 2), torch.tensor([2, 1, 0]), mask)
    assert torch.equal(images[:, 2], mixed)


def test_confusion_matrix_by_hand() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0, 1], [0, 255]]))
    matrix.update(torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert matrix.intersection.tolist() == [1, 2, 0, 0]
    assert matrix.union.tolist() == [2, 4, 1, 0]
    assert matrix.iou[:2].tolist() == [0.5, 0.5]
    assert matrix.iou[2:].isnan().all()  # mended: absent from the truth, so n/a and not 0
    assert matrix.miou == 0.5
    assert math.isclose(matrix.pixel_accuracy, 3 / 5)
    assert math.isclose(matrix.mean_accuracy, (1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(("prediction", "target", "message"), [
    (torch.zeros(2, 2).int(), torch.zeros(2, 3).int(), r"\(2, 2\), target \(2, 3\): one shape"),
    (torch.zeros(2), torch.zeros(2).int(), "prediction must have an integer type.*float32"),
    (torch.zeros(2).int(), torch.zeros(2).bool(), "target must have an integer type.*bool"),
    (torch.tensor([0, 2]), torch.tensor([0, 0]), "prediction has the value 2: expected classes from 0 to 1"),
    (torch.tensor([0, -1]), torch.tensor([0, 0]), "prediction has the value -1"),
    (torch.tensor([0, 1]), torch.tensor([0, 2]), "target has the value 2: .* 255"),
    (torch.tensor([0, 0]), torch.tensor([255, 2]), "target has the value 2"),
    (torch.tensor([1, 0]), torch.tensor([-1, 0]), "target has the value -1"),
    (torch.tensor([0, 1]), torch.tensor([0, 254], dtype=torch.uint8), "target has the value 254"),
])  # fmt: skip
def test_confusion_matrix_refuses_what_it_cannot_count(prediction: Tensor, target: Tensor, message: str) -> None:
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=message):
        matrix.update(prediction, target)
    assert matrix.counts.sum() == 0


def test_what_is_predicted_where_nothing_counts_does_not_matter() -> None:
    matrix = ConfusionMatrix(2, ignore_index=-1)
    matrix.update(torch.tensor([255, 1]), torch.tensor([-1, 1]))
    matrix.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert matrix.counts.tolist() == [[0, 0], [0, 1]]


def test_shares_of_classes() -> None:
    label = torch.tensor([[[0, 1], [1, 2]], [[2, 2], [2, 0]]])
    confidence = torch.tensor([[[0.9, 0.8], [0.79, 1.0]], [[0.1, 0.8], [0.9, 0.2]]])
    labeled = label.clone()
    labeled[0, 0] = 255
    pseudo = Prediction(label, confidence)
    assert {name: shares.tolist() for name, shares in logged_shares(pseudo, 0.8, labeled, 4).items()} == {
        "confident": [1 / 8, 1 / 8, 3 / 8, 0],
        "predicted": [2 / 8, 2 / 8, 4 / 8, 0],
        "labeled": [1 / 8, 1 / 8, 4 / 8, 0],
    }
    assert pseudo.sure(0.8).tolist() == [[[0, 1], [255, 2]], [[255, 2], [2, 255]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_counting_leaves_its_arguments_as_they_are(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 18, 255, 11], dtype=dtype)
    prediction, before = torch.tensor([0, 1, 15, 15]), target.clone()
    matrix = ConfusionMatrix(19)
    matrix.update(prediction, target)
    assert torch.equal(target, before)
    assert matrix.counts.nonzero().tolist() == [[0, 0], [11, 15], [18, 1]] and matrix.counts.sum() == 3


def test_area_boxes_fit_and_come_as_often_as_asked() -> None:
    """Means of the release's own distribution (golden: area 0.209, height 0.53, width 0.39 of the image), and a third
    of the images without a box.
    """
    masks = mixing.area_mask(3000, 64, 64, torch.Generator().manual_seed(0), probability=2 / 3)
    sizes = torch.stack([masks.any(2).sum(1), masks.any(1).sum(1)], dim=1).double()
    has = sizes[:, 0] > 0
    assert (masks.sum((1, 2)) == sizes.prod(1)).all()  # one rectangle each
    assert abs(has.double().mean() - 2 / 3) < 0.035
    height, width = (sizes[has] / 64).mean(0)
    assert abs(height - 0.53) < 0.02 and abs(width - 0.39) < 0.02
    share = masks[has].double().mean()
    assert abs(share - 0.2) < 0.012
