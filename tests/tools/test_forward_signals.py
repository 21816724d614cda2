"""A signal to a launcher's shell stops the running command and sets the launcher's exit status."""

import signal
import subprocess
import time

import pytest

from ..conftest import ROOT

STEP = 'trap "echo stopped; exit 0" TERM; echo begun; while :; do sleep 0.1; done'


def start_launcher(tmp_path, ignored=()):
    script = f". '{ROOT}/tools/forward_signals.sh'\nrun sh -c '{STEP}'\necho went on\n"
    (tmp_path / "launcher.sh").write_text(script)

    def prepare():
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        ["sh", str(tmp_path / "launcher.sh")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_is_forwarded(tmp_path, number):
    process = start_launcher(tmp_path)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "stopped\n"
    assert process.returncode == 128 + number


def test_nohup_is_obeyed(tmp_path):
    process = start_launcher(tmp_path, ignored=(signal.SIGHUP,))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.communicate(timeout=20)[0] == "stopped\n"
