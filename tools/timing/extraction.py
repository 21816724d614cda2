"""Time feature extraction, and return the rows for the benchmark table."""

import argparse
import functools
import math

import numpy as np
import torch

from data.locations import normalize_locations
from data.store import PatchStore
from data.views import convert_hu_to_input
from models.frozen import LOCATIONS_AT_ONCE, freeze_at_locations
from tools.dev.apart import PUBLISHED_LOCATIONS, LiteralProcess
from tools.dev.literal import encode_sample_by_sample
from tools.timing.measure import NO_BF16, Row, list_precisions, make_comparison_row, time_in_turns
from tools.timing.step import make_encoder
from tools.timing.training import FORWARD_GFLOP

EXTRACT_BATCH = 256  # the default of extract_feature.py


def measure_extraction(store: PatchStore, apart: LiteralProcess, args: argparse.Namespace, machine: dict) -> list[Row]:
    """Time feature extraction per subject of 581 patches, in a cohort that is encoded location by location."""
    device, N = args.device, store.num_subjects
    encoder = make_encoder(device)
    locations = torch.from_numpy(normalize_locations(store.locations)).to(device)
    batches = np.array_split(np.arange(N), math.ceil(N / EXTRACT_BATCH))

    def read_to_device(location: int, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(store.read(location, rows)).to(device)

    def encode_store(dtype: torch.dtype) -> None:
        for location, frozen in enumerate(freeze_at_locations(encoder, locations[:LOCATIONS_AT_ONCE], dtype)):
            for rows in batches:
                frozen(read_to_device(location, rows), convert_hu_to_input).cpu()

    x = convert_hu_to_input(read_to_device(0, batches[0]))
    with torch.no_grad():
        wanted = encode_sample_by_sample(encoder, x, locations[:1].expand(len(x), 3))[1]
    kinds = list_precisions(machine)
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
    jobs = {kind: functools.partial(encode_store, dtypes[kind]) for kind in kinds}
    times = time_in_turns({**jobs, "literal": lambda: apart("features")}, args.rounds)
    rows = []
    for kind, goal in (("float32", "1.5 s; 9 times"), ("bf16", "0.6 s")):
        what = f"features of a subject of {PUBLISHED_LOCATIONS} patches, in a cohort of {N}, {kind}, reading included"
        if kind not in kinds:
            rows.append(Row(what, "s", goal=goal, note=NO_BF16))
            continue
        error = float((freeze_at_locations(encoder, locations[:1], dtypes[kind])[0](x) - wanted).norm() / wanted.norm())
        amount, gflop = N * LOCATIONS_AT_ONCE / PUBLISHED_LOCATIONS, FORWARD_GFLOP * PUBLISHED_LOCATIONS
        rate = machine[f"matrix_gflops_{kind}"]
        # The literal implementation is timed only on this store's locations, which are fewer than the published 581.
        one = store.num_locations / PUBLISHED_LOCATIONS
        row = make_comparison_row(what, "s", times[kind], times["literal"], amount, one, gflop, rate)
        row.goal, row.note = goal, f"error of h {error:.0e}"
        rows.append(row)
    return rows
