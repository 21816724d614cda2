"""Test the trainer: schedule, loop, resuming and refused arguments. Most tests run train.py from the command line."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data.augment import Augmentation
from data.dataset import PatchBatch, PatchDataset
from data.locations import neighbor_table, normalize_locations
from data.sampler import LocationBatchSampler
from data.store import PatchStore
from misc.experiment import UNFINISHED
from misc.run.flags import parse_arguments
from misc.run.recipes import RECIPES
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.step import STATISTICS, LocationTable, TrainingStep, make_optimizer
from tools.timing.measure import has_fast_bf16

from .conftest import ROOT, step_views

SMALL = (
    "--batch-size",
    3,
    "--moco-k",
    6,
    "--rep-dim",
    8,
    "--moco-dim",
    4,
    "--num-experts",
    2,
    "--workers",
    0,
    "--save-minutes",
    0,
)


def parse_flags(*flags):
    return parse_arguments(None, ["--root-dir", "x", "--exp-name", "x", *map(str, flags)])


def read_records(folder, kind="step"):
    return [
        record for record in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if record["kind"] == kind
    ]


def test_defaults_are_the_published_values():
    args = parse_flags()
    published = dict(
        epochs=20, batch_size=128, lr=0.01, momentum=0.9, weight_decay=1e-4, rep_dim=128, moco_dim=128, moco_k=4096
    )
    published |= dict(moco_m=0.999, moco_t=0.2, num_experts=8, num_coordinates=1, k_neighbors=2, beta=1.0, warm_up=0)
    published |= dict(
        augmentation="agc", workers=16, print_freq=10, seed=0, mlp=True, lr_schedule="cosine", schedule=[120, 160]
    )
    assert {name: getattr(args, name) for name in published} == published


def test_a_recipe_sets_defaults_that_flags_override():
    small = parse_flags("--recipe", "small")
    assert {name: getattr(small, name) for name in RECIPES["small"]} == RECIPES["small"]
    assert small.moco_t == 0.2 and small.weight_decay == 1e-4 and small.recipe == "small"
    other = parse_flags("--lr", 0.1, "--recipe=small", "--negatives", "queue")
    assert (other.lr, other.negatives, other.moco_m) == (0.1, "queue", 0.9)
    assert parse_flags().negatives == "queue" and parse_flags().bn_groups is None


@pytest.mark.parametrize("epoch", [0, 1, 7, 19])
def test_cosine(epoch):
    assert train.compute_learning_rate(epoch, parse_flags()) == pytest.approx(
        0.01 * 0.5 * (1 + math.cos(math.pi * epoch / 20))
    )


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.5), (1, 0.5), (2, 0.05), (4, 0.05), (5, 0.005), (9, 0.005)])
def test_steps(epoch, rate):
    args = parse_flags("--lr", 0.5, "--lr-schedule", "step", "--schedule", 2, 5)
    assert train.compute_learning_rate(epoch, args) == pytest.approx(rate)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_losses_warm_up_beta_and_accuracy(grid, epoch):
    """Recompute the statistics of one step from the model's logits."""
    args = parse_flags("--warm-up", 1, "--beta", 0.3, "--moco-k", 6, "--batch-size", 3)
    torch.manual_seed(0)
    model = DrasCLR(Encoder, 6, 8, 4, 2, 1, 6, 0.9, 0.2, True)
    twin = DrasCLR(Encoder, 6, 8, 4, 2, 1, 6, 0.9, 0.2, True)
    twin.load_state_dict(model.state_dict())
    patches = torch.randint(-1024, 241, (3, 3, 32, 32, 32), dtype=torch.int16)
    batch = PatchBatch(epoch, 4, 1, patches[:, 0], patches[:, 1:])
    table, near = torch.from_numpy(normalize_locations(grid)), torch.from_numpy(neighbor_table(grid, 2))
    augmentation = Augmentation("agc")
    places = LocationTable.from_arrays(normalize_locations(grid), neighbor_table(grid, 2), torch.device("cpu"))
    views = step_views(batch, augmentation, args.seed, range(1), torch.device("cpu"))
    loss, figures, _ = TrainingStep(model, places)(4, views, args.beta if epoch >= args.warm_up else 0.0)

    query, key, around = step_views(batch, augmentation, 0, range(1), torch.device("cpu"))
    here = table[4].expand(3, 3)
    patch, neighbor, labels = twin(4, [query, here], [key, here], [around, table[near[4]].expand(3, 2, 3)])
    wanted = [F.cross_entropy(patch, labels), F.cross_entropy(neighbor, labels)]
    total = wanted[0] + (0.3 * wanted[1] if epoch >= 1 else 0)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    accuracies = [100 * sum(int(row.argmax()) == 0 for row in logits) / 3 for logits in (patch, neighbor)]
    torch.testing.assert_close(
        figures[:5], torch.stack([*wanted, total, *map(torch.tensor, accuracies)]).detach(), rtol=1e-4, atol=1e-4
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store, grid):
    folder = tmp_path_factory.mktemp("store")
    make_store(folder, 7, grid)
    return folder


@pytest.fixture(scope="module")
def trained(store, run, tmp_path_factory):
    """Train two epochs without interruption."""
    folder = tmp_path_factory.mktemp("run")
    result = run(
        "train.py", "--root-dir", store, "--exp-name", "a", "--epochs", 2, "--print-freq", 1, *SMALL, cwd=folder
    )
    return folder, result.stdout


def test_files_of_a_finished_run(trained, store):
    folder, output = trained
    experiment = folder / "ssl_exp" / "a"
    names = {path.name.split(".out.")[0] for path in experiment.iterdir()}
    assert names == {
        "configs.json",
        "log.jsonl",
        "events",
        "checkpoint_patch_0001.pth.tar",
        "checkpoint_patch_0002.pth.tar",
    }
    configs = json.loads((experiment / "configs.json").read_text())
    assert (
        configs["root_dir"] == str(store)
        and configs["batch_size"] == 3
        and configs["versions"]["torch"] == torch.__version__
    )
    assert configs["git_commit"]
    steps, epochs = read_records(experiment), read_records(experiment, "epoch")
    assert [(r["epoch"], r["step"], r["location"]) for r in steps] == [
        (epoch, step, (step - 1) // 2) for epoch in (1, 2) for step in range(1, 13)
    ]
    assert [r["lr"] for r in epochs] == [0.01, 0.005]
    for epoch in (1, 2):  # an epoch's statistics are the means over its steps
        mean = np.mean([r["loss"] for r in steps if r["epoch"] == epoch])
        assert epochs[epoch - 1]["loss"] == pytest.approx(mean, rel=1e-4)
    content = torch.load(experiment / "checkpoint_patch_0002.pth.tar", weights_only=True)
    assert content["epoch"] == 2 and content["arch"] == "custom"
    assert content["state_dict"]["module.queue"].shape == (4, 6, 6)
    # At each location, 4 steps with 3 keys each fill the queue's 6 rows twice, so that the pointer is 0 again.
    assert content["state_dict"]["module.queue_ptr"].tolist() == [0] * 6
    assert len(content["optimizer"]["param_groups"][0]["params"]) == 164
    assert "epoch 2/2" in output and "samples/s" in output


def test_tensorboard_curves_are_written(trained):
    from tensorboard_logger.tf_protobuf.event_pb2 import Event

    folder, _ = trained
    (path,) = (folder / "ssl_exp" / "a").glob("events.out.tfevents.*")
    data, tags, offset = path.read_bytes(), set(), 0
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 8], "little")
        event = Event.FromString(data[offset + 12 : offset + 12 + length])
        tags |= {value.tag for value in event.summary.value}
        offset += 12 + length + 4
    assert {f"train/{name}" for name in (*STATISTICS, "lr", "samples_per_s")} <= tags


@pytest.mark.parametrize("workers", [4])
def test_workers_do_not_change_the_losses(trained, store, run, tmp_path, workers):
    flags = list(SMALL)
    flags[flags.index("--workers") + 1] = workers
    code = (
        "import dask.system, runpy, sys; dask.system.CPU_COUNT = 4; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    # Request four workers, although the machine may have fewer cores.
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        str(ROOT / "train.py"),
        "--root-dir",
        str(store),
        "--exp-name",
        "w",
    ]
    command += ["--epochs", "1", "--print-freq", "1", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert f"{workers} data-loader workers" in result.stdout
    # The cosine schedules for one epoch and for two epochs differ only after the first epoch.
    ours = [record["loss"] for record in read_records(tmp_path / "ssl_exp" / "w")]
    assert ours == [record["loss"] for record in read_records(trained[0] / "ssl_exp" / "a") if record["epoch"] == 1]


def assert_same_checkpoint(first, second):
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    assert a["epoch"] == b["epoch"]
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    for index, entry in a["optimizer"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, b["optimizer"]["state"][index][name]), name
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert torch.equal(a["rng_state"], b["rng_state"])


def test_a_resumed_run_equals_an_uninterrupted_run(trained, store, run, tmp_path):
    done = trained[0] / "ssl_exp" / "a"
    ours = tmp_path / "ssl_exp" / "a"
    ours.mkdir(parents=True)
    (ours / "checkpoint_patch_0001.pth.tar").write_bytes((done / "checkpoint_patch_0001.pth.tar").read_bytes())
    flags = ("--root-dir", store, "--exp-name", "a", "--epochs", 2, *SMALL)
    refused = run("train.py", *flags, cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "already has checkpoints; use --resume auto" in refused.stderr
    result = run("train.py", *flags, "--resume", "auto", cwd=tmp_path)
    assert "after 1 epochs" in result.stdout
    assert_same_checkpoint(done / "checkpoint_patch_0002.pth.tar", ours / "checkpoint_patch_0002.pth.tar")
    again = run("train.py", *flags, "--resume", "auto", cwd=tmp_path)
    assert "nothing to do: 2 of 2 epochs are done" in again.stdout


def stop_at_line(line, number, *flags, cwd, launcher=()):
    """Start train.py and send a signal when it prints ``line``.

    Returns: The exit status, the output after the signal, and the seconds until the process ended.
    """
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, flags)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    for printed in process.stdout:
        if line in printed:
            break
    start = time.monotonic()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=120)
    return process.returncode, rest, time.monotonic() - start


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_resumes_at_that_step(trained, store, run, tmp_path):
    flags = ("--root-dir", store, "--exp-name", "a", "--epochs", 2, "--print-freq", 1, *SMALL)
    status, rest, _ = stop_at_line("epoch 1 [3/12]", signal.SIGTERM, *flags, cwd=tmp_path)
    assert status == 128 + signal.SIGTERM, rest
    assert "stopped by SIGTERM; saved" in rest
    folder = tmp_path / "ssl_exp" / "a"
    assert torch.load(folder / UNFINISHED, weights_only=True)["step"] in range(3, 12)
    result = run("train.py", *flags, "--resume", "auto", cwd=tmp_path)
    assert "after 0 epochs and" in result.stdout
    done = trained[0] / "ssl_exp" / "a"
    assert_same_checkpoint(done / "checkpoint_patch_0001.pth.tar", folder / "checkpoint_patch_0001.pth.tar")
    assert_same_checkpoint(done / "checkpoint_patch_0002.pth.tar", folder / "checkpoint_patch_0002.pth.tar")
    assert not (folder / UNFINISHED).exists()
    assert read_records(folder, "epoch")[0]["loss"] == pytest.approx(read_records(done, "epoch")[0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_with_every_option_resumes(store, run, tmp_path):
    """A resumed run restores the subjects of the queue's keys, AdamW's state and accumulated gradients."""
    (tmp_path / "some.csv").write_text("sid\n" + "\n".join(PatchStore(store).sids[1:]) + "\n")
    choices = ("--mask-own", "--optimizer", "adamw", "--lr", 1e-3, "--accumulate", 2, "--location-order", "interleaved")
    more = ("--subjects", "some.csv", "--bn-groups", 1)
    flags = ("--root-dir", store, "--epochs", 2, "--print-freq", 1, *SMALL, *choices, *more)
    run("train.py", *flags, "--exp-name", "whole", cwd=tmp_path)
    whole, ours = (tmp_path / "ssl_exp" / name for name in ("whole", "ours"))
    steps = read_records(whole)[-1]["step"]
    status, rest, _ = stop_at_line("epoch 1 [3/", signal.SIGTERM, *flags, "--exp-name", "ours", cwd=tmp_path)
    assert status == 128 + signal.SIGTERM, rest
    assert torch.load(ours / UNFINISHED, weights_only=True)["step"] % 2 == 0
    wrong = run(
        "train.py", *flags, "--exp-name", "ours", "--resume", "auto", "--optimizer", "sgd", cwd=tmp_path, check=False
    )
    assert wrong.returncode == 2 and "holds the state of --optimizer adamw" in wrong.stderr
    run("train.py", *flags, "--exp-name", "ours", "--resume", "auto", cwd=tmp_path)
    for epoch in (1, 2):
        assert_same_checkpoint(*(folder / f"checkpoint_patch_{epoch:04d}.pth.tar" for folder in (whole, ours)))
    assert "6 subjects" in rest or steps == 2 * 6  # --subjects leaves out one of the seven subjects
    assert read_records(whole, "epoch")[1]["queue_own"] >= 0


def test_without_the_neighbour_task_no_output_mentions_it(store, run, tmp_path):
    """A run that encoded neighbours still encodes them after a resume with --beta 0.

    Encoding neighbours changes BatchNorm's running statistics, but not the weights.
    """
    flags = ("--root-dir", store, "--exp-name", "a", "--epochs", 2, "--beta", 0, *SMALL, "--workers", 0)
    shown = run("train.py", *flags, "--print-freq", 4, cwd=tmp_path).stdout
    folder = tmp_path / "ssl_exp" / "a"
    assert "neighbour" not in shown and "neighbour" not in (folder / "log.jsonl").read_text()
    assert not any("neighbor" in name for line in read_records(folder) for name in line)
    first, wanted = (torch.load(folder / f"checkpoint_patch_000{n}.pth.tar", weights_only=True) for n in (1, 2))
    assert first["config"].pop("neighbor_pass") is False
    (tmp_path / "ssl_exp" / "b").mkdir()
    torch.save(first, tmp_path / "ssl_exp" / "b" / "checkpoint_patch_0001.pth.tar")
    flags = (*flags[:3], "b", *flags[4:])
    shown = run("train.py", *flags, "--resume", "auto", "--print-freq", 4, cwd=tmp_path).stdout
    assert (
        "note: --beta is 0, but checkpoint_patch_0001.pth.tar was trained with neighbours, so they are still encoded"
        in shown
    )
    assert all("loss_neighbor" in line for line in read_records(tmp_path / "ssl_exp" / "b"))
    path = tmp_path / "ssl_exp" / "b" / "checkpoint_patch_0002.pth.tar"
    found = torch.load(path, weights_only=True)
    assert found["config"]["neighbor_pass"] is True
    for name, value in wanted["state_dict"].items():
        if "encoder_q" in name and "num_batches" in name:
            assert found["state_dict"][name] == 1.5 * value, name  # epoch 1 has one pass per step, and epoch 2 has two
        elif not ("encoder_q" in name and ".running_" in name):
            torch.testing.assert_close(value, found["state_dict"][name], rtol=0, atol=1e-3, msg=name)

    # The neighbour pass adds training statistics, so it must not be switched on within an epoch.
    # A refused run writes nothing.
    first["config"]["neighbor_pass"], first["step"] = False, 4
    torch.save(first, folder / UNFINISHED)
    before = (folder / "configs.json").read_bytes(), (folder / "log.jsonl").read_bytes()
    refused = run(
        "train.py", *flags[:3], "a", *flags[4:], "--resume", UNFINISHED, "--beta", 1, cwd=tmp_path, check=False
    )
    assert (
        refused.returncode == 2
        and "partway through an epoch trained without neighbours; use --beta 0" in refused.stderr
    )
    assert before == ((folder / "configs.json").read_bytes(), (folder / "log.jsonl").read_bytes())


@pytest.mark.slow
def test_resume_by_name_and_by_path(trained, store, run, tmp_path):
    done = trained[0] / "ssl_exp" / "a"
    run(
        "train.py",
        "--root-dir",
        store,
        "--exp-name",
        "a",
        "--resume",
        "checkpoint_patch_0001.pth.tar",
        "--epochs",
        1,
        *SMALL,
        cwd=trained[0],
    )
    path = done / "checkpoint_patch_0001.pth.tar"
    result = run(
        "train.py", "--root-dir", store, "--exp-name", "b", "--resume", path, "--epochs", 1, *SMALL, cwd=tmp_path
    )
    assert "nothing to do" in result.stdout
    missing = run(
        "train.py",
        "--root-dir",
        store,
        "--exp-name",
        "a",
        "--resume",
        "no.pth.tar",
        *SMALL,
        cwd=trained[0],
        check=False,
    )
    assert missing.returncode == 2 and "--resume no.pth.tar: no checkpoint" in missing.stderr
    assert "ssl_exp/a, which has checkpoint_patch_0001.pth.tar" in missing.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", 8, "--moco-k", 8), "--batch-size 8 exceeds the 7 subjects"),
        (("--batch-size", 1), "gives a batch of 1 per rank"),
        (("--moco-k", 7), "--moco-k 7 is not a multiple of --batch-size 3"),
        (("--augmentation", "ax"), "unknown letter 'x'"),
        (("--k-neighbors", 6), "--k-neighbors 6 must be below the number of locations"),
        (("--root-dir", "nowhere"), "nowhere is not a folder"),
        (("--num-coordinates", 2), "use 1"),
        (("--epochs", 0), "--epochs 0 must be at least 1"),
        (("--start-epoch", -1), "--start-epoch -1 must be at least 0"),
        (("--lr", -1), "--lr -1.0 must be at least 0"),
        (("--lr", "nan"), "--lr nan must be at least 0"),
        (("--exp-name", "../x"), r"--exp-name '\.\./x' must be a folder name"),
        (("--exp-name", ""), "--exp-name '' must be a folder name"),
        (("--seed", 2**40), "below 2"),
        (("--bn-groups", 2), "--bn-groups 2 must be a divisor of --batch-size 3"),
        (("--gamma", 0, 2), "--gamma 0.0 must be at least 0.01"),
        (("--gamma", 4, 1), "--gamma 4.0 1.0 is in the wrong order"),
        (("--recipe", "big"), "--recipe big must be published or small"),
        (
            ("--rep-dim", 16, "--resume", "{a}"),
            r"of shape \(2, 8, 128, 3, 3, 3\), but the model needs \(2, 16, 128, 3, 3, 3\)",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(trained, store, run_here, tmp_path, flags, message):
    path = trained[0] / "ssl_exp" / "a" / "checkpoint_patch_0001.pth.tar"
    flags = [str(path) if flag == "{a}" else flag for flag in flags]
    result = run_here("train.py", "--root-dir", store, "--exp-name", "new", *SMALL, *flags, cwd=tmp_path)
    assert result.returncode == 2 and re.search(message, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "ssl_exp").exists()


@pytest.mark.slow
def test_two_runs_never_share_an_experiment(store, run, tmp_path):
    flags = ("--root-dir", store, "--exp-name", "s", "--epochs", 5000, "--print-freq", 1, *SMALL)
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    try:
        assert any("epoch 1 [1/12]" in line for line in first.stdout)
        before = (tmp_path / "ssl_exp" / "s" / "configs.json").read_bytes()
        for more in ((), ("--resume", "auto")):
            refused = run("train.py", *flags, "--seed", 5, *more, cwd=tmp_path, check=False)
            assert refused.returncode == 2 and "ssl_exp/s is in use by another run" in refused.stderr
        assert (tmp_path / "ssl_exp" / "s" / "configs.json").read_bytes() == before
    finally:
        first.kill()
        first.wait()
    run("train.py", *flags, "--epochs", 1, "--resume", "auto", cwd=tmp_path)  # the lock of a killed run is released


def test_statistics_are_logged_and_chance_level_is_reported(store, run, tmp_path):
    flags = ("--root-dir", store, "--exp-name", "m", "--epochs", 2, "--print-freq", 3, *SMALL, "--lr", 0)
    result = run("train.py", *flags, cwd=tmp_path)
    folder = tmp_path / "ssl_exp" / "m"
    for record in read_records(folder) + read_records(folder, "epoch"):
        assert record["chance_fresh"] == pytest.approx(100 / 3, rel=1e-4)
        assert 0 <= record["accuracy_fresh"] <= 100 and record["uniformity"] <= 1e-6 and 0 <= record["alignment"] <= 4
    steps = read_records(folder)
    assert all(1 <= record["effective_rank"] <= 3 for record in steps)
    # In epoch 2, the queue holds keys of epoch 1. At each location's first step, these keys are 12 and 11 steps old.
    assert steps[0]["queue_age"] < 2 and steps[-1]["queue_age"] > 5 and steps[-1]["queue_own"] > 0
    assert "fresh" in result.stdout and "(chance 33.3 %)" in result.stdout
    told = [record["accuracy_fresh"] < 1.2 * record["chance_fresh"] for record in read_records(folder, "epoch")]
    assert result.stdout.count("warning: the accuracy against fresh keys is at chance level") == sum(told)


def test_a_queue_longer_than_the_cohort_is_noted(store, run, tmp_path):
    result = run("train.py", "--root-dir", store, "--exp-name", "q", *SMALL, "--moco-k", 9, "--epochs", 1, cwd=tmp_path)
    assert "note: --moco-k 9 exceeds the 7 subjects" in result.stdout


def test_a_non_finite_loss_stops_the_run(store, run, tmp_path):
    result = run(
        "train.py",
        "--root-dir",
        store,
        "--exp-name",
        "n",
        "--print-freq",
        1,
        *SMALL,
        "--lr",
        1e30,
        cwd=tmp_path,
        check=False,
    )
    assert (
        result.returncode == 2
        and "the loss is not finite at epoch 1" in result.stderr
        and "lower --lr" in result.stderr
    )


@pytest.mark.slow
def test_a_stopped_run_ends_quickly_with_its_workers(store, tmp_path):
    """Send SIGINT, as a terminal does, while data-loader workers run."""
    flags = ("--root-dir", store, "--exp-name", "i", "--epochs", 50, "--print-freq", 1, *SMALL, "--workers", 2)
    status, rest, seconds = stop_at_line("epoch 1 [2/12]", signal.SIGINT, *flags, cwd=tmp_path)
    assert status == 128 + signal.SIGINT and "--resume auto" in rest and seconds < 30


@pytest.mark.slow
def test_resuming_never_overwrites_another_experiment(trained, store, run, tmp_path):
    for name in ("a", "c"):
        (tmp_path / "ssl_exp" / name).mkdir(parents=True)
        for number in (1, 2):
            file = f"checkpoint_patch_{number:04d}.pth.tar"
            (tmp_path / "ssl_exp" / name / file).write_bytes((trained[0] / "ssl_exp" / "a" / file).read_bytes())
    folder = tmp_path / "ssl_exp" / "a"
    before = (folder / "checkpoint_patch_0002.pth.tar").read_bytes()
    flags = ("--root-dir", store, "--exp-name", "a", "--epochs", 2, *SMALL)
    refused = run("train.py", *flags, "--resume", "ssl_exp/c/checkpoint_patch_0001.pth.tar", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "already has checkpoints, which resuming from" in refused.stderr
    assert (folder / "checkpoint_patch_0002.pth.tar").read_bytes() == before
    # Resuming from an older checkpoint of the same experiment renames and keeps the newer checkpoint.
    run("train.py", *flags, "--resume", "checkpoint_patch_0001.pth.tar", cwd=tmp_path)
    (kept,) = folder.glob("superseded-*-checkpoint_patch_0002.pth.tar")
    assert kept.read_bytes() == before
    assert_same_checkpoint(kept, folder / "checkpoint_patch_0002.pth.tar")


@pytest.mark.slow
def test_resuming_within_an_epoch_of_other_steps_is_refused(trained, store, run, tmp_path):
    content = torch.load(trained[0] / "ssl_exp" / "a" / "checkpoint_patch_0001.pth.tar", weights_only=True)
    content["step"] = 9
    torch.save(content, tmp_path / "u.pth.tar")
    flags = ("--root-dir", store, "--exp-name", "u", "--resume", "u.pth.tar", "--epochs", 2, *SMALL)
    refused = run("train.py", *flags, "--batch-size", 6, cwd=tmp_path, check=False)
    assert (
        refused.returncode == 2
        and "saved partway through an epoch with batch_size 3; the rest of this epoch cannot use 6" in refused.stderr
    )
    run("train.py", *flags, "--batch-size", 6, "--start-epoch", 1, cwd=tmp_path)
    (epoch,) = read_records(tmp_path / "ssl_exp" / "u", "epoch")
    steps = read_records(tmp_path / "ssl_exp" / "u")
    assert epoch["epoch"] == 2 and 0 < epoch["loss"] < 20 and steps[-1]["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "batch"), [(1, 3), (2, 4)])
def test_sigterm_to_the_launcher_saves(store, tmp_path, ranks, batch):
    """If a scheduler or container stops a job with SIGTERM, neither the ranks nor torchrun print a traceback."""
    flags = ("--root-dir", store, "--exp-name", "t", "--epochs", 50, "--print-freq", 1, *SMALL, "--workers", 2)
    flags += ("--batch-size", batch, "--moco-k", 4 * batch, "--device", "cpu")
    launcher = (str(ROOT / "tools" / "launch.py"), "--standalone", "--nproc-per-node", str(ranks))
    line = f"epoch 1 [3/{6 * (7 // batch)}]"
    status, rest, seconds = stop_at_line(line, signal.SIGTERM, *flags, cwd=tmp_path, launcher=launcher)
    assert "stopped by SIGTERM; saved" in rest, rest
    assert "Traceback" not in rest and status == 128 + signal.SIGTERM and seconds < 30, rest
    assert torch.load(tmp_path / "ssl_exp" / "t" / UNFINISHED, weights_only=True)["step"] >= 3


@pytest.mark.slow
def test_bf16_follows_float32(cohort, run, tmp_path, make_store, grid):
    """At each of twelve steps of a float32 run, compute the bfloat16 losses from the same state.

    Two independent runs cannot be compared step by step, because BatchNorm over a batch's few values makes training
    chaotic: even two float32 runs that differ by one rounding error diverge.
    """
    patches = PatchStore(cohort[1])
    batch, count = patches.num_subjects, patches.num_locations
    torch.manual_seed(0)
    model = DrasCLR(Encoder, count, 128, 128, 8, 1, 4 * batch, 0.999, 0.2, True).train()
    optimizer = make_optimizer(model, 0.01, 0.9, 1e-4)
    dataset = PatchDataset(patches, 2)
    table = LocationTable.from_arrays(normalize_locations(patches.locations), dataset.neighbors, torch.device("cpu"))
    sampler = LocationBatchSampler(batch, count, batch, seed=0)
    apart = []
    for step in range(12 if has_fast_bf16(torch.device("cpu")) else 3):  # emulated bfloat16 takes seconds per step
        sampler.set_epoch(step // count)
        drawn = dataset[list(sampler)[step % count]]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        views = step_views(drawn, Augmentation("agc"), 0, range(1), torch.device("cpu"))
        with torch.no_grad():
            half = TrainingStep(model, table, bf16=True)(drawn.location, views, 1.0).statistics
        model.load_state_dict(before)
        loss, full, _ = TrainingStep(model, table)(drawn.location, views, 1.0)
        apart.append((half / full - 1)[:2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    apart = torch.stack(apart).abs()
    print(f"bf16 against float32: mean {float(apart.mean()):.1e}, largest {float(apart.max()):.1e}")
    assert 0 < float(apart.mean()) < 0.01 and float(apart.max()) < 0.05

    # With --amp bf16, train.py saves weights, BatchNorm statistics and queue in float32.
    make_store(tmp_path / "few", 3, grid[:3])
    flags = ("--root-dir", "few", "--exp-name", "half", "--epochs", 1, *SMALL, "--amp", "bf16", "--device", "cpu")
    run("train.py", *flags, cwd=tmp_path)
    path = tmp_path / "ssl_exp" / "half" / "checkpoint_patch_0001.pth.tar"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.slow
def test_a_run_on_another_cohort_starts_from_weights(make_store, grid, run, tmp_path):
    make_store(tmp_path / "one", 6, grid)
    make_store(tmp_path / "two", 9, grid[:4], seed=1)
    run("train.py", "--root-dir", tmp_path / "one", "--exp-name", "a", "--epochs", 1, *SMALL, cwd=tmp_path)
    path = tmp_path / "ssl_exp" / "a" / "checkpoint_patch_0001.pth.tar"
    flags = ("--root-dir", tmp_path / "two", "--exp-name", "b", "--epochs", 1, *SMALL, "--init-from", path, "--lr", 0)
    shown = run("train.py", *flags, "--moco-k", 9, "--resume", "auto", cwd=tmp_path).stdout
    assert f"starting from the encoder of {path} after 1 epochs" in shown
    before, after = (
        torch.load(tmp_path / "ssl_exp" / name / "checkpoint_patch_0001.pth.tar", weights_only=True)["state_dict"]
        for name in ("a", "b")
    )
    name = "module.encoder_q.conv4.weight"
    assert torch.equal(before[name], after[name]) and after["module.queue"].shape == (4, 9, 4)
    again = run("train.py", *flags, "--moco-k", 9, "--resume", "auto", cwd=tmp_path).stdout
    assert "nothing to do" in again and "starting from" not in again
