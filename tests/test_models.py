"""Networks: the authors' names, shapes and outputs; dilations; the teacher; ImageNet files."""

from __future__ import annotations

import logging
from pathlib import Path

import golden
import pytest
import torch
from torch import nn

from imas import build_model, teacher_decay
from imas.errors import UserError
from imas.models.ema import make_teacher, update_teacher
from imas.models.pretrained import load_encoder
from imas.models.resnet import RESNETS, ResNet
from imas.ops.resize import resize


def _tiny(**encoder_kwargs) -> dict:
    """A small network of the family, as a ``net`` section."""
    return {
        "num_classes": 3,
        "encoder": {"type": "resnet18", "kwargs": {"width": 4, **encoder_kwargs}},
        "decoder": {"kwargs": {"inner_planes": 8, "low_conv_planes": 4}},
    }


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", golden.read("models"), ids=lambda case: case["name"])
def test_outputs_equal_the_authors(case: dict, layout: torch.memory_format) -> None:
    model = golden.fill(build_model(case["net"])).eval().to(memory_format=layout)
    assert sum(parameter.numel() for parameter in model.parameters()) == case["n_parameters"]
    assert len(model.state_dict()) == case["n_state"]
    with torch.no_grad():
        logits, aux_logits = model(golden.made(case["input"]))
    golden.assert_recorded(logits, case["logits"], 1e-4)
    if case["aux"] is None:
        assert aux_logits is None
    else:
        golden.assert_recorded(aux_logits, case["aux"], 1e-4)


@pytest.mark.parametrize("name", ["resnet50-os16-aux", "resnet101-os16"])
def test_state_names_and_shapes_equal_the_authors(name: str) -> None:
    state = build_model(golden.network(name)).state_dict()
    assert [[key, list(tensor.shape)] for key, tensor in state.items()] == golden.read(f"state_dict.{name}")


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize(("replace", "stride"), [((0, 0, 0), 32), ((0, 0, 1), 16), ((0, 1, 1), 8)])
def test_every_encoder_at_every_output_stride(name: str, replace: tuple, stride: int) -> None:
    encoder = ResNet(name, tuple(map(bool, replace)), multi_grid=True, zero_init_residual=True, width=4).eval()
    with torch.no_grad():
        features = encoder(torch.zeros(1, 3, 65, 97))
    assert [feature.shape[1] for feature in features] == list(encoder.channels)
    assert features[0].shape[-2:] == (17, 25)
    assert features[3].shape[-2:] == (64 // stride + 1, 96 // stride + 1)


@pytest.mark.parametrize(
    ("replace", "expected"),
    [((False, False, False), [2, 2, 4]), ((False, False, True), [2, 4, 8]), ((False, True, True), [4, 8, 16])],
)
def test_multi_grid_dilations(replace: tuple, expected: list[int]) -> None:
    """The first block of a dilated layer keeps the previous dilation; then times (2, 2, 4)."""
    encoder = ResNet("resnet50", replace, multi_grid=True, width=4)
    assert [block.conv2.dilation[0] for block in encoder.layer4] == expected
    plain = ResNet("resnet50", replace, width=4)
    assert plain.layer4[0].conv2.dilation[0] == expected[0] // 2


def test_initialisation() -> None:
    encoder = ResNet("resnet50", zero_init_residual=True)
    assert all(block.bn3.weight.abs().sum() == 0 for block in encoder.layer2)
    assert (encoder.layer2[0].bn2.weight == 1).all()
    weight = encoder.layer3[1].conv2.weight  # kaiming normal, fan_out
    assert abs(weight.std().item() - (2 / (weight.shape[0] * 9)) ** 0.5) < 1e-3


def test_logits_have_the_size_of_the_images_and_no_aux_head_is_none() -> None:
    logits, aux_logits = build_model(_tiny()).eval()(torch.zeros(2, 3, 33, 50))
    assert logits.shape == (2, 3, 33, 50)
    assert aux_logits is None
    with_aux = build_model(_tiny() | {"aux_loss": {"loss_weight": 0.4}}).eval()
    assert with_aux(torch.zeros(2, 3, 33, 50))[1].shape == (2, 3, 33, 50)


def test_the_parts_make_the_whole() -> None:
    """A method may change the fused features between the parts; auxiliary logits need no decoder."""
    model = build_model(_tiny() | {"aux_loss": {"loss_weight": 0.4}}).eval()
    images = golden.randn(1, 2, 3, 33, 50)
    with torch.no_grad():
        x1, x3, x4 = model.encode(images)
        fused = model.fuse(x1, x4)
        coarse, aux = model.coarse(images)
        assert fused.shape == (2, 4 + 8, 9, 13)
        assert torch.equal(model.decoder.low_conv(x1), fused[:, :4])
        assert torch.equal(model.classify(fused), coarse) and torch.equal(model.auxiliary(x3), aux)
        assert torch.equal(resize(coarse, (33, 50)), model(images)[0])
        assert not torch.equal(model.classify(fused * 0.5), coarse)
        assert model.coarse(images, aux=False)[1] is None
    assert build_model(_tiny()).eval().auxiliary(x3) is None
    with torch.autocast("cpu", torch.bfloat16):  # a softmax follows
        assert model.classify(fused.bfloat16()).dtype == torch.float32


def test_teacher_is_a_copy_with_its_own_storage() -> None:
    """Mended: the authors' teacher shared storage with the student, and its buffers were not initialised."""
    student = build_model(_tiny())
    student.encoder.bn1.running_mean.fill_(3.0)
    teacher = make_teacher(student)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    for ours, theirs in zip(teacher.state_dict().values(), student.state_dict().values()):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


def test_teacher_update() -> None:
    student, teacher = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.running_mean.fill_(10.0)
        student.num_batches_tracked.fill_(7)
    update_teacher(teacher, student, 0.75)
    assert teacher.weight.tolist() == [1.5, 1.5]
    assert teacher.running_mean.tolist() == [2.5, 2.5]  # floating-point buffers as well
    assert teacher.num_batches_tracked == 7  # integers are copied
    update_teacher(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), student.state_dict().values()))


def test_teacher_decay() -> None:
    """Zero through the whole first semi-supervised epoch, then a rising bound under ``ema_decay``."""
    assert [teacher_decay(0, i, 10, 0, 0.99) for i in range(10)] == [0.0] * 10
    assert teacher_decay(1, 10, 10, 0, 0.99) == 1 - 1 / 11
    assert teacher_decay(50, 500, 10, 0, 0.99) == 0.99
    assert teacher_decay(3, 39, 10, 3, 0.99) == 0.0
    assert teacher_decay(4, 40, 10, 3, 0.99) == 1 - 1 / 11  # k counts from epoch sup_only_epoch


def _encoder_state(**kwargs) -> dict:
    torch.manual_seed(1)
    return ResNet("resnet18", width=4, **kwargs).state_dict()


def test_the_authors_imagenet_files_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = _encoder_state() | {"fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "resnet.pth")
    logging.getLogger("imas").propagate = True
    with caplog.at_level(logging.INFO, "imas"):
        model = build_model(
            _tiny()
            | {"encoder": {"type": "resnet18", "pretrain": str(tmp_path / "resnet.pth"), "kwargs": {"width": 4}}}
        )
    assert torch.equal(model.encoder.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert f"{len(state) - 2} of {len(state) - 2} tensors matched" in caplog.text
    assert "unexpected" not in caplog.text


def test_mit_imagenet_files_load(tmp_path: Path) -> None:
    """The same network with the stem spelled conv1, bn1, conv2, bn2, conv3, bn3."""
    names = {
        "conv1.0": "conv1",
        "conv1.1": "bn1",
        "conv1.3": "conv2",
        "conv1.4": "bn2",
        "conv1.6": "conv3",
        "bn1": "bn3",
    }
    state = _encoder_state()
    mit = {}
    for key, tensor in state.items():
        module, _, rest = key.rpartition(".")
        mit[f"{names.get(module, module)}.{rest}"] = tensor
    torch.save(mit, tmp_path / "resnet18-imagenet.pth")
    encoder = ResNet("resnet18", width=4)
    load_encoder(encoder, tmp_path / "resnet18-imagenet.pth")
    assert all(torch.equal(encoder.state_dict()[key], tensor) for key, tensor in state.items())


def test_torchvision_files_load_into_a_plain_stem(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "tv.pth")
    encoder = ResNet("resnet18", deep_stem=False)
    load_encoder(encoder, tmp_path / "tv.pth")
    theirs = torchvision.models.resnet18(weights=None).eval()
    theirs.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    images = golden.randn(3, 1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.layer4(
            theirs.layer3(theirs.layer2(theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))))))
        )
        assert torch.equal(encoder.eval()(images)[3], expected)


def test_what_does_not_fit_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = _encoder_state()
    state["layer1.0.conv1.weight"] = torch.zeros(5, 5, 3, 3)
    del state["layer2.0.bn1.weight"]
    state["surprise"] = torch.zeros(1)
    torch.save(state, tmp_path / "odd.pth")
    logging.getLogger("imas").propagate = True
    with caplog.at_level(logging.INFO, "imas"):
        load_encoder(ResNet("resnet18", width=4), tmp_path / "odd.pth")
    assert "1 missing: layer2.0.bn1.weight" in caplog.text
    assert "1 unexpected: surprise" in caplog.text
    assert "1 misshapen: layer1.0.conv1.weight (5, 5, 3, 3), expected" in caplog.text


@pytest.mark.parametrize("content", [b"no weights at all", None])
def test_weight_files_that_cannot_be_used_are_errors(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.pth"
    if content is not None:
        path.write_bytes(content)
    net = _tiny()
    net["encoder"]["pretrain"] = str(path)
    with pytest.raises(UserError, match="net.encoder.pretrain: .*broken.pth"):
        build_model(net)


def test_a_file_from_which_nothing_fits_is_an_error(tmp_path: Path) -> None:
    torch.save({"transformer.weight": torch.zeros(2)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="none of its 1 tensors fits"):
        load_encoder(ResNet("resnet18", width=4), tmp_path / "vit.pth")
