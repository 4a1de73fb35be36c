"""What README.md and docs/ say: commands run, files exist, examples work, quoted messages are ours."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, run
from PIL import Image

import imas
from benchmarks import picture, shapes
from imas import load_config
from imas.__main__ import COMMANDS as LISTED
from imas.data.lists import read_lists
from imas.errors import UserError
from imas.methods import METHODS

EXPS = (ROOT / "exps" / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("exps", "data/splits", "pretrained", "benchmarks")]

# Commands of the pages that are not run here as they stand, nor marked "needs data", "needs GPUs", "needs internet"
# or "needs an hour": the test that runs them in a smaller form.
PAGE_OF_METHOD = "test_add_a_method.py::test_the_worked_example"
ELSEWHERE = {
    "python train_semi.py --config exps/shapes_mean_teacher/config.yaml": PAGE_OF_METHOD,
    "sh tests/run.sh": "test_readme.py::test_ci_runs_the_test_command",
    "tensorboard --logdir exps": "test_scripts.py::test_train_then_evaluate",
    "python -m imas.export exps/shapes_imas/checkpoints/ckpt_best.pth shapes.pt2": (
        "test_library.py::test_the_examples_of_the_page"
    ),
    "python -m benchmarks.shapes": "test_readme.py::test_the_benchmark_of_the_embedded_set",
    "python -m benchmarks.published": "test_compare.py::test_the_audit_of_published_runs_is_that_of_the_page",
    "python -m imas.compare --configs exps/shapes_sup/config.yaml exps/shapes_imas/config.yaml --seeds 1 2 3 "
    "--out runs/shapes --baseline sup_only": "test_compare.py::test_runs_are_trained_interrupted_and_not_repeated",
    "python -m imas.compare --out runs/shapes --baseline sup_only --report-only": (
        "test_compare.py::test_tables_of_stored_runs"
    ),
    "python -m benchmarks.survive": "test_survive.py::test_three_kills_on_one_process",
    "python -m benchmarks.step --recipe tiny": "test_precision.py::test_our_step_is_the_plain_twins",
    "mkdir -p data/splits/pets": "test_add_a_dataset.py::test_the_data_set_of_the_page_is_split_checked_and_trained",
    "python -m pytest tests/test_methods.py tests/test_structure.py": PAGE_OF_METHOD,
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """A command line of a page, without its comment."""

    page: str
    text: str
    marked: bool


def _blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found += [Block(str(page.relative_to(ROOT)), kind, text) for kind, text in fenced if kind == language]
    return found


def _commands() -> list[Command]:
    commands = []
    for block in _blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            text, _, comment = line.partition(" #")
            marked = re.search("needs (data|GPUs|internet|an hour)", comment) is not None
            commands.append(Command(block.page, " ".join(text.split()), marked))
    return commands


COMMANDS = _commands()
STUBS = {
    "python3": """case $1 in -) cat > /dev/null ;; -c) echo 0 ;; *) echo "$*" >> "$STARTED" ;; esac""",
    "srun": 'while [ "${1#-}" != "$1" ] || [ "$1" = 4 ]; do shift; done; SLURM_STEP_NUM_TASKS=4 exec "$@"',
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's scripts with small experiments: those that are shipped, and own data as the README describes it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("single_run.sh", "env.sh", "requirements.txt", "train_semi.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    (own,) = (block.text for block in _blocks("yaml") if block.page == "README.md")
    (folder / "mine.yaml").write_text(own)
    assert load_config(folder / "mine.yaml").dataset.folder.class_names == ("ground", "road", "roof")
    mine = yaml.safe_load(own)
    mine["imas"]["sup_only_epoch"] = 0
    mine["dataset"]["train"] |= {"batch_size": 2, "epoch_size": 8, "crop": {"size": 32}, "resize_base_size": 40}
    mine["dataset"]["workers"], mine["trainer"]["epochs"] = 0, 2
    mine["net"] = TINY["net"] | {"num_classes": 3}
    sup = TINY | {"trainer": {"epochs": 2, "optimizer": {"kwargs": {"lr": 0.02}}}}
    sup["dataset"] = sup["dataset"] | {"train": {"batch_size": 2}}
    for path in (ROOT / "exps").glob("*/config.yaml"):
        (folder / "exps" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, folder / "exps" / path.parent.name)
    small = TINY | {"trainer": TINY["trainer"] | {"epochs": 2}}
    for name, content in {"shapes_imas": small, "shapes_sup": sup, "mine": mine}.items():
        (folder / "exps" / name).mkdir(exist_ok=True)
        (folder / "exps" / name / "config.yaml").write_text(yaml.safe_dump(content))
    noise = np.random.default_rng(0)
    for number in range(40):
        files = {"images": (48, 56, 3), "masks": (48, 56)}
        for kind, shape in files.items() if number < 32 else [("images", files["images"])]:
            (folder / "data/mine" / kind).mkdir(parents=True, exist_ok=True)
            pixels = noise.integers(0, 3 if kind == "masks" else 256, shape).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data/mine" / kind / f"{number:02d}.png")
    (folder / "stubs").mkdir()
    for name, script in STUBS.items():
        (folder / "stubs" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "stubs" / name).chmod(0o755)
    return folder


def _started(command: str, project: Path) -> list[list[str]]:
    """The Python commands that a line comes down to: a shell runs it with an interpreter that only notes them."""
    if command.startswith("python "):
        return [shlex.split(command)[1:]]
    notes = project / "started.txt"
    notes.unlink(missing_ok=True)
    environment = {"PATH": f"{project / 'stubs'}:/usr/bin:/bin", "STARTED": str(notes)}
    ended = subprocess.run(["sh", "-c", command], cwd=project, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}\n{ended.stderr}"
    return [shlex.split(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def test_every_command_is_tested_or_marked(project: Path) -> None:
    """As it stands, in the order of the pages, on small data."""
    ran = set()
    for command in COMMANDS:
        if command.marked or command.text in ELSEWHERE or command.text in ran:
            continue
        ran.add(command.text)
        for words in _started(command.text, project):
            if words[:2] == ["-m", "torch.distributed.run"]:  # what it starts is enough here
                words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
            ended = run(*words, folder=project)
            assert ended.returncode == 0, f"{command.page}: {command.text}\n{ended.stdout}\n{ended.stderr}"
    assert len(ran) > 10


def test_commands_that_are_tested_elsewhere_exist() -> None:
    assert ELSEWHERE.keys() <= {command.text for command in COMMANDS}
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text)
def test_every_command_has_words_that_are_known(command: Command, project: Path) -> None:
    """Also of the commands that need data or GPUs."""
    parsers = {"train_semi.py": "train_semi", "eval.py": "eval", "imas.data": "imas.data.__main__"}
    parsers |= {"imas.compare": "imas.compare.__main__", "imas.export": "imas.export"}
    made = {
        "exps/pets_sup230/config.yaml",
        "exps/seed1/config.yaml",
        "exps/shapes_mean_teacher/config.yaml",
    }  # by the page itself
    text = command.text.replace("exps/.../", "exps/shapes_imas/")
    for words in _started(text, project) if "single_run.sh" in text else [shlex.split(text)]:
        for name in parsers.keys() & set(words):
            options = importlib.import_module(parsers[name]).parse(words[words.index(name) + 1 :])
            config = getattr(options, "config", None)
            known = config is None or (project / config).is_file() or "/".join(config.parts[-3:]) in made
            assert known, config


def test_single_run_counts_gpus_and_nodes(project: Path) -> None:
    script = "sh single_run.sh exps/mine/config.yaml --seed 3"
    plain = "train_semi.py --config exps/mine/config.yaml --seed 3"
    run_on = "-m torch.distributed.run"
    nodes = "NNODES={} RDZV_ENDPOINT=a:1 RDZV_ID=x NGPU=8"
    meeting = "--rdzv_backend=c10d --rdzv_endpoint=a:1 --rdzv_id=x --nproc_per_node=8"
    cases = {
        script: plain,
        f"NGPU=1 {script}": plain,
        f"NGPU=4 {script}": f"{run_on} --standalone --nproc_per_node=4 --max_restarts=0 {plain}",
        f"RESTARTS=3 {script}": f"{run_on} --standalone --nproc_per_node=1 --max_restarts=3 train_semi.py "
        "--config exps/mine/config.yaml --resume auto --seed 3",
        f"{nodes.format('2')} {script}": f"{run_on} --nnodes=2 {meeting} --max_restarts=0 {plain}",
        f"{nodes.format('1:2')} {script}": f"{run_on} --nnodes=1:2 {meeting} --max_restarts=0 {plain}",
        f"{nodes.format('2')} srun -n 4 {script}": f"{run_on} --nnodes=2 {meeting} --max_restarts=0 {plain}",
        f"srun --ntasks-per-node=4 {script}": plain,
    }
    for command, expected in cases.items():
        assert _started(command, project) == [expected.split()], command


def test_runs_of_other_words_or_jobs_do_not_meet(project: Path) -> None:
    words = "NNODES=2 NGPU=1 RDZV_ENDPOINT=a:1 sh single_run.sh exps/mine/config.yaml"
    commands = (f"{words} --seed 1", f"{words} --seed 2", f"SLURM_JOB_ID=7 {words} --seed 1", f"{words} --seed 1")
    one, two, three, again = (
        next(word for word in _started(command, project)[0] if word.startswith("--rdzv_id=")) for command in commands
    )
    assert len({one, two, three}) == 3 and one == again


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("NGPU=abc", "NGPU=abc: expected a whole number from 1 on"),
        ("NGPU=0", "NGPU=0: expected a whole number from 1 on"),
        ("RESTARTS=-1", "RESTARTS=-1: expected a whole number from 0 on"),
        ("NNODES=two", "NNODES=two: expected a whole number from 1 on"),
        ("NNODES=1:", "NNODES=: expected a whole number from 2 on"),
        ("NNODES=2", "NNODES=2 needs RDZV_ENDPOINT=host:port, the same on every node"),
    ],
)
def test_single_run_refuses_wrong_values(project: Path, settings: str, says: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        _started(f"{settings} sh single_run.sh exps/mine/config.yaml", project)


def test_paths_after_single_run_are_the_callers(project: Path, tmp_path: Path) -> None:
    """Called from another folder: the YAML from there, else of the project; --out and --resume always from there."""
    (tmp_path / "own.yaml").touch()
    called = f"cd {tmp_path} && sh {project}/single_run.sh"
    cases = {
        f"{called} own.yaml --out runs --seed 3": f"{tmp_path}/own.yaml --out {tmp_path}/runs --seed 3",
        f"{called} own.yaml --out=runs --seed 3": f"{tmp_path}/own.yaml --out={tmp_path}/runs --seed 3",
        f"{called} {tmp_path}/own.yaml --out /runs --resume auto": f"{tmp_path}/own.yaml --out /runs --resume auto",
        f"{called} exps/mine/config.yaml --resume a.pth": f"exps/mine/config.yaml --resume {tmp_path}/a.pth",
        f"{called} own.yaml --set dataset.cache=true": f"{tmp_path}/own.yaml --set dataset.cache=true",
    }
    for command, expected in cases.items():
        assert _started(command, project) == [f"train_semi.py --config {expected}".split()], command


def test_two_first_starts_set_up_once(tmp_path: Path) -> None:
    """An interpreter that lacks the packages, until the stub of pip has taken its time."""
    (tmp_path / "stubs").mkdir()
    stub = tmp_path / "stubs" / "python3"
    stub.write_text(
        f"""#!/bin/sh
case "$1 $2" in
"- requirements.txt") cat > /dev/null; case $0 in *.venv*) [ -e satisfied ] ;; *) exit 1 ;; esac ;;
"-c "*) case $2 in *fcntl*) exec {sys.executable} "$@" ;; esac ;;
"-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
"-m pip") echo pip >> pips; sleep 0.5; touch satisfied ;;
esac
"""
    )
    stub.chmod(0o755)
    shutil.copy(ROOT / "env.sh", tmp_path)
    environment = {"PATH": f"{tmp_path / 'stubs'}:/usr/bin:/bin"}
    starts = [
        subprocess.Popen(
            ["sh", "-ec", ". ./env.sh; echo $PYTHON"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for each in starts:
        out, _ = each.communicate(timeout=20)
        assert each.returncode == 0 and out.decode().splitlines()[-1] == f"{tmp_path}/.venv/bin/python"
    assert (tmp_path / "pips").read_text() == "pip\n"


def test_ci_runs_the_test_command() -> None:
    assert "\nsh tests/run.sh\n" in (ROOT / ".ci" / "run").read_text()


def test_the_benchmark_of_the_embedded_set(tmp_path: Path, monkeypatch) -> None:
    """Every arm loads, and the unlabeled images of the control are the labeled ones."""
    trained = []
    monkeypatch.setattr("imas.compare.__main__.train", lambda plans, *_: trained.extend(plans))
    with pytest.raises(UserError, match="no finished run"):
        shapes.main(["--out", str(tmp_path), "--seeds", "1", "3", "--jobs", "1"])
    assert [plan.seed for plan in trained] == [1] * 5 + [3] * 5
    assert all(plan.recipe["dataset"]["shapes"]["seed"] == plan.seed for plan in trained)
    control = next(plan.folder / "config.yaml" for plan in trained if plan.arm == "control")
    recipe = next(plan.recipe for plan in trained if plan.arm == "control")
    control.parent.mkdir(parents=True)
    control.write_text(yaml.safe_dump(recipe))
    lists = read_lists(load_config(control))
    assert lists.unlabeled == lists.labeled and len(lists.labeled) == recipe["dataset"]["shapes"]["labeled"]


def test_the_picture_is_drawn_from_a_run(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(TINY))
    assert run("train_semi.py", "--config", config).returncode == 0
    sheet = picture.draw(config)
    assert sheet.width > 1000 and sheet.height > 700 and len(sheet.getcolors(sheet.width * sheet.height)) > 1000
    assert load_config(ROOT / "exps/shapes_imas/config.yaml", picture.SETTINGS).trainer.epochs == 90
    assert (ROOT / "docs/overview.png").stat().st_size < 200_000


@pytest.mark.parametrize(
    "block",
    [each for each in _blocks("python") if not each.text.startswith("# imas/") and each.page != "docs/library.md"],
    ids=lambda block: block.page,
)
def test_examples_run(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(block.text)
    ended = run(script)
    assert ended.returncode == 0, ended.stderr
    assert "tensor([" in ended.stdout


def apply_page(page: str, copy: Path) -> set[str]:
    """Make the files that a page of docs shows, and apply its diffs, in a copy of the project. Returns the files."""
    touched = set()
    for kind in ("python", "yaml"):
        for text in (block.text for block in _blocks(kind) if block.page == page):
            name = text.split("\n", 1)[0].removeprefix("# ")
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text(text.split("\n", 1)[1])
            touched.add(name)
    for block in (block for block in _blocks("diff") if block.page == page):
        file, *lines = block.text.splitlines()
        source = (copy / file).read_text()
        hunks = re.findall(r"(?:^-.*\n)+(?:^\+.*\n?)+", "\n".join(lines), flags=re.MULTILINE)
        for hunk in hunks:
            old, new = ([line[1:] for line in hunk.splitlines() if line[0] == sign] for sign in "-+")
            assert source.count("\n".join(old)) == 1, f"{file}: {old}"
            source = source.replace("\n".join(old), "\n".join(new))
        (copy / file).write_text(source)
        touched.add(file)
    return touched


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def test_the_tree_names_every_file_once() -> None:
    (tree,) = re.findall(r"```\n(imas/ops.*?)```", (ROOT / "docs/house.md").read_text(), flags=re.DOTALL)
    lines = [line for line in tree.splitlines() if not line.startswith(" ")]
    named = [line.split()[0] for line in lines]
    assert all((ROOT / name).exists() for name in named)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
    folders = tuple(name for name in named if name.endswith("/"))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "imas").rglob("*.py") if path.name != "__init__.py"}
    files = [name for name in files if not name.startswith(folders)]
    assert sorted(name for name in named if name.startswith("imas/") and name not in folders) == sorted(files)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_readme_counts_the_published_rows_of_each_method() -> None:
    folders = re.findall(r"^\| `(\w+)` \|(?!.* inferred \|$)", EXPS, flags=re.MULTILINE)
    counts = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if len(cells := _cells(line)) == 5 and cells[3].isdecimal():
            counts[cells[0].strip("`")] = int(cells[3])
    words = {section: f"_{section.removesuffix('_only')}" for section in METHODS}
    assert counts == {section: sum(word in folder for folder in folders) for section, word in words.items()}


def test_published_figures_are_those_of_the_recipes() -> None:
    """The tables at a glance against the table with all of each run, cell by cell."""
    recipes = {}
    for line in EXPS.splitlines():
        cells = _cells(line)
        if len(cells) == 10 and cells[0].startswith("`") and cells[9] != "inferred":
            figure = cells[8] if "_sup" in cells[0] else cells[7]
            recipes[cells[0].strip("`")] = figure.split()[0]
    section = EXPS.split("## Published by the authors")[1].split("\n## ")[0]
    seen = {}
    for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
        head, _, *rows = map(_cells, table.splitlines())
        for title, *figures in rows:
            words = f"{head[0]}, {title}"
            dataset = "pascal" if "Pascal" in words else "cityscapes"
            method = "sup" if "SupOnly" in words else "imas"
            depth = re.search(r"ResNet-(\d+)", words)[1]
            stride = re.search(r"output stride (\d+)", words)[1]
            for labeled, figure in zip(head[1:], figures):
                if figure:
                    seen[f"{dataset}_{method}{labeled}_r{depth}_os{stride}"] = figure
    assert seen == recipes


def _templates(path: Path) -> list[str]:
    """Texts of a file, a NUL for what an f-string or a %-format fills in."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(re.sub(r"%[sd]|%\.\d+[fg]", "\0", node.value))
    return texts


def test_quoted_messages_are_ours() -> None:
    """The middle column of docs/troubleshooting.md: every quotation is a text of the code, with … for what varies."""
    files = [*(ROOT / "imas").rglob("*.py"), ROOT / "train_semi.py", ROOT / "eval.py"]
    texts = [text for path in files for text in _templates(path)]
    rows = [line.split("|") for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines()]
    quoted = [text for row in rows if len(row) == 5 for text in re.findall(r"`([^`]+)`", row[2])]
    assert len(quoted) > 30
    patterns = {text: re.compile(".*".join(map(re.escape, text.split("…"))), flags=re.DOTALL) for text in quoted}
    assert [text for text, pattern in patterns.items() if not any(map(pattern.search, texts))] == []


def test_python_m_imas_shows_versions_devices_and_commands() -> None:
    shown = run("-m", "imas")
    assert shown.returncode == 0, shown.stderr
    for words in (f"iMAS {imas.__version__}", "torch", "CPU, 1 threads", *LISTED):
        assert words in shown.stdout, words
    for command in LISTED:
        name = re.search(r"[\w./]+\.(?:py|sh)|-m ([\w.]+)", command)
        assert importlib.util.find_spec(name[1]) if name[1] else (ROOT / name[0]).is_file(), command


def test_citation_changelog_and_package_tell_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])
    assert citation["version"] == imas.__version__ and citation["license"] == "MIT"
    assert imas.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert paper["title"] in (ROOT / "README.md").read_text()


def test_the_spec_has_every_section_that_the_code_cites() -> None:
    text = (ROOT / "docs/spec.md").read_text()
    sections = {heading.lower() for heading in re.findall(r"^## (.*)$", text, flags=re.MULTILINE)}
    steps = set(re.findall(r"^(\d+)\. ", text, flags=re.MULTILINE))
    cited = []
    for path in (ROOT / "imas").rglob("*.py"):
        cited += re.findall(r"\bspec, ([^)`]*)", " ".join(path.read_text().split()))
    assert len(cited) > 20
    for words in (part.strip() for citation in cited for part in citation.split(";") if part.strip()):
        if words.startswith("step"):
            assert set(re.findall(r"\d+", words)) <= steps, words
        else:
            assert words.lower() in sections, words
