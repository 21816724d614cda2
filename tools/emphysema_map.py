"""Where in the lungs is it? A map of a label for each scan, and a picture.

    python tools/emphysema_map.py --root-dir /data/patches --checkpoint ssl_exp/NAME/checkpoint_patch_0020.pth.tar \\
        --labels labels.csv --column emphysema_percent --input-csv some.csv --atlas-mask atlas_lung_mask.nii.gz \\
        --out-dir maps

A linear model learns the columns from the store's patients, from the mean of their patches (weak labels: a patient's
model is the mean of the same model of each patch), or with --patch-labels from single patches. Patients that are
mapped are not learnt from. It is then slid over the lungs of each scan of --input-csv, --stride voxels of 1 mm at a
time, with the kernels of the nearest location, by the registration that the store keeps. Writes, in --out-dir,

    {sid}_{column}.nii.gz   float32 on the scan's own grid, in the label's unit, 0 outside the lungs
    {sid}_{column}.png      coronal, sagittal and axial slices of it over the scan
    maps.csv                a row a map: seconds, windows, mean; with --truth how well it finds what is there
    settings.json           what they were made from

--truth names a folder of label images {sid}.nii.gz (make_cohort.py --class-maps writes such) and --truth-values what
counts as there; beside the features' map stand those of a histogram's model and of the share below -950 HU.
Stopped, it goes on where it was; a bad scan costs itself.
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

from data.labels import read_numbers_and_words, why_no_column
from data.store import PatchStore
from misc import process
from misc.command import OneOf, Parser, UserError, at_least, run
from misc.files import write_json, write_text, write_whole
from misc.progress import add_progress_flag, progress_bar
from misc.sizes import PATCH_SIZE
from models.fast.memory import keep_freed_memory
from preprocess.atlas import read_affine, read_atlas_mask
from preprocess.geometry import same_grid, write_image
from preprocess.patches import patches_of
from preprocess.scan import ScanError, read_mask, read_scan
from preprocess.subjects import Subject, read_subjects
from tools.evaluation.tables import add_label_flags
from tools.finetuning.network import trained_encoder
from tools.finetuning.tasks import FEWEST, patch_task
from tools.mapping.overlay import picture_of_map
from tools.mapping.readings import Readers, fit_probe, patch_readings, patient_means, window_readings
from tools.mapping.truth import judge_map, summary
from tools.mapping.windows import lay_windows, to_scan


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--root-dir", required=True, help="patch store, grouped; its masks and transforms of the mapped scans are used")
    add("--checkpoint", required=True, help="of train.py, or the published weights")
    add("--sha256", help="of the checkpoint; another file is refused, for weights that were downloaded")
    add("--labels", help="CSV with sid and columns of numbers or of a few words")
    add("--column", nargs="+", default=[], help="of the labels; a map each; of two words the map is of the second")
    add_label_flags(parser)
    add("--patch-labels", metavar="CSV", help="sid, patch, value: labels of single patches, in place of --labels")
    add("--input-csv", required=True, help="table with sid and image: the scans to map, preprocessed into the store")
    add("--atlas-mask", required=True, help="the atlas lung mask that the store was made with")
    text = "voxels of 1 mm between windows; lower it for a finer map, at the cube of the time"
    add("--stride", type=at_least(int, 1), default=8, help=text)
    add("--truth", metavar="DIR", help="folder of label images {sid}.nii.gz to judge the maps by")
    add("--truth-values", nargs="+", type=int, default=[], help="values of those images that count as there")
    add("--device", type=OneOf("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--out-dir", required=True, help="folder of the maps; give the same to go on")
    add_progress_flag(parser)
    args = parser.parse_args()
    if bool(args.patch_labels) == bool(args.labels) or bool(args.labels) != bool(args.column):
        parser.error("give --labels and --column, or --patch-labels")
    if bool(args.truth) != bool(args.truth_values):
        parser.error("--truth and --truth-values go together")
    return args


def fit_probes(
    args: argparse.Namespace, store: PatchStore, readers: Readers, mapped: set[str]
) -> tuple[dict, np.ndarray]:
    """A model of each column and reading with the range of what it learnt from, {column: ({reading: predict}, range)}.

    And what is usual at each place, (L, ...), which the readings are taken from.
    """

    def note(text: str) -> None:
        if not text.startswith("column") or any(f"column {name!r}" in text for name in args.column):
            print(f"note: {text}", file=sys.stderr)

    others = np.array([sid not in mapped for sid in store.sids])
    if args.patch_labels:
        task = patch_task(args.patch_labels, store.sids, store.num_locations, "regression")
        own = others[task.rows]
        if len(np.unique(task.rows[own])) < FEWEST:
            raise UserError(f"{args.patch_labels} has labels of fewer than {FEWEST} subjects that are not to be mapped")
        rows, places = task.rows[own], task.places[own]
        read = patch_readings(readers, places, lambda place, some: store.read(place, rows[some]))
        usual = np.zeros((store.num_locations, read.shape[1]))  # single patches tell places apart themselves
        targets = {"value": (np.arange(len(read)), task.target[own])}
    else:
        values, names, words = read_numbers_and_words(args.labels, store.sids, note, dict(args.order), args.missing)
        targets = {}
        for column in args.column:
            if column not in names:
                raise UserError(why_no_column(args.labels, column, names))
            if column not in dict(args.order) and len(words.get(column, ())) > 2:
                raise UserError(
                    f"column {column!r} has the words {', '.join(words[column])}, and a map shows less and more: give "
                    f"their order, --order {column}={','.join(words[column])}"
                )
            target = values[:, names.index(column)].astype(np.float64)[others]
            known = np.flatnonzero(~np.isnan(target))
            if len(known) < FEWEST or np.ptp(target[known]) == 0:
                raise UserError(
                    f"column {column!r} must have two values, and {FEWEST} subjects that are not to be mapped; it has "
                    f"{len(known)}"
                )
            targets[column] = (known, target[known])
        read, usual = patient_means(readers, store, np.flatnonzero(others), args.no_progress)
        read -= usual.mean(axis=0)
    probes = {
        column: (
            {name: fit_probe(part[rows], target) for name, part in readers.split(read).items()},
            tuple(np.quantile(target, [0.05, 0.95])),
        )
        for column, (rows, target) in targets.items()
    }
    return probes, usual


def map_scan(
    subject: Subject,
    args: argparse.Namespace,
    store: PatchStore,
    readers: Readers,
    fitted: tuple[dict, np.ndarray],
    atlas: sitk.Image,
) -> list[dict]:
    """Write one scan's maps; rows of maps.csv. Raises ScanError."""
    start = time.perf_counter()
    probes, usual = fitted
    subject.check_image()
    scan, mask = read_scan(subject.image, subject.series), read_mask(store.layout.lung_mask(subject.sid))
    if not same_grid(mask, scan):
        raise ScanError(f"{store.layout.lung_mask(subject.sid)} is not on the grid of {subject.image}")
    transform = read_affine(store.layout.transform(subject.sid))
    cut = patches_of(scan, transform, atlas, store.locations[:0], PATCH_SIZE)
    windows = lay_windows(cut, mask, store.locations, atlas, transform, args.stride, PATCH_SIZE)
    if windows is None:
        raise ScanError(f"{store.layout.lung_mask(subject.sid)} is empty")
    readings = readers.split(window_readings(readers, cut, windows, PATCH_SIZE, usual))
    lungs = sitk.GetArrayFromImage(mask) > 0
    truth = None
    if args.truth:
        found = read_mask(Path(args.truth) / f"{subject.sid}.nii.gz")
        if not same_grid(found, scan):
            raise ScanError(f"{args.truth}/{subject.sid}.nii.gz is not on the grid of {subject.image}")
        truth = np.isin(sitk.GetArrayFromImage(found), args.truth_values)
    rows = []
    for column, (models, limits) in probes.items():
        for name, reading in readings.items():
            image = to_scan(models[name](reading), windows, cut.volume, scan, mask)
            row = {"sid": subject.sid, "column": column, "table": name, "status": "ok", "windows": len(windows.cells)}
            row["mean"] = float(sitk.GetArrayViewFromImage(image)[lungs].mean())
            if truth is not None:
                row |= judge_map(image, truth, lungs)
            if name == "features":
                base = Path(args.out_dir) / f"{subject.sid}_{column}"
                write_image(image, base.with_name(base.name + ".nii.gz"))
                picture = picture_of_map(scan, image, mask, limits, f"{subject.sid}: {column}")
                write_whole(base.with_name(base.name + ".png"), lambda stream, data=picture: stream.write(data))
            rows.append(row)
    return [{**row, "seconds": round(time.perf_counter() - start, 1)} for row in rows]


def settings_of(args: argparse.Namespace, path: Path) -> dict:
    """What the maps are made from, to keep at ``path``. Raises UserError where those there are from something else."""
    free = ("sha256", "input_csv", "out_dir", "device", "no_progress")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in settings if kept.get(name) != settings[name]]
        if other:
            flag = other[0].replace("_", "-")
            raise UserError(f"--out-dir {path.parent} has maps made with another --{flag}; name another folder")
    return settings


def main() -> int:
    args = parse_arguments()
    store = PatchStore(args.root_dir, require_grouped=True)
    atlas, subjects = read_atlas_mask(args.atlas_mask), read_subjects(args.input_csv)
    encoder, sizes = trained_encoder(args.checkpoint, store, args.sha256)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    settings = settings_of(args, out_dir / "settings.json")
    listed = out_dir / "maps.csv"
    table = pd.read_csv(listed, dtype={"sid": str}) if listed.is_file() else pd.DataFrame(columns=["sid", "status"])
    table = table[table["status"] == "ok"]
    todo = [subject for subject in subjects if subject.sid not in set(table["sid"])]
    if todo:
        device = process.start_process(args.device)
        if device.type == "cpu":
            keep_freed_memory()
        readers = Readers(encoder, sizes["rep_dim"], store.locations, device, compare=bool(args.truth))
        fitted = fit_probes(args, store, readers, {subject.sid for subject in subjects})
        write_json(out_dir / "settings.json", settings)
        with progress_bar(args.no_progress, total=len(todo), desc="emphysema_map", unit="scan") as bar:
            for subject in todo:
                try:
                    rows = map_scan(subject, args, store, readers, fitted, atlas)
                except UserError as error:
                    print(f"{subject.sid}: {error}", file=sys.stderr)
                    rows = [{"sid": subject.sid, "status": "failed", "message": str(error)}]
                table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
                write_text(listed, table.to_csv(index=False))
                bar.update()
    done = table[table["status"] == "ok"]
    print(f"emphysema_map: {done['sid'].nunique()} of {len(subjects)} scans mapped; {out_dir}")
    if "average_precision" in done:
        print(summary(done))
    return 0 if len(done) else 1


if __name__ == "__main__":
    run(main)
