"""Run torchrun, and replace its 30-line report with one line for errors that the user can fix.

    python tools/launch.py --standalone --nproc-per-node 4 train.py --root-dir /data/patches --exp-name mine

The script accepts torchrun's flags. The exit status is

    2               a user error, such as a wrong flag or a missing file, described in one line
    128 + signal    a signal to the launcher or to a rank stopped all ranks; continue with --resume auto
    75              a rank on another machine was lost
    other           any other failure, with torchrun's own report

SIGTERM, SIGINT and SIGUSR1 stop all ranks. SIGHUP also stops all ranks, unless nohup makes the ranks ignore
SIGHUP.
"""

import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException, logger
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import get_args_parser, main, parse_args

from misc.command import LOST, STOPPING, USER_ERROR, count_usable_cores, print_error, should_handle_signal

SAVE_SECONDS = 600  # time limit for ranks to stop: enough for one step and for saving 1.2 GB to a slow disk
MEET_SECONDS = 600  # time limit for reaching the first machine
JOB = "drasclr-job"  # key under which the rendezvous store holds the job's id


def should_keep_log_record(record: logging.LogRecord) -> bool:
    """Return False for torchrun's log lines about ended ranks; :func:`report_rank_failures` reports these ranks."""
    text = record.getMessage()
    return "failed (exitcode: 1)" in text or not ("(exitcode:" in text or "closing signal" in text or "death" in text)


def limit_threads_per_rank(torchrun_arguments: list[str] | None = None) -> None:
    """Divide this machine's cores among its ranks.

    By default, torchrun uses one thread per rank and prints a warning.
    """
    ranks = parse_args(torchrun_arguments or sys.argv[1:]).nproc_per_node
    if ranks.isdigit() and int(ranks) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_usable_cores() // int(ranks))))


def add_default_torchrun_flags(arguments: list[str]) -> list[str]:
    """Return torchrun's arguments, preceded by our defaults for the flags that were not given."""
    args = parse_args(arguments)
    known = get_args_parser().format_help()  # older versions of torchrun lack some of the flags
    heard = [signal.SIGQUIT, *(number for number in STOPPING if should_handle_signal(number))]
    ours = {"--signals-to-handle": ",".join(number.name for number in heard), "--shutdown-timeout": str(SAVE_SECONDS)}
    if args.standalone:  # the host name may not resolve, and the loopback address is enough here
        ours["--local-addr"] = "127.0.0.1"
    given = {part.split("=")[0].replace("_", "-") for part in arguments[: arguments.index(args.training_script)]}
    added = [f"{flag}={value}" for flag, value in ours.items() if flag not in given and flag in known]
    return [*added, *arguments]


def open_rendezvous(arguments: list[str]) -> tuple[list[str], TCPStore | None]:
    """Open the rendezvous store if the job uses several machines, and check that it belongs to this job.

    The first launcher hosts the rendezvous store and writes its job id to the store. The other launchers compare their
    own job id with the id in the rendezvous store.

    Returns:
        The flags for torchrun, and the rendezvous store or None. Keep a reference to the rendezvous store until
        torchrun ends.

    Raises:
        SystemExit: the endpoint is in use, belongs to another job, or cannot be reached; one line is printed first.
    """
    args = parse_args(arguments)
    host, _, port = args.rdzv_endpoint.rpartition(":")
    several = args.nnodes not in ("1", "1:1") and args.rdzv_backend == "c10d"
    if not (several and port.isdigit() and "--node-rank" in " ".join(arguments).replace("_", "-")):
        return arguments, None
    first = int(args.node_rank) == 0
    try:
        wait = timedelta(seconds=MEET_SECONDS)
        store = TCPStore(host, int(port), is_master=first, wait_for_workers=False, timeout=wait)
        if first:
            store.set(JOB, args.rdzv_id)
        job = store.get(JOB).decode()
    except (RuntimeError, ValueError) as error:  # torch's network and store errors are subclasses of RuntimeError
        if first and "in use" in str(error).lower():
            print_error(f"RDZV_ENDPOINT {args.rdzv_endpoint} is in use by another job; choose another port")
        else:
            print_error(f"RDZV_ENDPOINT {args.rdzv_endpoint} cannot be reached ({str(error).splitlines()[0][:150]})")
        sys.exit(USER_ERROR)
    if job != args.rdzv_id:
        print_error(
            f"RDZV_ENDPOINT {args.rdzv_endpoint} belongs to another job (id {job}, not {args.rdzv_id}). Give each job "
            "its own port, and use the same flags on all machines of a job"
        )
        sys.exit(USER_ERROR)
    more = [] if args.rdzv_conf else ["--rdzv-conf=is_host=false"]
    return [*more, *arguments], store


def report_rank_failures(failures: dict) -> int | None:
    """Return the exit status for failed ranks, or None to leave the report to torchrun.

    Print the cause of the failure in one line, unless a rank has already printed the cause.
    """
    by_time = sorted(failures.items(), key=lambda item: item[1].timestamp)
    statuses = {failure.exitcode for failure in failures.values()}
    stopped = {128 + number for number in STOPPING}
    if 1 in statuses:
        return None
    if USER_ERROR in statuses:
        return USER_ERROR
    if statuses & stopped:
        return min(statuses & stopped)
    rank, first = next(((rank, one) for rank, one in by_time if one.exitcode != LOST), by_time[0])
    if first.exitcode == LOST:
        print_error("a rank on another machine was lost; its launcher prints the cause. Continue with --resume auto")
        return LOST
    if first.exitcode > 0:
        return None
    number = signal.Signals(-first.exitcode)
    if number in STOPPING:  # the signal ended the rank before there was anything to save
        return 128 + number
    causes = {signal.SIGKILL: "usually because memory ran out", signal.SIGBUS: "usually because /dev/shm is full"}
    print_error(
        f"rank {rank} was ended by {number.name}, {causes.get(number, 'because it crashed')}; the others were stopped. "
        "Lower --workers, --batch-size or --moco-k, and continue with --resume auto"
    )
    return 128 + number


def launch_with_torchrun() -> int:
    arguments = sys.argv[1:]
    limit_threads_per_rank()
    for log in (logger, logging.getLogger("torch.distributed.elastic.agent.server.api")):
        log.addFilter(should_keep_log_record)
    arguments, _store = open_rendezvous(add_default_torchrun_flags(arguments))
    try:
        main(arguments)
    except ChildFailedError as error:
        status = report_rank_failures(error.failures)
        if status is None:
            raise
        return status
    except SignalException as error:  # torchrun passed the signal on to the ranks, which printed their own messages
        return 128 + error.sigval
    except RendezvousError as error:
        print_error(f"the machines could not connect: {str(error).splitlines()[0]}. Check RDZV_ENDPOINT and NNODES")
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(launch_with_torchrun())
