"""An atlas of your own: a scan's lung mask at 1 mm, with the atlas's labels.

    python preprocess/segment_lung.py --input-csv atlas.csv --root-dir /data/atlas
    python preprocess/make_atlas_mask.py --lung-mask /data/atlas/lung_mask/007.nii.gz \\
        --output atlas_lung_mask.nii.gz

Take the deep inspiration of a chest without deformity, and look at the mask first. Labels 1 and 2 (right
and left lung, as step 2 writes them) become 50 and 100; a mask that has 50 and 100 is only resampled.
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


def atlas_of(mask: sitk.Image) -> sitk.Image:
    """The mask on a grid of 1 mm from the same origin along the same axes: 50 right lung, 100 left.

    Raises:
        ScanError: its labels are neither 0, 1, 2 nor 0, 50, 100.
    """
    labels = np.unique(sitk.GetArrayViewFromImage(mask)).tolist()
    if labels not in ([0, 1, 2], [0, 50, 100]):
        raise ScanError(f"labels {labels[:8]}; a lung mask has 0, 1 (right lung), 2 (left), or 0, 50, 100")
    size = [int((n - 1) * own / ISO_SPACING) + 1 for n, own in zip(mask.GetSize(), mask.GetSpacing())]
    grid = (mask.GetOrigin(), [ISO_SPACING] * 3, mask.GetDirection())
    fine = sitk.Resample(mask, size, sitk.Transform(), sitk.sitkNearestNeighbor, *grid)
    return fine if labels[-1] == 100 else fine * 50


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--lung-mask", required=True, help="lung mask of one scan, at any spacing")
    parser.add_argument("--output", required=True, help="where the atlas's mask goes, a .nii.gz; never overwritten")
    args = parser.parse_args()
    target = Path(args.output)
    if not target.name.endswith((".nii.gz", ".nii", ".nrrd", ".mha")):
        raise StoreError(f"--output {target}: a name that ends in .nii.gz, .nii, .nrrd or .mha")
    if target.exists():
        raise StoreError(f"--output {target} is there already; choose another name")
    try:
        atlas = atlas_of(read_mask(args.lung_mask))
    except ScanError as error:
        raise StoreError(f"--lung-mask {args.lung_mask}: {error}") from error
    write_image(atlas, target)
    litres = np.count_nonzero(sitk.GetArrayViewFromImage(atlas)) / 1e6
    print(f"make_atlas_mask: {atlas.GetSize()} voxels of 1 mm, {litres:.1f} litres of lung; {target}")
    return 0


if __name__ == "__main__":
    run(main)
