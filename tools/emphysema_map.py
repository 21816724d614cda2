"""Map the prediction of a label over the lungs of each scan, and write each map as a NIfTI volume and a PNG picture.

    python tools/emphysema_map.py --root-dir /data/patches --checkpoint ssl_exp/NAME/checkpoint_patch_0020.pth.tar \\
        --labels labels.csv --column emphysema_percent --input-csv some.csv --atlas-mask atlas_lung_mask.nii.gz \\
        --out-dir maps

The script fits a linear model of each column to the subjects of the store. Labels of whole subjects are weak labels, so
the model is fitted to the mean over the patches of each subject. Because the model is linear, the prediction for a
subject is the mean of the predictions for the patches. With --patch-labels, the model is fitted to single patches. The
subjects to be mapped are not used for fitting.

The model is then evaluated in windows over the lungs of each scan in --input-csv, one window every --stride voxels of
1 mm. Each window uses the kernels of the nearest location, found with the registration in the store. The script writes
to --out-dir

    {sid}_{column}.nii.gz   float32 on the grid of the scan, in the unit of the label, 0 outside the lungs
    {sid}_{column}.png      coronal, sagittal and axial slices of the map over the scan
    maps.csv                one row per map: seconds, windows, mean; with --truth also how well it matches the truth
    settings.json           the settings of the maps

--truth names a folder of label images {sid}.nii.gz, for example from make_cohort.py --class-maps. --truth-values lists
the values of the label images that count as positive. With --truth, maps of the histogram baseline and of the fraction
of voxels below -950 HU are evaluated for comparison.

If a scan fails, the script reports it and continues with the next one. Run the same command again to resume.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.labels import explain_missing_column, read_numbers_and_words
from data.store import PatchStore
from misc import process
from misc.command import OneOf, Parser, UserError, at_least, run
from misc.files import write_atomically, write_json, write_text
from misc.progress import add_progress_flag, progress_bar
from misc.sizes import PATCH_SIZE
from models.fast.memory import keep_freed_memory_in_process
from preprocess.atlas import read_affine, read_atlas_mask
from preprocess.geometry import have_same_grid, write_image
from preprocess.patches import cut_scan
from preprocess.scan import ScanError, read_mask, read_scan
from preprocess.subjects import Subject, read_subjects
from tools.evaluation.tables import add_label_flags
from tools.finetuning.network import load_encoder
from tools.finetuning.tasks import FEWEST, read_patch_label_task
from tools.mapping.overlay import draw_map
from tools.mapping.readings import (
    Readers,
    compute_patch_features,
    compute_subject_and_location_means,
    compute_window_features,
    fit_probe,
)
from tools.mapping.truth import format_map_accuracy_table, score_map
from tools.mapping.windows import place_windows_over_lungs, resample_to_scan


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--root-dir",
        required=True,
        help="patch store with the grouped patches, lung masks and transforms of the scans to map",
    )
    add("--checkpoint", required=True, help="checkpoint from train.py, or the published weights")
    add("--sha256", help="expected SHA-256 of the checkpoint; set it to verify downloaded weights")
    add(
        "--labels",
        help="CSV with a sid column and label columns, each numeric or categorical (at most 10 distinct words)",
    )
    add(
        "--column",
        nargs="+",
        default=[],
        help="label columns to map; a column with two categories, such as no and yes, is converted to 0 and 1, "
        "and the map shows the predicted number",
    )
    add_label_flags(parser)
    add(
        "--patch-labels",
        metavar="CSV",
        help="CSV with the columns sid, patch and value, one labelled patch per row; replaces --labels",
    )
    add(
        "--input-csv",
        required=True,
        help="table with the columns sid and image, one row per scan to map; the scans must be in the store",
    )
    add("--atlas-mask", required=True, help="atlas lung mask that the store was made with")
    text = "distance between windows in voxels of 1 mm; half the distance gives a finer map and takes 8 times as long"
    add("--stride", type=at_least(int, 1), default=8, help=text)
    add("--truth", metavar="DIR", help="folder of label images {sid}.nii.gz to evaluate the maps against")
    add("--truth-values", nargs="+", type=int, default=[], help="values in the --truth images that count as positive")
    add(
        "--device",
        type=OneOf("auto", "cpu", "cuda"),
        default="auto",
        help="device of the encoder; auto uses a GPU if there is one",
    )
    add("--out-dir", required=True, help="output folder; give the same folder again to resume")
    add_progress_flag(parser)
    args = parser.parse_args()
    if bool(args.patch_labels) == bool(args.labels) or bool(args.labels) != bool(args.column):
        parser.error("give either --labels with --column, or --patch-labels")
    if bool(args.truth) != bool(args.truth_values):
        parser.error("--truth and --truth-values must be given together")
    return args


def fit_probes_on_other_subjects(
    args: argparse.Namespace, store: PatchStore, readers: Readers, mapped_sids: set[str]
) -> tuple[dict, np.ndarray]:
    """Fit a model for each column and each kind of features (from the encoder or a baseline).

    Returns:
        {column: ({kind: predict function}, range of the fitted labels)}, and the mean features at each location, (L,
        ...). Before prediction, subtract the mean features of a patch's location from the features of the patch.
    """

    def print_note_on_used_columns(text: str) -> None:
        if not text.startswith("column") or any(f"column {name!r}" in text for name in args.column):
            print(f"note: {text}", file=sys.stderr)

    others = np.array([sid not in mapped_sids for sid in store.sids])
    if args.patch_labels:
        task = read_patch_label_task(args.patch_labels, store.sids, store.num_locations, "regression")
        own = others[task.rows]
        if len(np.unique(task.rows[own])) < FEWEST:
            raise UserError(
                f"{args.patch_labels} has labels for fewer than {FEWEST} subjects outside --input-csv, "
                "which are too few to fit a model"
            )
        rows, places = task.rows[own], task.places[own]
        read = compute_patch_features(readers, places, lambda place, some: store.read(place, rows[some]))
        # For patch labels, do not subtract each location's mean features.
        usual = np.zeros((store.num_locations, read.shape[1]))
        targets = {"value": (np.arange(len(read)), task.target[own])}
    else:
        values, names, words = read_numbers_and_words(
            args.labels, store.sids, print_note_on_used_columns, dict(args.order), args.missing
        )
        targets = {}
        for column in args.column:
            if column not in names:
                raise UserError(explain_missing_column(args.labels, column, names))
            if column not in dict(args.order) and len(words.get(column, ())) > 2:
                raise UserError(
                    f"column {column!r} has the values {', '.join(words[column])}, which have no known order; "
                    f"give the order from low to high, for example --order {column}={','.join(words[column])}"
                )
            target = values[:, names.index(column)].astype(np.float64)[others]
            known = np.flatnonzero(~np.isnan(target))
            if len(known) < FEWEST or np.ptp(target[known]) == 0:
                raise UserError(
                    f"column {column!r} has values for {len(known)} subjects outside --input-csv; fitting needs at "
                    f"least {FEWEST} subjects and at least two different values"
                )
            targets[column] = (known, target[known])
        read, usual = compute_subject_and_location_means(readers, store, np.flatnonzero(others), args.no_progress)
        read -= usual.mean(axis=0)
    probes = {
        column: (
            {name: fit_probe(part[rows], target) for name, part in readers.split_by_feature_type(read).items()},
            tuple(np.quantile(target, [0.05, 0.95])),
        )
        for column, (rows, target) in targets.items()
    }
    return probes, usual


def write_maps_of_scan(
    subject: Subject,
    args: argparse.Namespace,
    store: PatchStore,
    readers: Readers,
    probes_and_location_means: tuple[dict, np.ndarray],
    atlas_mask: sitk.Image,
) -> list[dict]:
    """Write the maps of one scan, and return the scan's rows of maps.csv. Raises ScanError."""
    start = time.perf_counter()
    probes, usual = probes_and_location_means
    subject.check_image_exists()
    scan, mask = read_scan(subject.image, subject.series), read_mask(store.layout.lung_mask(subject.sid))
    if not have_same_grid(mask, scan):
        raise ScanError(f"{store.layout.lung_mask(subject.sid)} is not on the same grid as {subject.image}")
    transform = read_affine(store.layout.transform(subject.sid))
    cut = cut_scan(scan, transform, atlas_mask, store.locations[:0], PATCH_SIZE)
    windows = place_windows_over_lungs(cut, mask, store.locations, atlas_mask, transform, args.stride, PATCH_SIZE)
    if windows is None:
        raise ScanError(f"{store.layout.lung_mask(subject.sid)} is empty")
    readings = readers.split_by_feature_type(compute_window_features(readers, cut, windows, PATCH_SIZE, usual))
    lungs = sitk.GetArrayFromImage(mask) > 0
    truth = None
    if args.truth:
        found = read_mask(Path(args.truth) / f"{subject.sid}.nii.gz")
        if not have_same_grid(found, scan):
            raise ScanError(f"{args.truth}/{subject.sid}.nii.gz is not on the same grid as {subject.image}")
        truth = np.isin(sitk.GetArrayFromImage(found), args.truth_values)
    rows = []
    for column, (models, limits) in probes.items():
        for name, reading in readings.items():
            image = resample_to_scan(models[name](reading), windows, cut.volume, scan, mask)
            row = {"sid": subject.sid, "column": column, "table": name, "status": "ok", "windows": len(windows.cells)}
            row["mean"] = float(sitk.GetArrayViewFromImage(image)[lungs].mean())
            if truth is not None:
                row |= score_map(image, truth, lungs)
            if name == "features":
                base = Path(args.out_dir) / f"{subject.sid}_{column}"
                write_image(image, base.with_name(base.name + ".nii.gz"))
                picture = draw_map(scan, image, mask, limits, f"{subject.sid}: {column}")
                write_atomically(base.with_name(base.name + ".png"), lambda stream, data=picture: stream.write(data))
            rows.append(row)
    return [{**row, "seconds": round(time.perf_counter() - start, 1)} for row in rows]


def check_settings_unchanged(args: argparse.Namespace, settings_path: Path) -> dict:
    """Return the settings to save at ``settings_path``. Raises UserError if existing maps used different settings."""
    free = ("sha256", "input_csv", "out_dir", "device", "no_progress")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    if settings_path.is_file():
        kept = json.loads(settings_path.read_text(encoding="utf-8"))
        other = [name for name in settings if kept.get(name) != settings[name]]
        if other:
            flag = other[0].replace("_", "-")
            raise UserError(
                f"--out-dir {settings_path.parent} has maps made with a different --{flag}; give another folder"
            )
    return settings


def main() -> int:
    args = parse_arguments()
    store = PatchStore(args.root_dir, require_grouped=True)
    atlas, subjects = read_atlas_mask(args.atlas_mask), read_subjects(args.input_csv)
    encoder, sizes = load_encoder(args.checkpoint, store, args.sha256)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    settings = check_settings_unchanged(args, out_dir / "settings.json")
    listed = out_dir / "maps.csv"
    table = pd.read_csv(listed, dtype={"sid": str}) if listed.is_file() else pd.DataFrame(columns=["sid", "status"])
    table = table[table["status"] == "ok"]
    todo = [subject for subject in subjects if subject.sid not in set(table["sid"])]
    if todo:
        device = process.set_up_process(args.device)
        if device.type == "cpu":
            keep_freed_memory_in_process()
        readers = Readers(encoder, sizes["rep_dim"], store.locations, device, add_density_features=bool(args.truth))
        fitted = fit_probes_on_other_subjects(args, store, readers, {subject.sid for subject in subjects})
        write_json(out_dir / "settings.json", settings)
        with progress_bar(args.no_progress, total=len(todo), desc="emphysema_map", unit="scan") as bar:
            for subject in todo:
                try:
                    rows = write_maps_of_scan(subject, args, store, readers, fitted, atlas)
                except UserError as error:
                    print(f"{subject.sid}: {error}", file=sys.stderr)
                    rows = [{"sid": subject.sid, "status": "failed", "message": str(error)}]
                table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
                write_text(listed, table.to_csv(index=False))
                bar.update()
    done = table[table["status"] == "ok"]
    print(f"emphysema_map: {done['sid'].nunique()} of {len(subjects)} scans mapped; {out_dir}")
    if "average_precision" in done:
        print(format_map_accuracy_table(done))
    return 0 if len(done) else 1


if __name__ == "__main__":
    run(main)
