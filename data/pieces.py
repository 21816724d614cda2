"""The work of an extraction in pieces, and their encoding: patches are read, copied and encoded side by side."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from data.device import Copier, LateCopies
from data.prefetch import read_ahead
from data.store import PatchStore
from data.views import to_input

PIECE_SUBJECTS = 64  # of a piece, if there is only patch/


class Piece(NamedTuple):
    """Work whose result is one file in .pieces: all subjects at a location, or all locations of some subjects."""

    name: str
    locations: range
    rows: range


def list_pieces(store: PatchStore) -> list[Piece]:
    """A piece a location; over patch/, a piece of PIECE_SUBJECTS subjects, so that each file is read once."""
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
    """Patches of some rows of a piece at one of its locations."""

    piece: Piece
    column: int  # of the piece's locations
    start: int  # of the piece's rows
    rows: np.ndarray
    last: bool  # of the piece


def list_batches(pieces: list[Piece], batch_size: int) -> Iterator[Batch]:
    """The batches of each piece, location by location."""
    for piece in pieces:
        rows = np.asarray(piece.rows)
        starts = range(0, len(rows), batch_size)
        for column in range(len(piece.locations)):
            for start in starts:
                last = column == len(piece.locations) - 1 and start == starts[-1]
                yield Batch(piece, column, start, rows[start : start + batch_size], last)


def encode_pieces(
    frozen: Mapping[int, Callable[..., torch.Tensor]],
    store: PatchStore,
    pieces: list[Piece],
    batch_size: int,
    device: torch.device,
    layers: bool = False,
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Representations of one piece after the other: (rows, locations, rep_dim) float32.

    Args:
        frozen: the encoder of each location, models.frozen.FrozenLocations.
        store: to read from.
        pieces: of :func:`list_pieces`.
        batch_size: patches encoded together.
        device: of the encoder.
        layers: append the summaries of all layers, (rows, locations, rep_dim + W).
    """

    def read(batch: Batch) -> torch.Tensor:
        patches = torch.from_numpy(store.read(batch.piece.locations[batch.column], batch.rows))
        return patches.pin_memory() if device.type == "cuda" else patches

    copy, late, result = Copier(device), LateCopies(device), None
    for batch, patches in read_ahead(read, list_batches(pieces, batch_size)):
        piece = batch.piece
        h = frozen[piece.locations[batch.column]](*copy(patches), to_input, layers)  # (b, rep_dim [+ W])
        if result is None:  # on the device: a copy for every batch would wait for it every time
            result = h.new_empty(len(piece.rows), len(piece.locations), h.shape[1])
        result[batch.start : batch.start + len(h), batch.column] = h
        if batch.last:
            yield from late.add(piece, result)
            result = None
    yield from late.rest()
