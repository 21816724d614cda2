"""torchrun, without its report of some thirty lines where a rank has told what the user can mend.

    python tools/launch.py --standalone --nproc-per-node 4 train.py --root-dir /data/patches --exp-name mine

Takes torchrun's flags. Exits with status 2 where every rank that failed did (a wrong flag, a missing
file: one line says it); any other failure is reported as torchrun does.
"""

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed.elastic.multiprocessing.api import SignalException, logger
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main, parse_args

from misc.command import USER_ERROR
from misc.cores import usable_cores


def tells_more(record: logging.LogRecord) -> bool:
    """False for torchrun's lines about a rank that ended with USER_ERROR and about ending the others."""
    text = record.getMessage()
    return f"(exitcode: {USER_ERROR})" not in text and "closing signal" not in text


def share_cores() -> None:
    """Divide this machine's cores among its ranks; torchrun would give each one thread, and say so in five lines."""
    ranks = parse_args(sys.argv[1:]).nproc_per_node
    if ranks.isdigit() and int(ranks) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(ranks))))


def launch() -> int:
    share_cores()
    logger.addFilter(tells_more)
    try:
        main()
    except ChildFailedError as error:
        # The ranks that the launcher itself ended have a negative status.
        if {failure.exitcode for failure in error.failures.values() if failure.exitcode >= 0} == {USER_ERROR}:
            return USER_ERROR
        raise
    except SignalException as error:  # asked to stop, it has passed that on, and the ranks have told
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(launch())
