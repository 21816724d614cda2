"""Check the source code: file lengths, the direction of imports, and unused requirements."""

import ast
import subprocess
import sys
from importlib import metadata

import pytest

from .conftest import ROOT

LONGEST_FILE = 400  # lines
SHELL_ALSO = (".py", ".sh")
# The key "" stands for the root folder.
FLOORS = {"misc": 0, "data": 1, "models": 1, "preprocess": 2, "": 3, "tools": 4}
MAY_IMPORT = {
    "misc": {"misc"},
    "data": {"data", "misc"},
    "models": {"models", "misc"},
    "preprocess": {"preprocess", "data", "misc"},
    "": {"models", "data", "misc"},
    "tools": {"tools", "preprocess", "models", "data", "misc"},
}


def sources(*suffixes):
    """Return the source files outside tests as paths relative to the root."""
    for folder in FLOORS:
        place = ROOT / folder
        found = place.iterdir() if not folder else place.rglob("*")
        for path in sorted(found):
            if path.is_file() and path.suffix in suffixes:
                yield path.relative_to(ROOT)


def module_of(path):
    """Return a file's module name: tools/cohort/__init__.py -> tools.cohort; train.py -> train."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PYTHON = list(sources(".py"))
MODULES = {module_of(path): path for path in PYTHON}


def imported(path):
    """Return this project's modules that a file imports anywhere, and the names imported from each."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports start at the root"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner, None
                elif node.module in MODULES:
                    yield node.module, alias.name


def test_source_files_are_found():
    assert {"misc.command", "models.builder", "data.store", "preprocess.scan", "tools.evaluate", "train"} <= set(
        MODULES
    )
    assert ("models.builder", "DrasCLR") in set(imported(MODULES["train"]))


@pytest.mark.parametrize("path", list(sources(*SHELL_ALSO)), ids=str)
def test_files_are_short(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_imports_point_downwards(path):
    floor = path.parts[0] if len(path.parts) > 1 else ""
    for module, name in imported(path):
        other = MODULES[module].parts[0] if len(MODULES[module].parts) > 1 else ""
        assert other in MAY_IMPORT[floor], f"{path} imports {module}"
        assert name != "main", f"{path} imports a script's main"


def test_there_are_no_circular_imports():
    arrows = {module: {other for other, _ in imported(path)} - {module} for module, path in MODULES.items()}
    # Importing a module also imports its package's __init__, so the package counts as imported.
    done, path = set(), []

    def walk(module):
        assert module not in path, "a circle: " + " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in arrows[module]:
            walk(other)
        path.pop()
        done.add(module)

    for module in arrows:
        walk(module)
    assert done == set(MODULES)


def test_every_package_in_requirements_is_used():
    """The sources or the tests import every package in requirements.txt."""
    imports = set()
    for path in [*PYTHON, *(p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py"))]:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imports |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imports.add(node.module.split(".")[0])
    # Packages that no file imports: commands, a plug-in, and a dependency with a pinned version.
    commands = {"tensorboard", "ruff", "protobuf", "pytest-xdist"}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        package = text.split("[")[0].split(">")[0].split("<")[0].split("!")[0].split("=")[0]
        if package in commands:
            continue
        tops = {file.parts[0].removesuffix(".py") for file in metadata.files(package) or () if len(file.parts) <= 2}
        assert tops & imports, f"nothing imports {package}"


def test_preprocessing_workers_do_not_import_torch():
    """Importing torch would cost each preprocessing worker 2 s and 470 MB."""
    code = "import sys, preprocess.workers, preprocess.register; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
