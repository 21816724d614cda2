"""Check that a new test suite catches the mutations that the old suite caught.

A mutation changes one line of the sources: a wrong sign, an off-by-one, a swapped axis or a dropped check. First draw
60 mutations, spread over folders and kinds. Then test the mutations in order until 30 of them are caught,
at least 4 in each folder:

    python tools/dev/mutate.py draw --table tests/mutations.csv --seed 1 --count 60
    python tools/dev/mutate.py run --table tests/mutations.csv --suite old

After changing the tests, run the mutations that the old suite caught, two at a time:

    python tools/dev/mutate.py run --table tests/mutations.csv --suite new --jobs 2

Mutations are made in temporary copies of the tracked files. The tests of the mutated module run first. The tests
of a mutation end at the first test that fails only with the mutation. The results are

    caught      a test failed
    missed      no test failed; "missed (limit)" if --limit was reached
    invalid     the mutated file does not compile
    lost        the line does not exist any more, or is not unique

The same command resumes an interrupted run. The exit status is 1 if the new suite missed a mutation that the old
suite caught.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from misc.command import OneOf, Parser, UserError, at_least, run
from misc.files import write_text
from tools.dev.mutations import COLUMNS, DRAWN, FOLDERS, Row, draw_mutations, list_tracked_files

PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "1", "-rfE", "--tb=no")
FAILURE = re.compile(r"^(?:FAILED|ERROR) ([^\[\n]+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)
ROW = "{id} {file}:{line} {kind}"


def find_mutated_line(checkout: Path, mutation: Row) -> tuple[Path, int] | None:
    """Return the file and line index of a mutation, or None if the line is not found or not unique.

    The line is searched for at its original line number, in its original file, in files of the same name, and in all
    files. If the first successful search finds several matches, the line counts as not unique.
    """
    paths = [path for path in sorted(checkout.rglob("*.py")) if not path.is_relative_to(checkout / "tests")]
    lines = ((path, number, line) for path in paths for number, line in enumerate(path.read_bytes().split(b"\n")))
    places = [(path, number) for path, number, line in lines if line == mutation["before"].encode()]
    drawn = (checkout / mutation["file"], int(mutation["line"]) - 1)
    in_file = [place for place in places if place[0] == drawn[0]]
    namesakes = [place for place in places if place[0].name == drawn[0].name]
    found = [drawn] if drawn in places else in_file or namesakes or places
    return found[0] if len(found) == 1 else None


def iterate_test_stages(
    checkout: Path, mutated_file: str, add_all_tests: bool
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the test files and the pytest flags of each stage for a mutated file.

    The first four stages run quick tests: tests named after the mutated file, tests that import this file, tests in
    the same folder, and tests at the top level. The next stage runs the slow tests that are named after the mutated
    file or import this file. With ``add_all_tests``, the last stages run all remaining tests.
    """
    tests = [str(path.relative_to(checkout)) for path in sorted(checkout.glob("tests/**/test_*.py"))]
    parts = Path(mutated_file.removesuffix("/__init__.py")).with_suffix("").parts
    near = f"tests/{parts[0]}/" if "/" in mutated_file else "tests/test_"
    tests = [test for test in sorted(tests, key=lambda test: not test.startswith(near)) if "/test_house." not in test]
    module, package = re.escape(".".join(parts)), re.escape(".".join(parts[:-1]))
    uses = (
        rf"(from|import|['\"]) ?{module}\b|\b{re.escape(mutated_file)}\b|from {package or '-'} import .*\b{parts[-1]}\b"
    )
    namesakes = [test for test in tests if test.startswith(near) and Path(test).name.startswith(f"test_{parts[-1]}")]
    importers = [test for test in tests if re.search(uses, (checkout / test).read_text(encoding="utf-8"))]
    folder = [test for test in tests if test.startswith(near) and "/" in mutated_file]
    top_level = [test for test in tests if test.count("/") == 1]
    quick, slow = ["-m", "not slow"], ["-m", "slow"]
    stages = [
        (namesakes, quick),
        (importers, quick),
        (folder, quick),
        (top_level, quick),
        (namesakes + importers, slow),
    ]
    seen: set[tuple[str, str]] = set()
    for files, flags in [*stages, *([(tests, quick), (tests, slow)] if add_all_tests else [])]:
        new = [test for test in dict.fromkeys(files) if (test, flags[1]) not in seen]
        seen |= {(test, flags[1]) for test in new}
        yield new, flags


class Runner:
    """Test mutations in temporary copies of the checkout.

    Setting the event ``stop`` ends all tests. ``flaky`` maps each test to True if the test fails without a mutation.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.stop, self.flaky = args, threading.Event(), dict[str, bool]()

    def run_pytest(self, tree: Path, flags: list[str], seconds: float) -> tuple[int | None, str]:
        """Run pytest. Return the exit status (None if pytest exceeded the time limit) and the output."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONPATH"))}
        # Do not write .pyc files, because they could keep an old mutation.
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [self.args.python, *PYTEST, f"--rootdir={tree}", f"--basetemp={tree.parent / 'temporary'}", *flags]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **streams)
            until = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < until and not self.stop.is_set():
                time.sleep(0.1)
            status = process.poll()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also kill processes that a failed test left behind
            process.wait()
            output.seek(0)
            return status, output.read()

    def is_flaky(self, tree: Path, test: str) -> bool:
        """Return whether a test, or the collection of a test file, fails without a mutation."""
        if test not in self.flaky:
            flags = () if "::" in test else ("--collect-only",)
            status, output = self.run_pytest(tree, [test, *flags], self.args.limit)
            # A test file with errors gives exit status 2 and is ignored below.
            if "::" not in test and status not in (0, 2, 5):
                raise UserError(
                    f"pytest cannot collect {test} even without a mutation; fix the test file. {output.strip()[-400:]}"
                )
            # pytest exits with status 4 if the test does not exist.
            self.flaky[test] = status not in (0, 4, 5)
            if self.flaky[test]:
                print(f"{test} fails without a mutation and is ignored", flush=True)
        return self.flaky[test]

    def run_tests_on_mutation(self, checkout: Path, mutation: Row) -> tuple[str, str]:
        """Test one mutation. Return the result, for example "caught", and the name of the failing test."""
        place = find_mutated_line(checkout, mutation)
        if place is None:
            return "lost", ""
        path, number = place
        original, until = path.read_bytes(), time.monotonic() + self.args.limit
        lines = original.split(b"\n")
        lines[number] = mutation["after"].encode()
        mutated = b"\n".join(lines)
        try:
            compile(mutated, path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return "invalid", ""
        for files, flags in iterate_test_stages(checkout, str(path.relative_to(checkout)), self.args.whole):
            while kept := [test for test in files if not self.flaky.get(test)]:  # repeat without the flaky tests
                deselected = [f"--deselect={test}" for test, is_flaky in self.flaky.copy().items() if is_flaky]
                path.write_bytes(mutated)
                status, output = self.run_pytest(checkout, [*kept, *flags, *deselected], until - time.monotonic())
                path.write_bytes(original)
                failure = FAILURE.search(output)
                if status in (0, 5):  # exit status 5: pytest found no tests to run
                    break
                if status is None and failure is None:
                    return "missed (limit)", ""
                test = failure[1] if failure else kept[0]
                if not self.is_flaky(checkout, test):
                    return "caught", test
        return "missed", ""


def copy_checkout(checkout: Path, folder: Path) -> Path:
    """Copy the tracked files, and link the folder ``shared`` beside the copy, because some tests read this folder."""
    for name in list_tracked_files(checkout):
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(checkout / name, folder / "tree" / name, follow_symlinks=False)
    if (checkout.parent / "shared").exists():
        (folder / "shared").symlink_to((checkout.parent / "shared").resolve())
    return folder / "tree"


def is_mutation_pending(rows: list[Row], row: Row, args: argparse.Namespace) -> bool:
    """Return whether the mutation of a row must still be tested."""
    if row[args.suite] or args.suite == "new":
        return not row[args.suite] and row["old"] == "caught"
    caught = Counter(other["folder"] for other in rows if other["old"] == "caught")
    return caught.total() < args.wanted or caught[row["folder"]] < args.least


def run_pending_mutations(rows: list[Row], args: argparse.Namespace) -> None:
    """Test each mutation for which :func:`is_mutation_pending` is true, and write the table after each test."""
    runner, lock, copies = Runner(args), threading.Lock(), list[Path]()

    def run_mutation_and_save_result(mutation: Row) -> None:
        if runner.stop.is_set() or not is_mutation_pending(rows, mutation, args):
            return
        tree, began = copies.pop(), time.monotonic()
        result, test = runner.run_tests_on_mutation(tree, mutation)
        copies.append(tree)
        with lock:
            if not runner.stop.is_set():
                seconds = f"{time.monotonic() - began:.1f}"
                mutation |= {args.suite: result, f"{args.suite}_by": test, f"{args.suite}_seconds": seconds}
                write_table(args.table, rows)
                print(f"{ROW.format(**mutation)}: {result} {test} ({seconds} s)", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch, ThreadPoolExecutor(args.jobs) as pool:
        copies += [copy_checkout(args.checkout, Path(scratch) / str(number)) for number in range(args.jobs)]
        try:
            list(pool.map(run_mutation_and_save_result, rows))
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
    test = commands.add_parser("run", help="test the mutations; run the same command again to resume")
    for command in (draw, test):
        command.add_argument("--table", required=True, help="CSV with one row per mutation")
        command.add_argument(
            "--checkout", type=Path, default=ROOT, help="git checkout with the sources to mutate and the tests to run"
        )
    draw.add_argument("--seed", type=at_least(int, 0), default=1, help="random seed for drawing the mutations")
    draw.add_argument(
        "--count",
        type=at_least(int, 1),
        default=60,
        help="number of mutations to draw; use about twice the number of mutations to catch (--wanted)",
    )
    add = test.add_argument
    add(
        "--suite",
        type=OneOf("old", "new"),
        required=True,
        help="old: run the old test suite; new: run the new test suite, only on mutations that the old suite caught",
    )
    add(
        "--wanted",
        type=at_least(int, 1),
        default=30,
        help="with --suite old: stop when the old suite has caught this many mutations",
    )
    text = "with --suite old: do not stop before the old suite has caught this many mutations in each folder"
    add("--least", type=at_least(int, 0), default=4, help=text)
    add("--python", type=os.path.abspath, default=sys.executable, help="Python interpreter that runs the tests")
    add(
        "--limit",
        type=at_least(float, 1),
        default=900.0,
        help="time limit in seconds per mutation; raise it on a slow machine",
    )
    add(
        "--jobs",
        type=at_least(int, 1),
        default=1,
        help="number of mutations to test in parallel, each in a separate copy",
    )
    add(
        "--whole",
        action="store_true",
        help="before a mutation counts as missed, run all tests, not only those for the mutated file",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    args.checkout = args.checkout.resolve()
    if args.command == "draw":
        rows = draw_mutations(args.checkout, args.seed, args.count)
        kept = read_table(args.table) if Path(args.table).exists() else []
        if any(old[name] != new[name] for old, new in itertools.zip_longest(kept, rows[: len(kept)]) for name in DRAWN):
            raise UserError(
                f"--table {args.table} has mutations drawn with a different --seed or from different sources; "
                "choose another file"
            )
        write_table(args.table, kept + rows[len(kept) :])
        return 0
    rows = read_table(args.table)
    run_pending_mutations(rows, args)
    print("| folder | drawn | tried | caught old | caught new |\n| --- | --- | --- | --- | --- |")
    for folder in FOLDERS:
        own = [row for row in rows if row["folder"] == folder]
        old, new = (sum(row[suite] == "caught" for row in own) for suite in ("old", "new"))
        print(f"| {folder} | {len(own)} | {sum(bool(row['old']) for row in own)} | {old} | {new} |")
    if args.suite == "old" and any(is_mutation_pending(rows, {**row, "old": ""}, args) for row in rows):
        print("all mutations were run, and too few were caught; draw more with a larger --count")
    uncaught = [row for row in rows if row["old"] == "caught" and row["new"] not in ("", "caught")]
    for row in uncaught:
        print(f"{ROW.format(**row)}: caught by the old suite, {row['new']} by the new one")
    return int(bool(uncaught))


if __name__ == "__main__":
    run(main)
