"""Compute features of scans in memory with the functions of preprocess/ and the frozen encoder, one scan at a time."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch

from data.locations import normalize_locations, table_fingerprint
from data.tables import name_feature_columns
from data.views import convert_hu_to_input
from misc.command import UserError
from misc.files import hash_file
from misc.sizes import PATCH_SIZE
from models.checkpoint import build_query_encoder, check_same_location_table, check_sha256, read_checkpoint
from models.cnn3d import Encoder
from models.fast.pieces import run_in_parallel
from models.frozen import LOCATIONS_AT_ONCE, FrozenLocations, count_layer_features, encode_patch_per_location
from preprocess.atlas import read_atlas_mask
from preprocess.lungs import check_lungs, load_lungmask_network, lung_mask, lung_volumes
from preprocess.patches import Patches, check_any_patch_inside_scan, cut_scan, measure_share_inside
from preprocess.patchify_atlas import STEP_SIZE, make_location_table
from preprocess.patchify_images import summarize_patches_for_report
from preprocess.registration import check_overlap, measure_overlap, register_masks
from preprocess.scan import ScanError, add_warnings, load_scan
from tools.evaluation.vectors import Standardization

OUTSIDE = 0.1  # the report warns if more than 10 % of the patch voxels lie outside the scan
OFF = 0.7  # the report warns if the fraction of patch centres in the lungs is below 0.7 times the atlas's fraction


class Embedded(NamedTuple):
    """Features and reports of one scan."""

    features: np.ndarray  # (rep_dim,) float32: mean over patches; (width,) for other kinds of patient vectors
    patches: np.ndarray  # (L, rep_dim) float32
    figures: dict[str, Any]  # the same numbers as in the preprocessing reports
    verdict: str  # one line
    cut: Patches
    mask: sitk.Image


class Embedder:
    """The models of one checkpoint and one atlas, loaded once for many scans.

    Args:
        checkpoint: checkpoint from train.py, or the published weights.
        atlas_mask: lung mask of the atlas, 50 right lung, 100 left lung.
        atlas_patch_loc: table of patch corners (default: made from the mask).
        method: ``lungmask`` or ``threshold``.
        lungmask_weights: file with the weights of the lungmask network.
        min_dice: minimum Dice overlap with the atlas; scans with a lower overlap are refused.
        sha256: expected SHA-256 of the checkpoint.
        device: device of the encoder.
        patient_vector: one of VECTORS; all except mean need ``standardization``.
        standardization: standardization.npz written by evaluate.py --out-dir for features of this checkpoint.

    Raises:
        UserError: a file is missing or unreadable, or the checkpoint was trained on a different location table.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        atlas_mask: str | os.PathLike,
        atlas_patch_loc: str | os.PathLike | None = None,
        method: str = "lungmask",
        lungmask_weights: str | None = None,
        min_dice: float = 0.5,
        sha256: str | None = None,
        device: torch.device | str = "cpu",
        patient_vector: str = "mean",
        standardization: str | os.PathLike | None = None,
    ):
        self.method, self.weights, self.min_dice = method, lungmask_weights, min_dice
        if method == "lungmask":
            load_lungmask_network(lungmask_weights)  # fail here if weights are missing, not once per scan
        self.atlas = read_atlas_mask(atlas_mask)
        self.table = make_location_table(self.atlas, atlas_patch_loc, PATCH_SIZE, STEP_SIZE)
        source = str(atlas_patch_loc or atlas_mask)
        check_sha256(Path(checkpoint), sha256)
        content = read_checkpoint(Path(checkpoint))
        self.note = check_same_location_table(
            content, checkpoint, len(self.table), table_fingerprint(self.table), source
        )
        encoder, sizes = build_query_encoder(Encoder, content, checkpoint)
        self.rep_dim, self.vector = sizes["rep_dim"], patient_vector
        self.standardization = read_standardization(patient_vector, standardization, hash_file(Path(checkpoint)))
        self.width = self.rep_dim
        if self.standardization is not None:
            patch_width = count_layer_features(encoder) if patient_vector == "layers" else self.rep_dim
            shape, self.width = (len(self.table), patch_width), 2 * patch_width
            if (there := self.standardization.mean.shape) != shape:
                raise UserError(
                    f"--standardization {standardization} has shape (locations, features) = {there}, but this "
                    f"checkpoint needs {shape}; make it from features of this checkpoint"
                )
        self.encoder = encoder.to(device)
        self.locations = torch.from_numpy(normalize_locations(self.table)).to(device)
        self.usual = measure_share_inside(self.table, PATCH_SIZE, self.atlas, self.atlas)

    def encode(self, patches: np.ndarray) -> np.ndarray:
        """Encode patches: (L, 32, 32, 32) int16 HU -> h (L, rep_dim) float32.

        The result equals that of extract_feature.py for a store with one subject. With the patient vector ``layers``,
        each row contains h and then the summaries of all layers, as in models.frozen.
        """
        layers, hu = self.vector == "layers", torch.from_numpy(patches)
        if self.locations.device.type != "cpu":
            hu = hu.to(self.locations.device)
            return (
                encode_patch_per_location(self.encoder, hu, self.locations, convert_hu_to_input, layers).cpu().numpy()
            )
        frozen = FrozenLocations(self.encoder, self.locations)
        encoded = []
        # Compute the kernels of several locations in one call, then encode the patches at these locations in parallel.
        for first in range(0, len(hu), LOCATIONS_AT_ONCE):
            pairs = [
                (frozen[index], hu[index : index + 1]) for index in range(len(hu))[first : first + LOCATIONS_AT_ONCE]
            ]
            encoded += run_in_parallel(lambda pair: pair[0](pair[1], convert_hu_to_input, layers), pairs)
        return torch.cat(encoded).numpy()

    def __call__(self, path: str | os.PathLike, series: str = "") -> Embedded:
        """Compute the features of one scan. Raises ScanError if the scan cannot be used."""
        scan = load_scan(path, series)
        mask = lung_mask(scan.image, self.method, self.weights, path)
        facts = add_warnings(scan.facts, check_lungs(mask, scan.image, f"the mask of {path}"))
        transform = register_masks(self.atlas, mask)
        figures: dict[str, Any] = {**lung_volumes(mask, path), **measure_overlap(self.atlas, mask, transform)}
        check_overlap(figures, self.min_dice, f"{path}'s lung mask")
        cut = cut_scan(scan.image, transform, self.atlas, self.table, PATCH_SIZE)
        check_any_patch_inside_scan(cut, path)
        inside = measure_share_inside(cut.corners, PATCH_SIZE, cut.volume, mask)
        figures |= {**summarize_patches_for_report(cut, PATCH_SIZE), "centres_in_lungs": round(inside, 4)}
        encoded = self.encode(cut.patches)
        if not np.isfinite(encoded).all():
            raise ScanError(
                f"the features of {path} are not finite, probably because training diverged; use another checkpoint"
            )
        patches = encoded[:, : self.rep_dim]
        if self.standardization is None:
            features = patches.mean(axis=0, dtype=np.float64)
        else:
            given = encoded[:, self.rep_dim :] if self.vector == "layers" else patches
            features = self.standardization.compute_patient_vectors(given[None])[0]
        features = features.astype(np.float32)
        return Embedded(features, patches, figures | facts, self.describe_quality_verdict(figures, facts), cut, mask)

    def describe_quality_verdict(self, figures: dict[str, Any], facts: dict[str, str]) -> str:
        """Return ``fine``, or one line that says what to check."""
        said = [facts["warnings"]] if facts.get("warnings") else []
        share = figures["voxels_outside"] / (figures["patches"] * PATCH_SIZE**3)
        if share > OUTSIDE:
            said.append(f"{share:.0%} of the patches' voxels lie outside the scan")
        if figures["centres_in_lungs"] < OFF * self.usual:
            said.append(
                f"{figures['centres_in_lungs']:.2f} of the patch centres lie in the lungs, compared with "
                f"{self.usual:.2f} in the atlas"
            )
        return f"check it: {'; '.join(said)}" if said else "fine"


def read_standardization(kind: str, path: str | os.PathLike | None, checkpoint: str) -> Standardization | None:
    """Read the means and SDs that standardise the features of a patient vector. Raises UserError.

    Return None for the vector ``mean``, which needs no standardisation.
    """
    if kind == "mean":
        if path:
            raise UserError(
                f"--standardization {path} has no effect with --patient-vector mean; choose moments or layers"
            )
        return None
    if not path:
        raise UserError(
            f"--patient-vector {kind} needs --standardization FILE with the mean and SD of other subjects; give the "
            "standardization.npz that evaluate.py --out-dir writes"
        )
    found, made_of = Standardization.load_with_checkpoint_sha256(path)
    if found.kind != kind:
        raise UserError(
            f"--standardization {path} is for --patient-vector {found.kind}, not {kind}; give a file for {kind}"
        )
    if made_of and made_of != checkpoint:
        raise UserError(
            f"--standardization {path} was made for a different checkpoint (sha256 {made_of[:12]}, this one has "
            f"{checkpoint[:12]}); make it from features of this checkpoint"
        )
    return found


def embed_scans(scans: Sequence[str | os.PathLike], checkpoint: str, atlas_mask: str, **choices: Any) -> pd.DataFrame:
    """Compute features of scans as a table with columns sid (name of the file or folder), f000, ...

    Args:
        scans: image files or folders of DICOM slices.
        checkpoint, atlas_mask, choices: arguments of :class:`Embedder`.

    Raises:
        UserError: a scan, the checkpoint or another input cannot be used.
    """
    embedder = Embedder(checkpoint, atlas_mask, **choices)
    sids = [derive_sid_from_path(path) for path in scans]
    if len(set(sids)) < len(sids):
        twice = next(sid for sid in sids if sids.count(sid) > 1)
        raise UserError(f"two scans are called {twice!r}; rename one of the files")
    rows = np.stack([embedder(path).features for path in scans])
    table = pd.DataFrame(rows, columns=name_feature_columns(embedder.width))
    table.insert(0, "sid", sids)
    return table


def derive_sid_from_path(scan_path: str | os.PathLike) -> str:
    """Return the sid of a scan: the name of the file or folder without the suffixes of image formats."""
    scan_path = Path(os.path.abspath(scan_path))
    name = scan_path.name
    if not scan_path.is_dir():
        for suffix in (".gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img", ".dcm"):
            name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return name
