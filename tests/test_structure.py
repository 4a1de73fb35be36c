"""The house: imports run downwards, and the public names are there."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

import imas

ROOT = Path(imas.__file__).parents[1]

# room → what it may import of ours
ALLOWED = {
    "imas/__main__.py": {"__version__", "distributed", "engine.provenance"},
    "imas/strict.py": set(),
    "imas/files.py": set(),
    "imas/distributed.py": {"strict"},
    "imas/schema.py": {"strict"},
    "imas/config.py": {"schema", "strict", "data.catalog"},
    "imas/ops": {"ops"},
    "imas/models": {"models", "ops.resize"},
    "imas/data/__main__.py": {"data", "config", "strict"},
    "imas/data": {"data", "schema", "strict"},
    "imas/methods": {"methods", "ops", "models", "schema"},
    "imas/build.py": {"config", "schema", "methods", "models", "ops", "strict"},
    "imas/engine": {
        "engine",
        "methods.base",
        "models.pretrained",
        "data",
        "ops",
        "schema",
        "distributed",
        "files",
        "strict",
    },
    "imas/report": {"report", "files", "strict"},
}
OUTSIDE = {"torch", "torchvision", "numpy", "yaml", "PIL", "tensorboard", "tqdm"}


def _files() -> list[Path]:
    return sorted(path for path in (ROOT / "imas").rglob("*.py") if path != ROOT / "imas" / "__init__.py")


def _imports(path: Path) -> list[str]:
    """Absolute dotted names of everything that a file imports."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1]).split(".")
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    allowed = next(rooms for room, rooms in ALLOWED.items() if relative == room or relative.startswith(f"{room}/"))
    for name in _imports(path):
        top = name.split(".")[0]
        if top == "imas":
            inner = name.removeprefix("imas.")
            assert any(inner == room or inner.startswith(f"{room}.") for room in allowed), f"{relative} imports {name}"
        else:
            assert top in OUTSIDE or top in sys.stdlib_module_names, f"{relative} imports {name}"
        if name.startswith("torch.distributed"):
            assert relative == "imas/distributed.py", f"{relative} imports {name}"


def test_public_names_have_docstrings() -> None:
    for name in imas.__all__:
        assert inspect.getdoc(getattr(imas, name)), name


@pytest.mark.parametrize("path", [*_files(), *sorted(ROOT.glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_types_and_public_ones_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, path
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [argument.arg for argument in arguments if argument.annotation is None]
            assert set(bare) <= {"self", "cls", "ctx"} and node.returns is not None, f"{node.name}: {bare}"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            told = ast.get_docstring(node) or path.name == "schema.py"  # its sections are their fields
            assert told, f"{node.name} has no docstring"


def test_every_definition_is_used() -> None:
    """A function or class that nothing names is to be deleted."""
    sources = {path: path.read_text() for path in [*_files(), *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]}
    text = "\n".join([*sources.values(), (ROOT / "imas" / "__init__.py").read_text()])
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                uses = text.count(node.name)
                assert uses > 1, f"{path.name} defines {node.name}, which nothing uses"
