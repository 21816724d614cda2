"""Running one step over a table of subjects: workers, skipping, failures, the report and the exit status."""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from dask.system import CPU_COUNT  # cores that this process may use
from tqdm import tqdm

from data.layout import StoreError, StoreLayout, write_aside
from data.tables import read_table
from preprocess.scan import EarlierFailure, ScanError, limit_threads

ROOT = Path(__file__).resolve().parent.parent
FAILURES_SHOWN = 20
EARLIER = "failed in an earlier step: "  # begins the message of what an earlier step has told already
REPORT_SECONDS = 30  # between reports while a step runs: what made an output must outlive a crash
STAMPS = ("method", "atlas", "image_stamp")  # columns of a report that tell what an output was made from
LEFTOVER_SECONDS = 3600  # age of a half-written file that no run can be writing any more


class Skip(Exception):
    """Raised by a step whose output is there and verified; carries its figures for the report."""

    def __init__(self, figures: dict[str, Any] | None = None):
        super().__init__("done already")
        self.figures = figures or {}


class Subject(NamedTuple):
    """One row of the input table."""

    sid: str
    image: str  # absolute path; empty where the table has none


def one_line_errors(parser: argparse.ArgumentParser) -> None:
    """A wrong flag is one line, without the usage of every flag before it."""
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that steps 2 to 4 share."""
    one_line_errors(parser)
    parser.add_argument(
        "--input-csv", required=True, help="table with columns sid and image; image paths are relative to the table"
    )
    parser.add_argument("--root-dir", required=True, help="the patch store, made where it is missing")
    parser.add_argument(
        "--num-workers",
        type=int,
        default=1,
        help="subjects at a time, each in a process of its own; raise it to the number of cores, memory "
        "allowing (about 2 GB each) (default: %(default)s)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="send the subjects to this Dask scheduler instead; its workers must see the same files and packages",
    )
    parser.add_argument("--overwrite", action="store_true", help="make again what is already done")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 when any subject failed")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (none is drawn without a terminal)")


def read_subjects(path: str | os.PathLike) -> list[Subject]:
    """The input table. Raises StoreError for what concerns the table as a whole."""
    table = read_table(path, required=("sid", "image"))
    folder = Path(path).resolve().parent
    return [
        Subject(sid, str(folder / image.strip()) if image.strip() else "")
        for sid, image in zip(table["sid"], table["image"])
    ]


def file_stamp(path: str) -> str:
    """Tells one version of a file from another by size and modification time; of a folder, by its files'."""
    if os.path.isdir(path):
        files = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
        text = "".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n" for name, status in files)
        return f"{len(files)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def previous_figures(layout: StoreLayout, script: str) -> dict[str, dict[str, str]]:
    """The last report's rows by sid, to tell with which settings an output was made."""
    path = layout.report(script)
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError):
        return {}
    return {row["sid"]: row for row in table.to_dict("records")} if "sid" in table.columns else {}


def claim(layout: StoreLayout, script: str, sid: str) -> None:
    """Note, before a subject's outputs are touched, that they are this step's and not the user's own.

    The report says so from its next writing on; a run that is killed before that leaves the note, and
    the next one makes the outputs again.
    """
    folder = layout.claims(script)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sid).touch()


def _claimed(layout: StoreLayout, script: str) -> dict[str, dict[str, str]]:
    """Stamps, of nothing that is there, for subjects that a run was killed at."""
    folder = layout.claims(script)
    sids = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    return {sid: dict.fromkeys(STAMPS, "interrupted") for sid in sids}


def _remove_leftovers(layout: StoreLayout) -> None:
    """Half-written files and folders of runs that were killed."""
    for folder in (layout.lung_mask("x"), layout.transform("x"), layout.patch("x"), layout.patch_loc("x")):
        for path in (*folder.parent.glob(".partial-*"), *folder.parent.glob(".*.partial")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def stamps_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a failed subject's row keeps of the one before: what is left of its output is ours, not the user's own."""
    return {name: row[name] for name in STAMPS if row.get(name)}


def run_subjects(
    script: str,
    work: Callable[..., dict[str, Any]],
    subjects: list[Subject],
    args: argparse.Namespace,
    settings: dict[str, Any],
) -> int:
    """Run ``work(subject, previous, **settings)`` for each subject and report.

    ``work`` returns figures for the report, raises Skip where nothing is to do, and ScanError where
    the subject is at fault. It is a function of a script in preprocess/, which workers import.

    Returns:
        The exit status: 0 unless nothing succeeded, or anything failed under ``--strict``.
    """
    layout = StoreLayout(args.root_dir)
    before = previous_figures(layout, script)
    for sid, stamps in _claimed(layout, script).items():
        before[sid] = {**before.get(sid, {}), **stamps}
    _remove_leftovers(layout)
    rows: dict[str, dict[str, Any]] = {}
    unwritten: list[str] = []
    bar = tqdm(
        total=len(subjects), desc=script, unit="subject", disable=True if args.no_progress else None, dynamic_ncols=True
    )

    def write_report() -> None:
        _write_report(layout, script, rows)
        for sid in unwritten:
            (layout.claims(script) / sid).unlink(missing_ok=True)
        unwritten.clear()

    written, failed = time.monotonic(), 0
    try:
        for row in _outcomes(work, subjects, before, args, settings):
            rows[row["sid"]] = row
            unwritten.append(row["sid"])
            if time.monotonic() - written > REPORT_SECONDS:
                write_report()
                written = time.monotonic()
            failed += row["status"] == "failed"
            bar.update()
            bar.set_postfix_str(row["sid"] + (f", {failed} failed" if failed else ""), refresh=False)
    finally:
        bar.close()
        if rows:
            write_report()
    counts = {status: sum(row["status"] == status for row in rows.values()) for status in ("ok", "skipped", "failed")}
    print(
        f"{script}: {counts['ok']} ok, {counts['skipped']} skipped, {counts['failed']} failed; {layout.report(script)}"
    )
    told, failures = [], []
    for row in rows.values():
        if row["status"] == "failed":
            (told if row["message"].startswith(EARLIER) else failures).append(row)
    for row in failures[:FAILURES_SHOWN]:
        print(f"  {row['sid']}  failed  {row['message']}")
    if len(failures) > FAILURES_SHOWN:
        print(f"  and {len(failures) - FAILURES_SHOWN} more")
    if told:
        print(f"  {len(told)} of the failed had failed in an earlier step, {told[0]['sid']} first")
    if counts["ok"] + counts["skipped"] == 0:
        print(f"error: {script}: no subject succeeded", file=sys.stderr)
        return 1
    return 1 if args.strict and counts["failed"] else 0


def _write_report(layout: StoreLayout, script: str, rows: dict[str, dict[str, Any]]) -> None:
    """Put this run's rows into the report; subjects that it has not reached, or does not have, keep theirs."""
    path = layout.report(script)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(layout.report_lock(script), "w") as lock:  # two runs may share a store, each with its table
        fcntl.lockf(lock, fcntl.LOCK_EX)
        merged = {**previous_figures(layout, script), **rows}
        table = pd.DataFrame([merged[sid] for sid in sorted(merged)], dtype=object)  # whole numbers stay whole
        first = ["sid", "status", "seconds", "message"]
        table = table[first + [name for name in table.columns if name not in first]]
        write_aside(path, lambda stream: stream.write(table.to_csv(index=False, lineterminator="\n").encode()))


def attempt(
    work: Callable[..., dict], subject: Subject, previous: dict, threads: int, settings: dict
) -> dict[str, Any]:
    """One subject's row of the report; whatever goes wrong is that subject's."""
    limit_threads(threads)
    start = time.perf_counter()
    status, message, figures = "ok", "", {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figures = work(subject, previous, **settings)
    except Skip as skip:
        status, figures = "skipped", skip.figures
    except EarlierFailure as error:
        status, message = "failed", f"{EARLIER}{error}"
    except ScanError as error:
        status, message = "failed", str(error)
    except MemoryError:
        status, message = "failed", "not enough memory; use fewer --num-workers"
    except Exception as error:  # a subject's fault, or ours: it must not cost the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        status = "failed"
        message = f"{type(error).__name__}: {reason} ({Path(where.filename).name}, line {where.lineno})"
    if status == "failed":
        figures = stamps_of(previous)
    message = " ".join(message.split())
    return {
        "sid": subject.sid,
        "status": status,
        "seconds": round(time.perf_counter() - start, 2),
        "message": message,
        **figures,
    }


def _outcomes(
    work: Callable, subjects: list[Subject], before: dict, args: argparse.Namespace, settings: dict
) -> Iterator[dict[str, Any]]:
    if args.num_workers < 1:
        raise StoreError(f"--num-workers {args.num_workers}: at least 1")
    if args.num_workers == 1 and not args.scheduler:
        for subject in subjects:
            yield attempt(work, subject, before.get(subject.sid, {}), CPU_COUNT, settings)
        return

    from dask.distributed import Client, LocalCluster, as_completed

    root, name = str(ROOT), work.__qualname__
    # The running script is __main__ here, but not in a worker.
    module = f"preprocess.{Path(sys.modules[work.__module__].__file__).stem}"

    def remote(subject_fields, previous, threads):
        # Sent by value, because it is nested: the worker may not have the project on its path yet.
        import importlib
        import sys

        if root not in sys.path:
            sys.path.insert(0, root)
        runner = importlib.import_module("preprocess.subjects")
        function = getattr(importlib.import_module(module), name)
        return runner.attempt(function, runner.Subject(*subject_fields), previous, threads, settings)

    cluster = None
    if args.scheduler:
        try:
            client = Client(args.scheduler, timeout="30s")
        except (OSError, ValueError) as error:
            raise StoreError(f"--scheduler {args.scheduler} does not answer: {error}") from error
        threads = 1
    else:
        workers = min(args.num_workers, max(1, len(subjects)))
        threads = max(1, CPU_COUNT // workers)
        # A worker that dies (out of memory, a crash in a library) is restarted and costs its subject.
        with _ignored(signal.SIGINT):  # workers inherit it: Ctrl-C is this process's to handle
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=None, memory_limit=0, silence_logs=50
            )
        client = Client(cluster)
    try:
        futures = {
            client.submit(remote, tuple(subject), before.get(subject.sid, {}), threads, pure=False, retries=0): subject
            for subject in subjects
        }
        for future in as_completed(list(futures)):
            subject = futures[future]
            error = future.exception()
            if error is None:
                yield future.result()
            else:
                reason = "its worker process died (out of memory?)" if "Killed" in type(error).__name__ else str(error)
                yield {
                    "sid": subject.sid,
                    "status": "failed",
                    "seconds": 0.0,
                    "message": " ".join(reason.split())[:300],
                    **stamps_of(before.get(subject.sid, {})),
                }
            future.release()
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


@contextlib.contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def _stop(*_: Any) -> None:
    """SIGTERM stops as Ctrl-C does, with the report written. A second signal must not disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def script_main(main: Callable[[], int | None]) -> None:
    """Run a script's main; what is wrong with flags or files becomes one line, not a traceback."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(main())
    except (StoreError, ScanError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; start again to go on", file=sys.stderr)
        sys.exit(130)
