"""The house: imports run downwards, and the public names are there."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from pathlib import Path

import pytest
from first_step import small
from test_methods import CONTRACT

import imas
from imas.data.catalog import DATASETS
from imas.methods import METHODS

ROOT = Path(imas.__file__).parents[1]

# room → what it may import of ours
ALLOWED = {
    "imas/__main__.py": {"__version__", "distributed", "engine"},
    "imas/errors.py": set(),
    "imas/files.py": set(),
    "imas/strict.py": {"errors"},
    "imas/legacy.py": {"strict"},
    "imas/schema.py": {"strict"},
    "imas/distributed.py": {"errors"},
    "imas/library.py": {"build", "config", "data", "engine", "errors", "models.modes", "schema"},
    "imas/export.py": {"library", "errors", "files", "schema"},
    "imas/ops": {"ops"},
    "imas/models": {"models", "ops.resize", "distributed"},
    "imas/methods": {"methods", "ops", "models", "schema", "strict", "distributed", "errors"},
    "imas/data/__main__.py": {"data", "config", "errors"},
    "imas/data": {"data", "schema", "files", "errors"},
    "imas/config.py": {"schema", "strict", "errors", "legacy", "methods", "data.catalog"},
    "imas/build.py": {"config", "schema", "methods", "models", "ops", "errors"},
    "imas/engine": {
        "engine",
        "methods.base",
        "models",
        "data",
        "ops",
        "schema",
        "distributed",
        "files",
        "errors",
        "legacy",
        "strict",
    },
    "imas/report": {"report", "files", "errors", "legacy", "strict"},
    "imas/compare": {
        "compare",
        "report",
        "config",
        "data",
        "engine",
        "methods",
        "distributed",
        "files",
        "errors",
        "strict",
    },
}
OUTSIDE = {"torch", "torchvision", "numpy", "yaml", "PIL", "tensorboard", "tqdm"}


def _files() -> list[Path]:
    return sorted(path for path in (ROOT / "imas").rglob("*.py") if path != ROOT / "imas" / "__init__.py")


def _imports(path: Path) -> list[str]:
    """Absolute dotted names of everything that a file imports at run time."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1]).split(".")
    names = []
    tree = ast.parse(path.read_text())
    for_types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
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


def _outside_methods() -> list[Path]:
    known = (ROOT / "imas" / "methods", ROOT / "imas" / "legacy.py")
    paths = [path for path in _files() if not any(path.is_relative_to(room) for room in known)]
    return [*paths, *sorted(ROOT.glob("*.py"))]


@functools.cache
def _networks() -> set[str]:
    return {name for method in CONTRACT for name in small(method, **CONTRACT[method]).networks()}


@pytest.mark.parametrize("path", _outside_methods(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_knows_a_method_or_its_networks(path: Path) -> None:
    """No name of a method or of a network as a text, no network as an attribute, no method's class."""
    networks = _networks()
    texts = networks | METHODS.keys()
    tree = ast.parse(path.read_text())
    loggers = {
        id(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call) and "getLogger" in ast.dump(node.func)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in loggers:
            assert node.value not in texts, f"line {node.lineno}: {node.value!r}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in networks, f"line {node.lineno}: .{node.attr}"
    classes = {kind.__name__ for kind in METHODS.values()}
    assert not classes & {name.split(".")[-1] for name in _imports(path)}


@pytest.mark.parametrize("path", [*_files(), *sorted(ROOT.glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_table_alone_names_the_data_sets(path: Path) -> None:
    """No name of a data set as a text, but where they are listed and in what former files are called."""
    if path in (ROOT / "imas" / "data" / "catalog.py", ROOT / "imas" / "legacy.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant):
            assert node.value not in DATASETS, f"line {node.lineno}: {node.value!r}"


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
            explained = ast.get_docstring(node) or path.name == "schema.py"  # its sections are their fields
            assert explained, f"{node.name} has no docstring"


def test_every_definition_is_used() -> None:
    """A function or class that nothing names is to be deleted."""
    sources = {path: path.read_text() for path in [*_files(), *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]}
    text = "\n".join([*sources.values(), (ROOT / "imas" / "__init__.py").read_text()])
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                uses = text.count(node.name)
                assert uses > 1, f"{path.name} defines {node.name}, which nothing uses"
