"""Write an HTML page for exploring subjects and their features in a browser: one file, usable without a network.

    python tools/explore.py --features ssl_exp/NAME/patch_rep/0020/patient_features.csv --labels labels.csv \\
        --patch-features ssl_exp/NAME/patch_rep/0020/pred_arr_patch_full.npy --root-dir /data/patches \\
        --atlas-mask atlas_lung_mask.nii.gz --out page.html

The page shows a map of the subjects (two principal components, or t-SNE) that can be coloured by any label, and the
subjects nearest to a selected subject. The page also shows how well each single location in the lungs predicts a label,
and the locations where a subject differs most from the healthy subjects. Optional inputs add parts of the page:

    --labels            colours; numbers, or text with at most twelve different values
    --patch-features    locations: how well each predicts a label, and which are unusual in a subject
    --root-dir          positions of the locations, and the pictures of the preprocessing (linked, not copied)
    --atlas-mask        the lungs in the background of the locations
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.labels import find_filled_cells_and_numbers
from data.layout import StoreError, StoreLayout, load_locations
from data.store import PatchStore
from data.tables import read_table
from misc.command import Parser, UserError, at_least, run
from misc.files import check_writable
from misc.page import encode_array_as_base64, make_link, write_page
from misc.progress import add_progress_flag, progress_bar
from misc.sizes import PATCH_SIZE
from preprocess.atlas import read_atlas_mask
from tools.evaluation.normal import FEWEST
from tools.evaluation.tables import (
    add_vector_flags,
    choose_patient_vector,
    describe_store_mismatch,
    is_constant,
    read_features,
    read_healthy_and_known_masks,
    read_patch_features,
    read_vectors,
)
from tools.evaluation.vectors import get_features_fitted_to_rows
from tools.pages.numbers import (
    compute_location_importance,
    find_nearest_subjects,
    find_unusual_locations,
    project_subjects,
    standardize_features,
)
from tools.pages.sides import make_atlas_views

CATEGORIES = 12  # maximum number of different values of a text column; each value gets a colour
FOLDER = Path(__file__).resolve().parent / "pages"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--features", required=True, help="patient_features.csv written by extract_feature.py")
    add_vector_flags(parser, patches=False)
    add("--labels", help="CSV with a sid column and label columns to colour the map by")
    add(
        "--columns",
        nargs="+",
        default=[],
        help="label columns to use (default: all); fewer columns make the page smaller and faster",
    )
    add("--patch-features", metavar="NPY", help="pred_arr_patch_full.npy; sid_arr_full.npy must be in the same folder")
    add(
        "--root-dir",
        help="patch store of the subjects in --features; the page shows its locations and its qc/ pictures",
    )
    add("--atlas-mask", help="atlas lung mask that the store was made with")
    text = "label column with 1 for the healthy subjects that all subjects are compared to (default: all subjects)"
    add("--healthy", metavar="COLUMN", help=text)
    add("--neighbours", type=at_least(int, 1), default=6, help="number of nearest subjects to show for each subject")
    add(
        "--places",
        type=at_least(int, 1),
        default=10,
        help="number of unusual locations to show for a subject; raise it if there are many locations",
    )
    add(
        "--no-tsne",
        action="store_true",
        help="show only principal components; skipping t-SNE saves about a minute for 10,000 subjects",
    )
    add("--out", required=True, help="HTML file to write, such as page.html")
    add_progress_flag(parser)
    args = parser.parse_args()
    for flag, other in (("columns", "labels"), ("healthy", "labels"), ("healthy", "patch_features")):
        if getattr(args, flag) and not getattr(args, other):
            parser.error(f"--{flag} needs --{other.replace('_', '-')}")
    if args.atlas_mask and not args.root_dir:
        parser.error("--atlas-mask needs --root-dir for the table of locations")
    page = Path(args.out)
    inputs = [
        Path(path).resolve() for path in (args.features, args.labels, args.patch_features, args.atlas_mask) if path
    ]
    if page.is_dir() or page.resolve() in inputs:
        parser.error(f"--out {page} is {'a folder' if page.is_dir() else 'an input'}; give another file name")
    return args


def read_colours(path: str, sids: list[str], columns: list[str]) -> dict[str, tuple[np.ndarray, list[str] | None]]:
    """Read the label columns for the colours of the map.

    Text columns with too many different values are left out with a note.

    Returns:
        For each column, its values (N,) float32, NaN if missing, and its list of different texts. Each value of a text
        column is an index into the column's list of texts. For a numeric column, None replaces the list of texts.

    Raises:
        StoreError: the table cannot be read.
        UserError: one of ``columns`` does not exist, or the table has none of the subjects.
    """
    table = read_table(path, file_names=False).set_index("sid")
    if not table.index.isin(sids).any():
        raise UserError(
            f"{path} has none of the subjects that have features, such as {sids[0]!r}; its sids look like "
            f"{table.index[0]!r}"
        )
    unknown = next((column for column in columns if column not in table.columns), None)
    if unknown is not None:
        raise UserError(f"{path} has no column {unknown!r}; it has {', '.join(table.columns)}")
    table = table.reindex(sids)
    found: dict[str, tuple[np.ndarray, list[str] | None]] = {}
    for column in columns or table.columns:
        filled, numbers = find_filled_cells_and_numbers(table[column])
        if filled.any() and np.isfinite(numbers[filled].astype(np.float32)).all():
            found[column] = (numbers.to_numpy(dtype=np.float32), None)
            continue
        codes, values = pd.factorize(table[column].str.strip().where(filled), sort=True)
        if 0 < len(values) <= CATEGORIES:
            found[column] = (np.where(codes < 0, np.nan, codes).astype(np.float32), [str(value) for value in values])
        else:
            what = f"it has {len(values)} different texts, more than {CATEGORIES}" if len(values) else "it is empty"
            print(f"note: {path}: column {column!r} left out: {what}", file=sys.stderr)
    return found


def make_colour_data(name: str, values: np.ndarray, names: list[str] | None) -> dict[str, Any]:
    """Return the data about a label that the page shows.

    The colour range is the 2nd to the 98th percentile, so that a single subject does not determine it.
    """
    known = values[~np.isnan(values)]
    low, high = (float(np.quantile(known, q)) if len(known) else 0.0 for q in (0.02, 0.98))
    if low == high and len(known):
        low, high = float(known.min()), float(known.max())
    return {"name": name, "values": encode_array_as_base64(values), "names": names, "low": low, "high": high}


def make_location_data(
    args: argparse.Namespace, features: np.ndarray, colours: dict, healthy: np.ndarray
) -> dict[str, Any]:
    """Return the data about locations that the page shows.

    ``importance`` is how well each location predicts each numeric label. ``telling`` lists the unusual locations of
    each subject.
    """
    numbers = {name: values for name, (values, names) in colours.items() if names is None}
    told, count = [], min(args.places, features.shape[1])
    with progress_bar(args.no_progress, total=len(numbers) * features.shape[1], desc="explore", unit="location") as bar:
        for name, values in numbers.items():
            own = compute_location_importance(features, values, bar.update)
            if not np.isnan(own).all():
                told.append({"label": name, "values": encode_array_as_base64(own.astype(np.float32))})
    found: dict[str, Any] = {"importance": told, "telling": None}
    if healthy.sum() >= FEWEST:
        places, scores = find_unusual_locations(features, healthy, count)
        whom = "healthy subjects" if args.healthy else "the average subject"
        found["telling"] = {
            "places": encode_array_as_base64(places.astype(np.uint16)),
            "scores": encode_array_as_base64(scores.astype(np.float32)),
            "healthy": whom,
        }
    else:
        print(f"note: unusual locations left out: fewer than {FEWEST} subjects to compare to", file=sys.stderr)
    return found


def make_picture_links(root_dir: str | None, sids: list[str], page_path: Path) -> dict[str, Any]:
    """Return the folder of the preprocessing pictures relative to the page, and which subjects have a picture."""
    known, folder = np.zeros(len(sids), dtype=np.uint8), ""
    if root_dir:
        layout = StoreLayout(root_dir)
        known[:] = [layout.qc_picture(sid).is_file() for sid in sids]
        folder = make_link(layout.qc_picture(sids[0]).parent, page_path)
    return {"known": encode_array_as_base64(known), "folder": folder}


def main() -> None:
    args = parse_arguments()
    page = Path(args.out)
    check_writable(page.absolute().parent, "--out")

    def print_note(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    chosen = choose_patient_vector(args.patient_vector, args.features, None, print_note)
    table = read_features(args.features)
    sids = table.index.tolist()
    if len(sids) < 3:
        raise UserError(f"{args.features} has {len(sids)} subjects; a map needs at least 3")
    if is_constant(table.to_numpy()):
        raise UserError(
            f"{args.features}: all subjects have the same features, so no map can be drawn; "
            "check whether the training collapsed"
        )
    colours = read_colours(args.labels, sids, args.columns) if args.labels else {}
    healthy = np.ones(len(sids), dtype=bool)
    if args.healthy:
        healthy, _ = read_healthy_and_known_masks(args.labels, sids, args.healthy, FEWEST)
    if args.root_dir:
        with contextlib.suppress(StoreError):  # --root-dir may contain only the table of locations
            told = describe_store_mismatch(args.features, PatchStore(args.root_dir), "--root-dir")
            if told:
                print(f"note: {told}", file=sys.stderr)
    locations = load_locations(StoreLayout(args.root_dir).find_atlas_patch_loc()) if args.root_dir else None
    atlas = read_atlas_mask(args.atlas_mask) if args.atlas_mask else None
    places: dict[str, Any] = {"importance": [], "telling": None}
    if args.patch_features:
        features = read_patch_features(args.patch_features, sids)
        if locations is not None and len(locations) != features.shape[1]:
            raise UserError(
                f"{args.patch_features} has {features.shape[1]} locations, but --root-dir {args.root_dir} has "
                f"{len(locations)}; give the store that the features were extracted from"
            )
        places = make_location_data(args, features, colours, healthy)
    vectors = get_features_fitted_to_rows(read_vectors(chosen, table, sids), np.ones(len(sids), dtype=bool))
    values = standardize_features(vectors)
    sides = [] if locations is None else make_atlas_views(locations, PATCH_SIZE, atlas)
    without = "Give --root-dir to see the locations in the lungs." if locations is None else ""
    if not args.patch_features:
        without = "Give --patch-features to see which locations predict a label and which are unusual."
    data = {
        "sids": sids,
        "about": f"{len(sids)} subjects, {values.shape[1]} features ({chosen.kind}, standardised, Euclidean distance) "
        f"from {args.features}",
        "maps": [
            {"name": name, "places": encode_array_as_base64(own)}
            for name, own in project_subjects(values, tsne=not args.no_tsne).items()
        ],
        "labels": [make_colour_data(name, *one) for name, one in colours.items()],
        "nearest": encode_array_as_base64(
            find_nearest_subjects(values, min(args.neighbours, len(sids) - 1)).astype(np.uint32)
        ),
        "sides": [{**side, "places": encode_array_as_base64(side["places"])} for side in sides],
        "pictures": make_picture_links(args.root_dir, sids, page),
        "without": without,
        **places,
    }
    write_page(page, FOLDER, "explore", "Subjects and their features", data)
    print(f"explore: {len(sids)} subjects, {page.stat().st_size / 1e6:.1f} MB; open {page} in a browser")


if __name__ == "__main__":
    run(main)
