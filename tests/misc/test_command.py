"""Test command-line flags, one-line errors and uniform exit statuses."""

import os
import signal
import subprocess
import sys

import pytest

from misc.command import OneOf, Parser, StopRequest, UserError, at_least, between, run

from ..conftest import ROOT


def parser():
    made = Parser("A command.\n\n    python it.py --count 3\n")
    made.add_argument(
        "--count", type=at_least(int, 1), default=3, help="number of repetitions; more repetitions take longer"
    )
    made.add_argument("--rate", type=at_least(float, 0), default=0.0, help="dropout rate, in %%")
    made.add_argument("--share", type=between(float, 0, 1), default=0.5, help="fraction of the subjects to use")
    made.add_argument(
        "--workers", type=at_least(int, 1, "a whole number, at least 1"), default=1, help="number of worker processes"
    )
    made.add_argument("--kind", type=OneOf("new", "old"), default="new", help="table format to write")
    made.add_argument("--place", type=OneOf("a", "b", "c"), help="column to sort the table by")
    made.add_argument(
        "--marks", type=at_least(int, 0), nargs="*", default=[1, 2], help="positions of the axis ticks to draw"
    )
    made.add_argument("--off", action="store_true", help="draw no axis ticks")
    return made


def test_values_are_parsed():
    args = parser().parse_args(["--count", "4", "--share", "1", "--kind", "old", "--marks", "3", "0"])
    assert (args.count, args.share, args.kind, args.marks, args.off) == (4, 1.0, "old", [3, 0], False)
    assert parser().parse_args([]).marks == [1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--count 0", "--count 0 must be at least 1; see --help"),
        ("--count x", "argument --count: invalid int value: 'x'; see --help"),
        ("--rate -1", "--rate -1.0 must be at least 0; see --help"),
        ("--rate nan", "--rate nan must be at least 0; see --help"),
        ("--rate inf", "--rate inf must be at least 0; see --help"),
        ("--share 1.5", "--share 1.5 must be between 0 and 1"),
        ("--share 7x", "--share 7x must be between 0 and 1"),
        ("--workers two", "--workers two must be a whole number, at least 1"),
        ("--kind odd", "--kind odd must be new or old"),
        ("--place d", "--place d must be one of a, b, c"),
        ("--marks 1 -2", "--marks -2 must be at least 0; see --help"),
        ("--cou 4", "unrecognized arguments: --cou 4; see --help"),
        ("--count 0 --nothing", "unrecognized arguments: --nothing; see --help"),
    ],
)
def test_a_wrong_flag_gives_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as left:
        parser().parse_args(flags.split())
    assert left.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


def test_the_help_shows_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("(default: 3)", "(default: 0.0)", "(default: [1, 2])", "--kind {new,old}", "in %", "python it.py"):
        assert words in text
    assert "(default: False)" not in text and "(default: None)" not in text


def run_main(main, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            run(main)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return left.value.code, capsys.readouterr().err


def make_failing_main(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (make_failing_main(UserError("no table at x; make one")), 2, "error: no table at x; make one\n"),
        (
            make_failing_main(OSError(28, "No space left on device", "x")),
            2,
            "error: [Errno 28] No space left on device: 'x'\n",
        ),
        (make_failing_main(KeyboardInterrupt()), 130, "stopped; start again to continue\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped; start again to continue\n"),
    ],
)
def test_exit_status_and_message(main, status, message, capsys):
    assert run_main(main, capsys) == (status, message)


def test_all_project_errors_are_user_errors():
    from data.layout import StoreError
    from misc.experiment import ExperimentError
    from misc.process import DeviceError
    from misc.run.runlog import DivergedError
    from models.checkpoint import CheckpointError
    from preprocess.scan import ScanError

    errors = (StoreError, ExperimentError, DeviceError, DivergedError, CheckpointError, ScanError)
    assert all(issubclass(error, UserError) and issubclass(error, ValueError) for error in errors)


def test_an_unexpected_error_shows_a_traceback_and_exits_at_once(tmp_path):
    """An ordinary exit would wait for a thread that runs for 10 minutes."""
    (tmp_path / "x.py").write_text(
        f"import sys, threading, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom misc.command import run\n"
        "def main():\n    threading.Thread(target=time.sleep, args=(600,)).start()\n    raise IndexError('oh')\n"
        "run(main)\n"
    )
    result = subprocess.run([sys.executable, tmp_path / "x.py"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "IndexError: oh" in result.stderr and "in main" in result.stderr


def test_a_rank_exits_without_shutting_down_the_interpreter(tmp_path):
    """During the shutdown, a thread of Gloo may abort the rank. Threads that write a file must still end first,
    and idle threads of a pool must not delay the exit.
    """
    (tmp_path / "x.py").write_text(
        f"import atexit, sys, threading, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from misc.command import run, UserError\n"
        "def write():\n    time.sleep(0.5)\n    open('written', 'w').close()\n"
        "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\n"
        "def main():\n    threading.Thread(target=write).start()\n    pool.submit(abs, 1).result()\n"
        "    print('done')\n    raise UserError('disk full')\n"
        "atexit.register(print, 'shut down')\nrun(main)\n"
    )
    for rank, words in (({"RANK": "0"}, "done\n"), ({}, "done\nshut down\n")):
        (tmp_path / "written").unlink(missing_ok=True)
        environment = {"PATH": os.environ["PATH"], **rank}
        command = [sys.executable, tmp_path / "x.py"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
        assert (result.returncode, result.stdout, result.stderr) == (2, words, "error: disk full\n")
        assert (tmp_path / "written").exists()


def test_errors_of_other_ranks_show_the_rank(monkeypatch, capsys):
    from misc import command

    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(command, "LATER_SECONDS", 0)
    command.print_error("disk full")
    assert capsys.readouterr().err == "error: (rank 2) disk full\n"


def test_a_stop_request_keeps_the_first_signal():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopRequest()
    assert not stop.number
    try:
        stop.start_recording_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.number == signal.SIGTERM and stop.signal_name == "SIGTERM"


def test_a_low_hard_file_limit_is_refused_and_a_soft_one_raised():
    """Often the soft limit on open files is low, but the hard limit is not. The soft limit is then raised silently."""
    code = (
        "import resource, sys\nfrom misc.command import run\nfrom misc.process import set_up_process\n"
        "soft, hard = int(sys.argv[1]), int(sys.argv[2])\nresource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "run(lambda: set_up_process('cpu') and print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))\n"
    )
    raised, refused = (
        subprocess.run([sys.executable, "-c", code, *limits], capture_output=True, text=True, cwd=ROOT)
        for limits in (("100", "400"), ("100", "100"))
    )
    assert raised.stdout.strip() == "400", raised.stderr
    assert refused.returncode == 2 and "may open only 100 files (ulimit -n); raise the limit to 256" in refused.stderr
