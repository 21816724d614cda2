"""Test batches on the device: copied from the data loader, or gathered from location files that stay on the device."""

import numpy as np
import pytest
import torch

from data.augment import Augmentation
from data.dataset import PatchDataset
from data.device import BatchCarrier, LateCopies, ResidentPatches
from data.sampler import BatchIndex
from data.store import PatchStore
from data.views import StepDraws

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path, make_store, grid):
    make_store(tmp_path, 5, grid, seed=2)
    return PatchStore(tmp_path, require_grouped=True)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_resident_files_give_the_loaders_batches(store, k, device):
    device = torch.device(device)
    draws = StepDraws(Augmentation("ag"), 0, range(1))
    reading, leaving = PatchDataset(store, k, draws), PatchDataset(store, k, draws, read_patches=False)
    resident = ResidentPatches(store, reading.neighbors, device, max_cached_locations=1 + k)
    plain, gathering = BatchCarrier(device), BatchCarrier(device, resident)
    for location in (0, 1, 2, 5, 0):
        index = BatchIndex(1, location, 3, np.array([4, 0, 2]))
        wanted, ours = plain(reading[index]), gathering(leaving[index])
        assert int(ours[0]) == location and ours[1].dtype == torch.int16 and ours[1].device.type == device.type
        for value, other in zip(ours, wanted, strict=True):
            assert (value is None) == (other is None) and (value is None or torch.equal(value, other))
        assert (ours[2] is None) == (k == 0)
    assert len(resident._kept) <= 1 + k and len(resident._coming) <= 1 + k


def test_files_stay_on_a_gpu_if_they_fit(store, monkeypatch):
    neighbors, gpu = np.zeros((store.num_locations, 2), dtype=np.int64), torch.device("cuda")
    one = 5 * 32**3 * 2
    monkeypatch.setattr("data.device.Copier", lambda device: None)
    assert ResidentPatches.make_if_memory_allows(store, neighbors, CPU) is None
    for free, files in ((4 * 6 * one, 6), (4 * 6 * one - 4, None), (400 * one, 100)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        found = ResidentPatches.make_if_memory_allows(store, neighbors, gpu)
        assert (found and found.files) == files


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_late_copies_arrive_once_and_in_order(device):
    device, given = torch.device(device), []
    late = LateCopies(device)
    for number in range(3):
        given += late.copy_and_iterate_earlier_results(number, torch.full((4,), float(number), device=device))
    given += late.iterate_remaining_results()
    assert [name for name, _ in given] == [0, 1, 2]
    assert [value.tolist() for _, value in given] == [[float(number)] * 4 for number in range(3)]
    assert not list(late.iterate_remaining_results())
