"""Test that READMEs and docstrings only mention existing names, and that the scripts accept the commands shown."""

import ast
import importlib
import re
import shlex
import subprocess
import sys

import pytest

from misc.command import Parser

from .conftest import ROOT

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
DOCUMENTS = [path for path in TRACKED if path.endswith(".md")]
PYTHON = [path for path in TRACKED if path.endswith(".py") and not path.startswith("tests/")]
FOLDERS = {path.split("/")[0] for path in TRACKED if "/" in path}
CODE = "\n".join(
    (ROOT / path).read_text(encoding="utf-8", errors="replace")
    for path in TRACKED
    if path.endswith((".py", ".sh", ".js", ".toml", ".txt")) and path != "tests/test_documents.py"
)
WORDS = set(re.findall(r"\w+", CODE))
ELSEWHERE = {
    "--gres",
    "--time",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--shm-size",
    "--ipc",
    "--logdir",
} | {
    *("--standalone", "--nproc-per-node", "--nnodes", "--node-rank"),  # flags of torchrun
}


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def docstrings(path):
    """Yield the docstrings of a module and of its classes and functions."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def commands(text):
    """Yield (script, flags) of every command line in a text, with continued lines joined and comments removed."""
    for line in re.sub(r"\s*\\+\n\s*", " ", text).splitlines():
        found = re.match(
            r"\s*(?:\w+=\S+ )*(?:python|sh) ((?:\w+/)*\w+\.(?:py|sh))( .*)?$", line.split("  #")[0].rstrip()
        )
        if found:
            # Cut off a remark that follows two or more spaces.
            yield found[1], re.split(r"\s{2,}", (found[2] or "").strip())[0]


SOURCES = [*((path, read(path)) for path in DOCUMENTS), *((path, "\n".join(docstrings(path))) for path in PYTHON)]
SHOWN = sorted({(path, script, rest) for path, text in SOURCES for script, rest in commands(text)})


class Parsed(Exception):
    """Exception that the replaced ``parse_args`` raises after the real one has accepted the arguments."""


@pytest.mark.parametrize(("path", "script", "rest"), SHOWN, ids=lambda value: str(value)[:60])
def test_commands_are_accepted(path, script, rest, monkeypatch):
    assert (ROOT / script).is_file(), f"{path} shows {script}"
    stand_in = {"run_train.sh": "train.py", "preprocess/run_preprocess.sh": "preprocess/run_preprocess.py"}
    script = stand_in.get(script, script)
    given = shlex.split(re.sub(r"\.\.\.|[\[\]]", " ", rest))
    if not script.endswith(".py") or not re.search(r"\bParser\b|misc.run.flags", read(script)) or "launch" in script:
        return  # the script does not use this project's parser
    if script == "train.py":
        given = ["--root-dir", "D", "--exp-name", "E", *given]  # run_train.sh adds these
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    own = getattr(module, "parse_arguments", None)
    start = own if own and own.__module__ == module.__name__ else module.main
    accept = Parser.parse_args

    def parse(self, *arguments, **more):
        accept(self, *arguments, **more)
        raise Parsed

    required = "..." in rest  # a shortened command may lack flags that the script requires
    monkeypatch.setattr(Parser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *given])
    try:
        start()
    except Parsed:
        return
    except SystemExit as error:
        assert error.code == 0 or required, f"{path}: {script} refuses {rest}"


@pytest.mark.parametrize("path", DOCUMENTS)
def test_names_in_documents_exist(path):
    """Check code names, files and links: `a_name` must be a word in the code, `folder/file` an existing file."""
    text = read(path)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in link or ((ROOT / path).parent / link).exists(), f"{path} links to {link}"
    for token in re.findall(r"`([^`\n]+)`", text):
        name = token.removesuffix("()")
        if re.fullmatch(r"(\w+/)+[\w.]*", name) and name.split("/")[0] in FOLDERS - {"data"}:
            assert (ROOT / name).exists(), f"{path} mentions {token}"
        elif re.fullmatch(r"[a-z]\w*_\w+|\w+\.\w+_\w+", name) or token.endswith("()"):
            lacking = set(re.split(r"\W+", name)) - WORDS
            files = {part for line in TRACKED for part in re.split(r"\W+", line)}
            assert not lacking - files, f"{path} mentions {token}"


@pytest.mark.parametrize("path", [path for path, text in SOURCES if "--" in text])
def test_flags_exist(path):
    text = dict(SOURCES)[path]
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text)) - ELSEWHERE:
        name = flag[2:].replace("-", "_")
        assert f'"{flag}"' in CODE or f'add_range_flag("{name}"' in CODE or f"{flag} " in CODE.replace(text, ""), (
            f"{path} mentions {flag}"
        )


@pytest.mark.parametrize("path", PYTHON)
def test_names_in_docstrings_exist(path):
    """Check that the files and the targets of :func:, :class: and :meth: in docstrings exist."""
    for text in docstrings(path):
        for target in re.findall(r":(?:func|class|meth|attr|data):`[~.]?([\w.]+)`", text):
            assert target.split(".")[-1] in WORDS, f"{path} refers to {target}"
        for file in re.findall(r"(?<![\w/.{])((?:[a-z]\w*/)+\w+\.(?:py|sh|md|js))", text):
            assert file.split("/")[0] not in FOLDERS - {"data"} or (ROOT / file).is_file(), f"{path} mentions {file}"


def test_the_readme_is_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500
    assert len(read("misc/results/README.md").splitlines()) <= 150
