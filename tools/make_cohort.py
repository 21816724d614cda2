"""Make a cohort of synthetic chest CTs with simulated disease, to try the whole pipeline without patient data.

    python tools/make_cohort.py --out-dir ssl_exp/cohort --num-subjects 24 --size tiny
    python tools/make_cohort.py --out-dir ssl_exp/warped --num-subjects 12 --template thorax_ct.nii.gz

The first command makes procedural phantoms. The second command makes deformed copies of one real scan. The simulated
diseases are emphysema of five subtypes with the texture of real lungs, reticulation, and lesions. The same flags give
byte-identical files. Run an interrupted command again to make only the missing subjects. The script writes

    image/{sid}.nii.gz            int16 HU; anatomy, spacing, orientation, pose, dose, kernel and slice thickness vary
    dataset.csv                   sid, image: the input of preprocess/run_preprocess.sh
    labels.csv                    sid, held_out (1 for the test set, three in ten subjects), and the ground truth:
                                  shares of the lung in each subtype, visual grades, spirometry, exacerbations, survival
    class/{sid}.nii.gz            with --class-maps: uint8, the class of each lung voxel
    scans.csv                     sid and the scanner settings, which are independent of all labels
    atlas.nii.gz                  a healthy subject at 1 mm
    atlas_lung_mask.nii.gz        the lungs of the atlas: 50 right, 100 left
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from misc.command import OneOf, Parser, at_least, request_signal_on_parent_exit, run
from misc.experiment import read_git_commit
from misc.files import (
    hash_file,
    hold_lock_or_raise,
    prepare_resumable_folder,
    remove_old_partial_files,
    write_json,
    write_text,
)
from misc.progress import add_progress_flag, progress_bar
from preprocess.geometry import write_image
from tools.cohort.anatomy import SIZES, SLICES, SPACING, Anatomy, draw_anatomy
from tools.cohort.disease import Disease, draw_disease, plant_disease
from tools.cohort.phantom import LUNG_HU, Phantom
from tools.cohort.scanner import (
    ATLAS_ORIENTATION,
    ONE_SCANNER,
    ORIENTATIONS,
    draw_acquisition,
    round_hu,
    simulate_scanner,
    to_image,
)
from tools.cohort.subject import subject_name, write_subject
from tools.cohort.warped import load_template, make_template_atlas, make_warped_subject


def make_phantom(
    seed: int, index: int, size: str, one_scanner: bool, class_maps: bool, out_dir: Path
) -> tuple[dict, dict]:
    """Write the files of subject ``index``, and return the rows of this subject in labels.csv and scans.csv."""
    rng = np.random.default_rng([seed, index])
    anatomy, disease, acquisition = draw_anatomy(rng, size), draw_disease(rng), draw_acquisition(rng)
    if one_scanner:  # replace the scanner after drawing it, so that all other draws equal those with --scanners varied
        acquisition, anatomy.inflation = ONE_SCANNER, 0.0
    in_plane = rng.uniform(*SPACING)
    spacing = np.array([in_plane, in_plane, rng.uniform(*SLICES)])
    phantom = Phantom(anatomy, tuple(spacing), rng)
    planted, classes = plant_disease(phantom.hu, phantom.lung, spacing, disease, rng, base=phantom.hu - LUNG_HU)
    simulate_scanner(phantom.hu, spacing, acquisition, rng)
    stored = (phantom.origin + rng.uniform(-200, 200, 3), spacing, ORIENTATIONS[index % len(ORIENTATIONS)])
    images = [to_image(round_hu(phantom.hu), *stored), to_image(classes, *stored) if class_maps else None]
    scanned = {**acquisition._asdict(), "inflation_hu": anatomy.inflation}
    return write_subject(seed, index, images, planted, scanned, out_dir)


def make_phantom_atlas(seed: int, size: str, out_dir: Path) -> None:
    """Write a scan of a healthy subject with average anatomy, with 1 mm voxels, and the lung mask of the scan."""
    rng = np.random.default_rng([seed, 2**31])
    spacing = np.ones(3)
    phantom = Phantom(Anatomy(scale=SIZES[size]), tuple(spacing), rng)
    plant_disease(phantom.hu, phantom.lung, spacing, Disease(), rng, base=phantom.hu - LUNG_HU)
    simulate_scanner(phantom.hu, spacing, draw_acquisition(rng, full_dose=True), rng)
    labels = (phantom.lung.astype(np.int16)) * 50
    write_image(to_image(round_hu(phantom.hu), phantom.origin, spacing, ATLAS_ORIENTATION), out_dir / "atlas.nii.gz")
    write_image(to_image(labels, phantom.origin, spacing, ATLAS_ORIENTATION), out_dir / "atlas_lung_mask.nii.gz")


def make_subject_once(
    finished_dir: Path, make_subject: Callable[..., tuple[dict, dict]], seed: int, index: int, *job_arguments: object
) -> tuple[dict, dict]:
    """Return a subject's table rows: read the rows that an earlier run made, or else call ``make_subject``."""
    sid, out_dir = subject_name(index), job_arguments[-1]
    path = finished_dir / f"{sid}.json"
    if path.is_file() and (out_dir / "image" / f"{sid}.nii.gz").is_file():
        labels, scanned = json.loads(path.read_text(encoding="utf-8"))
        return labels, scanned
    rows = make_subject(seed, index, *job_arguments)
    write_json(path, rows)
    return rows


def fingerprint_flags_and_code(args: argparse.Namespace) -> str:
    """Return a string that changes with every flag that affects the subjects, and with the code."""
    flags = {
        name: value for name, value in vars(args).items() if name not in ("num_subjects", "num_workers", "no_progress")
    }
    templates = [hash_file(path) for path in (args.template, args.template_mask) if path and Path(path).is_file()]
    return repr((sorted(flags.items()), templates, read_git_commit()))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="output folder; created if it does not exist")
    add("--num-subjects", type=at_least(int, 1), default=24, help="number of subjects, not counting the atlas")
    add("--seed", type=at_least(int, 0), default=0, help="random seed; a different seed gives a different cohort")
    add(
        "--size",
        type=OneOf(*SIZES),
        default="tiny",
        help="body size relative to an adult: tiny 0.38, small 0.62, full 1. On one core, a tiny subject takes 4 to 9 "
        "s, and a full-size subject about a minute",
    )
    add("--template", metavar="SCAN", help="deform this CT scan instead of making phantoms, and ignore --size")
    add(
        "--scanners",
        type=OneOf("varied", "one"),
        default="varied",
        help="varied: dose, kernel, slice thickness and depth of inspiration differ between subjects, as in clinical "
        "data; one: all four are the same for every subject",
    )
    add(
        "--template-mask",
        metavar="MASK",
        help="lung mask of --template: 1 right lung, 2 left lung (default: made by thresholding)",
    )
    add(
        "--class-maps",
        action="store_true",
        help="also write class/{sid}.nii.gz, the class of each lung voxel (1 normal, 2 to 6 emphysema subtypes)",
    )
    add(
        "--num-workers",
        type=at_least(int, 1),
        default=1,
        help="number of subjects to make in parallel, for example the number of cores",
    )
    add_progress_flag(parser)
    args = parser.parse_args()
    if args.template_mask and not args.template:
        parser.error("--template-mask needs --template")
    for flag, path in (("--template", args.template), ("--template-mask", args.template_mask)):
        if path and not Path(path).exists():
            parser.error(f"{flag} {path} does not exist")
    try:
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out-dir {args.out_dir} cannot be created: {error.strerror}")
    return args


def main() -> None:
    args = parse_arguments()
    out_dir = Path(args.out_dir)
    made = out_dir / ".made"  # folder with the rows of finished subjects, deleted after the last subject
    with (
        hold_lock_or_raise(out_dir / ".lock", str(out_dir)),
        tempfile.TemporaryDirectory(dir=out_dir, prefix=".partial-") as workdir,
    ):
        if args.template:
            image, labels = load_template(args.template, args.template_mask)
            sitk.WriteImage(image, os.path.join(workdir, "scan.nii.gz"))
            sitk.WriteImage(labels, os.path.join(workdir, "mask.nii.gz"))
            make_template_atlas(image, labels, out_dir)
            job, given = make_warped_subject, Path(workdir)
        else:
            make_phantom_atlas(args.seed, args.size, out_dir)
            job, given = make_phantom, args.size
        remove_old_partial_files(out_dir, out_dir / "image", out_dir / "class")
        prepare_resumable_folder(made, fingerprint_flags_and_code(args))
        how = (given, args.scanners == "one", args.class_maps, out_dir)
        jobs = [(made, job, args.seed, index, *how) for index in range(args.num_subjects)]
        bar = progress_bar(args.no_progress, total=len(jobs), desc="make_cohort", unit="subject")
        rows = []
        # Workers are killed when this process ends. Otherwise, they could write into the folder of the next run.
        with bar, ProcessPoolExecutor(args.num_workers, None, request_signal_on_parent_exit, (signal.SIGKILL,)) as pool:
            futures = [pool.submit(make_subject_once, *job) for job in jobs]
            try:
                for future in futures:
                    rows.append(future.result())
                    bar.update()
            except KeyboardInterrupt:
                for worker in multiprocessing.active_children():
                    worker.kill()
                raise
    labels, scans = (pd.DataFrame(table) for table in zip(*rows))
    images = pd.DataFrame({"sid": labels["sid"], "image": [f"image/{sid}.nii.gz" for sid in labels["sid"]]})
    for name, table in (("dataset.csv", images), ("labels.csv", labels), ("scans.csv", scans)):
        write_text(out_dir / name, table.to_csv(index=False))
    shutil.rmtree(made)
    print(f"make_cohort: wrote {len(rows)} subjects, an atlas and its mask to {out_dir}")


if __name__ == "__main__":
    run(main)
