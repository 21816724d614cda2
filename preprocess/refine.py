"""Refine an affine between lung masks by maximising the overlap of both lungs.

ANTs compares intensities. If the lungs had different label values, one lung would count more than the other in the
registration. If both lungs had the same value, ANTs could not distinguish right from left. This module therefore
starts from the ANTs transform and maximises the overlap of the lungs.
"""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from preprocess.geometry import average_blocks

LEVELS = ((2.5, 30), (1.5, 12))  # per level: atlas point spacing as a multiple of ``spacing``, and maximum iterations
LENGTH = 100.0  # mm; a change of 1 in a matrix parameter moves a point at this distance from the centre by 1 mm
TOLERANCE = 1e-5  # relative change of the objective below which the iterations stop


class Points(NamedTuple):
    """Sample points in the lungs of the atlas."""

    places: np.ndarray  # (P, 3) coordinates, mm
    weights: np.ndarray  # (P, 2) volume of right and left lung around each point, ml


class Sampled(NamedTuple):
    """The lungs of a scan on a coarse grid."""

    shares: np.ndarray  # (x, y, z, 2) fraction of right and left lung in each voxel, with a border of zeros
    to_index: np.ndarray  # (3, 4) affine from points in mm to indices
    volumes: np.ndarray  # (2,) volume of right and left lung, ml


def average_lung_fractions(
    labels: sitk.Image, lung_labels: tuple[int, int], spacing: float
) -> tuple[np.ndarray, sitk.Image]:
    """Average both lungs over coarse voxels of about ``spacing`` mm.

    Returns:
        The fractions of right and left lung in each voxel, (x, y, z, 2) float64, and the grid as an image.
    """
    array = sitk.GetArrayViewFromImage(labels)
    shrink = [max(1, round(spacing / own)) for own in labels.GetSpacing()]
    box = ndimage.find_objects((array > 0).view(np.uint8))[0][::-1]  # x, y, z
    labels = sitk.RegionOfInterest(labels, [side.stop - side.start for side in box], [side.start for side in box])
    # Pad to whole coarse voxels, because averaging drops incomplete ones, and add an empty border around the lungs.
    margin = [factor * 2 for factor in shrink]
    upper = [two + (-n) % factor for n, two, factor in zip(labels.GetSize(), margin, shrink)]
    labels = sitk.ConstantPad(labels, margin, upper, 0)
    found, grid = [], None
    for value in lung_labels:
        grid = average_blocks(labels, shrink, lambda slab, value=value: slab == value)
        found.append(sitk.GetArrayFromImage(grid).transpose(2, 1, 0).astype(np.float64))
    return np.stack(found, axis=-1), grid


def _make_index_to_point(grid: sitk.Image) -> np.ndarray:
    """Return the (3, 4) affine of an image from indices to points in mm."""
    matrix = np.array(grid.GetDirection()).reshape(3, 3) * np.array(grid.GetSpacing())
    return np.column_stack([matrix, grid.GetOrigin()])


def make_atlas_points(atlas: sitk.Image, values: tuple[int, int], spacing: float) -> Points:
    """Convert the atlas lungs to points about ``spacing`` mm apart."""
    shares, grid = average_lung_fractions(atlas, values, spacing)
    index = np.argwhere(shares.any(axis=-1))  # (P, 3)
    to_point = _make_index_to_point(grid)
    millilitres = abs(np.linalg.det(to_point[:, :3])) / 1000
    return Points(index @ to_point[:, :3].T + to_point[:, 3], shares[tuple(index.T)] * millilitres)


def sample_lung_fractions(mask: sitk.Image, lung_labels: tuple[int, int], spacing: float) -> Sampled:
    """Compute the lung fractions of a scan on a grid with a voxel spacing of about ``spacing`` mm."""
    shares, grid = average_lung_fractions(mask, lung_labels, spacing)
    to_point = _make_index_to_point(grid)
    inverse = np.linalg.inv(to_point[:, :3])
    millilitres = abs(np.linalg.det(to_point[:, :3])) / 1000
    return Sampled(
        shares, np.column_stack([inverse, -inverse @ to_point[:, 3]]), shares.sum(axis=(0, 1, 2)) * millilitres
    )


def _interpolate_fractions_and_gradients(sampled: Sampled, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate the lung fractions (P, 2) at points in mm, and their derivatives with respect to x, y, z (P, 2, 3).

    The interpolation is trilinear, and the fractions are 0 outside the grid.
    """
    index = points_mm @ sampled.to_index[:, :3].T + sampled.to_index[:, 3]  # (P, 3)
    size = np.array(sampled.shares.shape[:3])
    index = np.clip(index, 0, size - 1.001)  # move points outside the grid to its border, where the fractions are 0
    low = index.astype(np.int64)
    f = index - low  # (P, 3)
    strides = np.array([size[1] * size[2], size[2], 1])
    flat, start = sampled.shares.reshape(-1, 2), low @ strides
    corner = [flat[start + (a * strides[0] + b * strides[1] + c)] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    c000, c001, c010, c011, c100, c101, c110, c111 = corner  # (P, 2) each
    x, y, z = f[:, :1], f[:, 1:2], f[:, 2:]
    d00, d01, d10, d11 = c100 - c000, c101 - c001, c110 - c010, c111 - c011
    e00, e01, e10, e11 = c000 + x * d00, c001 + x * d01, c010 + x * d10, c011 + x * d11
    g0, g1 = e00 + y * (e10 - e00), e01 + y * (e11 - e01)
    h0, h1 = d00 + y * (d10 - d00), d01 + y * (d11 - d01)
    by_x = h0 + z * (h1 - h0)
    by_y = (e10 - e00) * (1 - z) + (e11 - e01) * z
    by_index = np.stack([by_x, by_y, g1 - g0], axis=2)  # (P, 2, 3)
    return g0 + z * (g1 - g0), by_index @ sampled.to_index[:, :3]


def compute_soft_dice(
    parameters: np.ndarray, points: Points, sampled: Sampled, centre: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the negative sum of the Dice values of the right, the left and both lungs, and its gradient, (12,).

    The overlap is evaluated only at the atlas points. The volume of the scan's lungs in atlas space is therefore
    computed as their volume in the scan, divided by the determinant of the matrix.
    """
    matrix, shift = parameters[:9].reshape(3, 3) / LENGTH, parameters[9:]
    from_centre = points.places - centre  # (P, 3)
    shares, slopes = _interpolate_fractions_and_gradients(sampled, from_centre @ matrix.T + centre + shift)
    determinant = abs(np.linalg.det(matrix))
    sizes = points.weights.sum(axis=0), sampled.volumes / determinant  # (2,) ml each
    sides = 2 * (points.weights * shares).sum(axis=0) / (sizes[0] + sizes[1])  # (2,)
    together = points.weights.sum(axis=1)  # (P,)
    both = 2 * (together * shares.sum(axis=1)).sum() / (sizes[0] + sizes[1]).sum()

    total = (sizes[0] + sizes[1]).sum()
    # Derivatives of the sum of all Dice values with respect to the lung fractions at the points, (P, 2).
    pull = 2 * points.weights / (sizes[0] + sizes[1]) + 2 * together[:, None] / total
    by_place = (pull[:, :, None] * slopes).sum(axis=1)  # (P, 3)
    by_matrix = np.einsum("pi,pj->ij", by_place, from_centre)
    # The volumes depend on the determinant, whose derivative is the determinant times the transposed inverse.
    by_size = (sides * sizes[1] / (sizes[0] + sizes[1])).sum() + both * sizes[1].sum() / total
    by_matrix += by_size * np.linalg.inv(matrix).T
    gradient = np.concatenate([by_matrix.ravel() / LENGTH, by_place.sum(axis=0)])
    return -float(sides.sum() + both), -gradient


def refine_affine(
    atlas: sitk.Image,
    atlas_values: tuple[int, int],
    mask: sitk.Image,
    mask_values: tuple[int, int],
    transform: sitk.Transform,
    spacing: float,
) -> sitk.AffineTransform:
    """Find the affine near ``transform`` with the best overlap of the right lungs, the left lungs and both together.

    Args:
        atlas: lung mask of the atlas.
        atlas_values: labels of the right and left lung in the atlas.
        mask: lung mask of the scan.
        mask_values: labels of the right and left lung in the scan.
        transform: affine from atlas points to scan points, from which the optimisation starts.
        spacing: spacing in mm of the coarse grid on which the scan's mask is averaged.
    """
    from scipy.optimize import minimize

    sampled = sample_lung_fractions(mask, mask_values, spacing)
    start = sitk.AffineTransform(transform)
    coarse = make_atlas_points(atlas, atlas_values, spacing * LEVELS[0][0])
    centre = coarse.places.mean(axis=0)
    shift = np.array(start.TransformPoint(centre.tolist())) - centre
    parameters = np.concatenate([np.array(start.GetMatrix()) * LENGTH, shift])
    for scale, iterations in LEVELS:
        points = make_atlas_points(atlas, atlas_values, spacing * scale)
        options = dict(maxiter=iterations, ftol=TOLERANCE)
        parameters = minimize(
            compute_soft_dice, parameters, (points, sampled, centre), "L-BFGS-B", jac=True, options=options
        ).x
    found = sitk.AffineTransform(3)
    found.SetCenter(centre.tolist())
    found.SetMatrix((parameters[:9] / LENGTH).tolist())
    found.SetTranslation(parameters[9:].tolist())
    return found
