"""Whole runs of every method: stopped and resumed, and on two ranks."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, run_ranks
from test_methods import CONTRACT

import train_semi
from imas.engine import show
from imas.engine.interrupt import Interrupted, Interruption
from imas.methods import METHODS
from imas.strict import to_plain


@pytest.fixture(params=CONTRACT)
def config(request: pytest.FixtureRequest, experiment: Callable[..., Path]) -> Path:
    """The tiny experiment with the method's options of the contract test; four iterations an epoch for all."""
    name = request.param
    section = to_plain(METHODS[name].Options(**CONTRACT[name]))
    dataset = TINY["dataset"] | {"train": TINY["dataset"]["train"] | {"epoch_size": 16}}
    path = experiment()
    others = {key: value for key, value in TINY.items() if key != "imas"}
    if METHODS[name].trains_embedding:
        others["net"] = others["net"] | {"embedding": 8}
    path.write_text(yaml.safe_dump(others | {"dataset": dataset, name: section}))
    return path


def _networks(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the networks in the last checkpoints of a run, stage by stage."""
    tensors = {}
    for path in sorted((out / "checkpoints").rglob("ckpt.pth")):
        state = torch.load(path, weights_only=True)
        for key, network in state.items():
            if key.endswith("_state") and isinstance(network, dict) and key not in ("scaler_state", "optimizer_state"):
                stage = path.parent.name
                tensors |= {f"{stage}/{key}/{n}": t for n, t in network.items() if isinstance(t, torch.Tensor)}
    assert len(tensors) > 50
    return tensors


def test_a_stopped_run_ends_bitwise_as_a_straight_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of its second epoch of training, or of the stage that is first to have one."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    words = ["--config", str(config), "--set", "saver.use_tb=false", "--set", "trainer.epochs=2"]
    monkeypatch.setattr(show, "_draw", lambda *_: None)  # the pictures at the end
    train_semi.main([*words, "--out", str(straight)])
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "stops_before", lambda self, iteration: iteration == 6)
        with pytest.raises(Interrupted):
            train_semi.main([*words, "--out", str(stopped)])
    train_semi.main([*words, "--out", str(stopped), "--resume", "auto"])
    ours, theirs = _networks(stopped), _networks(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for path in straight.rglob("metrics.csv"):
        assert (stopped / path.relative_to(straight)).read_text() == path.read_text()


def test_two_ranks_keep_equal_weights(config: Path, tmp_path: Path) -> None:
    """What a rank has trained is the other's, to the last bit, after every stage."""
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import torch
        import train_semi
        from imas import distributed
        from imas.engine import session
        fit = session.fit
        def watched(run, keep):
            fit(run, keep)
            weights = {{name: dict(network.named_parameters()) for name, network in run.method.networks().items()}}
            torch.save(weights, f"{{sys.argv[1]}}-{{run.config.stage}}-{{distributed.rank()}}")
        session.fit = watched
        train_semi.main(sys.argv[2:])
        """)
    )
    words = ("--config", config, "--out", tmp_path / "out", "--set", "trainer.epochs=2", "--set", "saver.use_tb=false")
    ended = run_ranks(script, tmp_path / "weights", *words)
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    stages = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.glob("weights-*-0"))
    assert stages
    for stage in stages:
        one, two = (torch.load(tmp_path / f"{stage}-{rank}", weights_only=True) for rank in (0, 1))
        for network, parameters in one.items():
            assert all(torch.equal(two[network][name], tensor) for name, tensor in parameters.items()), network


@pytest.mark.parametrize("config", ["psmt", "u2pl"], indirect=True)
def test_a_run_on_two_ranks_goes_on_bitwise(config: Path, tmp_path: Path) -> None:
    """Of the methods with a stage before the main one, and with state beside their networks: both ranks are stopped."""
    script = tmp_path / "stopped.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import train_semi
        from imas.engine.interrupt import Interrupted, Interruption
        at = int(sys.argv[1])
        if at:
            Interruption.stops_before = lambda self, iteration: iteration == at
        try:
            train_semi.main(sys.argv[2:])
        except Interrupted:
            pass
        """)
    )
    words = ["--config", config, "--set", "saver.use_tb=false", "--set", "trainer.epochs=2", "--resume", "auto"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for at, out in ((0, straight), (3, stopped), (0, stopped)):
        ended = run_ranks(script, str(at), *words, "--out", out)
        assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    ours, theirs = _networks(stopped), _networks(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
