"""Test the batch script for Slurm with stand-ins for Slurm and the training."""

import os
import signal
import subprocess
import time

from ..conftest import ROOT

TRAINING = 'trap "echo saved; exit 138" USR1\necho "$@" > flags\nwhile :; do sleep 0.1; done\n'


def test_the_job_saves_and_requeues_before_its_time_limit(tmp_path):
    (tmp_path / "run_train.sh").write_text(TRAINING)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    command = ["bash", str(ROOT / "tools" / "train_slurm.sh"), "--exp-name", "mine"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not (tmp_path / "flags").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert (tmp_path / "flags").read_text() == "--resume auto --exp-name mine\n"
    assert output == "saved\nrequeue 42\n"
