"""Time the training step of an old commit, in a process that imports the exported files of the commit.

    python tools/dev/gpu_lab/old.py TREE FOLDER SIZES DEVICE PRECISION STEPS_OF_CURVE OUT

The script calls the functions of commit 4eccfb9. For a commit with different functions, change this script accordingly.
"""

import importlib.util
import json
import statistics
import sys
import time
import types
from pathlib import Path

import torch


def stand_in_for_pandas() -> None:
    """Replace pandas with a stub if pandas is not installed. Old commits import pandas even if no table is read."""
    if importlib.util.find_spec("pandas") is None:
        module = types.ModuleType("pandas")
        module.DataFrame = module.Series = object
        sys.modules["pandas"] = module


def load_store(folder: str, sizes: dict):
    path = Path(__file__).with_name("store.py")
    spec = importlib.util.spec_from_file_location("gpu_lab_store", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FileStore(Path(folder), sizes["locations"], sizes["subjects"])


def main(tree: str, folder: str, sizes: str, device: str, precision: str, curve: str, out: str) -> None:
    sys.path.insert(0, tree)
    stand_in_for_pandas()
    from data.augment import Augmentation
    from data.dataset import PatchDataset
    from data.loader import iterate_batches, make_loader
    from data.locations import normalize_locations
    from data.sampler import LocationBatchSampler
    from data.views import step_views
    from misc import process
    from models.builder import DrasCLR
    from models.cnn3d import Encoder
    from models.step import Descent, LocationTable, TrainingStep, make_optimizer

    sizes, device = json.loads(sizes), torch.device(device)
    process.set_arithmetic(precision == "tf32", deterministic=False)
    torch.manual_seed(0)
    store = load_store(folder, sizes)
    dataset = PatchDataset(store, sizes["neighbors"])
    sampler = LocationBatchSampler(store.num_subjects, store.num_locations, sizes["batch"], seed=0)
    loader = make_loader(dataset, sampler, sizes["workers"], pin_memory=device.type == "cuda")
    table = LocationTable.of(normalize_locations(store.locations), dataset.neighbors, device)
    K, groups = sizes["K"], sizes["groups"]
    model = DrasCLR(Encoder, store.num_locations, 128, 128, 8, 1, K, 0.999, 0.2, True, bn_groups=groups).to(device)
    step = TrainingStep(model, table, precision == "bf16").train()
    descend = Descent(make_optimizer(model, 0.01, 0.9, 1e-4))

    def forever():
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from iterate_batches(loader)
            epoch += 1

    given = forever()

    def run_training_steps(steps: int) -> list[torch.Tensor]:
        found = []
        for _ in range(steps):
            batch = next(given)
            views = step_views(batch, Augmentation("agc"), 0, range(groups), device)
            outcome = step(batch.location, views, 1.0, batch.subjects.to(device, non_blocking=True))
            descend(outcome.loss)
            found.append(outcome.statistics)
        return found

    losses = [float(value[2]) for value in run_training_steps(int(curve))]
    times = []
    for _ in range(sizes["rounds"]):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run_training_steps(sizes["steps"])
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(sizes["batch"] * sizes["steps"] / (time.perf_counter() - start))
    found = {"median": statistics.median(times), "low": min(times), "high": max(times)}
    Path(out).write_text(json.dumps({"samples_per_s": found, "losses": losses}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
