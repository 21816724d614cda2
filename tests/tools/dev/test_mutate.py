"""Test mutation testing: the mutations drawn from the sources, and test runs on mutations of a tiny project."""

import ast
import contextlib
import io
import subprocess
import sys
import tokenize
from collections import Counter
from types import SimpleNamespace

import pytest

from tools.dev import mutate, mutations

SOURCE = "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return a * 2\n"
TEST = """
from pathlib import Path
from misc.numbers_of import add

def test_add():
    with open({log!r}, "a") as log:
        log.write("run ")
    assert add(1, 2) == 3
"""
ARGUMENTS = SimpleNamespace(suite="old", wanted=9, least=0, python=sys.executable, limit=60.0, jobs=1, whole=False)


@pytest.fixture(scope="module")
def rows():
    if not (mutate.ROOT / ".git").exists():
        pytest.skip("the project is not a git checkout")
    return mutations.draw_mutations(mutate.ROOT, seed=1, count=90)


def make_project(folder, **files):
    for name, text in {"misc/__init__.py": "", "misc/numbers_of.py": SOURCE, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "-C", folder, "add", "."], check=True)
    return folder


def run_suite(project, table, rows, **changes):
    arguments = SimpleNamespace(**{**vars(ARGUMENTS), "checkout": project, "table": str(table), **changes})
    mutate.run_pending_mutations(rows, arguments)
    return mutate.read_table(table)


def list_tokens(line):
    """Return the tokens of a line, which may be part of a longer statement."""
    texts = []
    with contextlib.suppress(tokenize.TokenError):  # the line may end within brackets
        for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
            texts.append(token.string)
    return [text for text in texts if text.strip()]


def test_draw_is_deterministic_and_covers_folders_and_kinds(rows):
    assert rows[:30] == mutations.draw_mutations(mutate.ROOT, seed=1, count=30)
    assert [row["before"] for row in rows] != [row["before"] for row in mutations.draw_mutations(mutate.ROOT, 2, 90)]
    folders, kinds = Counter(row["folder"] for row in rows), Counter(row["kind"] for row in rows)
    assert set(folders) == set(mutations.FOLDERS) and min(folders.values()) == 15
    assert set(kinds) == set(mutations.KINDS) and min(kinds.values()) >= 15


def test_each_mutation_changes_one_token_and_compiles(rows):
    for row in rows:
        source = (mutate.ROOT / row["file"]).read_text(encoding="utf-8")
        lines = source.split("\n")
        assert lines[int(row["line"]) - 1] == row["before"]
        lines[int(row["line"]) - 1] = row["after"]
        assert ast.dump(ast.parse("\n".join(lines))) != ast.dump(ast.parse(source)), row
        before, after = list_tokens(row["before"]), list_tokens(row["after"])
        while before and after and before[0] == after[0]:
            before, after = before[1:], after[1:]
        while before and after and before[-1] == after[-1]:
            before, after = before[:-1], after[:-1]
        if row["kind"] == "swapped axis":
            # A "swapped axis" mutation swaps two numbers, changes an axis, or drops a transpose or [::-1].
            assert sorted(before) == sorted(after) or min(len(before), len(after)) <= 1, row
        elif row["kind"] == "dropped check":
            # A "dropped check" mutation replaces a condition with False, drops "not", or negates an operator.
            assert after == ["False"] or max(len(before), len(after)) <= 2, row
        else:
            assert max(len(before), len(after)) == 1, row


@pytest.mark.parametrize(
    "line, kind, mutated",
    [
        ("x = (a) - (b)", "wrong sign", {"x = (a) + (b)"}),
        ("x = -a", "wrong sign", {"x = a"}),
        ("x = '°' + a[b * c]", "wrong sign", set()),
        ("x = a <= b", "off by one", {"x = a < b"}),
        ("x = f'{a + 1}', g('--n', 3)", "off by one", set()),
        ("x = a.sum(dim=1).mean(-1)", "swapped axis", {"x = a.sum(dim=0).mean(-1)", "x = a.sum(dim=1).mean(0)"}),
        ("x = a.permute(2, 0, 1)", "swapped axis", {"x = a.permute(0, 2, 1)", "x = a"}),
        ("x = f(é, (-2, 0, 1))", "swapped axis", {"x = f(é, (0, -2, 1))"}),
        ("x = (a @ b).T[:, ::-1]", "swapped axis", {"x = (a @ b)[:, ::-1]", "x = (a @ b).T[:, :]"}),
        ("x = f(a.shape)", "swapped axis", {"x = f(a.shape[::-1])"}),
        ("if not a: raise E", "dropped check", {"if False: raise E", "if a: raise E"}),
        ("if a == b: x = 1", "dropped check", set()),
    ],
)
def test_mutations_of_a_line(line, kind, mutated):
    source = line.encode()
    edits = [edit for edit in mutations.find_possible_mutations(source) if edit[4] == kind]
    assert {(source[:start] + text + source[end:]).decode() for _, start, end, text, _ in edits} == mutated


@pytest.mark.slow
def test_a_run_marks_caught_and_missed_and_resumes(tmp_path):
    log = tmp_path / "log"
    project = make_project(tmp_path / "project", **{"tests/misc/test_numbers_of.py": TEST.format(log=str(log))})
    rows = [row for row in mutations.draw_mutations(project, seed=1, count=9) if row["kind"] == "wrong sign"]
    assert {row["after"] for row in rows} == {"    return a - b", "    return a / 2"}
    table = tmp_path / "table.csv"
    done = {row["before"]: row for row in run_suite(project, table, rows)}
    assert done["    return a + b"]["old"] == "caught" and done["    return a * 2"]["old"] == "missed"
    assert done["    return a + b"]["old_by"] == "tests/misc/test_numbers_of.py::test_add"
    assert log.read_text() == "run " * 3  # three test runs: one failure, its confirmation and one pass
    assert list(done.values()) == run_suite(project, table, mutate.read_table(table))
    assert log.read_text() == "run " * 3
    new = run_suite(project, table, mutate.read_table(table), suite="new", jobs=2)
    assert {row["before"]: row["new"] for row in new} == {"    return a + b": "caught", "    return a * 2": ""}
    assert log.read_text() == "run " * 5  # the tests run again only for the caught mutation
    assert (project / "misc" / "numbers_of.py").read_text(encoding="utf-8") == SOURCE


@pytest.mark.slow
def test_a_test_that_fails_without_the_mutation_does_not_count(tmp_path):
    tests = "from misc import numbers_of\n\ndef test_nothing():\n    assert False\n"
    project = make_project(tmp_path / "project", **{"tests/test_other.py": tests})
    rows = mutations.draw_mutations(project, seed=1, count=1)
    assert run_suite(project, tmp_path / "table.csv", rows)[0]["old"] == "missed"


def test_moved_and_removed_lines(tmp_path):
    project = make_project(tmp_path / "project")
    row = dict.fromkeys(mutations.COLUMNS, "") | {"file": "data/numbers_of.py", "line": "7", "after": "    return )"}
    cases = [{**row, "before": text} for text in ("    return a + b", "    return a - b", "")]
    results = [case["old"] for case in run_suite(project, tmp_path / "table.csv", cases)]
    # The first line was moved to misc/, the second line is missing, and the third line occurs twice.
    assert results == ["invalid", "lost", "lost"]
