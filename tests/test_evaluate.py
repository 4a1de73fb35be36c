"""Windows, views and bounded memory; ``eval.py`` with its options, and without ground truth."""

from __future__ import annotations

import csv
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, run, run_ranks
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import eval as script
from imas import build_model, load_config, predict_sliding
from imas.data.catalog import CITYSCAPES, CITYSCAPES_IDS, far_colours
from imas.data.check import check_data
from imas.data.shapes import CLASS_NAMES
from imas.engine.predict import find_images
from imas.engine.sliding import Predictor, Protocol, labels, labels_and_confidence, protocol_bands
from imas.errors import UserError
from imas.methods import METHODS


def _network(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, classes, 5, padding=2), nn.Tanh(), nn.Conv2d(classes, classes, 3, padding=1))


@torch.no_grad()
def _naive(model: nn.Module, images: Tensor, crop: int) -> Tensor:
    """The sum of all windows' probabilities, over the whole map."""
    height, width = images.shape[-2:]
    total = 0.0
    for top in range(0, height, int(crop * 2 / 3)):
        for left in range(0, width, int(crop * 2 / 3)):
            window = model(images[:, :, top : top + crop, left : left + crop]).softmax(dim=1)
            _, _, h, w = window.shape
            total = total + F.pad(window, (left, width - left - w, top, height - top - h))
    return total


# Windows and views

SIZES = [(40, 70), (48, 48), (65, 33), (7, 30), (1, 1), (129, 31)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bands_equal_the_whole_map_bitwise(size: tuple[int, int]) -> None:
    model, images = _network(), torch.randn(2, 3, *size)
    expected = _naive(model, images, 48)  # stride 32: 33, 65 and 129 leave windows of one pixel
    assert torch.equal(predict_sliding(model, images, 48), expected)
    found, confidence = labels_and_confidence(protocol_bands(model, images, Protocol(48)))
    assert torch.equal(found, expected.argmax(dim=1).byte())
    assert torch.equal(found, labels(protocol_bands(model, images, Protocol(48))))
    torch.testing.assert_close(confidence, expected.amax(dim=1) / expected.sum(dim=1))


def test_equally_likely_classes_fall_to_the_first() -> None:
    found = labels(
        protocol_bands(lambda window: window.new_zeros(1, 4, *window.shape[-2:]), torch.zeros(1, 3, 9, 9), Protocol(6))
    )
    assert not found.any()


def test_whole_is_one_window() -> None:
    model, images = _network(), torch.randn(1, 3, 40, 70)
    whole = torch.cat([band.clone() for band in protocol_bands(model, images, Protocol(None))], dim=-2)
    assert torch.equal(whole, model(images).detach().softmax(dim=1))
    assert torch.equal(whole, predict_sliding(model, images, 106))  # whose stride is 70


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [48, None])
def test_views_equal_a_plain_twin(size: tuple[int, int], flip: bool, window: int | None) -> None:
    model, images, scales = _network(), torch.randn(2, 3, *size), (0.25, 1.0, 1.7)
    views = []
    for scale in scales:
        scaled = [max(1, round(scale * side)) for side in size]
        for mirrored in (False, True)[: 1 + flip]:
            image = F.interpolate(images, scaled, mode="bilinear", antialias=True)
            image = image.flip(3) if mirrored else image
            total = _naive(model, image, window or 10_000)
            mean = total / total.sum(dim=1, keepdim=True)
            mean = F.interpolate(mean.flip(3) if mirrored else mean, size, mode="bilinear")
            views.append(mean)
    expected = torch.stack(views).mean(dim=0)
    bands = list(protocol_bands(model, images, Protocol(window, flip, scales)))
    torch.testing.assert_close(torch.cat(bands, dim=-2), expected, atol=1e-5, rtol=0)


def test_protocol_in_words() -> None:
    assert str(Protocol(769)) == "windows of 769, stride 512"
    assert str(Protocol(None, True, (0.75, 1.0))) == "whole images, flip, scales 0.75 1"


class _Full(nn.Module):
    """A network on a device that is full until the sum has gone elsewhere."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.left = times

    def forward(self, window: Tensor) -> Tensor:
        self.left -= 1
        if self.left >= 0:
            raise torch.OutOfMemoryError("full")
        return torch.cat([window, window], dim=1)


def test_a_full_device_leaves_the_sum_to_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("imas").propagate = True
    images = torch.randn(1, 3, 20, 30)
    predictor = Predictor(Protocol(12), torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(predictor(_Full(1), images), images.argmax(dim=1).byte())
    assert [record.getMessage() for record in caplog.records] == [
        "30×20 pixels are too many for cpu: such images are summed on the CPU"
    ]
    for accumulate in ("cpu", "device"):
        with pytest.raises(UserError, match="too small for a window of 1 image.*windows of 12, stride 8"):
            Predictor(Protocol(12), torch.device("cpu"), accumulate)(_Full(math.inf), images)


_LARGE = r"""
import re, torch
from pathlib import Path
from torch import nn
from imas.engine.evaluate import evaluate
from imas.engine.sliding import Predictor, Protocol
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
sample = (torch.zeros(3, 4000, 6000, dtype=torch.uint8), torch.zeros(4000, 6000, dtype=torch.int64))
sample[0][:, ::7].fill_(255), sample[1][::3].fill_(1)
before = peak()
matrices = evaluate(
    {"student": nn.Conv2d(3, 8, 1)}, [[sample]], lambda images: images.float().div_(255),
    Predictor(Protocol(1200), torch.device("cpu")), num_classes=8, ignore_index=255,
)
print(int(matrices["student"].counts.sum()), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the peak of memory")
def test_a_large_image_stays_within_the_bound() -> None:
    """Beyond image and mask: 13 bytes a pixel, in a band of as many rows as a window 4 · C + 13, and what the network
    needs for a window.
    """
    done = subprocess.run([sys.executable, "-c", _LARGE], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    count, rise = done.stdout.split()
    assert int(count) == 24_000_000
    window = 4 * 4 * 8 * 1200**2  # logits, probabilities, and what the convolution makes of them
    bound = 13 * 24e6 + (4 * 8 + 13) * 6000 * 1200 + window
    assert float(rise) * 2**20 < bound < (12 + 4 * 8) * 24e6  # the last: what the whole map would need, with the image


# eval.py


@pytest.fixture
def trained(experiment: Callable[..., Path]) -> Callable[..., Path]:
    """A checkpoint with random networks that carries the tiny experiment's configuration."""

    def write(carried: bool = True, **sections: dict) -> Path:
        config = load_config(experiment(**sections))
        torch.manual_seed(1)
        states = {key: build_model(config.net).state_dict() for key in ("model_state", "teacher_state")}
        for state in states.values():
            state["decoder.classifier.6.weight"].mul_(30)  # so that every class is predicted
        path = config.folder / "ckpt.pth"
        torch.save({**states, "epoch": 7} | ({"config": config.to_dict()} if carried else {}), path)
        return path

    return write


def _main(*words: str | Path) -> None:
    script.main([str(word) for word in words])


def test_every_output_stands_beside_its_protocol(trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = trained()
    out = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    words = ("--json", out["json"], "--csv", out["csv"], "--confusion", out["png"])
    _main("--checkpoint", checkpoint, "--flip", "--scales", "0.5", "1", *words)
    shown = capsys.readouterr().out
    assert "(teacher, 5 images, windows of 48, stride 32, flip, scales 0.5 1)" in shown
    figures = json.loads(out["json"].read_text())
    assert f"mIoU {figures['miou']:.2f}, fwIoU {figures['fwiou']:.2f}" in shown
    protocol = {"network": "teacher", "checkpoint": str(checkpoint), "epoch": 7, "list": None, "images": 5}
    protocol |= {"window": 48, "stride": 32, "flip": True, "scales": [0.5, 1.0]}
    assert protocol.items() <= figures.items()
    rows = list(csv.DictReader(out["csv"].read_text().splitlines()))
    assert [row["class"] for row in rows] == [*CLASS_NAMES, "mean", "by frequency"]
    assert all(row["images"] == "5" and row["scales"] == "0.5 1.0" for row in rows)
    assert float(rows[-2]["iou"]) == figures["miou"] and float(rows[-1]["iou"]) == figures["fwiou"]
    assert float(rows[0]["pixels"]) == figures["pixels"]["background"]
    assert min(Image.open(out["png"]).size) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json", "out.png", "run"]


def test_any_list_and_the_authors_checkpoints(trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = trained(carried=False)
    (tmp_path / "some.txt").write_text("shapes/00001\nshapes/00002\n")
    out = tmp_path / "out.json"
    config = checkpoint.with_name("config.yaml")
    _main("--config", config, "--checkpoint", checkpoint, "--list", tmp_path / "some.txt", "--whole", "--json", out)
    figures = json.loads(out.read_text())
    assert (figures["images"], figures["window"], figures["list"]) == (2, None, str(tmp_path / "some.txt"))
    with pytest.raises(UserError, match="carries no configuration.*--config"):
        _main("--checkpoint", checkpoint)


class _Mean(nn.Module):
    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return sum(network(images)[0] for network in self.networks) / len(self.networks)


def test_any_network_of_the_method_or_the_checkpoint(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is the network that selects the best checkpoint; a mean of several needs all of them."""
    checkpoint, out = trained(), tmp_path / "out.json"
    method = METHODS[load_config(checkpoint.with_name("config.yaml")).method]
    monkeypatch.setattr(method, "scored", lambda self: {"mean": _Mean(*self.networks().values())})

    def evaluated(path: Path, *words: str) -> tuple[str, float]:
        _main("--checkpoint", path, "--json", out, *words)
        return json.loads(out.read_text())["network"], json.loads(out.read_text())["miou"]

    found = dict(evaluated(checkpoint, *words) for words in ((), ("--network", "student"), ("--network", "teacher")))
    assert len({*found.values()}) == 3 and list(found) == ["mean", "student", "teacher"]
    state = torch.load(checkpoint)
    state["teacher_state"] = state["model_state"]
    torch.save(state, checkpoint)
    assert evaluated(checkpoint) == ("mean", pytest.approx(found["student"]))
    with pytest.raises(UserError, match="ckpt.pth: has no network nobody; it has mean, student, teacher"):
        evaluated(checkpoint, "--network", "nobody")
    del state["teacher_state"]
    torch.save(state, checkpoint)
    assert evaluated(checkpoint) == ("student", found["student"])
    with pytest.raises(UserError, match="ckpt.pth: has no network mean; it has student"):
        evaluated(checkpoint, "--network", "mean")


FOLDER = {"type": "folder", "folder": {"class_names": list("abcd")}, "val": {"crop": {"size": 48}}, "workers": 0}


def _photos(folder: Path) -> None:
    """Images as people have them: of many modes, and of sizes below a window and just above one."""
    rng = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)

    def image(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    image(50, 97).save(folder / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    image(20, 31).save(folder / "turned.jpg", exif=turned)
    image(65, 33).convert("L").save(folder / "grey.png")
    image(9, 40).convert("RGBA").save(folder / "sub" / "alpha.png")
    image(33, 33).convert("CMYK").save(folder / "sub" / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (12, 50), dtype=np.uint16)).save(folder / "sixteen.png")


def test_images_are_predicted_as_those_of_a_list(trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Evaluated against its own index PNGs as masks, the network is right everywhere."""
    _photos(tmp_path / "data" / "images")
    dataset = FOLDER | {"train": {"data_root": str(tmp_path / "data"), "crop": {"size": 33}}}
    dataset["val"] = {"data_list": str(tmp_path / "list.txt"), "crop": {"size": 48}, "batch_size": 2}
    checkpoint = trained(dataset=dataset)
    views = ("--flip", "--scales", "1", "1.5", "--network", "student")
    _main("--checkpoint", checkpoint, "--images", tmp_path / "data" / "images", "--save-dir", tmp_path / "data", *views)
    assert "6 images in" in capsys.readouterr().out
    (tmp_path / "data" / "index").rename(tmp_path / "data" / "masks")
    names = [path.relative_to(tmp_path / "data" / "images") for path in (tmp_path / "data" / "images").rglob("*.*")]
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted(names))))
    _main("--checkpoint", checkpoint, "--json", tmp_path / "out.json", *views)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["images"] == 6 and figures["pixel_accuracy"] == 100
    assert sum(share > 1 for share in figures["pixels"].values()) > 1  # not one class all over

    index = Image.open(tmp_path / "data" / "masks" / "turned.png")
    assert index.mode == "P" and index.size == (20, 31)
    assert index.getpalette()[:12] == [value for colour in far_colours(4) for value in colour]
    confidence = Image.open(tmp_path / "data" / "confidence" / "sub" / "alpha.png")
    assert confidence.mode == "L" and 63 <= confidence.getextrema()[0] <= confidence.getextrema()[1] <= 255
    assert Image.open(tmp_path / "data" / "overlay" / "sub" / "alpha.jpg").size == (40, 9)


def test_uncertain_pixels_become_255_in_masks_to_train_on(trained, tmp_path: Path) -> None:
    _photos(tmp_path / "images")
    dataset = FOLDER | {"train": {"data_root": str(tmp_path), "crop": {"size": 33}}}
    dataset["val"] = {"data_list": str(tmp_path / "list.txt"), "crop": {"size": 48}}
    words = ("--checkpoint", trained(dataset=dataset), "--images", tmp_path / "images", "--save-dir")
    _main(*words, tmp_path / "plain")
    sure = np.asarray(Image.open(tmp_path / "plain" / "confidence" / "a.png")) / 255
    limit = float(np.median(sure))
    _main(*words, tmp_path / "out", "--min-confidence", limit)
    plain, masked = (np.asarray(Image.open(tmp_path / name / "index" / "a.png")) for name in ("plain", "out"))
    clear = abs(sure - limit) > 0.01  # the picture of the confidence is rounded
    assert (masked[clear & (sure < limit)] == 255).all() and 0 < (masked == 255).mean() < 1
    assert (masked[clear & (sure > limit)] == plain[clear & (sure > limit)]).all()

    (tmp_path / "out" / "index").rename(tmp_path / "masks")
    (tmp_path / "list.txt").write_text("a.png\n")
    path = tmp_path / "config.yaml"
    sections = {key: TINY[key] for key in ("trainer", "net")} | {"sup_only": {}, "dataset": dataset}
    path.write_text(yaml.safe_dump(sections))
    config = load_config(path)
    assert len(check_data(config).labeled) == 5
    with pytest.raises(UserError, match="--min-confidence 2: expected a number between 0 and 1"):
        _main(*words, tmp_path / "out", "--min-confidence", 2)


def test_what_cannot_be_predicted_is_said_at_the_end(trained, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    _photos(photos)
    (photos / "broken.jpg").write_text("no image")
    Image.new("RGB", (5, 5)).save(photos / "a.bmp")
    done = run("eval.py", "--checkpoint", trained(), "--images", photos, "--save-dir", out)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{photos}/a.png: left out, since {photos}/a.bmp has the same outputs" in done.stderr
    assert f"{photos}/broken.jpg: cannot be read as an image" in done.stderr
    assert "2 of 8 images have no prediction" in done.stderr and "images/s" in done.stdout
    for kind, suffix in (("index", "png"), ("overlay", "jpg"), ("confidence", "png")):
        names = {path.relative_to(out / kind).as_posix() for path in (out / kind).rglob("*.*")}
        assert names == {f"{name}.{suffix}" for name in ("a", "turned", "grey", "sixteen", "sub/alpha", "sub/cmyk")}


def test_two_processes_share_the_images(trained, tmp_path: Path) -> None:
    _photos(tmp_path / "photos")
    words = ("eval.py", "--checkpoint", trained(), "--images", tmp_path / "photos", "--save-dir", tmp_path / "out")
    ranks = run_ranks(*words)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert "6 images in" in ranks[0].stdout and "images in" not in ranks[1].stdout
    assert len(list((tmp_path / "out" / "index").rglob("*.png"))) == 6


def test_cityscapes_ids(trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _photos(tmp_path / "photos")
    data = {"data_root": "nowhere", "data_list": "nowhere/labeled.txt", "crop": {"size": 33}}
    dataset = {
        "type": "cityscapes",
        "train": data,
        "val": {"data_list": "nowhere.txt", "crop": {"size": 48}},
        "workers": 0,
    }
    checkpoint = trained(dataset=dataset, net=TINY["net"] | {"num_classes": 19})
    words = ("--checkpoint", checkpoint, "--images", tmp_path / "photos" / "*.png", "--save-dir")
    _main(*words, tmp_path / "plain")
    _main(*words, tmp_path / "ids", "--cityscapes-ids")
    assert len(list((tmp_path / "ids" / "index").iterdir())) == 3
    for path in (tmp_path / "ids" / "index").iterdir():
        ids, plain = Image.open(path), Image.open(tmp_path / "plain" / "index" / path.name)
        assert ids.mode == "L" and plain.mode == "P"
        assert np.array_equal(np.asarray(ids), np.array(CITYSCAPES_IDS)[np.asarray(plain)])
        assert plain.getpalette()[:57] == [value for colour in CITYSCAPES.palette for value in colour]


def test_names_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)

    def names(*words: str, save_dir: str = "out") -> list[str]:
        return sorted(map(str, find_images(words, Path(save_dir))[0]))

    everything = ["a", "grey", "sixteen", "sub/alpha", "sub/cmyk", "turned"]
    assert names("photos") == names(f"{tmp_path}/photos") == names("photos/**/*.*") == everything
    assert names("photos/sub/alpha.png") == ["alpha"]
    assert names("photos/a.png", f"{tmp_path}/photos/sub/alpha.png", "photos/a.png") == ["a", "sub/alpha"]
    assert names("photos/sub/../a.png", "photos/sub/alpha.png") == ["a", "sub/alpha"]
    assert names("photos/*/*.png") == ["sub/alpha"]
    (tmp_path / "photos" / "sub").rename(tmp_path / "photos" / "index")  # as an earlier run leaves it
    assert names("photos", save_dir="photos") == ["a", "grey", "sixteen", "turned"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "{0}/none/*.png", "--save-dir", "{0}/o"], r"none/\*\.png: no such file \(looked in"),
        (["--images", "{0}/empty", "--save-dir", "{0}/o"], "empty: folder without images"),
        (["--images", "{0}"], "--images: needs --save-dir"),
        (["--images", "{0}", "--save-dir", "{0}/file/o"], "file is a file; expected a folder"),
        (
            ["--images", "{0}", "--save-dir", "{0}/o", "--json", "o.json", "--list", "l"],
            "--list, --json: --images has no",
        ),
        (["--images", "{0}", "--save-dir", "{0}/o", "--cityscapes-ids"], "--cityscapes-ids: the data set.*is shapes"),
        (["--save-dir", "o", "--cityscapes-ids"], "--save-dir, --cityscapes-ids: only with --images"),
        (["--scales", "1", "0"], "--scales 1.0 0.0: expected numbers above 0"),
        (["--json", "{0}/none/o.json", "--csv", "{0}"], r"there is no folder .*none\n--csv .*: is a folder"),
        (["--confusion", "{0}/o.jpg"], r"--confusion .*o\.jpg: expected a name that ends in \.png"),
        (["--list", "{0}/none.txt"], r"none\.txt: cannot read the list"),
        (["--root", "{0}"], "--root: the data set shapes has no folder"),
        (["--set", "net.num_classes=five"], "--set: net.num_classes: expected an integer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_before_anything_is_written(trained, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        _main("--checkpoint", trained(), *(word.format(tmp_path) for word in words))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "run"]
