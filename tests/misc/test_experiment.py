"""Rules of an experiment's folder, and how far a checkpoint got without reading it whole."""

import json
import time

import pytest
import torch

from misc.experiment import UNFINISHED, Experiment, ExperimentError, checkpoint_name
from models.checkpoint import CheckpointError, intact, progress, read_checkpoint, save_checkpoint


def save(path, epoch, step=0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"epoch": epoch, "step": step, "state_dict": {"a": torch.zeros(3)}, **more})


def test_how_far_without_loading(tmp_path, monkeypatch):
    """400 MB of queue are told apart from 12 bytes by nothing but their size."""
    big = tmp_path / "big.pth.tar"
    save(big, 7, 31, queue=torch.zeros(100_000_000))
    start = time.perf_counter()
    assert progress(big) == (7, 31)
    quick = time.perf_counter() - start
    start = time.perf_counter()
    assert read_checkpoint(big)["queue"].shape == (100_000_000,)
    assert quick < 0.1 + (time.perf_counter() - start) / 5
    content = read_checkpoint(big, tensors=False)
    assert torch.equal(content["state_dict"]["a"], torch.zeros(3))
    older = tmp_path / "older_0004.pth.tar"  # of torch before 1.6, which cannot be mapped
    torch.save({"epoch": 4, "state_dict": {}}, older, _use_new_zipfile_serialization=False)
    assert progress(older) == (4, 0)
    torch.save({"a": torch.zeros(2)}, tmp_path / "bare_0005.pth.tar")
    assert progress(tmp_path / "bare_0005.pth.tar") == (5, 0)
    (tmp_path / "torn.pth.tar").write_bytes(big.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        progress(tmp_path / "torn.pth.tar")


def test_the_latest_is_the_one_that_is_furthest_on(tmp_path):
    experiment = Experiment(tmp_path / "e")
    assert experiment.latest(progress) is None and experiment.resume_from("auto", progress) is None
    for epoch in (1, 2, 10):
        save(experiment.checkpoint(epoch), epoch)
    assert experiment.latest(progress) == experiment.checkpoint(10)
    save(experiment.unfinished, 9, 3)
    assert experiment.latest(progress) == experiment.checkpoint(10)
    save(experiment.unfinished, 10, 3)
    assert experiment.resume_from("auto", progress) == experiment.unfinished


def test_what_is_further_on_is_set_aside(tmp_path):
    experiment = Experiment(tmp_path / "e")
    for epoch in (1, 2, 3):
        save(experiment.checkpoint(epoch), epoch)
    save(experiment.unfinished, 3, 5)
    moved = experiment.set_aside_later(experiment.checkpoint(1), 1)
    assert moved == [checkpoint_name(2), checkpoint_name(3), UNFINISHED]
    assert sorted(experiment.numbered()) == [1]
    assert len(list(experiment.folder.glob("superseded-*"))) == 3
    elsewhere = tmp_path / "other.pth.tar"
    save(elsewhere, 0)
    assert experiment.set_aside_later(elsewhere, 0) == [] and sorted(experiment.numbered()) == [1]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/../b"])
def test_a_name_stays_in_the_folder_of_experiments(name):
    with pytest.raises(ExperimentError, match="the name of a folder that goes into ssl_exp/"):
        Experiment.named(name)


def test_the_configuration_comes_back_with_attributes(tmp_path):
    experiment = Experiment(tmp_path / "e")
    experiment.write_config({"root_dir": "/data/patches", "lr": 0.01, "schedule": [120, 160]})
    config = experiment.read_config()
    assert config.lr == 0.01 and config.schedule == [120, 160] and config.versions.torch == torch.__version__
    assert experiment.root_dir() == "/data/patches"
    experiment.configs.write_text(json.dumps({"root_dir": 3}))
    with pytest.raises(ExperimentError, match="names no root_dir; give --root-dir"):
        experiment.root_dir()
    for text in ("{", "[1, 2]", "3"):
        experiment.configs.write_text(text)
        with pytest.raises(ExperimentError, match="give --root-dir"):
            experiment.root_dir()


def test_features_from_within_an_epoch_have_their_own_folder(tmp_path):
    experiment = Experiment(tmp_path)
    assert experiment.features(3).name == "0003" and experiment.features(3, 12).name == "0003_step12"


def test_a_damaged_latest_is_told_and_the_one_before_taken(tmp_path):
    experiment, notes = Experiment(tmp_path / "e"), []
    for epoch in (1, 2, 3):
        save(experiment.checkpoint(epoch), epoch, weights=torch.arange(1000.0))
    path = experiment.checkpoint(3)
    damaged = bytearray(path.read_bytes())
    at = damaged.find(torch.arange(1000.0).numpy().tobytes()[:4000][2000:2400])
    damaged[at] ^= 1  # within a tensor: torch would read it without a word
    path.write_bytes(damaged)
    assert experiment.resume_from("auto", intact, notes.append) == experiment.checkpoint(2)
    assert "checkpoint_patch_0003.pth.tar cannot be read" in notes[0] and "going on from" in notes[0]
    experiment.unfinished.write_bytes(b"")
    assert experiment.latest(intact) == experiment.checkpoint(2)
    for epoch in (1, 2):
        experiment.checkpoint(epoch).write_bytes(b"PK")
    with pytest.raises(ExperimentError, match="has no checkpoint that can be read"):
        experiment.latest(intact)


def test_keep_latest(tmp_path):
    experiment = Experiment(tmp_path)
    for count, left in ((0, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 3, 4])):
        for epoch in range(5):
            save(experiment.checkpoint(epoch), epoch)
        experiment.keep_latest(count)
        assert sorted(experiment.numbered()) == left
