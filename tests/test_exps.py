"""Every shipped experiment is loaded, built and stepped once; the README's example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run

from imas import load_config
from imas.build import build_method
from imas.data.loaders import TrainingData, read_lists
from imas.data.normalise import Normalise
from imas.methods.base import Batch, Progress

CONFIGS = sorted((ROOT / "exps").glob("*/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_shipped_experiments_load_and_step(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.translated == ()
    copy = tmp_path / "config.yaml"
    copy.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(copy) == config

    data = TrainingData(config, read_lists(config), seed=0, rank=0, world=1)
    method = build_method(config).train()
    epoch = config.trainer.sup_only_epoch
    tensors = next(data.epoch(epoch, method.needs_unlabeled(epoch)))
    normalise = Normalise(config.dataset.mean, config.dataset.std)
    batch = Batch(**{name: normalise(x) if x.dtype == torch.uint8 else x for name, x in tensors.items()})
    step = method(batch, Progress(epoch, epoch * len(data), len(data), torch.Generator().manual_seed(0)))
    step.loss.backward()
    assert step.loss.isfinite()


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


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    ended = run(script)
    assert ended.returncode == 0, ended.stderr
    assert "tensor([" in ended.stdout
