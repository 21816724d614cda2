"""Test that fine-tuning learns planted labels, even from few subjects, and that bad arguments are refused."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from models.cnn3d import Encoder
from tools.finetune import read_task_and_held_out_mask
from tools.finetuning import fit as fitting
from tools.finetuning.network import Head
from tools.finetuning.tasks import Task, draw_split

from ..conftest import calibrate

N, L = 30, 6


@pytest.fixture(scope="module")
def study(tmp_path_factory, make_store, grid):
    """Make a store, an encoder and label tables.

    Every second subject has almost homogeneous patches at locations 0 and 1.
    """
    folder = tmp_path_factory.mktemp("finetune")
    patches = make_store(folder / "store", N, grid, seed=0)
    sick = np.arange(N) % 2
    for place in range(2):
        path = folder / "store" / "grouped_patch" / f"patch_loc_{place}.npy"
        values = np.load(path).astype(int)
        values[sick == 1] = -900 + values[sick == 1] % 40
        np.save(path, values.astype(np.int16))
    sids = [f"{index:03d}" for index in range(N)]
    rng = np.random.default_rng(0)
    labels = pd.DataFrame({"sid": sids, "sick": sick, "same": 1, "noise": rng.normal(size=N)})
    labels.to_csv(folder / "l.csv", index=False)
    rows = [(sid, place, sick[n] * (place < 2)) for n, sid in enumerate(sids) for place in range(4)]
    pd.DataFrame(rows, columns=["sid", "patch", "value"]).to_csv(folder / "p.csv", index=False)
    torch.manual_seed(0)
    encoder = Encoder(8, 4, 2, 1)
    calibrate(encoder)
    state = {f"module.encoder_q.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"state_dict": state}, folder / "k.pth.tar")
    assert patches is not None
    return folder


def finetune(run, folder, out, *flags, **more):
    return run(
        "tools/finetune.py", "--root-dir", "store", "--out-dir", out, "--no-progress", *flags, cwd=folder, **more
    )


@pytest.mark.slow
def test_the_published_patient_vector_is_optional(study, run, tmp_path):
    flags = ("--checkpoint", "k.pth.tar", "--labels", "l.csv", "--column", "sick", "--fractions", 1, "--seeds", 1)
    finetune(run, study, tmp_path / "o", *flags, "--patient-vector", "mean")
    head = torch.load(tmp_path / "o" / "k.pth.tar", weights_only=True)["head"]
    assert head["state_dict"]["linear.weight"].shape == (2, 8) and "patient_vector" not in head
    refused = finetune(
        run, study, tmp_path / "r", *flags, "--layers", "last", "--patient-vector", "layers", check=False
    )
    assert refused.returncode == 2 and "needs --labels, --layers frozen and --pooling mean" in refused.stderr


@pytest.mark.slow
def test_a_head_learns_the_label_and_a_fit_resumes(study, run, tmp_path):
    flags = ("--checkpoint", "k.pth.tar", "random", "--labels", "l.csv", "--column", "sick", "--fractions", 0.5, 1)
    out = tmp_path / "out"
    shown = finetune(run, study, out, *flags, "--seeds", 2).stdout
    table = pd.read_csv(out / "curve.csv")
    assert len(table) == 8 and set(table["arm"]) == {"k", "random"} and set(table["patients"]) == {10, 21}
    assert table.loc[(table["arm"] == "k") & (table["fraction"] == 1), "auroc"].min() > 0.9
    assert "| 0.5 | 10 |" in shown and (out / "curve.png").stat().st_size > 5000
    kept = torch.load(out / "k.pth.tar", weights_only=True)
    head = kept["head"]  # the head uses the mean and SD of every layer, standardised per location
    assert head["classes"] == [0, 1] and head["patient_vector"] == "layers"
    locations, features = head["location_mean"].shape
    assert locations == 6 and head["state_dict"]["linear.weight"].shape == (2, 2 * features)

    gone = out / "fits" / "k-1-1.json"
    before = {path: path.stat().st_mtime_ns for path in out.glob("fits/*")}
    first = json.loads(gone.read_text())
    gone.unlink()
    assert finetune(run, study, out, *flags, "--seeds", 2).stdout == shown
    assert json.loads(gone.read_text()) == first
    assert [path for path, time in before.items() if path.stat().st_mtime_ns != time] == [gone]


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["last", "all"])
def test_training_the_encoder_changes_the_chosen_layers(study, run, tmp_path, layers):
    flags = ("--checkpoint", "k.pth.tar", "--labels", "l.csv", "--column", "sick", "--fractions", 1, "--seeds", 1)
    finetune(run, study, tmp_path / "out", *flags, "--layers", layers, "--pooling", "attention")
    start = torch.load(study / "k.pth.tar", weights_only=True)["state_dict"]
    end = torch.load(tmp_path / "out" / "k.pth.tar", weights_only=True)["state_dict"]
    moved = {key for key, value in start.items() if not torch.equal(value, end[key])}
    assert any("conv4.weight" in key for key in moved) and not any(
        "running" in key or ".fc." in key[18:24] for key in moved
    )
    assert any("conv1.weight" in key for key in moved) == (layers == "all")
    assert pd.read_csv(tmp_path / "out" / "curve.csv")["auroc"].min() > 0.8


def test_labels_of_patches(study, run, tmp_path):
    flags = ("--checkpoint", "k.pth.tar", "--patch-labels", "p.csv", "--fractions", 1, "--seeds", 1)
    finetune(run, study, tmp_path / "out", *flags)
    row = pd.read_csv(tmp_path / "out" / "curve.csv").iloc[0]
    assert row["labels"] == 4 * 21 and row["auroc"] > 0.8


def test_attention_finds_the_informative_patch():
    torch.manual_seed(0)
    h, sick = torch.randn(64, 20, 4), torch.arange(64) % 2
    h[sick == 1, 3, 0] += 6  # one of twenty patches
    losses = {}
    for pooling in ("mean", "attention"):
        head = Head(4, 2, pooling)
        head.store_standardization(h)
        optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(head(h), sick)
            loss.backward()
            optimizer.step()
        losses[pooling] = float(loss.detach())
    assert losses["attention"] < 0.5 * losses["mean"]


def test_fractions_are_nested_and_splits_are_disjoint():
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(60), 3)
    task = Task("class", rows, np.tile(np.arange(3), 60), rng.integers(0, 2, 180).astype(float), (0.0, 1.0))
    splits = [draw_split(task, fraction, 3) for fraction in (0.2, 1.0)]
    people = [[set(rows[part]) for part in split] for split in splits]
    for train, validation, test in people:
        assert not (train & validation or train & test or validation & test) and len(test) == 18
    assert people[0][2] == people[1][2] and people[0][0] | people[0][1] < people[1][0] | people[1][1]
    assert not np.array_equal(splits[0].test, draw_split(task, 0.2, 4).test)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--labels", "l.csv", "--column", "far"), "no numeric column 'far'"),
        (("--labels", "l.csv", "--column", "same"), "column 'same' cannot be learned: it is 1 for every subject"),
        (("--labels", "l.csv"), "give either --labels with --column, or --patch-labels"),
        (("--patch-labels", "bad.csv"), "bad.csv, line 3: patch '9' is not a whole number from 0 to 5"),
        (("--patch-labels", "who.csv"), "who.csv, line 2: sid 'x' is not in the store"),
        (("--patch-labels", "sup.csv"), "sup.csv, line 2: patch '²' is not a whole number from 0 to 5"),
        (("--patch-labels", "sep.csv"), "column 'value' of sep.csv has values for 1 subjects"),
        (("--patch-labels", "l.csv"), "l.csv has no column 'patch'"),
        (("--labels", "l.csv", "--column", "sick", "--checkpoint", "no.tar"), "no checkpoint at no.tar"),
    ],
)
def test_bad_arguments_are_refused(study, run_here, flags, message):
    (study / "bad.csv").write_text("sid,patch,value\n000,0,1\n000,9,1\n")
    (study / "who.csv").write_text("sid,patch,value\nx,0,1\n")
    (study / "sup.csv").write_text("sid,patch,value\n000,²,1\n", encoding="utf-8")
    (study / "sep.csv").write_text("sid;patch;value\n000;0;1\n")
    given = ("--root-dir", "store", "--checkpoint", "k.pth.tar", "--out-dir", "refused")
    result = run_here("tools/finetune.py", *given, *flags, cwd=study)
    assert result.returncode == 2 and message in result.stderr and not (study / "refused").exists()


@pytest.mark.parametrize(
    ("losses", "start", "best", "kept", "rounds"),
    [
        ([3, 1, 2, 2, 2, 2, 0], float("inf"), 1, 2, 6),
        ([3, 2, 2, 2, 0], 1.0, 1.0, 0, 4),
        ([5, 4, 3], float("inf"), 3, 3, 3),
    ],
)
def test_training_keeps_the_best_model(monkeypatch, losses, start, best, kept, rounds):
    monkeypatch.setitem(fitting.ROUNDS, "last", len(losses))
    monkeypatch.setitem(fitting.PATIENCE, "last", 4)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    following = iter(losses)

    def one_round():
        model.weight.data += 1
        return next(following)

    assert fitting._train_until_no_better(one_round, (model,), "last", start) == (best, rounds)
    assert model.weight.item() == kept  # each round adds 1, so the weight is the number of the best round


def test_ordered_words_are_grades(tmp_path):
    store = SimpleNamespace(sids=[f"s{row}" for row in range(30)])
    words = np.array(["I", "II", "IIIa"])[np.arange(30) % 3]
    pd.DataFrame({"sid": store.sids, "stage": words}).to_csv(tmp_path / "l.csv", index=False)
    given = dict(
        labels=str(tmp_path / "l.csv"), column="stage", patch_labels=None, held_out=None, kind=None, missing=[]
    )
    for order, kind in (([], "class"), ([("stage", ["II", "I", "IIIa"])], "grade")):
        task, _ = read_task_and_held_out_mask(argparse.Namespace(**given, order=order), store)
        assert task.kind == kind
    assert (task.target == np.array([1, 0, 2])[np.arange(30) % 3]).all()
