"""Run preprocessing stages over all subjects: in this process, in worker processes, or on a Dask cluster."""

import argparse
import contextlib
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.layout import StoreError, StoreLayout
from misc.command import UserError, count_usable_cores
from misc.files import remove_old_partial_files
from misc.progress import progress_bar
from preprocess.outputs import FAILED_BEFORE, Skip, make_file_stamp
from preprocess.report import (
    find_earlier_failures,
    make_interrupted_subject_stamps,
    read_previous_rows,
    remove_in_progress_files,
    select_provenance_columns,
    write_report,
)
from preprocess.scan import EarlierFailure, Scan, limit_threads, load_scan
from preprocess.subjects import Subject

ROOT = Path(__file__).resolve().parent.parent
FAILURES_SHOWN = 20
WORST_SHOWN = 5
EARLIER = "failed in an earlier stage: "  # prefix of a message that an earlier stage has already reported
NO_WORKER_SECONDS = (5.0, 30.0)  # seconds until the first check for missing workers, and between later checks
REPORT_SECONDS = 30  # seconds between report updates, so that a crash loses only the newest rows

Row = dict[str, Any]


class Step(NamedTuple):
    """One preprocessing stage: the function that processes a subject, and its settings.

    ``work(subject, previous, **settings)`` returns values for the report. ``work`` raises Skip if the output exists,
    and ScanError if the subject's files are bad. Workers import ``work``, so it must be a function of a script in
    preprocess/.
    """

    script: str
    work: Callable[..., Row]
    settings: dict[str, Any]

    @property
    def work_module_and_name(self) -> tuple[str, str]:
        """Return the module and name of ``work``; a worker cannot import the running script as __main__."""
        return f"preprocess.{Path(sys.modules[self.work.__module__].__file__).stem}", self.work.__qualname__


class Record:
    """The report rows of one stage, from this run and from the previous run."""

    def __init__(self, layout: StoreLayout, script: str):
        self.layout, self.script = layout, script
        self.before = read_previous_rows(layout, script)
        for sid, stamps in make_interrupted_subject_stamps(layout, script).items():
            self.before[sid] = {**self.before.get(sid, {}), **stamps}
        self.rows: dict[str, Row] = {}
        self._unwritten: list[str] = []

    def add_report_row(self, report_row: Row) -> None:
        self.rows[report_row["sid"]] = report_row
        self._unwritten.append(report_row["sid"])

    def write_report_rows(self) -> None:
        if self.rows:
            write_report(self.layout, self.script, self.rows)
            remove_in_progress_files(self.layout, self.script, self._unwritten)
            self._unwritten.clear()

    def make_dead_worker_row(self, sid: str, message: str) -> Row:
        """Return the report row of a subject after its worker process died.

        If a subject has an in-progress file, this stage made the subject's output. Otherwise, the output may belong to
        the user.
        """
        stamps = make_interrupted_subject_stamps(self.layout, self.script).get(sid) or select_provenance_columns(
            self.before.get(sid, {})
        )
        return {"sid": sid, "status": "failed", "seconds": 0.0, "message": message, **stamps}


def run_steps(steps: Sequence[Step], subjects: list[Subject], args: argparse.Namespace) -> int:
    """Run all stages for one subject before the next, so that each scan is read once, and write the reports.

    Returns:
        The exit status: 1 if no subject succeeded in a stage, or if a subject failed under ``--strict``; else 0.
    """
    layout = StoreLayout(args.root_dir)
    records = [Record(layout, step.script) for step in steps]
    remove_old_partial_files(*layout.dirs_with_files_per_subject)
    name = steps[0].script if len(steps) == 1 else "preprocess"
    written, failed = time.monotonic(), 0
    bar = progress_bar(args.no_progress, total=len(subjects), desc=name, unit="subject")
    try:
        for rows in _run_subjects(steps, subjects, records, args):
            for record, row in zip(records, rows):
                record.add_report_row(row)
            if time.monotonic() - written > REPORT_SECONDS:
                for record in records:
                    record.write_report_rows()
                written = time.monotonic()
            failed += any(row["status"] == "failed" for row in rows)
            bar.update()
            bar.set_postfix_str(rows[0]["sid"] + (f", {failed} failed" if failed else ""), refresh=False)
    finally:
        bar.close()
        for record in records:
            record.write_report_rows()
    status = 0
    for record in records:
        status = status or _print_summary(record.script, layout, list(record.rows.values()), args.strict)
    return status


def _print_summary(script: str, layout: StoreLayout, rows: list[Row], strict: bool) -> int:
    """Print the summary of a stage and return its exit status."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "skipped", "failed")}
    print(
        f"{script}: {counts['ok']} ok, {counts['skipped']} skipped, {counts['failed']} failed; "
        f"{layout.report_path(script)}"
    )
    earlier, failures = [], []
    for row in rows:
        if row["status"] == "failed":
            (earlier if row["message"].startswith(EARLIER) else failures).append(row)
    for row in failures[:FAILURES_SHOWN]:
        print(f"  {row['sid']}  failed  {row['message']}")
    if len(failures) > FAILURES_SHOWN:
        print(f"  and {len(failures) - FAILURES_SHOWN} more failed subjects")
    if warned := [row for row in rows if row.get("warnings")]:
        print(f"  {len(warned)} with warnings; the first is {warned[0]['sid']}: {warned[0]['warnings']}")
    if worst := _list_lowest_dice_subjects(rows):
        print(f"  lowest overlap with the atlas (Dice of the worse side): {worst}")
    if earlier:
        print(f"  {len(earlier)} of the failed subjects failed in an earlier stage; the first is {earlier[0]['sid']}")
    if counts["ok"] + counts["skipped"] == 0:
        print(f"error: {script}: no subject succeeded; the reasons are in its report", file=sys.stderr)
        return 1
    return 1 if strict and counts["failed"] else 0


def _list_lowest_dice_subjects(rows: list[Row]) -> str:
    """List the subjects whose worse lung has the lowest Dice coefficient; empty if Dice is not measured."""
    told = []
    for row in rows:
        sides = [str(row.get(name, "")) for name in ("dice_right", "dice_left")]
        if all(sides):
            told.append((min(map(float, sides)), row["sid"]))
    return ", ".join(f"{sid} {dice:.2f}" for dice, sid in sorted(told)[:WORST_SHOWN])


def run_step_or_record_error(
    work: Callable[..., dict], subject: Subject, previous: dict, threads: int, settings: dict
) -> dict[str, Any]:
    """Run one stage for one subject and return its report row; any error fails only this subject."""
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
    except UserError as error:  # usually ScanError
        status, message = "failed", str(error)
    except MemoryError:
        status, message = "failed", "not enough memory; reduce --num-workers"
    except Exception as error:  # bad data or a bug, which must not stop the other subjects
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        status = "failed"
        message = f"{type(error).__name__}: {reason} ({Path(where.filename).name}, line {where.lineno})"
    if status == "failed":
        figures = select_provenance_columns(previous)
    message = " ".join(message.split())
    return {
        "sid": subject.sid,
        "status": status,
        "seconds": round(time.perf_counter() - start, 2),
        "message": message,
        **figures,
    }


def run_steps_or_record_errors(
    step_functions: Sequence[tuple[Callable[..., dict], dict]],
    subject: Subject,
    previous_rows: Sequence[dict],
    threads: int,
    earlier_failure: str = "",
) -> list[Row]:
    """Run the stages for one subject, reading its scan once, and return one row per stage.

    If the subject fails in one stage, it also fails in all later stages.
    """
    rows = []
    try:
        for (work, settings), before in zip(step_functions, previous_rows):
            given = {**before, FAILED_BEFORE: earlier_failure} if earlier_failure else before
            rows.append(run_step_or_record_error(work, subject, given, threads, settings))
            if rows[-1]["status"] == "failed":
                earlier_failure = earlier_failure or rows[-1]["message"]
        return rows
    finally:
        clear_kept_scan()


def _run_subjects(
    steps: Sequence[Step], subjects: list[Subject], records: list[Record], args: argparse.Namespace
) -> Iterator[list[Row]]:
    """Yield the report rows of one subject at a time, in the order in which subjects finish."""
    if args.num_workers > 1 or args.scheduler:
        yield from _run_distributed(steps, subjects, records, args)
        return
    works = [(step.work, step.settings) for step in steps]
    failed = find_earlier_failures(records[0].layout, records[0].script)
    for subject in subjects:
        before = _collect_previous_report_rows(records, subject.sid)
        yield run_steps_or_record_errors(works, subject, before, count_usable_cores(), failed.get(subject.sid, ""))


def _collect_previous_report_rows(records: list[Record], sid: str) -> list[dict[str, str]]:
    return [record.before.get(sid, {}) for record in records]


@contextlib.contextmanager
def _open_dask_client(args: argparse.Namespace, num_subjects: int) -> Iterator[tuple[Any, int]]:
    """Yield a Dask client and the number of threads that each of its workers may use. Raises StoreError."""
    from dask.distributed import Client, LocalCluster

    if args.scheduler:
        try:
            client = Client(args.scheduler, timeout="30s")
        except (OSError, ValueError) as error:
            raise StoreError(f"--scheduler {args.scheduler} cannot be reached ({error}); check the address") from error
        with client, _note_missing_workers(client, args.scheduler):
            yield client, 1
        return
    workers = min(args.num_workers, max(1, num_subjects))
    # Dask restarts a worker that crashes or runs out of memory; only the worker's current subject fails.
    with _ignore_signal(signal.SIGINT):  # workers also ignore SIGINT, so only this process handles Ctrl-C
        cluster = LocalCluster(
            # Use any free port (0): with its default port, Dask prints a warning if another run uses that port.
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=":0",
            memory_limit=0,
            silence_logs=50,
        )
    with cluster, Client(cluster) as client:
        yield client, max(1, count_usable_cores() // workers)


@contextlib.contextmanager
def _note_missing_workers(client: Any, address: str) -> Iterator[None]:
    """Print a note if a cluster has had no worker for a while, because the run would otherwise wait silently."""
    ended = threading.Event()

    def print_note_if_no_dask_workers() -> None:
        seconds, told = NO_WORKER_SECONDS[0], False
        while not ended.wait(seconds):
            with contextlib.suppress(Exception):  # the main thread reports a lost scheduler
                there = bool(client.scheduler_info()["workers"])
                if not there and not told:
                    print(f"note: --scheduler {address} has no worker; waiting for one", file=sys.stderr, flush=True)
                told = not there
            seconds = NO_WORKER_SECONDS[1]

    thread = threading.Thread(target=print_note_if_no_dask_workers, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run_distributed(
    steps: Sequence[Step], subjects: list[Subject], records: list[Record], args: argparse.Namespace
) -> Iterator[list[Row]]:
    from dask.distributed import as_completed

    root, places = str(ROOT), [(*step.work_module_and_name, step.settings) for step in steps]

    failed = find_earlier_failures(records[0].layout, records[0].script)

    def run_steps_on_worker(
        subject_fields: tuple, previous_rows: list[dict[str, str]], threads: int, earlier_failure: str
    ):
        # Dask sends nested functions by value, so this function works before the project is on the worker's path.
        import importlib
        import sys

        if root not in sys.path:
            sys.path.insert(0, root)
        runner = importlib.import_module("preprocess.workers")
        works = [(getattr(importlib.import_module(module), name), settings) for module, name, settings in places]
        return runner.run_steps_or_record_errors(
            works, runner.Subject(*subject_fields), previous_rows, threads, earlier_failure
        )

    with _open_dask_client(args, len(subjects)) as (client, threads):
        futures = {
            client.submit(
                run_steps_on_worker,
                *(
                    tuple(subject),
                    _collect_previous_report_rows(records, subject.sid),
                    threads,
                    failed.get(subject.sid, ""),
                ),
                pure=False,
                retries=0,
            ): subject
            for subject in subjects
        }
        for future in as_completed(list(futures)):
            subject, error = futures[future], future.exception()
            if error is None:
                yield future.result()
            else:
                reason = "its worker process died (out of memory?)" if "Killed" in type(error).__name__ else str(error)
                message = " ".join(reason.split())[:300]
                later = [f"{EARLIER}{message}"] * (len(records) - 1)
                yield [
                    record.make_dead_worker_row(subject.sid, text) for record, text in zip(records, [message, *later])
                ]
            future.release()


@contextlib.contextmanager
def _ignore_signal(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


# ============================================================ load a scan once for all stages

_kept: dict[tuple[str, str, str], Scan] = {}  # at most one scan: the current subject's scan


def load_scan_once(subject: Subject) -> Scan:
    """Load the subject's scan, or return the one in memory if its file is unchanged. Raises ScanError."""
    key = (subject.image, subject.series, make_file_stamp(subject.image, subject.series))
    if key not in _kept:
        _kept.clear()  # free the old scan first, so that a worker never holds two
        _kept[key] = load_scan(subject.image, subject.series)
    return _kept[key]


def clear_kept_scan() -> None:
    """Free the scan's memory after the last stage of a subject."""
    _kept.clear()
