"""Split feature extraction into pieces, and encode each piece. Reading, copying and encoding run in parallel."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from data.device import Copier, LateCopies
from data.prefetch import read_ahead
from data.store import PatchStore
from data.views import convert_hu_to_input

PIECE_SUBJECTS = 64  # subjects per piece if the store has patch/ but no grouped_patch/


class Piece(NamedTuple):
    """A part of the extraction, saved as one file: all subjects at one location, or all locations of some subjects."""

    name: str
    locations: range
    rows: range


def split_store_into_pieces(store: PatchStore) -> list[Piece]:
    """Split the store into pieces, so that each file is read by only one piece.

    In a grouped store, a piece covers all subjects at one location. Without grouping, a piece covers all locations of
    up to PIECE_SUBJECTS subjects.
    """
    if store.grouped:
        return [
            Piece(f"location_{index:05d}.npy", range(index, index + 1), range(store.num_subjects))
            for index in range(store.num_locations)
        ]
    pieces = []
    for start in range(0, store.num_subjects, PIECE_SUBJECTS):
        rows = range(start, min(start + PIECE_SUBJECTS, store.num_subjects))
        pieces.append(Piece(f"subjects_{start:07d}.npy", range(store.num_locations), rows))
    return pieces


class Batch(NamedTuple):
    """Patches that are encoded together: some subjects of a piece, at one location."""

    piece: Piece
    column: int  # index into the piece's locations
    start: int  # index of this batch's first row within the piece's rows
    rows: np.ndarray
    last: bool  # whether this batch is the last of its piece


def list_batches(pieces: list[Piece], batch_size: int) -> Iterator[Batch]:
    """Yield the batches of each piece, location by location."""
    for piece in pieces:
        rows = np.asarray(piece.rows)
        starts = range(0, len(rows), batch_size)
        for column in range(len(piece.locations)):
            for start in starts:
                last = column == len(piece.locations) - 1 and start == starts[-1]
                yield Batch(piece, column, start, rows[start : start + batch_size], last)


def encode_pieces(
    frozen_encoders: Mapping[int, Callable[..., torch.Tensor]],
    store: PatchStore,
    pieces: list[Piece],
    batch_size: int,
    device: torch.device,
    layers: bool = False,
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yield the pieces in order, each with its representations, (rows, locations, rep_dim) float32.

    Args:
        frozen_encoders: maps each location to its encoder, for example a models.frozen.FrozenLocations.
        store: store to read from.
        pieces: pieces from :func:`split_store_into_pieces`.
        batch_size: number of patches to encode together.
        device: device of the encoder.
        layers: append W summary values of all layers; the result is (rows, locations, rep_dim + W).
    """

    def read_batch(batch: Batch) -> torch.Tensor:
        patches = torch.from_numpy(store.read(batch.piece.locations[batch.column], batch.rows))
        return patches.pin_memory() if device.type == "cuda" else patches

    copy, late, result = Copier(device), LateCopies(device), None
    for batch, patches in read_ahead(read_batch, list_batches(pieces, batch_size)):
        piece = batch.piece
        h = frozen_encoders[piece.locations[batch.column]](
            *copy(patches), convert_hu_to_input, layers
        )  # (b, rep_dim [+ W])
        if result is None:  # collect features on the device; copying each batch to the CPU would make the CPU wait
            result = h.new_empty(len(piece.rows), len(piece.locations), h.shape[1])
        result[batch.start : batch.start + len(h), batch.column] = h
        if batch.last:
            yield from late.copy_and_iterate_earlier_results(piece, result)
            result = None
    yield from late.iterate_remaining_results()
