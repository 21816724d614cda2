"""Shared behaviour of the command-line scripts: flags, one-line errors and exit statuses.

def main() -> int | None:
    parser = Parser(__doc__)
    parser.add_argument("--epochs", type=at_least(int, 1), default=20, help="...")
    ...

if __name__ == "__main__":
    run(main)
"""

import argparse
import atexit
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

USER_ERROR = 2  # exit status for errors that the user can fix, the same as argparse's
LOST = 75  # exit status of a rank that lost contact with another rank (EX_TEMPFAIL in sysexits.h)
STOPPING = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
)  # signals on which a program shuts down in an orderly way
LATER_SECONDS = 5  # wait before ranks other than rank 0 print an error; the launcher usually ends these ranks sooner


class UserError(ValueError):
    """An error that the user can fix. Scripts print only the error's message: what is wrong, where, and what to do."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop. The only argument of the exception is the number of the signal."""


# ============================================================ flags


class Bounded:
    """A number with limits, for use as the ``type`` of a flag.

    The class Parser checks the limits and names the flag in errors.

    Args:
        number_type: int or float.
        low, high: smallest and largest allowed value; nan and infinity are never allowed.
        requirement: the requirement, printed after "must be" for a value outside the limits.
        is_full_message: if True, ``requirement`` is also the message for text that is not a number; if False, the
            message refers to --help.
    """

    def __init__(self, number_type: type, low: float, high: float, requirement: str, is_full_message: bool = False):
        self.kind, self.low, self.high, self.words, self.complete = number_type, low, high, requirement, is_full_message
        self.__name__ = number_type.__name__  # argparse prints this name, as in "invalid float value"

    def __call__(self, text: str) -> Any:
        try:
            return self.kind(text)
        except ValueError:
            if self.complete:
                return text
            raise

    def describe_violation(self, value: Any) -> str | None:
        """Return the part of an error message that follows the flag and its value, or None if the value is allowed."""
        fits = not isinstance(value, str) and self.low <= value <= self.high and abs(value) < math.inf
        return None if fits else f" must be {self.words}{'' if self.complete else '; see --help'}"


def at_least(number_type: type, low: float, requirement: str = "") -> Bounded:
    """Accept numbers of at least ``low``. ``requirement`` replaces the default text "at least LOW"."""
    return Bounded(number_type, low, math.inf, requirement or f"at least {low}", is_full_message=bool(requirement))


def between(number_type: type, low: float, high: float) -> Bounded:
    """Accept numbers from ``low`` to ``high``, both included."""
    return Bounded(number_type, low, high, f"between {low} and {high}", is_full_message=True)


class OneOf:
    """One of a fixed set of words, for use as the ``type`` of a flag."""

    def __init__(self, *allowed_words: str):
        self.words = allowed_words

    def __call__(self, text: str) -> str:
        return text

    def describe_violation(self, value: str) -> str | None:
        if value in self.words:
            return None
        return " must be " + " or ".join(self.words) if len(self.words) == 2 else f" must be one of {self}"

    def __str__(self) -> str:
        return ", ".join(self.words)


class Help(argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the description's line breaks and shows default values and allowed words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False or action.default == "" or action.nargs == 0
        return (action.help or "") + ("" if silent or not action.option_strings else " (default: %(default)s)")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, OneOf):
            return "{" + ",".join(action.type.words) + "}"
        return super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, defaults in the help, unabbreviated flags and checked limits."""

    def __init__(self, description: str | None = None, **more: Any):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        self.refuse(f"{message}; see --help")

    def refuse(self, message: str) -> NoReturn:
        """Print an error message without a reference to --help, and exit."""
        print_error(message)
        sys.exit(USER_ERROR)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:  # parse_args reports these unknown flags
            return parsed, rest
        for action in self._actions:
            if isinstance(action.type, (Bounded, OneOf)):
                given = getattr(parsed, action.dest, None)
                for value in given if isinstance(given, list) else [given]:
                    complaint = None if value is None else action.type.describe_violation(value)
                    if complaint:
                        self.refuse(f"{action.option_strings[-1]} {value}{complaint}")
        return parsed, rest


# ============================================================ errors and exit


def print_error(message: object) -> None:
    """Print one line on standard error.

    All ranks usually fail for the same reason, so rank 0 prints its error first. The other ranks wait LATER_SECONDS
    before they print an error, because the launcher usually ends them within this time.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(LATER_SECONDS)
    print(f"error: {f'(rank {rank}) ' if rank else ''}{message}", file=sys.stderr, flush=True)


def _raise_stopped(signal_number: int, _: Any) -> NoReturn:
    signal.signal(signal_number, signal.SIG_IGN)  # a second signal must not disturb the shutdown
    raise Stopped(signal_number)


def run(main: Callable[[], int | None], memory: str = "--batch-size, --workers or --num-workers") -> NoReturn:
    """Run a script's main function and exit. All scripts use the same exit statuses.

    - Status 0, or the value that ``main`` returns, if no error occurs.
    - Status 2 with a one-line message after a UserError or a system error (a full disk, a folder without
      write permission), or if memory runs out.
    - Status 128 plus the signal's number after a signal in STOPPING.
    - Status 1 with a traceback after any other error, without waiting for other processes.

    Args:
        main: the script's main function.
        memory: flags whose values the out-of-memory message suggests lowering.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # print backslash escapes for characters that the console cannot encode
            stream.reconfigure(errors="backslashreplace")
    if "RANK" not in os.environ:  # the launcher sends SIGTERM to a rank if another rank has failed and printed why
        for number in STOPPING:
            if number != signal.SIGINT and should_handle_signal(number):
                signal.signal(number, _raise_stopped)
    try:
        status = main() or 0
    except (UserError, OSError) as error:
        print_error(describe_out_of_memory(error, memory) if is_out_of_memory(error) else error)
        status = USER_ERROR
    except KeyboardInterrupt as stop:
        print("stopped; start again to continue", file=sys.stderr)
        status = 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
    except Exception as error:
        if is_out_of_memory(error):
            print_error(describe_out_of_memory(error, memory))
            exit_at_once(USER_ERROR)
        traceback.print_exc()
        exit_at_once(1)
    if "RANK" in os.environ:
        # Gloo's threads outlive the process group. If one needs Python while the interpreter shuts down, it aborts the
        # rank (pytorch pull request 179291). Exit handlers run after all threads and pools have ended, but before that.
        atexit.register(exit_at_once, status)
    sys.exit(status)


def exit_at_once(status: int) -> NoReturn:
    """End this process at once, without waiting for data-loader workers or other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def should_handle_signal(signal_number: int) -> bool:
    """Return whether this process should handle a signal. Under nohup, SIGHUP is ignored and must stay ignored."""
    return signal_number != signal.SIGHUP or signal.getsignal(signal_number) is not signal.SIG_IGN


# ============================================================ memory


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error from Python, NumPy or torch means that host or GPU memory ran out."""
    words = ("can't allocate memory", "out of memory", "cannot allocate memory", "unable to allocate")
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def describe_out_of_memory(error: BaseException, flags_to_lower: str) -> str:
    """Return the out-of-memory message; ``flags_to_lower`` names the flags to lower."""
    gpu = "cuda" in str(error).lower()
    asked = re.search(r"(?:allocate|you tried to allocate) ([\d.]+ ?[a-zA-Z]+)", str(error), re.IGNORECASE)
    size = f" ({asked[1]} more requested)" if asked else ""
    return f"out of memory on the {'GPU' if gpu else 'host'}{size}; lower {flags_to_lower}"


class StopRequest:
    """Records a stop signal (STOPPING) instead of ending the process at once, so that a loop can save before it stops.

    Attributes:
        number: number of the first signal received; 0 if none has arrived.
    """

    def __init__(self):
        self.number = 0

    def start_recording_signals(self) -> None:
        """Start recording the signals in STOPPING."""
        for number in STOPPING:
            if should_handle_signal(number):
                signal.signal(number, self._record_signal)

    def _record_signal(self, number: int, _: Any) -> None:
        self.number = self.number or number

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.number).name

    def exit_with_signal_status(self) -> NoReturn:
        """End this process at once with a status that encodes the signal, so that a scheduler can restart it."""
        exit_at_once(128 + self.number)


# ============================================================ processes and cores

PR_SET_PDEATHSIG = 1  # prctl(2): send a signal when the parent process ends


def request_signal_on_parent_exit(signal_number: int) -> None:
    """Ask the operating system to send this process a signal when its parent process ends."""
    with contextlib.suppress(OSError, AttributeError):  # prctl exists only on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)


def count_usable_cores() -> int:
    """Return the number of cores that this process may use; Slurm and containers may allow only some cores."""
    from dask.system import CPU_COUNT  # CPU_COUNT also respects a container's CPU quota

    return CPU_COUNT
