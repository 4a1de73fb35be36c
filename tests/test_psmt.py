"""PS-MT: what its golden figures do not show. Stages, momentum, modes, resume, two processes, bad input."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import golden
import pytest
import torch
import yaml
from conftest import ROOT, TINY, run_ranks
from first_step import batch_for, progress, small
from torch.nn import functional as F

import train_semi
from imas import load_config
from imas.data.lists import Lists
from imas.data.loaders import TrainingData
from imas.engine import checkpoint
from imas.engine.interrupt import Interrupted, Interruption
from imas.engine.optim import build_optimizer, learning_rate, param_groups
from imas.errors import ConfigError
from imas.methods import psmt
from imas.methods.psmt import PSMT, VAT, Options, WarmUp
from imas.ops.pseudo import Prediction
from imas.schema import Optimizer, OptimizerKwargs

OURS = {name: section for name, section in TINY.items() if name != "imas"}
OURS |= {"psmt": {"warm_up": 2, "threshold": 0.3, "ramp_up": 1, "assist": 2}}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny experiment as ``tmp_path/NAME/config.yaml``; settings are dotted keys."""

    def write(name: str = "run", **options: object) -> Path:
        path = tmp_path / name / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(OURS | {"psmt": OURS["psmt"] | options}))
        return path

    return write


def _method(**options: object) -> PSMT:
    return small("psmt", **{"threshold": 0.5, "assist": 2, **options})


def _buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def _equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def test_assist_and_loss_by_hand() -> None:
    active = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    other = torch.tensor([9.0, -1.0, 5.0, -2.0]).view(1, 4, 1, 1)
    assert psmt.assisted(active, other, 2).flatten().tolist() == [9, 2, 5, 4]
    assert psmt.ensemble(active, other, 2).flatten().tolist() == [5, 2, 4, 4]
    logits = golden.randn(1, 1, 4, 1, 3)
    pseudo = Prediction(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[0.9, 0.5, 0.6]]]))
    loss = F.cross_entropy(logits, pseudo.label, reduction="none")[0, 0]
    expected = (0.9 * loss[0] + 0.6 * loss[2]) / 2  # divided by the number of kept pixels
    torch.testing.assert_close(psmt.weighted_consistency(logits, pseudo, 0.6), expected)
    assert psmt.weighted_consistency(logits, pseudo, 0.95) == 0


def test_ramp_up_without_epochs_is_off() -> None:
    assert psmt.ramp_up(1.5, 0, 0) == 1.5 and psmt.ramp_up(1.5, 0, 10) == 0


def test_one_teacher_follows_in_each_epoch() -> None:
    method = _method()
    for epoch, moving in ((0, "teacher1"), (1, "teacher2"), (2, "teacher1")):
        before = {name: [p.clone() for p in network.parameters()] for name, network in method.networks().items()}
        rates = method.after_step(progress(epoch, 5 * epoch))
        moved = [
            name for name, network in method.networks().items() if not _equal(before[name], [*network.parameters()])
        ]
        assert moved == [moving] and rates["teacher"] == int(moving[-1])


def test_teachers_see_batch_statistics_and_their_own_move() -> None:
    """Both run in train mode, the one that does not follow as well; in evaluation they are in eval mode."""
    method = _method(vat=VAT(enabled=False))
    labeled, unlabeled = batch_for(PSMT.wants(method.options))
    before = {name: _buffers(network) for name, network in method.networks().items()}
    method(labeled, unlabeled, progress())
    assert all(not _equal(before[name], _buffers(network)) for name, network in method.networks().items())
    method.eval()
    before = _buffers(method)
    method.pseudo_label(unlabeled.weak, progress())
    assert _equal(before, _buffers(method))
    assert not method.teacher1.training and not any(p.requires_grad for p in method.teacher1.parameters())


def test_noise_reads_the_teachers_running_statistics_and_leaves_them() -> None:
    method = _method()
    images = golden.randn(1, 4, 3, 33, 33)
    before = _buffers(method.teacher1), _buffers(method.teacher2)
    method.disturbed(images, torch.Generator().manual_seed(0))
    assert _equal(before[0], _buffers(method.teacher1)) and _equal(before[1], _buffers(method.teacher2))
    assert all(module.training for module in method.modules())
    assert all(p.grad is None for p in method.parameters())


def test_the_students_features_are_disturbed_by_epsilon() -> None:
    """Through the student's own features, whose gradient stays; the switch turns it off."""
    images = golden.randn(1, 4, 3, 33, 33)
    seen: list[torch.Tensor] = []
    for vat in (VAT(), VAT(epsilon=0.5), VAT(enabled=False)):
        method = _method(vat=vat)
        fuse, classify, norms = method.student.fuse, method.student.classify, []
        method.student.fuse = lambda x1, x4, fuse=fuse: seen.append(fuse(x1, x4)) or seen[-1]
        method.student.classify = lambda f, classify=classify, norms=norms: (
            norms.append((f - seen[-1]).flatten(1).norm(dim=1)) or classify(f)
        )
        method.disturbed(images, torch.Generator().manual_seed(0))[0].sum().backward()
        expected = vat.epsilon if vat.enabled else 0.0
        assert norms[0].tolist() == pytest.approx([expected] * 4, rel=1e-3)
        assert method.student.encoder.conv1[0].weight.grad.any()


def test_default_step_gives_the_adversarial_direction_in_float32() -> None:
    """The release's ξ does not: its noise has next to no norm, and in float32 no direction (spec, T-VAT)."""
    method = _method().eval()
    features = golden.randn(2, 2, 12, 9, 9).relu()
    start = golden.rand(3, *features.shape) - 0.5
    decoders = [teacher.decoder.classifier for teacher in (method.teacher1, method.teacher2)]
    noise = {xi: psmt.adversarial_noise(features, decoders, start, xi, 2.0) for xi in (VAT().xi, 1e-6)}
    for decoder in decoders:
        decoder.double()
    exact = psmt.adversarial_noise(features.double(), decoders, start.double(), 1e-3, 2.0)
    assert noise[VAT().xi].flatten(1).norm(dim=1).tolist() == pytest.approx([2, 2], rel=1e-4)
    likeness = {xi: F.cosine_similarity(each.double().flatten(), exact.flatten(), dim=0) for xi, each in noise.items()}
    assert likeness[VAT().xi] > 0.99
    assert likeness[1e-6] < 0.5 and noise[1e-6].norm() < 1


def test_noise_survives_autocast() -> None:
    """It is made and classified in float32: bfloat16 would round most of it away."""
    method, images = _method(), golden.randn(1, 4, 3, 33, 33)
    kinds, classify = [], method.student.classify
    method.student.classify = lambda f: kinds.append(f.dtype) or classify(f)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = method.disturbed(images, torch.Generator().manual_seed(0))
    assert kinds == [torch.float32] and logits.dtype == torch.float32


@pytest.mark.parametrize("rule", ["box", "three_boxes"])
def test_cutmix_pastes_images_and_labels_alike(rule: str) -> None:
    method = _method(cutmix=rule)
    strong = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 33, 33).contiguous()
    pseudo = Prediction(strong[:, 0].long(), strong[:, 0] / 4)
    counts = torch.zeros(4)
    for seed in range(8):
        image, mixed = method.cutmix(strong, pseudo, torch.Generator().manual_seed(seed))
        assert torch.equal(image[:, 0].long(), mixed.label) and torch.equal(image[:, 0] / 4, mixed.confidence)
        counts += (mixed.label != pseudo.label).float().mean((1, 2))
    assert 0.02 < counts.mean() / 8 < 0.6


def test_mean_of_both_teachers_is_scored_first() -> None:
    method, images = _method().eval(), golden.randn(1, 2, 3, 33, 33)
    assert list(method.scored()) == ["mean", "student", "teacher1", "teacher2"]
    expected = (method.teacher1(images)[0] + method.teacher2(images)[0]) / 2
    torch.testing.assert_close(method.scored()["mean"](images)[0], expected)


def test_warm_up_goes_once_over_the_labels_at_a_constant_rate(written: Callable[..., Path]) -> None:
    config = load_config(written(), ["dataset.train.epoch_size=400", "trainer.optimizer.kwargs.lr=0.1"])
    for labeled, batch, length in ((92, 8, 11), (3, 4, 1), (8, 4, 2)):
        lists = Lists([f"{i}" for i in range(labeled)], [], ["0"])
        here = load_config(written(), [f"dataset.train.batch_size={batch}", "dataset.train.epoch_size=400"])
        ours = psmt.warm_up_config(here, lists)
        data = TrainingData(ours, lists, seed=0, rank=0, world=1)
        assert len(data) == length
        drawn = [draw.index for each in data.labeled_sampler for draw in each]
        assert len(drawn) == length * batch and (labeled < batch or len(set(drawn)) == len(drawn))
    ours = psmt.warm_up_config(config, lists).trainer
    assert ours.epochs == 2
    assert {learning_rate(ours.lr_scheduler, 0.1, i, 2 * length, length) for i in range(2 * length)} == {0.1}


def test_warm_up_trains_three_networks_apart_from_each_other() -> None:
    """The gradients of each network are those of its own loss; the student's view is the strong one."""
    method = WarmUp(
        Options(), iter([_method().student, _method().teacher1, _method().teacher2]).__next__, _mean_entropy
    )
    labeled, _ = batch_for(WarmUp.wants(method.options))
    step = method.train()(labeled, None, progress())
    step.loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    views = {"student": labeled.strong[0], "teacher1": labeled.image, "teacher2": labeled.image}
    for name, network in method.networks().items():
        loss = _mean_entropy(*network.coarse(views[name]), labeled.label)
        assert torch.allclose(loss, step.scalars["loss_lb" if name == "student" else f"loss_{name}"], rtol=1e-4)
        weight = network.decoder.classifier[-1].weight
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], weight.grad, rtol=1e-3, atol=1e-5)
    assert method.after_step(progress()) == {}
    assert param_groups(method.trained())[0]["name"] == "student.encoder"


def _mean_entropy(coarse: torch.Tensor, aux: torch.Tensor | None, label: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.interpolate(coarse, label.shape[-2:]), label)


@pytest.mark.parametrize("decay", ["all", "convolutions"])
def test_the_students_momentum_goes_on(tmp_path: Path, decay: str) -> None:
    options = Optimizer(OptimizerKwargs(lr=0.1, weight_decay=0.1, decay=decay), head_lr_times=1.0)
    three, one = (
        build_optimizer(param_groups(networks, decay), options)
        for networks in (_method().networks(), _method().trained())
    )
    for values in three.state.values():
        values["momentum_buffer"].normal_()
    path = tmp_path / "ckpt.pth"
    torch.save({"model_state": {"a": torch.ones(1)}, "optimizer_state": three.state_dict()}, path)
    checkpoint.take_momentum(one, path, "student")
    ours, theirs = ([v["momentum_buffer"] for v in each.state.values()] for each in (one, three))
    assert len(ours) > 50 and _equal(ours, theirs[: len(ours)]) and ours[0].any()


def test_killed_in_any_phase_it_goes_on_bitwise(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the warm-up, between two epochs of it, at its end, and in the middle of the main stage."""
    taken: list[tuple] = []
    take = checkpoint.take_momentum
    monkeypatch.setattr(checkpoint, "take_momentum", lambda *words: taken.append(words[1:]) or take(*words))
    straight, killed = written("straight"), written("killed")
    train_semi.main(["--config", str(straight)])
    assert taken == [(straight.parent / "checkpoints" / "warm_up" / "ckpt.pth", "student")]
    stops = iter([("warm_up", 1), ("warm_up", 2), ("main", 2), ("main", 7)])
    for stage, iteration in stops:
        with monkeypatch.context() as patch:
            length = 1 if stage == "warm_up" else 4

            def stops_before(self: Interruption, now: int, stage: str = stage, iteration: int = iteration) -> bool:
                begun = (killed.parent / "checkpoints" / "warm_up" / "done").exists()
                return now == iteration and begun == (stage == "main")

            patch.setattr(Interruption, "stops_before", stops_before)
            with pytest.raises(Interrupted):
                train_semi.main(["--config", str(killed)])
        state = torch.load(killed.parent / "checkpoints" / stage / "ckpt.pth", weights_only=True)
        assert state["epoch"] * length + state["step"] == iteration
    train_semi.main(["--config", str(killed)])
    for stage in ("warm_up", "main"):
        ours, theirs = (
            torch.load(config.parent / "checkpoints" / stage / "ckpt.pth", weights_only=True)
            for config in (killed, straight)
        )
        for key in ("model_state", "teacher1_state", "teacher2_state"):
            assert all(torch.equal(ours[key][name], tensor) for name, tensor in theirs[key].items())
        assert _equal(
            *([v["momentum_buffer"] for v in each["optimizer_state"]["state"].values()] for each in (ours, theirs))
        )
        assert ours["best"] == theirs["best"] and list(ours["best"]) == ["mean", "student", "teacher1", "teacher2"]
        rows = [(config.parent / "log" / stage / "metrics.csv").read_text() for config in (killed, straight)]
        assert rows[0] == rows[1] and "miou_mean" in rows[0] and "miou_teacher2" in rows[0]
    assert taken[1:] == [(killed.parent / "checkpoints" / "warm_up" / "ckpt.pth", "student")]
    main = yaml.safe_load((straight.parent / "log" / "main" / "config.yaml").read_text())
    assert main["trainer"]["epochs"] == 3 and main["psmt"]["warm_up"] == 2


def test_without_warm_up_there_is_one_stage(written: Callable[..., Path]) -> None:
    config = written(warm_up=0)
    train_semi.main(["--config", str(config), "--set", "trainer.epochs=1"])
    assert [path.name for path in (config.parent / "checkpoints").iterdir()] == ["main"]


def test_two_ranks_have_the_same_weights(written: Callable[..., Path], tmp_path: Path) -> None:
    """All three networks, parameters and statistics, after both stages."""
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import torch
        import train_semi
        from imas import distributed
        from imas.engine import fit
        evaluation = fit.Evaluation.__call__
        def evaluate(self, networks, stop=None):
            states = {{name: network.state_dict() for name, network in networks.items()}}
            stage = self.config.stage
            torch.save(states, f"{{sys.argv[1]}}.{{stage}}.{{distributed.rank()}}")
            return evaluation(self, networks, stop)
        fit.Evaluation.__call__ = evaluate
        settings = ["--set", "trainer.epochs=2", "--set", "dataset.train.batch_size=2"]
        train_semi.main(["--config", sys.argv[2], *settings])
        """)
    )
    ended = run_ranks(script, tmp_path / "weights", written())
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr
    for stage in ("warm_up", "main"):
        ours, theirs = (torch.load(tmp_path / f"weights.{stage}.{rank}", weights_only=True) for rank in (0, 1))
        assert ours.keys() == {"mean", "student", "teacher1", "teacher2"}
        for name, state in ours.items():
            assert all(torch.equal(tensor, theirs[name][key]) for key, tensor in state.items()), (stage, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.train.strong_aug=null"], "dataset.train.strong_aug: missing; psmt trains on strong views"),
        (["dataset.train.batch_size=1"], "expected at least 2, got 1"),
        (["psmt.assist=7"], "psmt.assist: expected at most the 4 classes, got 7"),
        (["psmt.assist=0"], "psmt.assist"),
        (["trainer.tf32=true"], "cannot be combined with psmt.vat"),
        (["psmt.vat.xi=0"], "psmt.vat.xi: expected a number above 0"),
        (["psmt.cutmix=circle"], "expected box or three_boxes"),
        (["psmt.vat.on=false"], "unknown key"),
    ],
)
def test_bad_input_is_one_clear_sentence(written: Callable[..., Path], words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config(written(), words)
    load_config(written(), ["trainer.tf32=true", "psmt.vat.enabled=false"])


def test_checkpointed_encoders_give_the_same_step() -> None:
    """Two passes of the student, teachers without a gradient and T-VAT's inner one: bitwise the same."""
    results = []
    for recompute in (False, True):
        method = _method()
        for network in method.networks().values():
            network.encoder.recompute = recompute
        method(*batch_for(PSMT.wants(method.options)), progress(3, 15)).loss.backward()
        gradients = [parameter.grad for parameter in method.student.parameters()]
        results.append([*gradients, *method.buffers()])
    assert _equal(*results)
