"""A page of patients, to look through with a browser: one file, no network.

    python tools/explore.py --features ssl_exp/NAME/patch_rep/0020/patient_features.csv --labels labels.csv \\
        --patch-features ssl_exp/NAME/patch_rep/0020/pred_arr_patch_full.npy --root-dir /data/patches \\
        --atlas-mask atlas_lung_mask.nii.gz --out page.html

It shows a map of the patients (two principal components, or t-SNE) coloured by any label, the patients nearest to a
chosen one, how well each place in the lungs tells a label alone, and a patient's places that are farthest from the
healthy ones. Each needs what it is made of:

    --labels            colours; numbers, and text of a dozen values at most
    --patch-features    places: which tell a label, which are unusual in a patient
    --root-dir          where the places are, and the pictures that preprocessing made (linked, not copied)
    --atlas-mask        the lungs behind the places
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.labels import filled_and_numbers
from data.layout import StoreError, StoreLayout, load_locations
from data.store import PatchStore
from data.tables import read_table
from misc.command import Parser, UserError, at_least, run
from misc.files import check_writable
from misc.page import link_to, packed, write_page
from misc.progress import add_progress_flag, progress_bar
from misc.sizes import PATCH_SIZE
from preprocess.atlas import read_atlas_mask
from tools.evaluation.normal import FEWEST
from tools.evaluation.tables import (
    add_vector_flags,
    choose_vector,
    healthy_and_known,
    is_constant,
    other_store,
    read_features,
    read_patch_features,
    read_vectors,
)
from tools.evaluation.vectors import fitted_table
from tools.pages.numbers import importance, maps_of, nearest, standardised, telling
from tools.pages.sides import sides_of

CATEGORIES = 12  # values of a text column that colours can tell apart
FOLDER = Path(__file__).resolve().parent / "pages"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--features", required=True, help="patient_features.csv of extract_feature.py")
    add_vector_flags(parser, patches=False)
    add("--labels", help="CSV with sid and further columns, to colour by")
    add("--columns", nargs="+", default=[], help="of the labels (default: all); fewer make a smaller page, sooner")
    add("--patch-features", metavar="NPY", help="pred_arr_patch_full.npy beside the features' sid_arr_full.npy")
    add("--root-dir", help="patch store of the features: its table of locations, its qc/ pictures")
    add("--atlas-mask", help="the atlas lung mask that the store was made with")
    text = "column of the labels, 1 for patients that others' places are compared with (default: all patients)"
    add("--healthy", metavar="COLUMN", help=text)
    add("--neighbours", type=at_least(int, 1), default=6, help="nearest patients shown beside one")
    add("--places", type=at_least(int, 1), default=10, help="unusual places shown of one; raise it for large tables")
    add("--no-tsne", action="store_true", help="principal components only: t-SNE takes a minute for 10,000 patients")
    add("--out", required=True, help="the page, such as page.html")
    add_progress_flag(parser)
    args = parser.parse_args()
    for flag, other in (("columns", "labels"), ("healthy", "labels"), ("healthy", "patch_features")):
        if getattr(args, flag) and not getattr(args, other):
            parser.error(f"--{flag} needs --{other.replace('_', '-')}")
    if args.atlas_mask and not args.root_dir:
        parser.error("--atlas-mask needs --root-dir, whose table has the locations")
    page = Path(args.out)
    inputs = [
        Path(path).resolve() for path in (args.features, args.labels, args.patch_features, args.atlas_mask) if path
    ]
    if page.is_dir() or page.resolve() in inputs:
        parser.error(f"--out {page} is {'a folder' if page.is_dir() else 'an input'}; give the page's own name")
    return args


def read_colours(path: str, sids: list[str], columns: list[str]) -> dict[str, tuple[np.ndarray, list[str] | None]]:
    """Columns to colour by: values (N,) float32, NaN where unknown; of a text column numbers of its names.

    Raises StoreError; UserError where a wanted column is not there or has too many values.
    """
    table = read_table(path, file_names=False).set_index("sid")
    if not table.index.isin(sids).any():
        raise UserError(f"{path} has none of the features' subjects, such as {sids[0]!r}; it has {table.index[0]!r}")
    unknown = next((column for column in columns if column not in table.columns), None)
    if unknown is not None:
        raise UserError(f"{path} has no column {unknown!r}; it has {', '.join(table.columns)}")
    table = table.reindex(sids)
    found: dict[str, tuple[np.ndarray, list[str] | None]] = {}
    for column in columns or table.columns:
        filled, numbers = filled_and_numbers(table[column])
        if filled.any() and np.isfinite(numbers[filled].astype(np.float32)).all():
            found[column] = (numbers.to_numpy(dtype=np.float32), None)
            continue
        codes, values = pd.factorize(table[column].str.strip().where(filled), sort=True)
        if 0 < len(values) <= CATEGORIES:
            found[column] = (np.where(codes < 0, np.nan, codes).astype(np.float32), [str(value) for value in values])
        else:
            what = f"has {len(values)} different texts, more than {CATEGORIES}" if len(values) else "is empty"
            print(f"note: {path}: column {column!r} left out, it {what}", file=sys.stderr)
    return found


def colour_data(name: str, values: np.ndarray, names: list[str] | None) -> dict[str, Any]:
    """A label for the page; its colours end at the 2nd and 98th percentile, so that one patient does not take all."""
    known = values[~np.isnan(values)]
    low, high = (float(np.quantile(known, q)) if len(known) else 0.0 for q in (0.02, 0.98))
    if low == high and len(known):
        low, high = float(known.min()), float(known.max())
    return {"name": name, "values": packed(values), "names": names, "low": low, "high": high}


def place_data(args: argparse.Namespace, features: np.ndarray, colours: dict, healthy: np.ndarray) -> dict[str, Any]:
    """What the page says of places: ``importance`` of every number, ``telling`` places of every patient."""
    numbers = {name: values for name, (values, names) in colours.items() if names is None}
    told, count = [], min(args.places, features.shape[1])
    with progress_bar(args.no_progress, total=len(numbers) * features.shape[1], desc="explore", unit="location") as bar:
        for name, values in numbers.items():
            own = importance(features, values, bar.update)
            if not np.isnan(own).all():
                told.append({"label": name, "values": packed(own.astype(np.float32))})
    found: dict[str, Any] = {"importance": told, "telling": None}
    if healthy.sum() >= FEWEST:
        places, scores = telling(features, healthy, count)
        whom = "healthy patients" if args.healthy else "what is usual here"
        found["telling"] = {
            "places": packed(places.astype(np.uint16)),
            "scores": packed(scores.astype(np.float32)),
            "healthy": whom,
        }
    else:
        print(f"note: fewer than {FEWEST} patients, too few to tell unusual places", file=sys.stderr)
    return found


def picture_data(root_dir: str | None, sids: list[str], page: Path) -> dict[str, Any]:
    """Where the preprocessing's pictures lie, as the page sees it, and whose there are."""
    known, folder = np.zeros(len(sids), dtype=np.uint8), ""
    if root_dir:
        layout = StoreLayout(root_dir)
        known[:] = [layout.qc(sid).is_file() for sid in sids]
        folder = link_to(layout.qc(sids[0]).parent, page)
    return {"known": packed(known), "folder": folder}


def main() -> None:
    args = parse_arguments()
    page = Path(args.out)
    check_writable(page.absolute().parent, "--out")

    def note(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    chosen = choose_vector(args.patient_vector, args.features, None, note)
    table = read_features(args.features)
    sids = table.index.tolist()
    if len(sids) < 3:
        raise UserError(f"{args.features} has {len(sids)} patients; a map needs 3")
    if is_constant(table.to_numpy()):
        raise UserError(
            f"{args.features}: every patient has the same features; a collapsed run has, and no map of them is"
        )
    colours = read_colours(args.labels, sids, args.columns) if args.labels else {}
    healthy = np.ones(len(sids), dtype=bool)
    if args.healthy:
        healthy, _ = healthy_and_known(args.labels, sids, args.healthy, FEWEST)
    if args.root_dir:
        with contextlib.suppress(StoreError):  # a folder of the locations alone will do
            told = other_store(args.features, PatchStore(args.root_dir), "--root-dir")
            if told:
                print(f"note: {told}", file=sys.stderr)
    locations = load_locations(StoreLayout(args.root_dir).find_atlas_patch_loc()) if args.root_dir else None
    atlas = read_atlas_mask(args.atlas_mask) if args.atlas_mask else None
    places: dict[str, Any] = {"importance": [], "telling": None}
    if args.patch_features:
        features = read_patch_features(args.patch_features, sids)
        if locations is not None and len(locations) != features.shape[1]:
            raise UserError(
                f"{args.patch_features} has {features.shape[1]} locations, --root-dir {args.root_dir} has "
                f"{len(locations)}; give the store that the features were extracted from"
            )
        places = place_data(args, features, colours, healthy)
    vectors = fitted_table(read_vectors(chosen, table, sids), np.ones(len(sids), dtype=bool))
    values = standardised(vectors)
    sides = [] if locations is None else sides_of(locations, PATCH_SIZE, atlas)
    without = "Places are drawn where --root-dir is given" if locations is None else ""
    if not args.patch_features:
        without = "--patch-features tells which places tell a label, and which are unusual."
    data = {
        "sids": sids,
        "about": f"{len(sids)} patients, {values.shape[1]} features ({chosen.kind}, standardised; near is Euclidean); "
        f"{args.features}",
        "maps": [{"name": name, "places": packed(own)} for name, own in maps_of(values, tsne=not args.no_tsne).items()],
        "labels": [colour_data(name, *one) for name, one in colours.items()],
        "nearest": packed(nearest(values, min(args.neighbours, len(sids) - 1)).astype(np.uint32)),
        "sides": [{**side, "places": packed(side["places"])} for side in sides],
        "pictures": picture_data(args.root_dir, sids, page),
        "without": without,
        **places,
    }
    write_page(page, FOLDER, "explore", "Patients and their features", data)
    print(f"explore: {len(sids)} patients, {page.stat().st_size / 1e6:.1f} MB; open {page} with a browser")


if __name__ == "__main__":
    run(main)
