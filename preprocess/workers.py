"""Running one step over the subjects: in this process, in worker processes, or on a Dask cluster."""

import argparse
import contextlib
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.layout import StoreError, StoreLayout
from misc.command import UserError
from misc.cores import usable_cores
from misc.files import remove_leftovers
from misc.progress import progress_bar
from preprocess.outputs import Skip
from preprocess.report import claimed, previous_figures, stamps_of, unclaim, write_report
from preprocess.scan import EarlierFailure, limit_threads
from preprocess.subjects import Subject

ROOT = Path(__file__).resolve().parent.parent
FAILURES_SHOWN = 20
EARLIER = "failed in an earlier step: "  # begins the message of what an earlier step has told already
REPORT_SECONDS = 30  # between reports while a step runs: what made an output must outlive a crash

Row = dict[str, Any]


def run_subjects(
    script: str,
    work: Callable[..., Row],
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
    for sid, stamps in claimed(layout, script).items():
        before[sid] = {**before.get(sid, {}), **stamps}
    remove_leftovers(*layout.subject_dirs)
    rows: dict[str, Row] = {}
    unwritten: list[str] = []

    def report() -> None:
        write_report(layout, script, rows)
        unclaim(layout, script, unwritten)
        unwritten.clear()

    written, failed = time.monotonic(), 0
    bar = progress_bar(args.no_progress, total=len(subjects), desc=script, unit="subject")
    try:
        for row in _outcomes(work, subjects, before, args, settings):
            rows[row["sid"]] = row
            unwritten.append(row["sid"])
            if time.monotonic() - written > REPORT_SECONDS:
                report()
                written = time.monotonic()
            failed += row["status"] == "failed"
            bar.update()
            bar.set_postfix_str(row["sid"] + (f", {failed} failed" if failed else ""), refresh=False)
    finally:
        bar.close()
        if rows:
            report()
    return _conclude(script, layout, list(rows.values()), args.strict)


def _conclude(script: str, layout: StoreLayout, rows: list[Row], strict: bool) -> int:
    """Print what came of a step's subjects; its exit status."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "skipped", "failed")}
    print(
        f"{script}: {counts['ok']} ok, {counts['skipped']} skipped, {counts['failed']} failed; {layout.report(script)}"
    )
    earlier, failures = [], []
    for row in rows:
        if row["status"] == "failed":
            (earlier if row["message"].startswith(EARLIER) else failures).append(row)
    for row in failures[:FAILURES_SHOWN]:
        print(f"  {row['sid']}  failed  {row['message']}")
    if len(failures) > FAILURES_SHOWN:
        print(f"  and {len(failures) - FAILURES_SHOWN} more")
    if warned := [row for row in rows if row.get("warnings")]:
        print(f"  {len(warned)} with a warning in the report, {warned[0]['sid']} first: {warned[0]['warnings']}")
    if earlier:
        print(f"  {len(earlier)} of the failed had failed in an earlier step, {earlier[0]['sid']} first")
    if counts["ok"] + counts["skipped"] == 0:
        print(f"error: {script}: no subject succeeded", file=sys.stderr)
        return 1
    return 1 if strict and counts["failed"] else 0


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
    except UserError as error:  # ScanError mostly
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
    work: Callable[..., Row], subjects: list[Subject], before: dict[str, Row], args: argparse.Namespace, settings: dict
) -> Iterator[Row]:
    """Rows of the report as they come."""
    if args.num_workers > 1 or args.scheduler:
        yield from _distributed(work, subjects, before, args, settings)
        return
    for subject in subjects:
        yield attempt(work, subject, before.get(subject.sid, {}), usable_cores(), settings)


@contextlib.contextmanager
def _client(args: argparse.Namespace, subjects: int) -> Iterator[tuple[Any, int]]:
    """A Dask client, and the threads that each of its workers may use. Raises StoreError."""
    from dask.distributed import Client, LocalCluster

    if args.scheduler:
        try:
            client = Client(args.scheduler, timeout="30s")
        except (OSError, ValueError) as error:
            raise StoreError(f"--scheduler {args.scheduler} does not answer: {error}") from error
        with client:
            yield client, 1
        return
    workers = min(args.num_workers, max(1, subjects))
    # A worker that dies (out of memory, a crash in a library) is restarted and costs its subject.
    with _ignored(signal.SIGINT):  # workers inherit it: Ctrl-C is this process's to handle
        cluster = LocalCluster(
            # Port 0 is any that is free: Dask's own warns on standard error where another run has it.
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=":0",
            memory_limit=0,
            silence_logs=50,
        )
    with cluster, Client(cluster) as client:
        yield client, max(1, usable_cores() // workers)


def _distributed(
    work: Callable[..., Row], subjects: list[Subject], before: dict[str, Row], args: argparse.Namespace, settings: dict
) -> Iterator[Row]:
    from dask.distributed import as_completed

    root, name = str(ROOT), work.__qualname__
    # The running script is __main__ here, but not in a worker.
    module = f"preprocess.{Path(sys.modules[work.__module__].__file__).stem}"

    def remote(subject_fields, previous, threads):
        # Sent by value, because it is nested: the worker may not have the project on its path yet.
        import importlib
        import sys

        if root not in sys.path:
            sys.path.insert(0, root)
        runner = importlib.import_module("preprocess.workers")
        function = getattr(importlib.import_module(module), name)
        return runner.attempt(function, runner.Subject(*subject_fields), previous, threads, settings)

    with _client(args, len(subjects)) as (client, threads):
        futures = {
            client.submit(remote, tuple(subject), before.get(subject.sid, {}), threads, pure=False, retries=0): subject
            for subject in subjects
        }
        for future in as_completed(list(futures)):
            subject, error = futures[future], future.exception()
            if error is None:
                yield future.result()
            else:
                reason = "its worker process died (out of memory?)" if "Killed" in type(error).__name__ else str(error)
                failed = {"sid": subject.sid, "status": "failed", "seconds": 0.0}
                message = " ".join(reason.split())[:300]
                yield {**failed, "message": message, **stamps_of(before.get(subject.sid, {}))}
            future.release()


@contextlib.contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
