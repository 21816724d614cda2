"""The rows of extraction."""

import math

import numpy as np
import torch

from data.locations import normalize_locations
from data.store import PatchStore
from data.views import to_input
from models.frozen import LOCATIONS_AT_ONCE, freeze
from tools.timing.apart import PUBLISHED_LOCATIONS, Apart
from tools.timing.literal import literal_encode
from tools.timing.measure import Row, compare, in_turns
from tools.timing.step import trained_encoder
from tools.timing.training import FORWARD_GFLOP

EXTRACT_BATCH = 256  # the default of extract_feature.py


def rows_extraction(store: PatchStore, apart: Apart, args, machine: dict) -> list[Row]:
    """Features of a 581-patch subject over a cohort, location by location."""
    device, N = args.device, store.num_subjects
    encoder = trained_encoder(device)
    locations = torch.from_numpy(normalize_locations(store.locations)).to(device)
    batches = np.array_split(np.arange(N), math.ceil(N / EXTRACT_BATCH))

    def read(location: int, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(store.read(location, rows)).to(device)

    def features(dtype: torch.dtype) -> None:
        for location, frozen in enumerate(freeze(encoder, locations[:LOCATIONS_AT_ONCE], dtype)):
            for rows in batches:
                frozen(read(location, rows), to_input).cpu()

    x = to_input(read(0, batches[0]))
    with torch.no_grad():
        wanted = literal_encode(encoder, x, locations[:1].expand(len(x), 3))[1]
    times = in_turns(
        {
            torch.float32: lambda: features(torch.float32),
            torch.bfloat16: lambda: features(torch.bfloat16),
            "literal": lambda: apart("features"),
        },
        args.rounds,
    )
    rows = []
    for dtype, kind, goal in (
        (torch.float32, "float32", "1.5 s; 9 times"),
        (torch.bfloat16, "bf16", "0.6 s"),
    ):
        error = float((freeze(encoder, locations[:1], dtype)[0](x) - wanted).norm() / wanted.norm())
        note = f"error of h {error:.0e}"
        if kind == "bf16" and not machine["fast_bf16"]:
            note += "; the processor has no bf16 arithmetic"
        rows.append(
            compare(
                f"features of a subject of {PUBLISHED_LOCATIONS} patches, in a cohort of {N}, {kind}, reading included",
                "s",
                times[dtype],
                times["literal"],
                N * LOCATIONS_AT_ONCE / PUBLISHED_LOCATIONS,
                1.0,
                FORWARD_GFLOP * PUBLISHED_LOCATIONS,
                machine[f"matrix_gflops_{kind}"],
                goal=goal,
                note=note,
            )
        )
    return rows
