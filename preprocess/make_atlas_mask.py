"""Make your own atlas mask from the lung mask of a scan.

    python preprocess/segment_lung.py --input-csv atlas.csv --root-dir /data/atlas
    python preprocess/make_atlas_mask.py --lung-mask /data/atlas/lung_mask/007.nii.gz \\
        --output atlas_lung_mask.nii.gz

Choose a scan of a normally shaped chest in deep inspiration, and look at its lung mask first. The script resamples the
mask to 1 mm. The script changes label 1 (right lung) to 50, and label 2 (left lung) to 100. If the mask
already has labels 50 and 100, the script only resamples it.
"""

import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError
from misc.command import Parser, run
from preprocess.geometry import ISO_SPACING, write_image
from preprocess.scan import ScanError, read_mask


def resample_and_relabel_atlas_mask(mask: sitk.Image) -> sitk.Image:
    """Resample a mask to 1 mm with the same origin and axes, and set the labels 50 (right lung) and 100 (left lung).

    Raises:
        ScanError: the labels are neither 0, 1, 2 nor 0, 50, 100.
    """
    labels = np.unique(sitk.GetArrayViewFromImage(mask)).tolist()
    if labels not in ([0, 1, 2], [0, 50, 100]):
        raise ScanError(
            f"the mask has labels {labels[:8]}, but needs 0, 1 (right lung), 2 (left lung) or 0, 50 (right), 100 (left)"
        )
    size = [int((n - 1) * own / ISO_SPACING) + 1 for n, own in zip(mask.GetSize(), mask.GetSpacing())]
    grid = (mask.GetOrigin(), [ISO_SPACING] * 3, mask.GetDirection())
    fine = sitk.Resample(mask, size, sitk.Transform(), sitk.sitkNearestNeighbor, *grid)
    return fine if labels[-1] == 100 else fine * 50


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--lung-mask", required=True, help="lung mask of one scan, with any voxel spacing")
    parser.add_argument(
        "--output", required=True, help="file for the atlas mask, for example atlas.nii.gz; must not exist yet"
    )
    args = parser.parse_args()
    target = Path(args.output)
    if not target.name.endswith((".nii.gz", ".nii", ".nrrd", ".mha")):
        raise StoreError(f"--output {target} has an unknown format; end the name in .nii.gz, .nii, .nrrd or .mha")
    if target.exists():
        raise StoreError(f"--output {target} exists already; choose another name")
    try:
        atlas = resample_and_relabel_atlas_mask(read_mask(args.lung_mask))
    except ScanError as error:
        raise StoreError(f"--lung-mask {args.lung_mask}: {error}") from error
    write_image(atlas, target)
    litres = np.count_nonzero(sitk.GetArrayViewFromImage(atlas)) / 1e6
    print(f"make_atlas_mask: {atlas.GetSize()} voxels of 1 mm, lung volume {litres:.1f} litres; {target}")
    return 0


if __name__ == "__main__":
    run(main)
