"""Time augmentation and reading, and return the rows for the benchmark table."""

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.augment import Augmentation
from data.prefetch import prefetch_files
from data.store import PatchStore
from tools.dev.literal import LiteralAugmentation
from tools.timing.measure import Row, make_comparison_row, time_in_turns, time_seconds
from tools.timing.store import DISTINCT_FILES, make_store


def measure_augmentation(args: argparse.Namespace) -> list[Row]:
    """Time the augmentation of one view of one patch on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for letters, count, slow_count, goal in (("agc", 64, 64, "0.5 ms; 3 times"), ("e", 32, 2, "10 ms; 10 times")):
            volumes = torch.rand(count, 1, 32, 32, 32) * 1264
            augmentation, literal = Augmentation(letters), LiteralAugmentation(letters)
            parameter_generator, noise_generator = (torch.Generator().manual_seed(seed) for seed in (0, 1))

            def augment_volumes(
                volumes: torch.Tensor = volumes,
                augmentation: Augmentation = augmentation,
                parameter_generator: torch.Generator = parameter_generator,
                noise_generator: torch.Generator = noise_generator,
            ) -> torch.Tensor:
                size = volumes.shape[2:]
                prepared = augmentation.prepare_parameters(
                    augmentation.draw_parameters(len(volumes), size, parameter_generator), size
                )
                return augmentation.apply(
                    volumes, prepared, lambda some: torch.randn(some.shape, generator=noise_generator)
                )

            times = time_in_turns(
                {
                    "ours": augment_volumes,
                    "literal": lambda literal=literal, volumes=volumes, n=slow_count: [literal(v) for v in volumes[:n]],
                },
                args.rounds,
            )
            rows.append(
                make_comparison_row(
                    f"augmentation {letters}, one view, one core",
                    "ms",
                    times["ours"],
                    times["literal"],
                    count / 1e3,
                    slow_count / 1e3,
                    goal=goal,
                )
            )
    finally:
        torch.set_num_threads(threads)
    return rows


def measure_reading(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Time the reading of shuffled batches, one location file after another, and compare with dd on the same files."""
    store = make_store(folder, DISTINCT_FILES, args.reading_subjects)
    paths = [store.layout.grouped_patch_file(location) for location in range(DISTINCT_FILES)]
    total = sum(path.stat().st_size for path in paths)
    order = np.random.default_rng(0).permutation(store.num_subjects)

    def drop_page_cache() -> None:
        """Drop the files from the page cache."""
        for path in paths:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read_batches(prefetch: Callable[[list[Path]], None] = lambda _: None) -> None:
        fresh = PatchStore(folder, require_grouped=True)  # an old memory mapping would keep the files in the page cache
        for location in range(DISTINCT_FILES):
            prefetch(paths[location + 1 : location + 2])
            for start in range(0, len(order), 32):
                fresh.read(location, order[start : start + 32])

    def read_files_with_dd() -> None:
        for path in paths:
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)

    rows = []
    for cold, ahead in ((True, False), (True, True), (False, True)):
        times: dict[str, list[float]] = {"ours": [], "dd": []}
        for _ in range(args.rounds):
            jobs = {"ours": (lambda: read_batches(prefetch_files)) if ahead else read_batches, "dd": read_files_with_dd}
            for name, work in jobs.items():
                if cold:
                    drop_page_cache()
                else:
                    work()
                times[name].append(time_seconds(work))
        rows.append(
            make_comparison_row(
                f"reading shuffled batches of 32, {'cold' if cold else 'from the page cache'}, "
                f"{'next location read ahead' if ahead else 'not read ahead'} (literal: dd)",
                "GB/s",
                times["ours"],
                times["dd"],
                total / 1e9,
                total / 1e9,
            )
        )
    return rows
