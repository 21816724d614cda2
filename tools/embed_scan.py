"""Compute features of scans in one command, without a store or a table of subjects.

    python tools/embed_scan.py scan.nii.gz --checkpoint checkpoint_patch_0020.pth.tar \\
        --atlas-mask atlas_lung_mask.nii.gz --out features.csv
    python tools/embed_scan.py --input-csv dataset.csv --checkpoint checkpoint_patch_0020.pth.tar \\
        --atlas-mask atlas_lung_mask.nii.gz --out features.csv

Each SCAN is a NIfTI, NRRD or MetaImage file, or a folder of DICOM slices. --input-csv takes the same table as
preprocessing. The script runs all preprocessing stages and the frozen encoder on each scan. The features equal those of
extract_feature.py after the preprocessing scripts, except for float32 rounding, which depends on the batch size.

The script writes

    OUT                sid, f000 ...: same columns as patient_features.csv; the sid is the name of the file or folder
    OUT.report.csv     one row per scan: status, a short verdict, the inputs, and the numbers of the preprocessing
    OUT.qc/{sid}.png   the patches drawn over the scan and its lung mask; not drawn with --no-qc
    --patch-dir        {sid}.npy, (L, rep_dim) float32: features of single patches

By default the features are the mean over patches, as published. --patient-vector moments or layers computes the vectors
of evaluate.py, and needs a --standardization file that evaluate.py wrote for the same checkpoint.

If a scan cannot be used, the script reports it and continues with the next one. Run the same command again to resume.
The features of a scan are computed again if the scan has changed since the last run.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.tables import check_sid, format_features, name_feature_columns, read_table
from misc import process
from misc.command import OneOf, Parser, UserError, between, count_usable_cores, run
from misc.files import check_writable, hash_file, save_array, write_atomically, write_text
from misc.progress import add_progress_flag, progress_bar
from misc.sizes import PATCH_SIZE
from models.fast.memory import keep_freed_memory_in_process
from preprocess.outputs import make_file_stamp
from preprocess.picture import render_patch_picture
from preprocess.segment_lung import add_segmentation_flags, check_segmentation_flags
from preprocess.subjects import Subject, read_subjects
from preprocess.workers import run_step_or_record_error
from tools.embedding.embed import Embedded, Embedder, derive_sid_from_path
from tools.evaluation.vectors import VECTORS

SAVE_SECONDS = 20  # minimum time between two writes of the tables
FilesOf = Callable[[str], list[Path]]  # takes a sid and returns the files that the subject's table rows need


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("scans", nargs="*", metavar="SCAN", help="image file or folder of DICOM slices; can be repeated")
    add(
        "--input-csv",
        help="table with the columns sid, image and optionally series (the DICOM series in a folder); replaces SCAN",
    )
    add("--checkpoint", required=True, help="checkpoint from train.py, or the published weights")
    add("--sha256", help="expected SHA-256 of the checkpoint; set it to verify downloaded weights")
    add("--atlas-mask", required=True, help="atlas lung mask of the store that the checkpoint was trained on")
    add(
        "--atlas-patch-loc",
        help="table of locations; required for the published weights (default: the grid made from --atlas-mask)",
    )
    add_segmentation_flags(parser)
    text = (
        "minimum Dice overlap with the atlas, for both lungs together and for each lung; "
        "scans with a lower overlap are refused"
    )
    add("--min-dice", type=between(float, 0, 1), default=0.5, help=text)
    add("--out", required=True, help="table of features to write, such as features.csv")
    text = (
        "features of a scan: mean over patches (as published), moments (mean and SD over patches) or layers (moments "
        "of every layer); moments and layers need --standardization"
    )
    add("--patient-vector", type=OneOf(*VECTORS), default="mean", help=text)
    text = "standardization.npz that evaluate.py --out-dir wrote for features of this checkpoint"
    add("--standardization", metavar="FILE", help=text)
    add("--patch-dir", help="output folder for the features of single patches")
    add("--no-qc", action="store_true", help="do not draw pictures; saves about one second per scan")
    add(
        "--device",
        type=OneOf("auto", "cpu", "cuda"),
        default="auto",
        help="device of the encoder; auto uses a GPU if there is one",
    )
    add_progress_flag(parser)
    args = parser.parse_args()
    if bool(args.scans) == bool(args.input_csv):
        parser.error("give either SCAN arguments or --input-csv")
    check_segmentation_flags(args)
    return args


def read_scans(args: argparse.Namespace) -> list[Subject]:
    """Return the scans to embed.

    Raises StoreError if the table is invalid, and UserError if a scan's name is invalid or repeated.
    """
    if args.input_csv:
        return read_subjects(args.input_csv)
    found: dict[str, Subject] = {}
    for scan in args.scans:
        sid = derive_sid_from_path(scan)
        try:
            check_sid(sid)
        except UserError as error:
            raise UserError(
                f"{scan}: {error}. Rename the file or folder, or list the scan with another sid in --input-csv"
            ) from None
        if sid in found:
            raise UserError(
                f"{scan} and {found[sid].image} are both called {sid!r}; list them with different sids in --input-csv"
            )
        found[sid] = Subject(sid, os.path.abspath(scan))
    return list(found.values())


def name_picture_and_feature_files(args: argparse.Namespace, sid: str) -> tuple[Path | None, Path | None]:
    """Return the paths of a scan's picture and of its patch features, or None for a file that is not written."""
    out = Path(args.out)
    picture = None if args.no_qc else out.with_name(out.name + ".qc") / f"{sid}.png"
    return picture, Path(args.patch_dir) / f"{sid}.npy" if args.patch_dir else None


class OutputTables:
    """The output tables OUT and OUT.report.csv, including rows from earlier runs.

    Rows of scans that are not part of this run are kept. An existing row of a scan in
    this run is kept if the scan, checkpoint and settings are unchanged.

    Args:
        table_path: path of the feature table (OUT in the script's docstring).
        subjects: the scans of this run.
        columns: feature columns.
        provenance: checkpoint, atlas and settings, as text.
        list_required_files: function that takes a sid and returns the output files that the subject must have besides
            the table. An existing row is not reused if one of the subject's output files is missing.

    Raises:
        UserError: OUT is not a feature table, has no report, or has features from a different checkpoint, atlas or
            method. Without this error, the new features would replace all rows of OUT.
    """

    def __init__(
        self,
        table_path: Path,
        subjects: list[Subject],
        columns: list[str],
        provenance: str,
        list_required_files: FilesOf,
    ):
        self.out, self.subjects, self.columns, self.made_by = table_path, subjects, columns, provenance
        self.report = table_path.with_name(table_path.name + ".report.csv")
        self.features: dict[str, list[str]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.kept: list[str] = []  # sids of other scans
        if not table_path.is_file():
            return
        if not self.report.is_file():
            raise UserError(
                f"--out {table_path} already exists, but without {self.report.name} its rows cannot be checked; "
                "give another file name or remove the table"
            )
        rows = {row["sid"]: row for row in read_table(self.report).to_dict("records")}
        table = read_table(table_path)
        others = [row["made_from"] for row in rows.values() if row.get("made_from")]
        if list(table.columns) != ["sid", *columns] or any(not made.endswith(f" {provenance}") for made in others):
            raise UserError(
                f"--out {table_path} has features from a different checkpoint, atlas or method; "
                f"give another file name, or remove the table and {self.report}"
            )
        texts = {row[0]: list(row[1:]) for row in table.itertuples(index=False)}
        asked = {subject.sid for subject in subjects}
        self.kept = [sid for sid in texts if sid not in asked]
        self.features |= {sid: texts[sid] for sid in self.kept}
        self.rows |= {sid: row for sid, row in rows.items() if sid not in asked}
        for subject in subjects:
            row = rows.get(subject.sid, {})
            same = row.get("status") == "ok" and row.get("made_from") == self.make_scan_and_settings_id(subject)
            if same and subject.sid in texts and all(path.is_file() for path in list_required_files(subject.sid)):
                self.features[subject.sid], self.rows[subject.sid] = texts[subject.sid], row

    def make_scan_and_settings_id(self, subject: Subject) -> str:
        """Return a string that identifies the scan, checkpoint and settings, or "" if the scan does not exist."""
        there = os.path.exists(subject.image)
        return f"{make_file_stamp(subject.image, subject.series)} {self.made_by}" if there else ""

    def add_scan(self, sid: str, features: np.ndarray | None, row: dict[str, Any]) -> None:
        self.rows[sid] = row
        if features is not None:
            self.features[sid] = format_features(features)

    def write_features_and_report(self) -> None:
        """Write the features and the report: first the rows of other scans, then the rows of this run's scans."""
        earlier = [sid for sid in self.rows if sid not in {subject.sid for subject in self.subjects}]
        sids = [*earlier, *(subject.sid for subject in self.subjects)]
        table = pd.DataFrame(
            [[sid, *self.features[sid]] for sid in sids if sid in self.features], columns=["sid", *self.columns]
        )
        report = pd.DataFrame([self.rows[sid] for sid in sids if sid in self.rows], dtype=object)
        # Write the report first, because the next run refuses a feature table without a report.
        write_text(self.report, report.to_csv(index=False, lineterminator="\n"))
        write_text(self.out, table.to_csv(index=False, lineterminator="\n"))


def draw_patches(path: Path, sid: str, embedded: Embedded) -> None:
    """Draw the patches over the scan and its lung mask."""
    figures = embedded.figures
    title = f"{sid}: {embedded.verdict}; Dice right {figures['dice_right']:.2f}, left {figures['dice_left']:.2f}"
    picture = render_patch_picture(
        embedded.cut.volume, embedded.cut.values, embedded.mask, embedded.cut.corners, PATCH_SIZE, title
    )
    write_atomically(path, lambda stream: stream.write(picture))


def embed_one(args: argparse.Namespace, embedder: Embedder, tables: OutputTables, subject: Subject) -> str:
    """Embed one scan, write its files, and return a one-line summary to print."""
    features: list[np.ndarray] = []

    def embed_and_save(subject: Subject, _: dict) -> dict[str, Any]:
        subject.check_image_exists()
        found = embedder(subject.image, subject.series)
        picture, patches = name_picture_and_feature_files(args, subject.sid)
        if patches:
            save_array(patches, found.patches)
        if picture:
            draw_patches(picture, subject.sid, found)
        features.append(found.features)
        return {"verdict": found.verdict, "made_from": tables.make_scan_and_settings_id(subject), **found.figures}

    row = run_step_or_record_error(embed_and_save, subject, {}, count_usable_cores(), {})
    row.setdefault("verdict", "refused")
    tables.add_scan(subject.sid, features[0] if features else None, row)
    return f"{subject.sid}: {row['message'] or row['verdict']}"


def main() -> int:
    args = parse_arguments()
    subjects, out = read_scans(args), Path(args.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file name, such as {out / 'features.csv'}")
    check_writable(out.parent, "--out")
    device = process.set_up_process(args.device)
    if device.type == "cpu":
        keep_freed_memory_in_process()
    choices = dict(method=args.method, lungmask_weights=args.lungmask_weights, min_dice=args.min_dice)
    vector = dict(patient_vector=args.patient_vector, standardization=args.standardization)
    embedder = Embedder(
        args.checkpoint, args.atlas_mask, args.atlas_patch_loc, **choices, sha256=args.sha256, device=device, **vector
    )
    if embedder.note:
        print(f"note: {embedder.note}", file=sys.stderr)
    inputs = [args.checkpoint, args.atlas_mask, *filter(None, [args.atlas_patch_loc, args.lungmask_weights])]
    made_by = " ".join([*(hash_file(path)[:12] for path in inputs), args.method])
    if args.standardization:
        made_by += f" {args.patient_vector} {hash_file(args.standardization)[:12]}"
    tables = OutputTables(
        out,
        subjects,
        name_feature_columns(embedder.width),
        made_by,
        lambda sid: [*filter(None, name_picture_and_feature_files(args, sid))],
    )
    todo = [subject for subject in subjects if subject.sid not in tables.rows]
    written = time.monotonic()
    bar = progress_bar(
        args.no_progress, total=len(subjects), initial=len(subjects) - len(todo), desc="embed", unit="scan"
    )
    try:
        with bar:
            for subject in todo:
                bar.write(embed_one(args, embedder, tables, subject))
                bar.update()
                if time.monotonic() - written > SAVE_SECONDS:
                    tables.write_features_and_report()
                    written = time.monotonic()
    finally:
        if tables.rows:
            tables.write_features_and_report()
    done = len(tables.features) - len(tables.kept)
    beside = f", {len(tables.kept)} other scans kept" if tables.kept else ""
    print(f"embed_scan: {done} of {len(subjects)} scans embedded{beside}; {out}")
    return 0 if done else 1


if __name__ == "__main__":
    run(main)
