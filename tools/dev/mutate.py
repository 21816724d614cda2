"""Check that a new test suite catches the mutations that the old one caught.

A mutation changes one line of the sources: a wrong sign, an off-by-one, a swapped axis or a dropped check.
Draw 60, spread over folders and kinds. Test them in order until 30 are caught, at least 4 in each folder:

    python tools/dev/mutate.py draw --table tests/mutations.csv --seed 1 --count 60
    python tools/dev/mutate.py run --table tests/mutations.csv --suite old

Change the tests. Then test the mutations that the old suite caught, two at a time:

    python tools/dev/mutate.py run --table tests/mutations.csv --suite new --jobs 2

Mutations are made in temporary copies of the tracked files. Tests of the mutated module run first, and the first
failure that does not happen without the mutation ends the row. Results are caught, missed ("missed (limit)" after
--limit), invalid (does not compile) and lost (the line is gone or not unique). The same command resumes. The exit
status is 1 if the new suite did not catch every mutation that the old one caught.
"""

import argparse
import ast
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from misc.command import OneOf, Parser, UserError, at_least, run
from misc.files import write_text

FOLDERS = (".", "data", "misc", "models", "preprocess", "tools")  # "." has the scripts of the top level
EXCLUDED = ("tools/dev/", "tools/timing/", "tools/benchmark.py")
DRAWN = ("id", "folder", "file", "line", "kind", "before", "after")
COLUMNS = (*DRAWN, "old", "old_by", "old_seconds", "new", "new_by", "new_seconds")
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", "-rfE", "--tb=no")
FAILURE = re.compile(r"^(?:FAILED|ERROR) ([^\[\n]+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)
ROW = "{id} {file}:{line} {kind}"
SIGN, BOUND, AXIS, CHECK = KINDS = ("wrong sign", "off by one", "swapped axis", "dropped check")
OPERATORS = {sign: (other, SIGN) for sign, other in ("+-", "-+", "*/")}
OPERATORS |= {"<": ("<=", BOUND), "<=": ("<", BOUND), ">": (">=", BOUND), ">=": (">", BOUND)}
OPPOSITES = [("<", ">="), (">", "<="), ("==", "!="), ("in", "not in"), ("is", "is not")]
NEGATIONS = {sign: (other, CHECK) for pair in OPPOSITES for sign, other in (pair, pair[::-1])}
REDUCE = rb"\.(?:all|any|arg\w+|a?max|a?min|cat|flatten|flip|gather|index_\w+|mean|median|stack|std|sum|unbind|var)\("
RULES = (  # nodes, pattern, and what replaces its first group, for a swapped axis
    (ast.keyword, rb"^(?:dim|axis)=(0)$", rb"1"),
    (ast.keyword, rb"^(?:dim|axis)=(-?[1-9])$", rb"0"),
    (ast.Call, REDUCE + rb"(?:\w+, )?(0)[,)]", rb"1"),
    (ast.Call, REDUCE + rb"(?:\w+, )?(-?[1-9])[,)]", rb"0"),
    (ast.Call, rb"\.(?:permute|transpose)\(((-?\d+), (-?\d+)), ", rb"\3, \2"),
    (ast.Tuple | ast.List, rb"^[(\[]?((-?\d+), (-?\d+))(?:, -?\d+)*[)\]]?$", rb"\3, \2"),
    (ast.Call, rb"(?<!np)(?<!torch)(\.(?:t|transpose|permute|swapaxes)\([^()]*\))$", rb""),
    (ast.Attribute, rb"(?<!self)(\.m?T)$", rb""),  # self.T is a temperature
    (ast.Attribute, rb"\.shape()$", rb"[::-1]"),
    (ast.Slice, rb"^(::-1)$", rb":"),
)
Edit = tuple[int, int, int, bytes, str]  # line, first and last column in bytes, new text, kind
Row = dict[str, str]  # of COLUMNS

# ============================================================ draw


def is_skipped(node: ast.AST, parent: ast.AST | None) -> bool:
    """Whether a part of the sources is left alone: texts, messages, flags, annotations, decorators, __main__ blocks."""
    match node:
        case ast.Call():
            is_flag = any(ast.unparse(argument).startswith("'--") for argument in node.args)
            return is_flag or ast.unparse(node.func).endswith(("add_argument", "sys.path.insert"))
        case ast.BinOp(left=left, right=right):  # + and * of texts and lists, % of texts
            return any(isinstance(x, (ast.JoinedStr, ast.List)) or ast.unparse(x)[0] in "'\"" for x in (left, right))
        case ast.If():
            return "__name__" in ast.unparse(node.test)
        case ast.JoinedStr() | ast.Raise():
            return True
    hints = [getattr(parent, name, None) for name in ("annotation", "returns")]
    return node in [*hints, *getattr(parent, "decorator_list", ())]


def walk_code(node: ast.AST, parent: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Nodes that may be mutated, each with its parent."""
    if not is_skipped(node, parent):
        yield node, parent
        for child in ast.iter_child_nodes(node):
            yield from walk_code(child, node)


def replace_operators(lines: list[bytes], node: ast.AST, signs: dict[str, tuple[str, str]]) -> Iterator[Edit]:
    """Replace each operator of ``signs`` that is on the same line as the operands beside it."""
    if not isinstance(node, (ast.AugAssign, ast.BinOp, ast.Compare)):
        return
    operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    for left, right in itertools.pairwise(operands):
        gap = lines[right.lineno - 1][left.end_col_offset : right.col_offset].decode()
        sign = gap.strip(" ()=" if isinstance(node, ast.AugAssign) else " ()")
        if left.end_lineno == right.lineno and sign in signs:
            start = left.end_col_offset + gap.index(sign)
            other, kind = signs[sign]
            yield right.lineno, start, start + len(sign), other.encode(), kind


def swap_axes(lines: list[bytes], node: ast.AST, parent: ast.AST | None) -> Iterator[Edit]:
    """Edits by RULES of a node that is on one line."""
    if getattr(node, "lineno", 0) != getattr(node, "end_lineno", None):
        return
    text = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
    ignores_order = isinstance(parent, ast.Compare | ast.For | ast.comprehension | ast.keyword)  # x in (0, 1)
    is_indexed = isinstance(parent, (ast.Attribute, ast.Subscript))
    for nodes, pattern, new in RULES:
        found = re.search(pattern, text) if isinstance(node, nodes) else None
        if found and not (is_indexed and new == b"[::-1]") and not (ignores_order and nodes == ast.Tuple | ast.List):
            start, end = (node.col_offset + column for column in found.span(1))
            yield node.lineno, start, end, found.expand(new), AXIS


def drop_checks(lines: list[bytes], node: ast.AST) -> Iterator[Edit]:
    """A condition that leads to ``raise``: never true, or negated."""
    if not isinstance(node, ast.If) or not isinstance(node.body[0], ast.Raise):
        return
    if node.test.lineno == node.test.end_lineno:
        yield node.test.lineno, node.test.col_offset, node.test.end_col_offset, b"False", CHECK
    for part, _ in walk_code(node.test):
        if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not):
            yield part.lineno, part.col_offset, part.col_offset + len("not "), b"", CHECK
        elif isinstance(part, ast.Compare):
            yield from replace_operators(lines, part, NEGATIONS)


def find_edits(source: bytes) -> list[Edit]:
    """All mutations of a file. An integer that is an axis is not also off by one."""
    lines, edits = source.split(b"\n"), []
    for node, parent in walk_code(ast.parse(source)):
        edits += [*drop_checks(lines, node), *swap_axes(lines, node, parent)]
        edits += replace_operators(lines, node, OPERATORS)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            edits.append((node.lineno, node.col_offset, node.col_offset + 1, b"", SIGN))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            edits.append((node.lineno, node.col_offset, node.end_col_offset, b"%d" % (node.value + 1), BOUND))
    axes = {edit[:3] for edit in edits if edit[4] == AXIS}
    return sorted({edit for edit in edits if edit[4] != BOUND or edit[:3] not in axes})


def take_turns(streams: Iterable[Iterable]) -> Iterator:
    """One item of each stream in turn, until all have ended."""
    for items in itertools.zip_longest(*streams):
        yield from (item for item in items if item is not None)


def list_files(checkout: Path) -> list[str]:
    """Tracked files that exist."""
    git = subprocess.run(["git", "-C", checkout, "ls-files", "-z"], capture_output=True, encoding="utf-8", check=False)
    if git.returncode:
        raise UserError(f"--checkout {checkout} is not a git checkout; give the folder that has .git")
    return [name for name in git.stdout.split("\0") if (checkout / name).is_file()]


def draw_folder(sources: dict[str, bytes], seed: int) -> Iterator[tuple[str, str, str, str, str]]:
    """File, line, kind, before and after in random order, the kinds in turn; only lines that are unique in a file."""
    candidates = [(name, edit) for name, source in sources.items() for edit in find_edits(source)]
    random.Random(seed).shuffle(candidates)
    drawn = set()
    for name, (line, start, end, text, kind) in take_turns([c for c in candidates if c[1][4] == k] for k in KINDS):
        lines = sources[name].split(b"\n")
        before = lines[line - 1]
        after = before[:start] + text + before[end:]
        if (name, line) not in drawn and lines.count(before) == 1 and after != before:
            drawn.add((name, line))
            yield name, str(line), kind, before.decode(), after.decode()


def draw_rows(checkout: Path, seed: int, count: int) -> list[Row]:
    """Mutations of all folders in turn; the same seed and sources give the same rows."""
    sources: dict[str, dict[str, bytes]] = {folder: {} for folder in FOLDERS}
    for name in list_files(checkout):
        folder = name.split("/")[0] if "/" in name else "."
        if name.endswith(".py") and folder in sources and not name.startswith(EXCLUDED):
            sources[folder][name] = (checkout / name).read_bytes()
    streams = [zip(itertools.repeat(folder), draw_folder(sources[folder], seed)) for folder in FOLDERS]
    rows = []
    for folder, values in itertools.islice(take_turns(streams), count):
        values = (f"m{len(rows) + 1:03d}", folder, *values)
        rows.append(dict(itertools.zip_longest(COLUMNS, values, fillvalue="")))
    return rows


# ============================================================ run


def find_line(tree: Path, row: Row) -> tuple[Path, int] | None:
    """File and index of a row's line: where it was drawn, else where it is unique: in that file, its namesakes, all."""
    paths = [path for path in sorted(tree.rglob("*.py")) if not path.is_relative_to(tree / "tests")]
    lines = ((path, number, line) for path in paths for number, line in enumerate(path.read_bytes().split(b"\n")))
    places = [(path, number) for path, number, line in lines if line == row["before"].encode()]
    drawn = (tree / row["file"], int(row["line"]) - 1)
    in_file = [place for place in places if place[0] == drawn[0]]
    namesakes = [place for place in places if place[0].name == drawn[0].name]
    found = [drawn] if drawn in places else in_file or namesakes or places
    return found[0] if len(found) == 1 else None


def list_stages(tree: Path, name: str, whole: bool) -> Iterator[tuple[list[str], list[str]]]:
    """Test files and flags of each stage for a mutated file: namesakes, importers, folder, top level, the rest."""
    tests = [str(path.relative_to(tree)) for path in sorted(tree.glob("tests/**/test_*.py"))]
    parts = Path(name.removesuffix("/__init__.py")).with_suffix("").parts
    near = f"tests/{parts[0]}/" if "/" in name else "tests/test_"
    tests = [test for test in sorted(tests, key=lambda test: not test.startswith(near)) if "/test_house." not in test]
    module, package = re.escape(".".join(parts)), re.escape(".".join(parts[:-1]))
    uses = rf"(from|import|['\"]) ?{module}\b|\b{re.escape(name)}\b|from {package or '-'} import .*\b{parts[-1]}\b"
    stages = (
        [test for test in tests if test.startswith(near) and Path(test).name.startswith(f"test_{parts[-1]}")],
        [test for test in tests if re.search(uses, (tree / test).read_text(encoding="utf-8"))],
        [test for test in tests if test.startswith(near) and "/" in name],
        [test for test in tests if test.count("/") == 1],
        tests if whole else [],
    )
    for number, stage in enumerate(stages):
        files = [test for test in stage if test in tests]
        tests = [test for test in tests if test not in files]
        yield files, ["-m", "not slow"] if number == 3 and not whole else []


class Runner:
    """Tests mutations in scratch copies; ``stop`` ends the tests that run. ``flaky`` are tests that fail anyway."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.stop, self.flaky = args, threading.Event(), dict[str, bool]()

    def run_pytest(self, tree: Path, flags: list[str], seconds: float) -> tuple[int | None, str]:
        """Exit status, None at the limit, and output."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONPATH"))}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # a .pyc could outlive its mutation
        command = [self.args.python, *PYTEST, f"--rootdir={tree}", f"--basetemp={tree.parent / 'temporary'}", *flags]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **streams)
            until = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < until and not self.stop.is_set():
                time.sleep(0.1)
            status = process.poll()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a failed test left behind
            process.wait()
            output.seek(0)
            return status, output.read()

    def is_flaky(self, tree: Path, test: str) -> bool:
        """Whether a test, or the collection of a test file, fails without a mutation."""
        if test not in self.flaky:
            flags = () if "::" in test else ("--collect-only",)
            status, output = self.run_pytest(tree, [test, *flags], self.args.limit)
            if "::" not in test and status not in (0, 2, 5):  # 2: an error in this file, not of pytest or conftest.py
                raise UserError(f"pytest cannot collect {test} without a mutation; repair it. {output.strip()[-400:]}")
            self.flaky[test] = status not in (0, 4, 5)  # 4: a test that has this id only with the mutation
            if self.flaky[test]:
                print(f"{test} fails without a mutation: not counted", flush=True)
        return self.flaky[test]

    def run_row(self, tree: Path, row: Row) -> tuple[str, str]:
        """Result and failing test of one row."""
        place = find_line(tree, row)
        if place is None:
            return "lost", ""
        path, number = place
        original, until = path.read_bytes(), time.monotonic() + self.args.limit
        lines = original.split(b"\n")
        lines[number] = row["after"].encode()
        mutated = b"\n".join(lines)
        try:
            compile(mutated, path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return "invalid", ""
        for files, flags in list_stages(tree, str(path.relative_to(tree)), self.args.whole):
            while kept := [test for test in files if not self.flaky.get(test)]:  # again without a flaky test
                deselected = [f"--deselect={test}" for test, is_flaky in self.flaky.copy().items() if is_flaky]
                path.write_bytes(mutated)
                status, output = self.run_pytest(tree, [*kept, *flags, *deselected], until - time.monotonic())
                path.write_bytes(original)
                failure = FAILURE.search(output)
                if status in (0, 5):  # 5: nothing to run
                    break
                if status is None and failure is None:
                    return "missed (limit)", ""
                test = failure[1] if failure else kept[0]
                if not self.is_flaky(tree, test):
                    return "caught", test
        return "missed", ""


def copy_checkout(checkout: Path, folder: Path) -> Path:
    """Copy the tracked files; tests look for ``shared`` beside the checkout."""
    for name in list_files(checkout):
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(checkout / name, folder / "tree" / name, follow_symlinks=False)
    if (checkout.parent / "shared").exists():
        (folder / "shared").symlink_to((checkout.parent / "shared").resolve())
    return folder / "tree"


def is_wanted(rows: list[Row], row: Row, args: argparse.Namespace) -> bool:
    """Whether a row is still to be run."""
    if row[args.suite] or args.suite == "new":
        return not row[args.suite] and row["old"] == "caught"
    caught = Counter(other["folder"] for other in rows if other["old"] == "caught")
    return caught.total() < args.wanted or caught[row["folder"]] < args.least


def run_rows(rows: list[Row], args: argparse.Namespace) -> None:
    """Run the wanted rows, and write the table after each."""
    runner, lock, copies = Runner(args), threading.Lock(), list[Path]()

    def work(row: Row) -> None:
        if runner.stop.is_set() or not is_wanted(rows, row, args):
            return
        tree, began = copies.pop(), time.monotonic()
        result, test = runner.run_row(tree, row)
        copies.append(tree)
        with lock:
            if not runner.stop.is_set():
                seconds = f"{time.monotonic() - began:.1f}"
                row |= {args.suite: result, f"{args.suite}_by": test, f"{args.suite}_seconds": seconds}
                write_table(args.table, rows)
                print(f"{ROW.format(**row)}: {result} {test} ({seconds} s)", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch, ThreadPoolExecutor(args.jobs) as pool:
        copies += [copy_checkout(args.checkout, Path(scratch) / str(number)) for number in range(args.jobs)]
        try:
            list(pool.map(work, rows))
        finally:
            runner.stop.set()


def read_table(path: str) -> list[Row]:
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def write_table(path: str, rows: list[Row]) -> None:
    write_text(path, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{draw,run}")
    draw = commands.add_parser("draw", help="draw mutations; a larger --count adds rows to the same table")
    test = commands.add_parser("run", help="run tests on mutations; the same command resumes")
    for command in (draw, test):
        command.add_argument("--table", required=True, help="CSV with one row per mutation")
        command.add_argument("--checkout", type=Path, default=ROOT, help="git checkout whose sources and tests run")
    draw.add_argument("--seed", type=at_least(int, 0), default=1, help="another seed draws other mutations")
    draw.add_argument("--count", type=at_least(int, 1), default=60, help="rows; about twice as many as --wanted")
    add = test.add_argument
    add("--suite", type=OneOf("old", "new"), required=True, help="new runs the rows that old caught")
    add("--wanted", type=at_least(int, 1), default=30, help="caught mutations at which --suite old stops")
    add("--least", type=at_least(int, 0), default=4, help="caught mutations that each folder must have by then")
    add("--python", type=os.path.abspath, default=sys.executable, help="path of the interpreter that runs the tests")
    add("--limit", type=at_least(float, 1), default=900.0, help="seconds per mutation; raise it on a slow machine")
    add("--jobs", type=at_least(int, 1), default=1, help="mutations at a time, each in its own copy")
    add("--whole", action="store_true", help="run the rest of the suite too before a mutation counts as missed")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    args.checkout = args.checkout.resolve()
    if args.command == "draw":
        rows = draw_rows(args.checkout, args.seed, args.count)
        kept = read_table(args.table) if Path(args.table).exists() else []
        if any(old[name] != new[name] for old, new in itertools.zip_longest(kept, rows[: len(kept)]) for name in DRAWN):
            raise UserError(f"--table {args.table} has rows of another draw; choose another name")
        write_table(args.table, kept + rows[len(kept) :])
        return 0
    rows = read_table(args.table)
    run_rows(rows, args)
    print("| folder | drawn | tried | caught old | caught new |\n| --- | --- | --- | --- | --- |")
    for folder in FOLDERS:
        own = [row for row in rows if row["folder"] == folder]
        old, new = (sum(row[suite] == "caught" for row in own) for suite in ("old", "new"))
        print(f"| {folder} | {len(own)} | {sum(bool(row['old']) for row in own)} | {old} | {new} |")
    if args.suite == "old" and any(is_wanted(rows, {**row, "old": ""}, args) for row in rows):
        print("the table has no more rows, and too few are caught; draw more with a larger --count")
    uncaught = [row for row in rows if row["old"] == "caught" and row["new"] not in ("", "caught")]
    for row in uncaught:
        print(f"{ROW.format(**row)}: caught by the old suite, {row['new']} by the new one")
    return int(bool(uncaught))


if __name__ == "__main__":
    run(main)
