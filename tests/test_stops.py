"""Test what a training run saves, prints and leaves behind if it is stopped, is killed or diverges."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from misc.experiment import UNFINISHED

from .conftest import ROOT
from .test_train import SMALL, assert_same_checkpoint, read_records

LAUNCH = ("tools/launch.py", "--standalone", "--nproc-per-node", 2)
CHILDREN = "/proc/{0}/task/{0}/children"


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store, grid):
    folder = tmp_path_factory.mktemp("store")
    make_store(folder, 9, grid)
    return folder


def flags_of(store, name, *more):
    ours = ("--batch-size", 4, "--moco-k", 8, "--device", "cpu", "--print-freq", 1)
    return ("--root-dir", store, "--exp-name", name, *SMALL, *ours, *more)


def start_command(*command, cwd):
    command = [sys.executable, *(str(ROOT / part) if str(part).endswith(".py") else str(part) for part in command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env=environment
    )


def wait_for_output(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


def list_children(pid):
    with open(CHILDREN.format(pid)) as stream:
        return [int(child) for child in stream.read().split()]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return ") Z " not in stream.read()
    except OSError:
        return False


def wait_until_ended(pids):
    """Return whether all processes end within 15 seconds."""
    end = time.monotonic() + 15
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.2)
    return not any(map(is_running, pids))


@pytest.mark.slow
def test_a_resumed_run_logs_each_step_once_with_the_same_means(store, run, tmp_path):
    """Two ranks resume within an epoch. The logged losses must be means over both ranks, not over rank 0 alone."""
    flags = flags_of(store, "k", "--epochs", 2, "--print-freq", 5)
    alike = {"OMP_NUM_THREADS": "1"}  # rounding depends on the number of threads
    run(*LAUNCH, ROOT / "train.py", *flags, "--exp-name", "whole", cwd=tmp_path, env=alike)
    process = start_command(*LAUNCH, "train.py", *flags, cwd=tmp_path)
    wait_for_output(process, "epoch 1 [5/12]")
    os.kill(list_children(process.pid)[1], signal.SIGUSR1)  # any rank may get the signal
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGUSR1 and "stopped by SIGUSR1; saved" in rest, rest
    whole, ours = (tmp_path / "ssl_exp" / name for name in ("whole", "k"))
    step = torch.load(ours / UNFINISHED, weights_only=True)["step"] if (ours / UNFINISHED).exists() else 0
    with open(ours / "log.jsonl", "a") as log:  # after a SIGKILL, the log may contain later steps than the checkpoint
        log.write(json.dumps({"kind": "step", "epoch": 2, "step": 7, "loss": 0.0}) + '\n{"kind"')
    run(*LAUNCH, ROOT / "train.py", *flags, "--resume", "auto", cwd=tmp_path, env=alike)
    places = [(record["epoch"], record["step"]) for record in read_records(whole)]
    assert [(record["epoch"], record["step"]) for record in read_records(ours)] == places, step
    for kind in ("step", "epoch"):
        ours_told, wanted = ([record["loss"] for record in read_records(folder, kind)] for folder in (ours, whole))
        np.testing.assert_allclose(ours_told, wanted, rtol=1e-5)
    assert len(read_records(ours, "resume")) == 1 and len(list(ours.glob("superseded-*-log.jsonl"))) == 1
    assert_same_checkpoint(*(folder / "checkpoint_patch_0002.pth.tar" for folder in (whole, ours)))


@pytest.mark.slow
def test_a_killed_rank_stops_the_others_with_one_line(store, tmp_path):
    process = start_command(*LAUNCH, "train.py", *flags_of(store, "d", "--epochs", 500), cwd=tmp_path)
    wait_for_output(process, "epoch 1 [3/12]")
    ranks = list_children(process.pid)
    begun = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    rest = process.communicate(timeout=120)[0]
    told = [line for line in rest.splitlines() if "samples/s" not in line and "epoch" not in line]
    assert told == [
        "error: rank 1 was ended by SIGKILL, usually because memory ran out; the others were stopped. Lower --workers, "
        "--batch-size or --moco-k, and continue with --resume auto"
    ], rest
    assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - begun < 15 and wait_until_ended(ranks)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_orphans(store, tmp_path):
    process = start_command(*LAUNCH, "train.py", *flags_of(store, "l", "--epochs", 500, "--workers", 2), cwd=tmp_path)
    wait_for_output(process, "epoch 1 [3/12]")
    ranks = list_children(process.pid)
    process.kill()
    process.communicate(timeout=120)
    assert wait_until_ended(ranks) and (tmp_path / "ssl_exp" / "l" / UNFINISHED).exists()


@pytest.mark.slow
def test_a_signal_to_a_worker_saves_and_nohup_is_obeyed(store, tmp_path):
    flags = flags_of(store, "w", "--epochs", 500, "--workers", 2)
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    process = start_command("-c", code, sys.executable, "train.py", *flags, cwd=tmp_path)
    wait_for_output(process, "epoch 1 [2/12]")
    process.send_signal(signal.SIGHUP)
    wait_for_output(process, "epoch 1 [9/12]")
    readers = list_children(process.pid)
    os.kill(readers[0], signal.SIGTERM)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM; saved" in rest, rest
    assert wait_until_ended(readers) and (tmp_path / "ssl_exp" / "w" / UNFINISHED).exists()


@pytest.mark.slow
def test_a_non_finite_state_is_never_saved(store, run, tmp_path):
    """A non-finite loss is also detected between printed steps.

    A run with a lower learning rate resumes from the last good state.
    """
    flags = flags_of(store, "n", "--print-freq", 5, "--resume", "auto")
    run("train.py", *flags, "--epochs", 1, cwd=tmp_path)
    folder = tmp_path / "ssl_exp" / "n"
    bad = run("train.py", *flags, "--epochs", 3, "--save-minutes", 1e-4, "--lr", 1e30, cwd=tmp_path, check=False)
    assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1
    for words in (
        "at epoch 2, step",
        "has values that are too large or not finite",
        "the last good checkpoint is",
        "checkpoint_patch_0001",
        "a lower --lr",
    ):
        assert words in bad.stderr
    assert {path.name for path in folder.glob("*.pth.tar")} == {"checkpoint_patch_0001.pth.tar"}
    good = run("train.py", *flags, "--epochs", 2, "--lr", 0.001, cwd=tmp_path)
    assert "note: --lr was 0.01 in checkpoint_patch_0001.pth.tar and is now 0.001" in good.stdout
    assert "note: --epochs was 1" in good.stdout and "epoch 2/2" in good.stdout


@pytest.mark.slow
def test_resuming_with_other_data_is_noted_or_refused(store, make_store, run_here, run, tmp_path, grid):
    flags = flags_of(store, "r", "--epochs", 1)
    run("train.py", *flags, cwd=tmp_path)
    make_store(tmp_path / "other", 9, grid, seed=8)
    make_store(tmp_path / "table", 9, grid[::-1])
    go_on = (*flags, "--resume", "auto")
    told = run("train.py", *go_on, "--root-dir", "other", cwd=tmp_path)
    assert "note: the version of the store was" in told.stdout and "different patches or subjects" in told.stdout
    refused = run_here("train.py", *go_on, "--root-dir", "table", "--epochs", 2, cwd=tmp_path)
    assert refused.returncode == 2 and "was trained on a different table of locations" in refused.stderr
    content = torch.load(tmp_path / "ssl_exp" / "r" / "checkpoint_patch_0001.pth.tar", weights_only=True)
    assert content["config"]["world_size"] == 1 and content["config"]["bn_groups"] == 2


@pytest.mark.slow
def test_a_changed_store_stops_training(store, make_store, grid, tmp_path):
    make_store(tmp_path / "store", 9, grid)
    process = start_command("train.py", *flags_of("store", "c", "--epochs", 500, "--workers", 1), cwd=tmp_path)
    wait_for_output(process, "epoch 1 [2/12]")
    for path in (tmp_path / "store" / "grouped_patch").iterdir():
        np.save(path.with_suffix(".new.npy"), np.load(path)[::-1])
        path.with_suffix(".new.npy").rename(path)
    rest = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 2 and "has changed since this run opened the store" in rest[-1], rest[-5:]


def make_environment(**variables):
    return {key: value for key, value in {**os.environ, **variables}.items() if value}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(RANK="1", WORLD_SIZE="2"), "RANK=1, WORLD_SIZE=2 is set without MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 is set without RANK, MASTER_ADDR, MASTER_PORT"),
        (dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"), "from 0 to WORLD_SIZE - 1"),
        (dict(OMPI_COMM_WORLD_SIZE="2"), "OMPI_COMM_WORLD_SIZE is 2, but RANK and WORLD_SIZE are not set"),
    ],
)
def test_incomplete_rank_variables_are_refused(store, run_here, tmp_path, monkeypatch, variables, message):
    monkeypatch.setattr("misc.command.LATER_SECONDS", 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = run_here("train.py", *flags_of(store, "x", "--epochs", 1), cwd=tmp_path)
    assert refused.returncode == 2 and message in refused.stderr and not (tmp_path / "ssl_exp").exists()


@pytest.mark.slow
def test_kubeflow_ranks_join_and_compare_their_flags(store, tmp_path):
    for port, more in (("29931", ()), ("29932", ("--lr", 0.5))):
        name = f"k{port}"
        processes = []
        for rank, given in (("0", ()), ("1", more)):
            command = [sys.executable, ROOT / "train.py", *flags_of(store, name, "--epochs", 1, *given)]
            environment = make_environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
            processes.append(
                subprocess.Popen(
                    list(map(str, command)),
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**environment, "OMP_NUM_THREADS": "1"},
                )
            )
        (output, errors), _ = (process.communicate(timeout=120) for process in processes)
        if not more:
            assert [process.returncode for process in processes] == [0, 0] and "2 x cpu" in output, errors
        else:
            assert [process.returncode for process in processes] == [2, 2]
            assert "error: lr is 0.5 on rank 1" in errors and "0.01 on rank 0" in errors


@pytest.mark.slow
def test_a_hanging_rank_is_named(store, tmp_path):
    process = start_command(
        *LAUNCH, "train.py", *flags_of(store, "h", "--epochs", 400, "--patience", 0.15), cwd=tmp_path
    )
    wait_for_output(process, "epoch 1 [2/")
    ranks = {}
    for pid in list_children(process.pid):
        with open(f"/proc/{pid}/environ", "rb") as stream:
            ranks |= {part[5:]: pid for part in stream.read().split(b"\0") if part.startswith(b"RANK=")}
    os.kill(ranks[b"1"], signal.SIGSTOP)
    try:
        wait_for_output(process, "rank 1 (")
    finally:
        os.kill(ranks[b"1"], signal.SIGKILL)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "Traceback" not in rest
