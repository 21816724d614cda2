"""Features of patches and windows, and linear models that predict a label from these features."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from data.locations import normalize_locations
from data.store import PatchStore
from data.views import convert_hu_to_input
from misc.progress import progress_bar
from models.frozen import LOCATIONS_AT_ONCE, freeze_at_locations
from preprocess.patches import Patches, cut_patches
from tools.evaluation.baselines import count_voxels_by_density
from tools.evaluation.learn import make_ridge_regression
from tools.mapping.windows import Windows

Encode = Callable[[np.ndarray], np.ndarray]  # (n, 32, 32, 32) int16 HU at one location -> (n, D)


class Readers:
    """Compute features of patches: the encoder's representation h.

    With ``add_density_features``, also compute a histogram and the fraction of voxels below -950 HU.

    In the docstrings of this module, D is rep_dim, or rep_dim + BINS + 1 with ``add_density_features``.
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        rep_dim: int,
        locations: np.ndarray,
        device: torch.device,
        add_density_features: bool,
    ):
        self.rep_dim, self.compare = rep_dim, add_density_features
        self.encoder = encoder.eval().to(device)
        self.locations = torch.from_numpy(normalize_locations(locations)).to(device)

    def iterate_location_encoders(self, locations: Iterable[int]) -> Iterable[tuple[int, Encode]]:
        """Yield each location of ``locations`` with a function that computes the features of its patches, (n, D)."""
        locations = list(locations)
        for start in range(0, len(locations), LOCATIONS_AT_ONCE):
            some = locations[start : start + LOCATIONS_AT_ONCE]
            for place, frozen in zip(some, freeze_at_locations(self.encoder, self.locations[some])):
                yield place, lambda patches, frozen=frozen: self._compute_patch_features(patches, frozen)

    def _compute_patch_features(self, patches: np.ndarray, frozen_encoder: Callable[..., torch.Tensor]) -> np.ndarray:
        h = frozen_encoder(
            torch.from_numpy(np.ascontiguousarray(patches)).to(self.locations.device), convert_hu_to_input
        )  # (n, rep_dim)
        if not self.compare:
            return h.cpu().numpy()
        counts = [count_voxels_by_density(patch) for patch in patches]
        histograms = np.array([histogram / histogram.sum() for histogram, _, _ in counts])  # (n, BINS)
        density = np.array([[low / max(1, lung)] for _, low, lung in counts])  # (n, 1)
        return np.concatenate([h.cpu().numpy(), histograms, density], axis=1)

    def split_by_feature_type(self, patch_features: np.ndarray) -> dict[str, np.ndarray]:
        """Split features (..., D) by source: encoder and, if ``self.compare`` is set, histogram and density."""
        found = {"features": patch_features[..., : self.rep_dim]}
        if self.compare:
            found |= {"histogram": patch_features[..., self.rep_dim : -1], "density": patch_features[..., -1:]}
        return found


def compute_subject_and_location_means(
    readers: Readers, store: PatchStore, rows: np.ndarray, no_progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean features of some subjects of the store: over locations (n, D), and over subjects (L, D)."""
    total: np.ndarray | float = 0.0
    of_place = []
    with progress_bar(no_progress, total=store.num_locations, desc="store", unit="location") as bar:
        for place, encode in readers.iterate_location_encoders(range(store.num_locations)):
            read = encode(store.read(place, rows)).astype(np.float64)
            total = total + read
            of_place.append(read.mean(axis=0))
            bar.update()
    return total / store.num_locations, np.array(of_place)


def compute_patch_features(
    readers: Readers, patch_locations: np.ndarray, read_patches: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Compute features (n, D) of patches at several locations, one location at a time to save memory.

    Args:
        readers: object that computes the features of patches at each location.
        patch_locations: (n,) location of each patch, as a row of the location table.
        read_patches: function that takes a location and the indices (m,) of its patches in ``patch_locations``, and
            returns these patches, (m, 32, 32, 32) in HU.
    """
    found: np.ndarray | None = None
    for place, encode in readers.iterate_location_encoders(np.unique(patch_locations).tolist()):
        own = np.flatnonzero(patch_locations == place)
        part = encode(read_patches(place, own))
        found = np.zeros((len(patch_locations), part.shape[1])) if found is None else found
        found[own] = part
    return found


def compute_window_features(
    readers: Readers, resampled_scan: Patches, windows: Windows, patch_size: int, mean_features_per_location: np.ndarray
) -> np.ndarray:
    """Compute the features of each window, minus the mean features at its location: (n, D).

    Args:
        readers: object that computes the features.
        resampled_scan: the resampled scan.
        windows: the windows.
        patch_size: edge length of a window in voxels.
        mean_features_per_location: (L, D), mean features of the training subjects at each location. Features differ
            more between locations than between subjects, because each location has its own kernels. The linear model
            is therefore fitted to deviations from the mean of each location.
    """
    found = compute_patch_features(
        readers, windows.places, lambda _, own: cut_patches(resampled_scan.values, windows.corners[own], patch_size)[0]
    )
    return found - mean_features_per_location[windows.places]


def fit_probe(features: np.ndarray, target: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a linear model of a label, and return its predict function.

    A model fitted to subject means also applies to single patches. This is multiple-instance learning from weak labels
    with mean pooling: the prediction for the mean of the patches is the mean of the predictions for the patches. The
    prediction for a patch therefore shows how much the patch contributes to the prediction for the subject.

    Args:
        features: (n, D) features, after subtracting mean features as in :func:`compute_window_features`.
        target: (n,) label values.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), make_ridge_regression()).fit(features, target).predict
