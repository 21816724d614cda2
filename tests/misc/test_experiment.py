"""Test the rules for an experiment's folder, and reading a checkpoint's progress without loading the checkpoint."""

import json
import time

import pytest
import torch

from misc.experiment import UNFINISHED, Experiment, ExperimentError, checkpoint_name
from models.checkpoint import CheckpointError, read_checkpoint, read_progress, save_checkpoint, verify_checkpoint


def save(path, epoch, step=0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"epoch": epoch, "step": step, "state_dict": {"a": torch.zeros(3)}, **more})


def test_progress_is_read_without_loading(tmp_path, monkeypatch):
    """Reading the progress of a checkpoint with a 400 MB queue takes far less time than loading the checkpoint."""
    big = tmp_path / "big.pth.tar"
    save(big, 7, 31, queue=torch.zeros(100_000_000))
    start = time.perf_counter()
    assert read_progress(big) == (7, 31)
    quick = time.perf_counter() - start
    start = time.perf_counter()
    assert read_checkpoint(big)["queue"].shape == (100_000_000,)
    assert quick < 0.1 + (time.perf_counter() - start) / 5
    content = read_checkpoint(big, tensors=False)
    assert torch.equal(content["state_dict"]["a"], torch.zeros(3))
    older = tmp_path / "older_0004.pth.tar"  # the checkpoint format before torch 1.6 cannot be memory-mapped
    torch.save({"epoch": 4, "state_dict": {}}, older, _use_new_zipfile_serialization=False)
    assert read_progress(older) == (4, 0)
    torch.save({"a": torch.zeros(2)}, tmp_path / "bare_0005.pth.tar")
    assert read_progress(tmp_path / "bare_0005.pth.tar") == (5, 0)
    (tmp_path / "torn.pth.tar").write_bytes(big.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_progress(tmp_path / "torn.pth.tar")


def test_the_latest_checkpoint_has_the_most_progress(tmp_path):
    experiment = Experiment(tmp_path / "e")
    assert (
        experiment.find_latest_checkpoint(read_progress) is None
        and experiment.find_resume_checkpoint("auto", read_progress) is None
    )
    for epoch in (1, 2, 10):
        save(experiment.checkpoint(epoch), epoch)
    assert experiment.find_latest_checkpoint(read_progress) == experiment.checkpoint(10)
    save(experiment.checkpoint_of_unfinished_epoch, 9, 3)
    assert experiment.find_latest_checkpoint(read_progress) == experiment.checkpoint(10)
    save(experiment.checkpoint_of_unfinished_epoch, 10, 3)
    assert experiment.find_resume_checkpoint("auto", read_progress) == experiment.checkpoint_of_unfinished_epoch


def test_later_checkpoints_are_set_aside(tmp_path):
    experiment = Experiment(tmp_path / "e")
    for epoch in (1, 2, 3):
        save(experiment.checkpoint(epoch), epoch)
    save(experiment.checkpoint_of_unfinished_epoch, 3, 5)
    moved = experiment.rename_later_checkpoints(experiment.checkpoint(1), 1)
    assert moved == [checkpoint_name(2), checkpoint_name(3), UNFINISHED]
    assert sorted(experiment.list_epoch_checkpoints()) == [1]
    assert len(list(experiment.folder.glob("superseded-*"))) == 3
    elsewhere = tmp_path / "other.pth.tar"
    save(elsewhere, 0)
    assert experiment.rename_later_checkpoints(elsewhere, 0) == [] and sorted(experiment.list_epoch_checkpoints()) == [
        1
    ]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/../b"])
def test_names_outside_the_experiments_folder_are_refused(name):
    with pytest.raises(ExperimentError, match="must be a folder name inside ssl_exp/"):
        Experiment.from_name(name)


def test_the_configuration_comes_back_with_attributes(tmp_path):
    experiment = Experiment(tmp_path / "e")
    experiment.write_config({"root_dir": "/data/patches", "lr": 0.01, "schedule": [120, 160]})
    config = experiment.read_config()
    assert config.lr == 0.01 and config.schedule == [120, 160] and config.versions.torch == torch.__version__
    assert experiment.root_dir() == "/data/patches"
    experiment.configs_json.write_text(json.dumps({"root_dir": 3}))
    with pytest.raises(ExperimentError, match="has no entry root_dir; give --root-dir"):
        experiment.root_dir()
    for text in ("{", "[1, 2]", "3"):
        experiment.configs_json.write_text(text)
        with pytest.raises(ExperimentError, match="give --root-dir"):
            experiment.root_dir()


def test_mid_epoch_features_have_their_own_folder(tmp_path):
    experiment = Experiment(tmp_path)
    assert experiment.features(3).name == "0003" and experiment.features(3, 12).name == "0003_step12"


def test_a_damaged_checkpoint_is_noted_and_the_previous_one_used(tmp_path):
    experiment, notes = Experiment(tmp_path / "e"), []
    for epoch in (1, 2, 3):
        save(experiment.checkpoint(epoch), epoch, weights=torch.arange(1000.0))
    path = experiment.checkpoint(3)
    damaged = bytearray(path.read_bytes())
    at = damaged.find(torch.arange(1000.0).numpy().tobytes()[:4000][2000:2400])
    damaged[at] ^= 1  # damage a tensor's values, which torch would not notice
    path.write_bytes(damaged)
    assert experiment.find_resume_checkpoint("auto", verify_checkpoint, notes.append) == experiment.checkpoint(2)
    assert "checkpoint_patch_0003.pth.tar cannot be read" in notes[0] and "resuming from" in notes[0]
    experiment.checkpoint_of_unfinished_epoch.write_bytes(b"")
    assert experiment.find_latest_checkpoint(verify_checkpoint) == experiment.checkpoint(2)
    for epoch in (1, 2):
        experiment.checkpoint(epoch).write_bytes(b"PK")
    with pytest.raises(ExperimentError, match="has no other checkpoint that can be read"):
        experiment.find_latest_checkpoint(verify_checkpoint)


def test_keep_latest_removes_older_checkpoints(tmp_path):
    experiment = Experiment(tmp_path)
    for count, left in ((0, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 3, 4])):
        for epoch in range(5):
            save(experiment.checkpoint(epoch), epoch)
        experiment.remove_old_checkpoints(count)
        assert sorted(experiment.list_epoch_checkpoints()) == left
