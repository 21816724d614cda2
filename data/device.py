"""Copy batches to the training device, and keep location files in the device's memory."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from data.dataset import PatchBatch
from data.store import PatchStore
from misc.sizes import PATCH_SIZE

SHARE = 0.25  # fraction of a GPU's free memory that location files may use


class Copier:
    """Copies tensors to a device. On a GPU, copies run in a separate stream, in parallel with the previous step."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return copies of the tensors on the device. Copying pinned tensors does not block. None stays None."""
        if self._stream is None:
            return [None if tensor is None else tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copied = [None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in tensors]
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._stream)
        for tensor in copied:
            if tensor is not None:
                tensor.record_stream(here)
        return copied


class LateCopies:
    """Copies results from a device to the host, and waits for a copy only after the next copy has started."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._waiting: list[tuple[Any, torch.Tensor, Any]] = []

    def copy_and_iterate_earlier_results(self, name: Any, result: torch.Tensor) -> Iterator[tuple[Any, np.ndarray]]:
        """Start copying a result to the host, and yield earlier results with their names."""
        if not self._on_gpu:
            yield name, result.numpy()
            return
        on_host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        on_host.copy_(result, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        yield from self.iterate_remaining_results()
        self._waiting.append((name, on_host, copied))

    def iterate_remaining_results(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield all results that have been added but not yet returned."""
        while self._waiting:
            name, on_host, copied = self._waiting.pop(0)
            copied.synchronize()
            yield name, on_host.numpy()


class ResidentPatches:
    """Keeps location files in device memory and gathers batches there, instead of reading the files for every batch.

    Args:
        store: grouped store.
        neighbors: (L, k) indices of each location's neighbours.
        device: device on which the files are kept.
        max_cached_locations: maximum number of files to keep; the least recently used file is dropped first.
    """

    def __init__(self, store: PatchStore, neighbors: np.ndarray, device: torch.device, max_cached_locations: int):
        self.store, self.neighbors, self.files = store, neighbors, max_cached_locations
        self._copy = Copier(device)
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._coming: dict[int, Future] = {}
        self._reader = ThreadPoolExecutor(1, "resident")

    @classmethod
    def make_if_memory_allows(
        cls, store: PatchStore, neighbors: np.ndarray, device: torch.device
    ) -> "ResidentPatches | None":
        """Return an instance, or None if two locations' files exceed the fraction SHARE of the free GPU memory."""
        if device.type != "cuda":
            return None
        bytes_each = store.num_subjects * PATCH_SIZE**3 * store.read(0, np.zeros(1, dtype=np.int64)).itemsize
        files = int(SHARE * torch.cuda.mem_get_info(device)[0]) // bytes_each
        return cls(store, neighbors, device, files) if files >= 2 * (1 + neighbors.shape[1]) else None

    def gather_batch(self, location: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gather patches (B, 32, 32, 32) and neighbours (B, k, 32, 32, 32) for ``rows`` (B,), all on the device."""
        patches, *near = (self.load_location(index)[rows] for index in self.list_location_and_neighbors(location))
        if location + 1 < len(self.neighbors):  # training usually continues with location + 1
            wanted = [index for index in self.list_location_and_neighbors(location + 1) if index not in self._kept]
            coming = self._coming
            self._coming = {i: coming.get(i) or self._reader.submit(self._read_location, i) for i in wanted}
        return patches, torch.stack(near, dim=1) if near else None

    def list_location_and_neighbors(self, location: int) -> Sequence[int]:
        return [location, *map(int, self.neighbors[location])]

    def _read_location(self, index: int) -> torch.Tensor:
        patches = torch.from_numpy(self.store.read(index, np.arange(self.store.num_subjects)))
        with contextlib.suppress(RuntimeError):  # if pinning fails, copies from unpinned memory are only slower
            return patches.pin_memory() if self._copy.device.type == "cuda" else patches
        return patches

    def load_location(self, index: int) -> torch.Tensor:
        """Return the patches of a location on the device, (N, 32, 32, 32)."""
        if index not in self._kept:
            coming = self._coming.pop(index, None)
            (self._kept[index],) = self._copy(self._read_location(index) if coming is None else coming.result())
            while len(self._kept) > self.files:
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return self._kept[index]


class BatchCarrier:
    """Provides the tensors of a batch on the device, from the loader or from files in the device's memory."""

    def __init__(self, device: torch.device, resident: ResidentPatches | None = None):
        self.device, self.resident = device, resident
        self._copy = Copier(device)

    def __call__(self, batch: PatchBatch) -> tuple[torch.Tensor | None, ...]:
        """Return location (1,), patches, neighbours, draws and subjects, in the order of models.step.Inputs."""
        where = torch.full((1,), batch.location, device=self.device)
        patches, neighbors, draws, subjects = self._copy(batch.patches, batch.neighbors, batch.draws, batch.subjects)
        if self.resident is not None:
            patches, neighbors = self.resident.gather_batch(batch.location, subjects)
        return where, patches, neighbors, draws, subjects
