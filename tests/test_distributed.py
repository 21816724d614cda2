"""Compare several Gloo ranks with a single rank: losses, gradients, queues, shuffled BatchNorm and the trainer."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from models.builder import DrasCLR
from models.cnn3d import Encoder

from . import distributed_step
from .conftest import ROOT, calibrate, run_ranks
from .distributed_step import NEAR, TOTAL, K, L, inputs


def results_of(folder, world, mode):
    torch.manual_seed(7)
    model = DrasCLR(Encoder, L, 6, 4, 2, 1, K, 0.9, 0.2, True)
    calibrate(model.encoder_q, model.encoder_k)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "start.pt")
    run_ranks(distributed_step.run_rank, world, folder, mode)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def in_eval_mode(tmp_path_factory):
    """Return the results of 1, 2 and 4 ranks and the folder with their initial weights."""
    folder = tmp_path_factory.mktemp("ranks")
    return {world: results_of(folder / str(world), world, "eval") for world in (1, 2, 4)}, folder / "1"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_equal_one_process(in_eval_mode, world):
    """With BatchNorm in eval mode, splitting the batch does not change the loss, gradients, queue or weights."""
    results, _ = in_eval_mode
    (wanted,) = results[1]
    for result in results[world]:
        assert result["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        for name, gradient in wanted["gradients"].items():
            # Compare whole tensors, because the terms of a single element may cancel and leave only rounding error.
            assert float((result["gradients"][name] - gradient).norm()) < 1e-3 * float(gradient.norm()) + 1e-6, name
        for name, tensor in wanted["state"].items():
            torch.testing.assert_close(result["state"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_shuffled_batchnorm(tmp_path, world):
    """Ranks encode shuffled key patches. Every patch is encoded once, with its own location. All queues are equal."""
    ranks = results_of(tmp_path / "r", world, "rows")
    for step in range(2):
        _, key, _, locs = inputs(step)
        order = []
        for result in ranks:
            patches, where = result["encoded"][step]
            for patch, loc in zip(patches, where):
                found = [i for i in range(TOTAL) if torch.equal(key[i], patch)]
                assert len(found) == 1 and torch.equal(locs[found[0], 0], loc)
                order += found
        assert sorted(order) == list(range(TOTAL)) and order != list(range(TOTAL))
    for result in ranks[1:]:
        for name in ("queue", "queue_ptr"):
            assert torch.equal(result["state"][name], ranks[0]["state"][name])
        for name, gradient in ranks[0]["gradients"].items():
            assert torch.equal(result["gradients"][name], gradient), name
    assert ranks[0]["state"]["queue_ptr"].tolist() == [TOTAL, TOTAL, 0]
    # In training mode, each rank has separate BatchNorm statistics.
    name = "encoder_q.bn1.running_mean"
    assert not torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])


@pytest.mark.slow
def test_keys_enter_the_queue_in_rank_order(in_eval_mode):
    """After a step with frozen BatchNorm, the queue holds the keys of samples 0, 1, 2, ... of the whole batch."""
    results, folder = in_eval_mode
    ranks = results[2]
    model = DrasCLR(Encoder, L, 6, 4, 2, 1, K, 0.9, 0.2, True).eval()
    model.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
    _, key, _, locs = inputs(0)
    with torch.no_grad():
        model._update_key_encoder()
        wanted = torch.nn.functional.normalize(model.encoder_k(key, locs[:1, 0])[0], dim=1)
    apart = torch.cdist(wanted, wanted) + 10 * torch.eye(TOTAL)
    assert float(apart.min()) > 1e-2  # all keys differ, so a wrong order would be detected
    torch.testing.assert_close(ranks[1]["state"]["queue"][:, :TOTAL, 0].t(), wanted, rtol=1e-4, atol=1e-5)
    assert NEAR == 2


def torchrun(ranks, script, *flags, cwd):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(ROOT / script),
    ]
    result = subprocess.run([*command, *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr  # users would see a warning once per rank at every start
    return result.stdout


@pytest.mark.slow
def test_two_ranks_by_command_line(tmp_path, make_store, grid):
    make_store(tmp_path / "store", 9, grid)
    flags = (
        "--root-dir",
        "store",
        "--exp-name",
        "two",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--moco-k",
        8,
        "--rep-dim",
        8,
    )
    more = ("--moco-dim", 4, "--num-experts", 2, "--workers", 2, "--print-freq", 2, "--device", "cpu", "--save-initial")
    output = torchrun(2, "train.py", *flags, *more, cwd=tmp_path)
    assert output.count("2 x cpu") == 1 and output.count("epoch 1/1") == 1  # only one rank prints
    folder = tmp_path / "ssl_exp" / "two"
    assert json.loads((folder / "configs.json").read_text())["world_size"] == 2
    content = torch.load(folder / "checkpoint_patch_0001.pth.tar", weights_only=True)
    assert content["state_dict"]["module.queue_ptr"].tolist() == [0] * 6  # 2 steps of 4 keys fill the queue's 8 rows
    start = torch.load(folder / "checkpoint_patch_0000.pth.tar", weights_only=True)
    assert not torch.equal(content["state_dict"]["module.queue"], start["state_dict"]["module.queue"])

    common = ("--exp-name", "ssl_exp/two", "--checkpoint-patch", "checkpoint_patch_0001.pth.tar", "--device", "cpu")
    torchrun(2, "extract_feature.py", *common, "--out-dir", "two", cwd=tmp_path)
    subprocess.run(
        [sys.executable, str(ROOT / "extract_feature.py"), *common, "--out-dir", "one"], cwd=tmp_path, check=True
    )
    two, one = (np.load(tmp_path / name / "pred_arr_patch_full.npy") for name in ("two", "one"))
    # The order of oneDNN's sums depends on the number of threads.
    assert np.linalg.norm(two - one) < 1e-5 * np.linalg.norm(one)
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
