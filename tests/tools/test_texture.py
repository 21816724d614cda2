"""Render every class of lung tissue at 0.6 mm and compare its texture with measurements of real patches."""

import numpy as np
import pytest

from tools.cohort.texture import CLASSES, Parenchyma

# Columns 1 and 2: mean and SD of the pixels below -700 HU.
# Columns 3 to 5: fractions of all pixels below -950, below -910 and above -700 HU.
# Column 6: autocorrelation at distances of 1, 2, 3, 4, 6 and 8 pixels.
# Source: 1,337 patches of the Chest Imaging Platform's public data.
MEASURED = {
    "normal": (-889, 37, 0.01, 0.26, 0.06, (0.79, 0.46, 0.24, 0.14, 0.07, 0.05)),
    "mild_centrilobular": (-889, 44, 0.04, 0.32, 0.05, (0.80, 0.46, 0.23, 0.10, 0.01, 0.0)),
    "moderate_centrilobular": (-917, 50, 0.28, 0.63, 0.05, (0.82, 0.52, 0.28, 0.15, 0.04, 0.01)),
    "severe_centrilobular": (-949, 46, 0.64, 0.85, 0.02, (0.81, 0.50, 0.27, 0.15, 0.06, 0.03)),
    "panlobular": (-971, 27, 0.88, 0.97, 0.005, (0.73, 0.36, 0.17, 0.09, 0.04, 0.02)),
    "paraseptal": (-914, 61, 0.20, 0.38, 0.34, (0.91, 0.77, 0.64, 0.53, 0.36, 0.22)),
}
SIDE, WALL = 31, 10  # in pixels: the side of a patch, and the rows of chest wall in a paraseptal patch


def measure(patch):
    """Measure a (31, 31) patch; return a row like those of MEASURED. The autocorrelation uses pixels below -700 HU."""
    low = patch < -700
    mean, sd = patch[low].mean(), patch[low].std()
    rest = np.where(low, patch - mean, 0.0)
    correlation = []
    for lag in (1, 2, 3, 4, 6, 8):
        pairs = [
            (rest[lag:], rest[:-lag], low[lag:] & low[:-lag]),
            (rest[:, lag:], rest[:, :-lag], low[:, lag:] & low[:, :-lag]),
        ]
        total = sum((one * two)[both].sum() for one, two, both in pairs)
        correlation.append(total / sum(both.sum() for *_, both in pairs) / sd**2)
    return [mean, sd, (patch < -950).mean(), (patch < -910).mean(), (patch > -700).mean(), *correlation]


@pytest.fixture(scope="module")
def rows():
    """Return the 11 measurements of each patch, (n, 11), for each class of synthetic lung tissue."""
    shape = (96, 248, 248)
    parenchyma = Parenchyma(shape, np.full(3, 0.6), np.random.default_rng(0))
    found = {}
    for kind, name in enumerate(CLASSES):
        hu = parenchyma.render_class_texture(kind)
        patches = hu[::4].reshape(24, 8, SIDE, 8, SIDE).transpose(0, 1, 3, 2, 4).reshape(-1, SIDE, SIDE).copy()
        if name == "paraseptal":
            patches[:, :WALL] = 40.0
        found[name] = np.array([measure(patch) for patch in patches[::3]])
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_the_texture_of_real_lung(rows, name):
    mean, sd, below_950, below_910, above_700, correlation = MEASURED[name]
    found = rows[name]
    assert found[:, 0].mean() == pytest.approx(mean, abs=5)
    assert np.median(found[:, 1]) == pytest.approx(sd, rel=0.15)
    np.testing.assert_allclose(np.median(found[:, 2:5], axis=0), (below_950, below_910, above_700), atol=0.05)
    np.testing.assert_allclose(found[:, 5:].mean(0), correlation, atol=0.1)
