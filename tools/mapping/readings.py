"""What is read off patches, and what it says of a label: of patients' means, of a store's patches, of windows."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from data.locations import normalize_locations
from data.store import PatchStore
from data.views import to_input
from misc.progress import progress_bar
from models.frozen import LOCATIONS_AT_ONCE, freeze
from preprocess.patches import Patches, cut_patches
from tools.evaluation.baselines import counts_of
from tools.evaluation.learn import ridge
from tools.mapping.windows import Windows

Encode = Callable[[np.ndarray], np.ndarray]  # (n, 32, 32, 32) int16 HU of one place -> (n, D)


class Readers:
    """Readings of a patch: the encoder's h; and to compare, a histogram and the share of its lung below -950 HU.

    Below, D is rep_dim, with ``compare`` rep_dim + BINS + 1.
    """

    def __init__(
        self, encoder: torch.nn.Module, rep_dim: int, locations: np.ndarray, device: torch.device, compare: bool
    ):
        self.rep_dim, self.compare = rep_dim, compare
        self.encoder = encoder.eval().to(device)
        self.locations = torch.from_numpy(normalize_locations(locations)).to(device)

    def of_places(self, places: Iterable[int]) -> Iterable[tuple[int, Encode]]:
        """For every place a function from its patches to their readings, (n, D)."""
        places = list(places)
        for start in range(0, len(places), LOCATIONS_AT_ONCE):
            some = places[start : start + LOCATIONS_AT_ONCE]
            for place, frozen in zip(some, freeze(self.encoder, self.locations[some])):
                yield place, lambda patches, frozen=frozen: self._read(patches, frozen)

    def _read(self, patches: np.ndarray, frozen) -> np.ndarray:
        h = frozen(torch.from_numpy(np.ascontiguousarray(patches)).to(self.locations.device), to_input)  # (n, rep_dim)
        if not self.compare:
            return h.cpu().numpy()
        counts = [counts_of(patch) for patch in patches]
        histograms = np.array([histogram / histogram.sum() for histogram, _, _ in counts])  # (n, BINS)
        density = np.array([[low / max(1, lung)] for _, low, lung in counts])  # (n, 1)
        return np.concatenate([h.cpu().numpy(), histograms, density], axis=1)

    def split(self, readings: np.ndarray) -> dict[str, np.ndarray]:
        """By name, from (..., D)."""
        found = {"features": readings[..., : self.rep_dim]}
        if self.compare:
            found |= {"histogram": readings[..., self.rep_dim : -1], "density": readings[..., -1:]}
        return found


def patient_means(
    readers: Readers, store: PatchStore, rows: np.ndarray, no_progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean readings of some rows of the store: over all places (n, D), and of each place (L, ...)."""
    total: np.ndarray | float = 0.0
    of_place = []
    with progress_bar(no_progress, total=store.num_locations, desc="store", unit="location") as bar:
        for place, encode in readers.of_places(range(store.num_locations)):
            read = encode(store.read(place, rows)).astype(np.float64)
            total = total + read
            of_place.append(read.mean(axis=0))
            bar.update()
    return total / store.num_locations, np.array(of_place)


def patch_readings(readers: Readers, places: np.ndarray, read: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Readings of patches of several places, one place at a time, so memory stays small: (n, D).

    Args:
        places: (n,) rows of the table.
        read: a place and the numbers of its patches -> those patches, (m, 32, 32, 32) HU.
    """
    found: np.ndarray | None = None
    for place, encode in readers.of_places(np.unique(places).tolist()):
        own = np.flatnonzero(places == place)
        part = encode(read(place, own))
        found = np.zeros((len(places), part.shape[1])) if found is None else found
        found[own] = part
    return found


def window_readings(readers: Readers, cut: Patches, windows: Windows, patch_size: int, usual: np.ndarray) -> np.ndarray:
    """Readings of windows, less what is usual at their places: (n, D).

    Args:
        usual: (L, D), the learnt patients' mean at each place. Places differ more than patients do,
            as their kernels do: what a model of patients learns is the deviation.
    """
    found = patch_readings(
        readers, windows.places, lambda _, own: cut_patches(cut.values, windows.corners[own], patch_size)[0]
    )
    return found - usual[windows.places]


def fit_probe(readings: np.ndarray, target: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A linear model of a label. Fitted to patients' means it is one of patches too.

    Learning from weak labels by multiple instances, with the mean as the pooling: a linear model of the mean
    of a patient's patches is the mean of the same model of each, which therefore says how much a patch adds.

    Args:
        readings: (n, D), less the mean of all: so are the windows'.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), ridge()).fit(readings, target).predict
