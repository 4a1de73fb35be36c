"""The package as a library: a checkpoint's network, an image's classes, export; the examples of docs/library.md."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import eval as script
import imas
from imas import load_checkpoint, load_config, predict
from imas.build import build_method
from imas.engine import checkpoint
from imas.errors import UserError
from imas.export import export
from imas.export import main as export_main


@pytest.fixture
def trained(experiment: Callable[..., Path]) -> Callable[..., Path]:
    """A checkpoint of random networks that differ, and predict every class."""

    def write(*overrides: str) -> Path:
        config = load_config(experiment(), overrides)
        torch.manual_seed(1)
        states = {"epoch": 7, "config": config.to_dict()}
        for number, (each, network) in enumerate(build_method(config).networks().items()):
            network.decoder.classifier[-1].weight.data.mul_(30 + 10 * number)
            states[checkpoint.state_key(each)] = network.state_dict()
        path = config.folder / "ckpt.pth"
        torch.save(states, path)
        return path

    return write


NOISE = np.random.default_rng(0).integers(0, 256, (70, 101, 3)).astype(np.uint8)


def test_predict_is_what_eval_writes(trained, tmp_path: Path) -> None:
    """Windows of 48 on an image of 70 × 101; another mean than the default; a photograph lying on its side."""
    path = trained()
    state = torch.load(path)
    state["config"]["dataset"] |= {"mean": [100.0, 120.0, 90.0], "std": [50.0, 60.0, 70.0]}
    torch.save(state, path)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / "plain.png")
    Image.fromarray(NOISE).save(tmp_path / "turned.png", exif=sideways)
    Image.fromarray(NOISE[..., 0]).save(tmp_path / "grey.png")
    images = [tmp_path / f"{name}.png" for name in ("plain", "turned", "grey")]
    script.main([f"--checkpoint={path}", "--images", *map(str, images), f"--save-dir={tmp_path / 'out'}"])
    network, recipe = load_checkpoint(path)
    assert recipe.to_dict() == state["config"]
    written = [torch.from_numpy(np.array(Image.open(tmp_path / "out" / "index" / image.name))) for image in images]
    for image, expected in zip(images, written):
        classes = predict(network, Image.open(image))
        assert classes.dtype == torch.uint8 and torch.equal(classes, expected) and len(classes.unique()) > 2
    assert written[0].shape == (70, 101) and written[1].shape == (101, 70)
    mirrored = np.ascontiguousarray(NOISE[..., ::-1])  # BGR, whose view is RGB again
    for same in (NOISE, torch.from_numpy(NOISE).permute(2, 0, 1), mirrored[..., ::-1]):
        assert torch.equal(predict(network, same), written[0])
    assert torch.equal(predict(network.train(), NOISE), written[0]) and network.training


def test_the_network_is_the_one_that_selects_unless_named(trained) -> None:
    path = trained()
    state = torch.load(path)
    for name, key in ((None, "teacher_state"), ("student", "model_state"), ("teacher", "teacher_state")):
        network, _ = load_checkpoint(str(path), network=name)
        assert not network.training and next(network.parameters()).device.type == "cpu"
        assert all(torch.equal(tensor, state[key][each]) for each, tensor in network.state_dict().items())
    with pytest.raises(UserError, match="ckpt.pth: has no network nobody; it has teacher, student"):
        load_checkpoint(path, "nobody")
    with pytest.raises(UserError, match="none.pth: no such file"):
        load_checkpoint(path.with_name("none.pth"))
    del state["config"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"carries no configuration.*recipe=load_config"):
        load_checkpoint(path)
    assert load_checkpoint(path, recipe=load_config(path.with_name("config.yaml")))[0].recipe.method == "imas"


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (NOISE / 255, r"ndarray \(70, 101, 3\) float64"),
        (NOISE[..., 0], r"ndarray \(70, 101\) uint8"),
        (torch.from_numpy(NOISE), r"Tensor \(70, 101, 3\) torch.uint8"),
        ("photo.jpg", "str"),
    ],
    ids=["of 0..1", "grey", "(H, W, 3) tensor", "name"],
)
def test_other_images_are_refused(trained, image: object, got: str) -> None:
    network, recipe = load_checkpoint(trained())
    with pytest.raises(ValueError, match=f"image must be .*, got {got}"):
        predict(network, image)
    own = imas.build_model(recipe.net)
    with pytest.raises(ValueError, match="give its recipe"):
        predict(own, NOISE)
    assert predict(own, NOISE, recipe).shape == (70, 101)


class _Restless(nn.Module):
    """Other logits at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.calls += 1
        return images * self.calls, None


def test_an_export_that_differs_is_not_written(trained, tmp_path: Path) -> None:
    _, recipe = load_checkpoint(trained())
    with pytest.raises(UserError, match="out.pt2: not written.*differs"):
        export(_Restless(), recipe, tmp_path / "out.pt2")
    assert not list(tmp_path.glob("out*"))


def _blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/library.md").read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page(trained, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """In the folder of a run, as on the page, the export's command before the example that reads its file."""
    path = trained("net.aux_loss.loss_weight=0.4")
    (tmp_path / "exps/shapes_imas/checkpoints").mkdir(parents=True)
    best = path.rename(tmp_path / "exps/shapes_imas/checkpoints/ckpt_best.pth")
    (tmp_path / "exps/shapes_imas/config.yaml").write_text(path.with_name("config.yaml").read_text())
    Image.fromarray(NOISE).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    export_main([str(best), "shapes.pt2"])
    assert "written: shapes.pt2" in capsys.readouterr().out
    load, loop, exported = _blocks()
    spaces: list[dict] = [{}, {}, {}]
    torch.manual_seed(0)
    for code, space in zip((load, loop, exported), spaces):
        exec(compile(code, "docs/library.md", "exec"), space)
    assert re.search(r"background: [\d.]+%", capsys.readouterr().out)
    own = spaces[1]
    assert own["loss"].isfinite() and own["score"].mean() > 0 and own["unlabeled"] > 0
    pairs = zip(own["teacher"].parameters(), own["student"].parameters())
    assert any(not torch.equal(*pair) for pair in pairs)
    dataset, pixels = load_config("exps/shapes_imas/config.yaml").dataset, spaces[2]["pixels"]
    network = spaces[0]["network"]
    with torch.no_grad():
        logits = network(imas.Normalise(dataset.mean, dataset.std)(pixels))[0]
    assert (logits.argmax(dim=1) == spaces[2]["classes"]).float().mean() > 0.999  # but for rounding
    smallest = torch.randn(1, 3, 9, 40)  # above the output stride of 8, as the page promises
    with torch.no_grad():
        torch.testing.assert_close(spaces[2]["network"](smallest), network(smallest)[0], atol=1e-4, rtol=1e-4)


def test_export_refuses_other_names(tmp_path: Path) -> None:
    for name in ("out.onnx", "none/out.pt2"):
        with pytest.raises(UserError, match="ends in .pt2, in a folder that exists"):
            export_main(["ckpt.pth", str(tmp_path / name)])


def test_the_package_has_the_requirements_and_all_of_imas() -> None:
    """What ``pip install`` reads: this package alone, its one data file, and no second list of requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setup = project["tool"]["setuptools"]
    assert set(project["project"]["dynamic"]) == setup["dynamic"].keys() == {"version", "dependencies"}
    assert (ROOT / setup["dynamic"]["dependencies"]["file"]).is_file()
    assert setup["packages"]["find"]["include"] == ["imas*"]
    data = {str(path.relative_to(ROOT / "imas/data")) for path in (ROOT / "imas").rglob("*.yaml")}
    assert data == set(setup["package-data"]["imas.data"])
