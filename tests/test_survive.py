"""Interruptions of every kind: the run is the same run. And several processes: the same numbers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, TINY, Forked, meeting, run, run_ranks, start

import train_semi
from benchmarks import survive
from imas import distributed, load_config
from imas.build import build_method
from imas.data.dataset import Draw
from imas.data.lists import read_lists
from imas.data.loaders import TrainingData
from imas.engine import checkpoint, fit, lock, provenance
from imas.engine.interrupt import Interrupted, Interruption, interruptible
from imas.engine.run import resume
from imas.errors import UserError

Experiment = Callable[..., Path]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
LONG = TINY["dataset"] | {"train": TINY["dataset"]["train"] | {"epoch_size": 80}}  # 20 iterations an epoch


def _state(config: Path, name: str = "ckpt.pth") -> dict:
    return torch.load(config.parent / "checkpoints" / name, weights_only=True)


def _wait_for(text: str, path: Path, process: subprocess.Popen) -> None:
    """Until the text is in the file."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{text!r} did not come: {process.communicate()[1] if process.poll() is not None else ''}")


def _ranks(launcher: subprocess.Popen) -> list[int]:
    """Processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def _same_end(one: Path, two: Path) -> None:
    total, different, files = survive.differing(one.parent, two.parent)
    assert total > 50 and different == 0 and files == []


def test_a_signal_saves_within_an_epoch_and_the_run_goes_on(experiment: Experiment) -> None:
    """The iteration ends, the checkpoint is of the middle of an epoch, status 75; the end is the straight run's."""
    straight, stopped = experiment("straight", dataset=LONG), experiment("stopped", dataset=LONG)
    assert run("train_semi.py", "--config", straight).returncode == 0
    process = start("train_semi.py", "--config", stopped)
    _wait_for("epoch 0: teacher", stopped.parent / "log" / "train.log", process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75, err
    assert "and saved; the same command with --resume auto goes on" in err
    assert _state(stopped)["epoch"] == 1 and 0 <= _state(stopped)["step"] < 20
    resumed = run("train_semi.py", "--config", stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch 0" in resumed.stdout
    _same_end(straight, stopped)


def _seen(config: Path, stops_before: int | None = None, *words: str) -> list[tuple]:
    """What each update of a run gets to see: indices of unlabeled images, and sums over the labeled views."""
    seen, update = [], fit._update

    def noted(run, wrapped, normalise, batches, iteration):
        for batch in batches:
            ids = batch["unlabeled"]["index"].tolist() if "unlabeled" in batch else []
            seen.append((iteration, ids, batch["labeled"]["image"].long().sum(dim=(1, 2, 3)).tolist()))
        return update(run, wrapped, normalise, batches, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_update", noted)
        if stops_before is not None:
            patch.setattr(Interruption, "stops_before", lambda self, iteration: iteration == stops_before)
        with pytest.raises(Interrupted) if stops_before is not None else contextlib.nullcontext():
            train_semi.main(["--config", str(config), "--set", "trainer.epochs=4", *words])
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple]]:
    """A run of four epochs of four updates that was left alone, and what it has seen."""
    path = tmp_path_factory.mktemp("seen") / "config.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path, _seen(path)


@pytest.mark.parametrize(("stop", "where"), [(6, (1, 2)), (8, (1, 4)), (9, (2, 1))], ids=["middle", "end", "after"])
def test_a_run_stopped_in_its_second_epoch_sees_the_same_images(
    experiment: Experiment, seen: tuple[Path, list[tuple]], stop: int, where: tuple[int, int]
) -> None:
    """In the middle of it, between its last update and its end, and just after; then two more epochs, on workers."""
    straight, everything = seen
    stopped = experiment("stopped")
    before = _seen(stopped, stop)
    assert (_state(stopped)["epoch"], _state(stopped)["step"]) == where
    assert before + _seen(stopped, None, "--set", "dataset.workers=2") == everything
    assert len(everything) == 16 and all(len(ids) == 4 for _, ids, _ in everything[4:])
    ours, theirs = (_state(config) for config in (stopped, straight))
    assert all(torch.equal(ours["model_state"][name], tensor) for name, tensor in theirs["model_state"].items())
    for name in ("metrics.csv", "scores.csv"):
        assert (stopped.parent / "log" / name).read_text() == (straight.parent / "log" / name).read_text()


def test_three_kills_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short form of ``python -m benchmarks.survive``."""

    def launch(folder: Path, processes: int, settings: dict) -> Forked:
        folder.mkdir(exist_ok=True)
        shutil.copy(survive.BASE, folder / "config.yaml")
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        process = start("train_semi.py", "--config", folder / "config.yaml", "--resume", "auto", *words)
        while os.getpgid(process.pid) != process.pid:  # it is killed with its group, which it has yet to make
            time.sleep(0.01)
        return process

    settings = survive.TINY | {"trainer.epochs": 5, "dataset.train.epoch_size": 120, "saver.save_every": 0.005}
    settings |= {"net.encoder.kwargs.width": 4, "net.decoder.kwargs.inner_planes": 8}
    monkeypatch.setattr(survive, "launch", launch)
    survive.finish(launch(tmp_path / "straight", 1, settings), tmp_path / "straight")
    counts = survive.killed_run(tmp_path / "killed", 1, 3, settings, random.Random(1), longest=1.5)
    assert counts["in training"] >= 1 and counts["torn"] == 0
    _same_end(tmp_path / "straight" / "config.yaml", tmp_path / "killed" / "config.yaml")


def test_torchrun_restarts_a_run_that_fails(experiment: Experiment) -> None:
    """A rank that is killed ends all; ``--max-restarts`` with auto-resume goes on by itself, bitwise."""
    straight, killed = experiment("straight", dataset=LONG), experiment("killed", dataset=LONG)
    assert [each.returncode for each in run_ranks("train_semi.py", "--config", straight)] == [0, 0]
    process = start("train_semi.py", "--config", killed, launcher=(*TORCHRUN, "--max_restarts=2"))
    _wait_for("epoch 0: teacher", killed.parent / "log" / "train.log", process)
    os.kill(_ranks(process)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "resumed after epoch 0" in out
    _same_end(straight, killed)


def test_another_number_of_processes_goes_on_from_an_epochs_end(experiment: Experiment) -> None:
    """And says that it is no longer the same run."""
    config = experiment(dataset=LONG)
    assert run("train_semi.py", "--config", config, "--set", "trainer.epochs=2").returncode == 0
    resumed, _ = run_ranks("train_semi.py", "--config", config, "--resume", config.parent / "checkpoints/ckpt.pth")
    assert resumed.returncode == 0, resumed.stderr
    assert "no longer bitwise the same run" in resumed.stdout and "epoch 2: teacher" in resumed.stdout


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("step", [1, 5, 9, 10])
def test_another_number_of_processes_within_an_epoch(
    experiment: Experiment, caplog: pytest.LogCaptureFixture, before: int, after: int, step: int
) -> None:
    """The images of the updates done are the first of the epoch's order, on any number of processes: the rest follows,
    without one that is left out, and with less than an update's seen twice."""
    config = load_config(experiment(dataset=LONG))
    lists = read_lists(config)

    def draws(world: int, start: int) -> list[Draw]:
        samplers = [TrainingData(config, lists, 0, rank, world).labeled_sampler for rank in range(world)]
        for sampler in samplers:
            sampler.epoch, sampler.start = 1, start
        return [draw for updates in zip(*samplers) for update in updates for draw in update]

    step = step * 2 // before  # of 20 or 10 updates
    seen = draws(before, 0)[: step * 4 * before]
    description = provenance.describe(config, lists, 0, before)
    state = {
        "config": config.to_dict(), "run": description, "epoch": 1, "step": step, "best": None,
        "iterations_per_epoch": 20 // before, "partial": {"metrics": [], "scores": [[]] * before},
    }  # fmt: skip
    run = SimpleNamespace(
        config=config, description=description, data=range(20 // after), seed=0, device="cpu", meter=SimpleNamespace(),
        method=None, optimizer=None,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_or_previous", lambda path: (state, path))
        patch.setattr(checkpoint, "resume", lambda *_: None)
        patch.setattr(distributed, "world_size", lambda: after)
        caplog.set_level(logging.INFO, "imas")
        logging.getLogger("imas").propagate = True
        resume(run, Path("ckpt.pth"), by_hand=False)
    rest = draws(after, run.step)
    again = len(seen) + len(rest) - 80
    assert 0 <= again < 4 * after and set(seen) | set(rest) == set(draws(1, 0))
    assert f"of the {len(seen)} images seen the last {again} are seen again" in caplog.text


def test_no_rank_ends_before_rank_0_has_saved(experiment: Experiment, tmp_path: Path) -> None:
    """Launchers kill the others some seconds after the first that ends."""
    config, script = experiment(), tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(f"""
        import pathlib, sys, time; sys.path.insert(0, {str(ROOT)!r})
        import torch, train_semi
        from imas.engine.interrupt import Interruption
        from imas.errors import run_script
        save = torch.save
        torch.save = lambda *arguments: time.sleep(2) or save(*arguments)
        Interruption.asked = Interruption.stops_before = lambda self, iteration: iteration > 0
        try:
            run_script(train_semi.main)
        finally:
            print("saved" if pathlib.Path({str(config.parent / "checkpoints" / "ckpt.pth")!r}).is_file() else "not yet")
        """)
    )
    ended = run_ranks(script, "--config", config)
    assert [each.returncode for each in ended] == [75, 75], ended
    assert [each.stdout.split()[-1] for each in ended] == ["saved", "saved"]


# What makes the ranks one run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seed", "1"), "seed: 0 (rank 0 on {host}) / 1 (rank 1 on {host})"),
        (
            ("--set", "trainer.optimizer.kwargs.lr=0.5"),
            "trainer.optimizer.kwargs.lr: 0.02 (rank 0 on {host}) / 0.5 (rank 1",
        ),
        (("--set", "dataset.shapes.unlabeled=12"), "dataset.shapes.unlabeled: 16 (rank 0 on {host}) / 12 (rank 1"),
        (("--out", "elsewhere"), "run folder: "),
    ],
)
def test_ranks_of_two_runs_do_not_train_together(
    experiment: Experiment, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    config, folder = experiment(), tmp_path / "elsewhere"
    words = tuple(str(folder) if word == "elsewhere" else word for word in words)
    ended = run_ranks("train_semi.py", "--config", config, of_rank_1=words)
    assert [each.returncode for each in ended] == [2, 2]
    for rank, each in enumerate(ended):
        assert f"error: rank {rank} on {socket.gethostname()}: the ranks differ, so nothing is trained: " in each.stderr
        assert says.format(host=socket.gethostname()) in each.stderr and "Traceback" not in each.stderr
    assert not (config.parent / "log").exists() and not folder.exists()


def test_ranks_that_resume_from_different_states_do_not_train(experiment: Experiment, tmp_path: Path) -> None:
    """As where nodes do not share the folder, or see an old listing of it: rank 1 finds no checkpoint."""
    config = experiment()
    assert run("train_semi.py", "--config", config, "--set", "trainer.epochs=2").returncode == 0
    script = tmp_path / "blind.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys; sys.path.insert(0, {str(ROOT)!r})
        import train_semi
        from imas.engine import checkpoint
        from imas.errors import run_script
        if os.environ["RANK"] == "1":
            checkpoint.find_checkpoint = lambda folder, resume: None
        run_script(train_semi.main)
        """)
    )
    ended = run_ranks(script, "--config", config, "--resume", config.parent / "checkpoints/ckpt.pth")
    host = socket.gethostname()
    assert [each.returncode for each in ended] == [2, 2]
    assert f"checkpoint: ckpt.pth (rank 0 on {host}) / none (rank 1 on {host})" in ended[0].stderr


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(experiment: Experiment, tmp_path: Path) -> None:
    script = tmp_path / "nan.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys; sys.path.insert(0, {str(ROOT)!r})
        import train_semi
        from imas.engine import fit
        from imas.errors import run_script
        update = fit._update
        def broken(run, wrapped, normalise, batches, iteration):
            scalars = update(run, wrapped, normalise, batches, iteration)
            if os.environ["RANK"] == "1" and iteration == 6:
                scalars["loss_lb"] = scalars["loss_lb"] * float("nan")
            return scalars
        fit._update = broken
        run_script(train_semi.main)
        """)
    )
    ended = run_ranks(script, "--config", experiment(dataset=LONG))
    assert [each.returncode for each in ended] == [1, 1]
    for rank, each in enumerate(ended):
        start = f"error: rank {rank} on {socket.gethostname()}: iteration 6: loss_lb = nan on rank 1 (all: "
        assert start in each.stderr, each.stderr


def test_a_rank_that_comes_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two runs have one address: no rank of one trains with a rank of the other."""
    monkeypatch.setattr(distributed, "_store", torch.distributed.FileStore(str(tmp_path / "store"), 2))
    distributed._come_once(1)
    distributed._come_once(0)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(UserError, match=r"rank 1 is here already \(.*, pid .*\): another run uses this address"):
        distributed._come_once(1)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    logging.getLogger("imas").propagate = True
    lock.hold(tmp_path).close()
    assert f"this file system has no locks ({os.strerror(number)})" in caplog.text
    monkeypatch.setattr(fcntl, "lockf", lambda *_: refuse_held())
    with pytest.raises(UserError, match="in use by another live run"):
        lock.hold(tmp_path)


def refuse_held() -> None:
    raise OSError(errno.EAGAIN, "")


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1; under torchrun, too few GPUs are refused."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "3")
    with distributed.process_group() as device:
        assert device == torch.device("cuda", 0) and taken == [device]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match=r"local rank 3, but .* has 1 GPU\(s\)"), distributed.process_group():
        pass


@pytest.mark.parametrize("sign", ["CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "device"])
def test_cuda_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    def old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", old)
    monkeypatch.setattr(distributed, "_NVIDIA", tmp_path)
    for name in ("WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with distributed.process_group() as device:
        assert device == torch.device("cpu")  # a machine without a GPU
    if sign == "device":
        (tmp_path / "nvidia0").touch()
    else:
        monkeypatch.setenv(sign, "2")
    with pytest.raises(UserError, match="there is a GPU .* cannot use it: The NVIDIA driver on your system is too old"):
        with distributed.process_group():
            pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with distributed.process_group() as device:
        assert device == torch.device("cpu")


def test_one_image_a_batch_is_refused(experiment: Experiment) -> None:
    with pytest.raises(UserError, match="batch_size: 1, but BatchNorm cannot train on one image"):
        train_semi.main(["--config", str(experiment()), "--set", "dataset.train.batch_size=1"])


def test_a_stop_within_an_evaluation_is_saved(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """All updates of the epoch are done, its end is not: it follows when the run goes on."""
    straight, stopped = experiment("straight"), experiment("stopped")
    train_semi.main(["--config", str(straight)])
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asked", lambda self, iteration: iteration == 8)
        patch.setattr(Interruption, "stops_before", lambda self, iteration: False)
        with pytest.raises(Interrupted, match="stopped in an evaluation and saved"):
            train_semi.main(["--config", str(stopped)])
    assert (_state(stopped)["epoch"], _state(stopped)["step"]) == (1, 4)
    train_semi.main(["--config", str(stopped)])
    for name in ("metrics.csv", "scores.csv"):
        assert (stopped.parent / "log" / name).read_text() == (straight.parent / "log" / name).read_text()


def test_a_torn_or_foreign_file_is_named_and_the_one_before_it_used(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = experiment()
    train_semi.main(["--config", str(config), "--set", "trainer.epochs=2"])
    assert _state(config, "ckpt_prev.pth")["epoch"] == 1
    folder, whole = config.parent / "checkpoints", tmp_path / "whole"
    path = folder / "ckpt.pth"
    shutil.copytree(folder, whole)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pth")
    for content in (b"", path.read_bytes()[:5000], (tmp_path / "foreign.pth").read_bytes()):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        path.write_bytes(content)
        capsys.readouterr()
        train_semi.main(["--config", str(config), "--resume", str(path)])
        told = capsys.readouterr().out
        assert f"{path}: " in told and f"using the one before it: {folder / 'ckpt_prev.pth'}" in told
        assert "resumed after epoch 0" in told and _state(config)["epoch"] == 3
    for name in ("ckpt.pth", "ckpt_prev.pth"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match="the file is empty"):
        train_semi.main(["--config", str(config)])


def test_killed_between_two_renames_the_previous_checkpoint_counts(tmp_path: Path) -> None:
    (tmp_path / "ckpt_prev.pth").touch()
    assert checkpoint.find_checkpoint(tmp_path, "auto") == tmp_path / "ckpt_prev.pth"
    (tmp_path / "ckpt.pth").touch()
    assert checkpoint.find_checkpoint(tmp_path, "auto") == tmp_path / "ckpt.pth"


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(experiment: Experiment) -> None:
    """A real limit of the system: no file of this process may grow beyond half a checkpoint."""
    config = experiment()
    assert run("train_semi.py", "--config", config, "--set", "trainer.epochs=2").returncode == 0
    path = config.parent / "checkpoints" / "ckpt.pth"
    before, limit = path.read_bytes(), path.stat().st_size // 2

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = subprocess.run(
        [sys.executable, "train_semi.py", "--config", config, "--set", "saver.use_tb=false", "--resume", path],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limited,
    )  # fmt: skip
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "cannot be written" in ended.stderr and "last good checkpoint stays" in ended.stderr
    assert path.read_bytes() == before and not list(path.parent.glob("*.tmp"))


def test_space_is_looked_at_before_the_start(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    method = build_method(load_config(experiment()), pretrained=False)
    with pytest.raises(UserError, match="0.0 GB are free, but the checkpoints of this run need"):
        checkpoint.need_space(Path("/nowhere/at/all"), method, 1)


def test_a_folder_in_use_is_refused_with_host_and_pid(experiment: Experiment) -> None:
    config = experiment()
    (config.parent / "log").mkdir()
    script = (
        "import sys, time; from imas.engine import lock; from pathlib import Path; "
        "held = lock.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, config.parent / "log"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    refused = run("train_semi.py", "--config", config)
    assert refused.returncode == 2 and f"{socket.gethostname()}, pid {holder.pid}" in refused.stderr
    assert not (config.parent / "checkpoints").exists() and not (config.parent / "log" / "train.log").exists()
    holder.kill()
    holder.wait()
    lock.hold(config.parent / "log").close()


# Several processes


def test_slurm_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    batch_step = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "71234"}
    for name, value in batch_step.items():
        monkeypatch.setenv(name, value)
    distributed.read_launcher()
    assert "RANK" not in os.environ  # a plain process of a batch script: one process
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "localhost,gpu9",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    distributed.read_launcher()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "localhost", "31234"]
    monkeypatch.setenv("RANK", "0")  # of torchrun inside srun
    distributed.read_launcher()
    assert os.environ["RANK"] == "0"
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "no-such-node.invalid")
    distributed.read_launcher()  # an address that is set is taken
    assert os.environ["MASTER_ADDR"] == "localhost"
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="the node no-such-node.invalid has no address on .*; set MASTER_ADDR"):
        distributed.read_launcher()


def test_srun_starts_two_processes(experiment: Experiment) -> None:
    """The variables of two tasks, set by hand: one run on two processes."""
    config = experiment()
    port = meeting()["MASTER_PORT"]
    tasks = [
        start(
            "train_semi.py", "--config", config, "--set", "trainer.epochs=2",
            SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_JOB_ID="1",
            SLURM_STEP_NODELIST="localhost", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "batch 4 on 2 process(es)" in outputs[0][0]


def test_a_port_in_use_and_a_rank_that_never_comes_are_explained(tmp_path: Path) -> None:
    script = tmp_path / "join.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from datetime import timedelta
        from imas import distributed
        from imas.errors import run_script
        distributed._PATIENCE = timedelta(seconds=2)
        def main():
            with distributed.process_group():
                pass
        run_script(main)
        """)
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        used = start(script, MASTER_PORT=str(taken.getsockname()[1]), **environment)
        _, err = used.communicate(timeout=60)
        assert used.returncode == 2 and "that port is in use" in err and "Traceback" not in err
        port = taken.getsockname()[1]
    alone = start(script, MASTER_PORT=str(port), **environment)
    _, err = alone.communicate(timeout=60)
    assert alone.returncode == 2 and "did all 2 ranks start" in err and "Traceback" not in err


def test_ranks_with_other_versions_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "versions.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys; sys.path.insert(0, {str(ROOT)!r})
        import torch
        from imas import distributed
        from imas.errors import run_script
        if os.environ["RANK"] == "1":
            torch.__version__ = "1.0"
        def main():
            with distributed.process_group():
                pass
        run_script(main)
        """)
    )
    ended, _ = run_ranks(script)
    assert ended.returncode == 2
    assert "the ranks differ, so nothing is trained: torch: " in ended.stderr and "1.0 (rank 1 on " in ended.stderr


def test_two_ranks_have_the_gradients_of_one_process_with_twice_the_batch(tmp_path: Path) -> None:
    """With frozen BatchNorm, and as many valid pixels on both ranks; accumulation on both adds nothing of its own."""
    script = tmp_path / "gradients.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys; sys.path.insert(0, {str(ROOT)!r})
        import torch
        from imas import build_model, distributed
        from imas.methods.base import Labeled, Progress
        from imas.methods.sup_only import Options, SupOnly
        from imas.ops.losses import cross_entropy
        torch.manual_seed(0)
        net = {TINY["net"]!r}
        supervised = lambda coarse, aux, label: cross_entropy(coarse, label)
        method = SupOnly(Options(), lambda: build_model(net), supervised).eval()
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 4, (8, 32, 32))
        with distributed.process_group() as device:
            wrapped = distributed.wrap(method, device, False)
            world, parts = distributed.world_size(), int(sys.argv[1])
            mine = slice(distributed.rank() * 8 // world, (distributed.rank() + 1) * 8 // world)
            chunks = list(zip(images[mine].chunk(parts), labels[mine].chunk(parts)))
            for number, (x, y) in enumerate(chunks):
                with distributed.gradients_shared(wrapped, number + 1 == parts):
                    (wrapped(Labeled(x, y), None, Progress(0, 1, 0, 1, torch.Generator())).loss / parts).backward()
            gradients = {{name: p.grad for name, p in method.named_parameters() if p.grad is not None}}
            torch.save(gradients, sys.argv[2] + str(distributed.rank()))
        """)
    )
    files = {name: tmp_path / name for name in ("one", "two", "parts")}
    assert run(script, "1", files["one"]).returncode == 0
    for parts, name in (("1", "two"), ("2", "parts")):
        assert [each.returncode for each in run_ranks(script, parts, files[name])] == [0, 0]
    expected = torch.load(f"{files['one']}0")
    assert len(expected) > 20
    for name in ("two", "parts"):
        for rank in (0, 1):
            got = torch.load(f"{files[name]}{rank}")
            assert all(torch.allclose(got[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies within some seconds are one request; a later one acts as it always does."""
    always: list[int] = []
    before = signal.signal(number, lambda *_: always.append(1))
    try:
        with interruptible() as interruption:
            assert not interruption.stops_before(3)
            for _ in range(3):
                os.kill(os.getpid(), number)
            assert interruption.received == number and interruption.stops_before(4) and not always
            later = time.monotonic() + 6
            monkeypatch.setattr(time, "monotonic", lambda: later)
            os.kill(os.getpid(), number)
            assert always == [1]
        os.kill(os.getpid(), number)
        assert always == [1, 1]
        with pytest.raises(Interrupted):
            _saved_after(number)
        assert signal.getsignal(number) == signal.SIG_IGN  # until the process has ended with its own status
    finally:
        signal.signal(number, before)


def _saved_after(number: signal.Signals) -> None:
    with interruptible():
        os.kill(os.getpid(), number)
        raise Interrupted("here")


def test_nohup_keeps_its_meaning() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
