"""Process one scan from Python without a store: mask, transform, patches and features equal those of the commands."""

import numpy as np
import SimpleITK as sitk
import torch

from data.locations import normalize_locations
from data.views import convert_hu_to_input
from models.builder import DrasCLR
from models.checkpoint import add_module_prefix, build_query_encoder, read_checkpoint, save_checkpoint
from models.cnn3d import Encoder
from models.frozen import freeze_at_locations
from preprocess.atlas import load_atlas
from preprocess.lungs import lung_mask
from preprocess.patches import cut_scan
from preprocess.picture import render_patch_picture
from preprocess.registration import register_masks
from preprocess.scan import read_scan

from ..conftest import calibrate


def test_patches_and_features_of_one_scan(cohort, run, tmp_path):
    folder, store = cohort
    scan, atlas = read_scan(folder / "image" / "0002.nii.gz"), load_atlas(folder / "atlas_lung_mask.nii.gz")
    table = np.load(store / "atlas_patch_loc.npy")
    mask = lung_mask(scan, "threshold")
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(store / "lung_mask" / "0002.nii.gz")))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), stored)
    cut = cut_scan(scan, register_masks(atlas, mask), atlas, table, 32)
    np.testing.assert_array_equal(cut.patches, np.load(store / "patch" / "0002_patch.npy"))
    np.testing.assert_array_equal(cut.corners, np.load(store / "patch_loc" / "0002_patch_loc.npy"))
    picture = render_patch_picture(cut.volume, cut.values, mask, cut.corners, 32, "one scan")
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000

    torch.manual_seed(0)
    model = DrasCLR(Encoder, len(table), 16, 8, 2, 1, 8, 0.9, 0.2, True)
    calibrate(model.encoder_q)
    save_checkpoint(tmp_path / "c.pth.tar", {"epoch": 1, "state_dict": add_module_prefix(model.state_dict())})
    flags = ("--exp-name", ".", "--checkpoint-patch", "c.pth.tar", "--root-dir", store, "--out-dir", "o")
    run("extract_feature.py", *flags, "--device", "cpu", cwd=tmp_path)
    encoder, _ = build_query_encoder(Encoder, read_checkpoint(tmp_path / "c.pth.tar"), "the checkpoint")
    locations = torch.from_numpy(normalize_locations(table))
    frozen = freeze_at_locations(encoder, locations)
    h = torch.cat([f(convert_hu_to_input(torch.from_numpy(patch[None]))) for f, patch in zip(frozen, cut.patches)])
    np.testing.assert_allclose(h, np.load(tmp_path / "o" / "pred_arr_patch_full.npy")[1], rtol=1e-4, atol=1e-5)


def test_the_functions_do_not_import_store_code(cohort):
    """Importing the preprocessing functions loads no code for reports, workers or stores."""
    import subprocess
    import sys

    from ..conftest import ROOT

    code = (
        "import sys, preprocess.scan, preprocess.geometry, preprocess.lungs, preprocess.registration, "
        "preprocess.patches, preprocess.picture, preprocess.atlas\n"
        "wrong = [name for name in sys.modules if name.startswith('data.') or name in ('preprocess.report', "
        "'preprocess.workers', 'preprocess.outputs', 'preprocess.subjects', 'torch')]\nassert not wrong, wrong"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
