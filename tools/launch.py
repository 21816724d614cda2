"""torchrun, without its report of some thirty lines where a rank has told what the user can mend.

    python tools/launch.py --standalone --nproc-per-node 4 train.py --root-dir /data/patches --exp-name mine

Takes torchrun's flags. Exits with status 2 where every rank that failed did (a wrong flag, a missing file: one line
says it), with 128 + a signal's number where a signal to the launcher or to any rank has stopped all of them (they have
saved: start again with --resume auto), with 75 where another machine's rank was lost; any other failure is reported as
torchrun does. SIGUSR1 stops too, and SIGHUP unless nohup has it ignored.
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

from misc.command import LOST, STOPPING, USER_ERROR, heeded, print_error, usable_cores

SAVE_SECONDS = 600  # for ranks that were asked to stop: a step, and the save of 1.2 GB to a slow disk
MEET_SECONDS = 600  # for the first machine to come
JOB = "drasclr-job"  # key of the rendezvous store whose value is the job's id


def tells_more(record: logging.LogRecord) -> bool:
    """False for torchrun's lines about a rank that ended by itself or was ended, of which :func:`explain` tells."""
    text = record.getMessage()
    return "failed (exitcode: 1)" in text or not ("(exitcode:" in text or "closing signal" in text or "death" in text)


def share_cores(arguments: list[str] | None = None) -> None:
    """Divide this machine's cores among its ranks; torchrun would give each one thread, and say so in five lines."""
    ranks = parse_args(arguments or sys.argv[1:]).nproc_per_node
    if ranks.isdigit() and int(ranks) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(ranks))))


def with_our_defaults(arguments: list[str]) -> list[str]:
    """torchrun's flags with those of ours before them that were not given."""
    args = parse_args(arguments)
    known = get_args_parser().format_help()  # older ones lack some
    heard = [signal.SIGQUIT, *(number for number in STOPPING if heeded(number))]
    ours = {"--signals-to-handle": ",".join(number.name for number in heard), "--shutdown-timeout": str(SAVE_SECONDS)}
    if args.standalone:  # a machine's own name may not resolve; its ranks need no other way
        ours["--local-addr"] = "127.0.0.1"
    given = {part.split("=")[0].replace("_", "-") for part in arguments[: arguments.index(args.training_script)]}
    added = [f"{flag}={value}" for flag, value in ours.items() if flag not in given and flag in known]
    return [*added, *arguments]


def hold_endpoint(arguments: list[str]) -> tuple[list[str], TCPStore | None]:
    """Of several machines: let the first one's launcher keep the rendezvous store, marked with the job's id.

    Returns:
        The flags for torchrun, and the store, to be kept until the end.

    Raises:
        SystemExit: after one line, where the endpoint is in use, is another job's, or is not reached.
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
    except (RuntimeError, ValueError) as error:  # torch's own errors of networks and stores among them
        if first and "in use" in str(error).lower():
            print_error(f"RDZV_ENDPOINT {args.rdzv_endpoint} is in use by another job; choose another port")
        else:
            print_error(f"RDZV_ENDPOINT {args.rdzv_endpoint} is not reached ({str(error).splitlines()[0][:150]})")
        sys.exit(USER_ERROR)
    if job != args.rdzv_id:
        print_error(
            f"RDZV_ENDPOINT {args.rdzv_endpoint} is another job's (id {job}, this one's is {args.rdzv_id}): give each "
            "job a port of its own, and all machines of a job the same flags"
        )
        sys.exit(USER_ERROR)
    more = [] if args.rdzv_conf else ["--rdzv-conf=is_host=false"]
    return [*more, *arguments], store


def explain(failures: dict) -> int | None:
    """The exit status of ranks that failed, after one line where they have not told it; None for torchrun's report."""
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
        print_error("a rank of another machine was lost, its launcher tells why; go on with --resume auto")
        return LOST
    if first.exitcode > 0:
        return None
    number = signal.Signals(-first.exitcode)
    if number in STOPPING:  # before there was anything to save
        return 128 + number
    causes = {signal.SIGKILL: "mostly for want of memory", signal.SIGBUS: "mostly for want of room in /dev/shm"}
    print_error(
        f"rank {rank} was ended by {number.name}, {causes.get(number, 'a fault of its own')}: lower --workers, "
        "--batch-size or --moco-k; the others were stopped, go on with --resume auto"
    )
    return 128 + number


def launch() -> int:
    arguments = sys.argv[1:]
    share_cores()
    for log in (logger, logging.getLogger("torch.distributed.elastic.agent.server.api")):
        log.addFilter(tells_more)
    arguments, _store = hold_endpoint(with_our_defaults(arguments))
    try:
        main(arguments)
    except ChildFailedError as error:
        status = explain(error.failures)
        if status is None:
            raise
        return status
    except SignalException as error:  # asked to stop, it has passed that on, and the ranks have told
        return 128 + error.sigval
    except RendezvousError as error:
        print_error(f"the machines did not meet: {str(error).splitlines()[0]}; check RDZV_ENDPOINT and NNODES")
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(launch())
