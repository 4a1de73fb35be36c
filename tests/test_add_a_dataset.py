"""docs/add_a_dataset.md to the letter, in a copy of the project: two files are touched, then it trains."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

PAGE = (ROOT / "docs" / "add_a_dataset.md").read_text()
CATALOG = "imas/data/catalog.py"
CONFIG = "exps/pets_sup230/config.yaml"
SMALL = {
    "dataset.train.batch_size": 2,
    "dataset.train.crop.size": 33,
    "dataset.train.resize_base_size": 40,
    "dataset.val.crop.size": 48,
    "dataset.n_sup": 4,
    "dataset.workers": 0,
    "trainer.epochs": 1,
    "net.encoder.type": "resnet18",
    "net.encoder.pretrain": "null",
    "net.encoder.kwargs.width": 8,
    "net.decoder.kwargs": "{inner_planes: 8, low_conv_planes: 4, dilations: [1, 2, 3]}",
}


def _block(language: str) -> tuple[str, str]:
    """File and text of the page's one block in a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    file, _, text = text.partition("\n")
    return file.removeprefix("# "), text


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the data set added, and 68 small images in its layout."""
    copy = tmp_path_factory.mktemp("copy") / "project"
    copy.mkdir()
    for name in ("train_semi.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "imas", copy / "imas", ignore=shutil.ignore_patterns("__pycache__"))
    before = _files(copy)

    file, entry = _block("python")
    assert file == CATALOG
    source = (copy / file).read_text()
    head, comment, table = source.partition("# dataset.type → ")
    assert comment
    source = f"{head}{entry}\n\n{comment}{table}"
    file, diff = _block("diff")
    assert file == CATALOG
    old, new = ("".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] == sign) for sign in "-+")
    assert source.count(old) == 1
    (copy / file).write_text(source.replace(old, new))
    file, text = _block("yaml")
    assert file == CONFIG
    (copy / file).parent.mkdir(parents=True)
    (copy / file).write_text(text)
    after = _files(copy)
    assert sorted(name for name in after if after[name] != before.get(name)) == [CONFIG, CATALOG]

    noise = np.random.default_rng(0)
    for folder in ("images", "annotations/trimaps"):
        (copy / "data/pets" / folder).mkdir(parents=True)
    names = [f"Abyssinian_{i}" for i in range(68)]
    for name in names:
        image, trimap = noise.integers(0, 256, (36, 40, 3)), noise.integers(1, 4, (36, 40))
        Image.fromarray(image.astype(np.uint8)).save(copy / f"data/pets/images/{name}.jpg")
        Image.fromarray(trimap.astype(np.uint8)).save(copy / f"data/pets/annotations/trimaps/{name}.png")
    (copy / "data/splits/pets").mkdir(parents=True)
    (copy / "data/splits/pets/train.txt").write_text("\n".join(names[:64]))
    (copy / "data/splits/pets/val.txt").write_text("\n".join(names[64:]))
    return copy


def test_the_data_set_of_the_page_is_split_checked_and_trained(project: Path) -> None:
    (splits,) = re.findall(r"^python (-m imas\.data splits .*?) +#", PAGE, flags=re.MULTILINE)
    drawn = run(*splits.split(), folder=project)
    assert drawn.returncode == 0, drawn.stderr
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    checked = run("-m", "imas.data", "check", "--config", CONFIG, *settings, folder=project)
    assert checked.returncode == 0, checked.stderr
    rows = {line.split()[0]: line.split()[1:] for line in checked.stdout.splitlines() if line.strip()}
    assert 45 < float(rows["pet"][0]) < 55 and 28 < float(rows["(ignored)"][0]) < 38
    trained = run("train_semi.py", "--config", CONFIG, *settings, folder=project)
    assert trained.returncode == 0, trained.stderr
    assert "4 labeled" in trained.stdout and "4 validation images" in trained.stdout and "pet" in trained.stdout
    assert len((project / CONFIG).with_name("log").joinpath("metrics.csv").read_text().splitlines()) == 2


def test_a_value_that_no_trimap_has_is_refused_by_name(project: Path) -> None:
    path = project / "data/pets/annotations/trimaps/Abyssinian_64.png"
    Image.fromarray(np.full((36, 40), 9, np.uint8)).save(path)
    refused = run("train_semi.py", "--config", CONFIG, "--set", "net.encoder.pretrain=null", folder=project)
    assert refused.returncode == 2 and "Abyssinian_64.png: 1440 pixels have the values 9" in refused.stderr
