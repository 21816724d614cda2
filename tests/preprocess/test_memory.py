"""Test that peak memory is a small multiple of the size of a scan (430 MB).

Processing float32 and wider types in slabs gives the same results as processing whole arrays."""

import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess import geometry
from preprocess.geometry import average_blocks, iterate_slabs, orient, resample_to_slab
from preprocess.reading.values import check_hounsfield

from ..conftest import ROOT
from .phantoms import array, chest, image_of

STEPS = """
import json, re, sys
from pathlib import Path
import ants
from preprocess.lungs import check_lungs, lung_volumes
from preprocess.registration import make_coarse_lung_image
from preprocess.scan import limit_threads, load_scan, read_mask

limit_threads(1)
found = {}

def peak(name, step):
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory mark
    before = memory("VmRSS")
    result = step()
    found[name] = memory("VmHWM") - before
    return result

def memory(name):
    return int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

scan = peak("read", lambda: load_scan(sys.argv[1])).image
mask = read_mask(sys.argv[2])
peak("volumes", lambda: lung_volumes(mask, "mask"))
peak("check", lambda: check_lungs(mask, scan, "mask"))
peak("coarse", lambda: make_coarse_lung_image(mask, 8.0))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_peak_memory_in_multiples_of_the_scan(tmp_path):
    small, size, origin = chest((60, 60, 70), spacing=(5.0, 5.0, 5.0)), (400, 256, 256), (-60.5, -55.25, 101.5)
    spacing = [5 * (n - 1) / (m - 1) for n, m in zip((70, 60, 60), size[::-1])]
    grid = (size[::-1], sitk.Transform(), sitk.sitkNearestNeighbor, origin, spacing, np.eye(3).ravel().tolist())
    scan = sitk.Resample(small, *grid, -1000.0)
    mask = np.zeros(size, dtype=np.uint8)
    mask[:, :, :128], mask[:, :, 128:] = 1, 2
    mask[array(scan) > -500] = 0
    sitk.WriteImage(scan, str(tmp_path / "scan.nii"))
    sitk.WriteImage(image_of(mask, spacing), str(tmp_path / "mask.nii"))
    call = [sys.executable, "-c", STEPS, str(tmp_path / "scan.nii"), str(tmp_path / "mask.nii")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: peak / (np.prod(size) * 2) for name, peak in json.loads(done.stdout).items()}
    assert found["read"] < 3 and found["volumes"] < 1 and found["check"] < 2 and found["coarse"] < 3, found


@pytest.mark.parametrize("factors", [(1, 1, 1), (2, 3, 4), (3, 2, 5), (40, 1, 50)])
def test_means_in_slabs_equal_means_of_the_whole(monkeypatch, factors):
    monkeypatch.setattr(geometry, "SLAB", 5000)
    image = chest((43, 34, 30))
    factors_there = [min(factor, count) for factor, count in zip(factors, image.GetSize())]
    whole = sitk.BinShrink(sitk.Cast(image > -500, sitk.sitkFloat32), factors_there)
    found = average_blocks(image, factors, lambda slab: slab > -500)
    assert len(list(iterate_slabs(image, factors_there[2]))) > (factors[2] < 43)
    assert (array(found) == array(whole)).all()
    for of in (sitk.Image.GetOrigin, sitk.Image.GetSpacing, sitk.Image.GetDirection):
        assert of(found) == of(whole)


def test_resampling_in_slabs_equals_resampling_at_once(monkeypatch):
    monkeypatch.setattr(geometry, "SLAB", 5000)
    grid, coarse = chest((43, 34, 30)), sitk.Cast(chest((20, 16, 14), spacing=(6.1, 7.3, 5.2)), sitk.sitkFloat32)
    found = np.concatenate([resample_to_slab(coarse, grid, *ends) for ends in iterate_slabs(grid)])
    whole = array(sitk.Resample(coarse, grid, sitk.Transform(), sitk.sitkLinear, 0.0))
    assert len(list(iterate_slabs(grid))) > 3 and np.allclose(found, whole, atol=1e-3) and np.ptp(whole) > 500


def test_an_unchanged_scan_is_not_copied():
    image = chest()
    assert check_hounsfield(image, "x") is image
    values = array(image)
    values[0, 0, :5] = -2000
    changed = check_hounsfield(image_of(values), "x")
    assert array(changed).min() == -1024 and (array(changed)[1:] == values[1:]).all()


@pytest.mark.parametrize("wanted", ["LPS", "RAS", "LAI", "SPL"])
def test_flips_equal_the_itk_filter(wanted):
    image = chest((7, 6, 5))
    image.SetDirection([np.cos(0.1), -np.sin(0.1), 0, np.sin(0.1), np.cos(0.1), 0, 0, 0, 1])
    found, whole = orient(image, wanted), sitk.DICOMOrient(image, wanted)
    assert (array(found) == array(whole)).all()
    assert found.GetOrigin() == whole.GetOrigin() and found.GetDirection() == whole.GetDirection()
