"""What makes a script a command: its flags, its errors in one line, its exit status.

def main() -> int | None:
    parser = Parser(__doc__)
    parser.add_argument("--epochs", type=at_least(int, 1), default=20, help="...")
    ...

if __name__ == "__main__":
    run(main)
"""

import argparse
import contextlib
import ctypes
import errno
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

USER_ERROR = 2  # exit status for what the user can mend; argparse's too
LOST = 75  # of a rank that lost another one (sysexits.h: a temporary failure); the launcher tells of the other
STOPPING = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
)  # asked by these, a program ends in good order
LATER_SECONDS = 5  # for a launcher of ranks, which looks at its processes ten times a second


class UserError(ValueError):
    """Something that the user can mend. The message is all that is shown: what was wrong, where, what to do."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop; its number is the only argument."""


# ============================================================ flags


class Bounded:
    """A number with limits, as the ``type`` of a flag; Parser checks the limits and names the flag.

    Args:
        kind: int or float.
        low, high: smallest and largest value; nan and infinity are never admitted.
        words: what to say of a value outside.
        complete: whether these words say it all, also of a value that is no number; else --help is pointed to.
    """

    def __init__(self, kind: type, low: float, high: float, words: str, complete: bool = False):
        self.kind, self.low, self.high, self.words, self.complete = kind, low, high, words, complete
        self.__name__ = kind.__name__  # argparse's "invalid float value"

    def __call__(self, text: str) -> Any:
        try:
            return self.kind(text)
        except ValueError:
            if self.complete:
                return text
            raise

    def complaint(self, value: Any) -> str | None:
        """What is wrong with a value, to be read after the flag and the value; None where nothing is."""
        fits = not isinstance(value, str) and self.low <= value <= self.high and abs(value) < math.inf
        return None if fits else f": {self.words}{'' if self.complete else '; see --help'}"


def at_least(kind: type, low: float, words: str = "") -> Bounded:
    """A number from ``low`` on. ``words`` replaces the complaint "at least LOW"."""
    return Bounded(kind, low, math.inf, words or f"at least {low}", complete=bool(words))


def between(kind: type, low: float, high: float) -> Bounded:
    """A number from ``low`` to ``high``, both included."""
    return Bounded(kind, low, high, f"between {low} and {high}", complete=True)


class OneOf:
    """One of a few words, as the ``type`` of a flag."""

    def __init__(self, *words: str):
        self.words = words

    def __call__(self, text: str) -> str:
        return text

    def complaint(self, value: str) -> str | None:
        if value in self.words:
            return None
        return " is neither " + " nor ".join(self.words) if len(self.words) == 2 else f" is none of {self}"

    def __str__(self) -> str:
        return ", ".join(self.words)


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, shows every default that says something, and a OneOf's words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False or action.default == "" or action.nargs == 0
        return (action.help or "") + ("" if silent or not action.option_strings else " (default: %(default)s)")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, OneOf):
            return "{" + ",".join(action.type.words) + "}"
        return super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in the help, whole flag names, and limits beside each flag."""

    def __init__(self, description: str | None = None, **more: Any):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        self.refuse(f"{message}; see --help")

    def refuse(self, message: str) -> NoReturn:
        """Leave with a message that already says what to do."""
        print_error(message)
        sys.exit(USER_ERROR)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:  # parse_args refuses these, and they come first
            return parsed, rest
        for action in self._actions:
            if isinstance(action.type, (Bounded, OneOf)):
                given = getattr(parsed, action.dest, None)
                for value in given if isinstance(given, list) else [given]:
                    complaint = None if value is None else action.type.complaint(value)
                    if complaint:
                        self.refuse(f"{action.option_strings[-1]} {value}{complaint}")
        return parsed, rest


# ============================================================ errors and endings


def print_error(message: object) -> None:
    """One line on standard error.

    Ranks mostly share a fault: the others give the first one time to tell it, and the launcher to
    end them, before they tell theirs.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(LATER_SECONDS)
    print(f"error: {f'(rank {rank}) ' if rank else ''}{message}", file=sys.stderr, flush=True)


def _stop(number: int, _: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the ending
    raise Stopped(number)


def run(main: Callable[[], int | None], memory: str = "--batch-size, --workers or --num-workers") -> NoReturn:
    """Run a script's main and leave with an exit status, the same in every script.

    ``memory`` names the flags to lower where memory does not do.

    0, or what main returns; 2 after a UserError or an error of the system (a full disk, a folder that
    may not be written) or for want of memory, told in one line; 128 + the signal's number after one of STOPPING;
    1 with a traceback after anything else, without waiting for other processes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that is not UTF-8 gets a code for what it cannot show
            stream.reconfigure(errors="backslashreplace")
    if "RANK" not in os.environ:  # a rank is ended by SIGTERM when another has failed, which tells why
        for number in STOPPING:
            if number != signal.SIGINT and heeded(number):
                signal.signal(number, _stop)
    try:
        status = main() or 0
    except (UserError, OSError) as error:
        print_error(out_of_memory(error, memory) if is_out_of_memory(error) else error)
        status = USER_ERROR
    except KeyboardInterrupt as stop:
        print("stopped; start again to go on", file=sys.stderr)
        status = 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
    except Exception as error:
        if is_out_of_memory(error):
            print_error(out_of_memory(error, memory))
            leave(USER_ERROR)
        traceback.print_exc()
        leave(1)
    sys.exit(status)


def leave(status: int) -> NoReturn:
    """End this process at once; data-loader workers and other ranks are not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def heeded(number: int) -> bool:
    """Whether a signal means anything to this process: nohup has SIGHUP ignored, and so it stays."""
    return number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN


# ============================================================ memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python, NumPy or torch, says that the host's or a GPU's memory did not do."""
    words = ("can't allocate memory", "out of memory", "cannot allocate memory", "unable to allocate")
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def out_of_memory(error: BaseException, lower: str) -> str:
    """The sentence; ``lower`` names the flags."""
    gpu = "cuda" in str(error).lower()
    asked = re.search(r"(?:allocate|you tried to allocate) ([\d.]+ ?[a-zA-Z]+)", str(error), re.IGNORECASE)
    size = f" (asked for {asked[1]} more)" if asked else ""
    return f"out of memory on the {'GPU' if gpu else 'host'}{size}; lower {lower}"


class StopRequest:
    """Notes the signals of STOPPING instead of stopping at once, for a loop that saves first.

    Attributes:
        number: of the first signal received; 0 before.
    """

    def __init__(self):
        self.number = 0

    def listen(self) -> None:
        """Take the signals from now on."""
        for number in STOPPING:
            if heeded(number):
                signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        self.number = self.number or number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def leave(self) -> NoReturn:
        """End this process at once, with a status that says which signal it was: it may be started again."""
        leave(128 + self.number)


# ============================================================ processes and cores

PR_SET_PDEATHSIG = 1  # prctl(2): a signal when the process that started this one ends


def end_with_parent(number: int) -> None:
    """Have the system send this process a signal when the one that started it ends, so that none is left behind."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def usable_cores() -> int:
    """Cores that this process may run on; Slurm and containers give fewer than the machine has."""
    from dask.system import CPU_COUNT  # knows a container's quota too

    return CPU_COUNT
