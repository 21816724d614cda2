"""Write the features of every patch and every patient of a store.

    python extract_feature.py --exp-name=ssl_exp/NAME --checkpoint-patch=checkpoint_patch_0020.pth.tar

with all GPUs of a machine:

    python tools/launch.py --standalone --nproc-per-node 4 extract_feature.py --exp-name=ssl_exp/NAME \\
        --checkpoint-patch=checkpoint_patch_0020.pth.tar --labels labels.csv

with the published weights on your own store (its atlas_patch_loc.npy must be the published table):

    python extract_feature.py --exp-name=weights --checkpoint-patch=checkpoint_patch_0002.pth.tar \\
        --root-dir=/data/patches --out-dir=features

Writes <exp-name>/patch_rep/<epoch>/, or --out-dir: sid_arr_full.npy (N,), pred_arr_patch_full.npy
(N, L, rep_dim), pred_arr_patient_full.npy (N, rep_dim), patient_features.csv, features.json (what made them), with
--layers layer_arr_patch_full.npy (N, L, 1216), and with --labels feature_arr_patch_full.npy (N, P) and
label_names.json. Stopped half-way, it goes on where it was.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that wait for each other sleep. Spinning, its default, takes the core that another
# would need: beside one busy process on 2 cores a step took 262 ms so and 228 sleeping, alone 149 and 145.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from data.labels import read_labels
from data.layout import StoreError
from data.locations import normalize_locations, table_fingerprint
from data.pieces import PIECE_SUBJECTS, Piece, encode_pieces, list_pieces
from data.store import PatchStore
from data.tables import feature_table
from misc import process
from misc.command import OneOf, Parser, UserError, at_least, run
from misc.experiment import Experiment, environment, running_code
from misc.files import array_header, file_hash, held, resume_folder, save_array, write_json, write_text, write_whole
from misc.progress import add_progress_flag, progress_bar
from models.checkpoint import build_query_encoder, check_sum, check_table, position, read_checkpoint
from models.cnn3d import Encoder
from models.fast.memory import keep_freed_memory
from models.frozen import FrozenLocations, layer_width

MADE_BY = "features.json"  # beside the features
LAYERS = "layer_arr_patch_full.npy"
ASSEMBLY_BYTES = 64 * 2**20  # of features in memory while the result is put together


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--exp-name", required=True, help="folder of the experiment, such as ssl_exp/NAME")
    parser.add_argument("--checkpoint-patch", required=True, help="a checkpoint's name in that folder, or a path")
    parser.add_argument("--sha256", help="of the checkpoint; another file is refused, for weights that were downloaded")
    parser.add_argument("--root-dir", help="patch store (default: the one in the experiment's configs.json)")
    text = "also write the mean and SD of every layer's channels, for --patient-vector layers: 2.8 MB a subject"
    parser.add_argument("--layers", action="store_true", help=text)
    parser.add_argument("--labels", help="CSV with sid and numeric columns, to save beside the features")
    parser.add_argument("--out-dir", help="where to write (default: <exp-name>/patch_rep/<epoch>)")
    parser.add_argument(
        "--batch-size",
        type=at_least(int, 1),
        default=256,
        help="patches read at a time; a GPU encodes them at once, lower it if its memory is short",
    )
    parser.add_argument("--amp", type=OneOf("off", "bf16"), default="off", help="bf16: faster, features to within 1 %%")
    parser.add_argument(
        "--device", type=OneOf("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    add_progress_flag(parser)
    return parser.parse_args(argv)


# ============================================================ inputs


def refuse_features_of_other_store(out_dir: Path, experiment: Experiment, store: PatchStore) -> None:
    """Raise StoreError if the default folder has features of the store that the experiment was trained on."""
    try:
        own = Path(experiment.root_dir())
    except (UserError, OSError):
        return
    there = (out_dir / "sid_arr_full.npy").is_file() and own.is_dir()
    if there and own.resolve() != store.layout.root.resolve():
        raise StoreError(
            f"{out_dir} has features already, of {own} on which the experiment was trained, not of --root-dir "
            f"{store.layout.root}; give --out-dir for these"
        )


def open_store(root_dir: str, content: Mapping[str, Any], checkpoint: Path, say: Callable[[str], None]) -> PatchStore:
    """The store, whose table of locations must be the checkpoint's. Raises StoreError, CheckpointError."""
    store = PatchStore(root_dir)
    table = (store.num_locations, table_fingerprint(store.locations), store.layout.root)
    for text in (check_table(content, checkpoint, *table), *store.notes()):
        if text:
            say(f"note: {text}")
    return store


def describe_origin(
    checkpoint: Path, place: tuple[int, int], store: PatchStore, amp: str, layers: bool
) -> dict[str, Any]:
    """What these features are made from, for MADE_BY beside them."""
    where = {"checkpoint": str(checkpoint.resolve()), "checkpoint_sha256": file_hash(checkpoint)}
    where |= {"epoch": place[0], "step": place[1], "root_dir": str(store.layout.root.resolve())}
    return {**where, **store.facts(), "num_locations": store.num_locations, "amp": amp, "dtype": "float32"} | {
        "precision": "bf16" if amp == "bf16" else process.precision(),
        "layers": layers,
    }


def refuse_features_of_other_checkpoint(out_dir: Path, ours: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Raise StoreError if the folder has another checkpoint's features; report what else is replaced."""
    try:
        theirs = json.loads((out_dir / MADE_BY).read_text(encoding="utf-8"))
        before = {name: theirs.get(name) for name in ("checkpoint_sha256", "store_version", "amp")}
    except (OSError, ValueError, AttributeError):
        return  # none, or from before features told whose they are
    if before["checkpoint_sha256"] != ours["checkpoint_sha256"]:
        raise StoreError(
            f"{out_dir} has features of another checkpoint, {theirs.get('checkpoint')} (sha256 "
            f"{str(before['checkpoint_sha256'])[:12]}; this one's is {ours['checkpoint_sha256'][:12]}); give another "
            "--out-dir, or remove them"
        )
    for name in ("store_version", "amp"):
        if before[name] != ours[name]:
            say(
                f"note: features of {name.replace('_', ' ')} {before[name]} in {out_dir} are replaced, now {ours[name]}"
            )


# ============================================================ encoding


def refuse_not_finite(features: np.ndarray, piece: Piece, store: PatchStore) -> np.ndarray:
    """The features, (rows, locations, rep_dim). Raises StoreError if one is not finite, naming its patch."""
    if np.isfinite(features).all():
        return features
    row, column = np.argwhere(~np.isfinite(features))[0][:2]
    raise StoreError(
        f"features of subject {store.sids[piece.rows[row]]} at location {piece.locations[column]} are not finite: the "
        "checkpoint's run had diverged; take an earlier checkpoint, or check that patch"
    )


# ============================================================ output


def work_key(checkpoint: Path, store: PatchStore, amp: str, layers: bool = False) -> str:
    """Changes with anything that the features depend on, so that old pieces are not taken for new ones."""
    digest = hashlib.sha256()
    for path in (checkpoint, *store.files):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(repr((store.grouped, store.sids, store.locations.tolist(), amp, layers)).encode())
    return digest.hexdigest()


def read_subjects(folder: Path, pieces: list[Piece], store: PatchStore, width: int) -> Iterator[np.ndarray]:
    """The pieces' features of some subjects after the others, in row order: (n, L, width) float32."""
    if not store.grouped:
        for piece in pieces:
            yield np.load(folder / piece.name)
        return
    step = max(1, ASSEMBLY_BYTES // (store.num_locations * width * 4))
    for start in range(0, store.num_subjects, step):
        count = min(step, store.num_subjects - start)
        features = np.empty((count, store.num_locations, width), dtype=np.float32)
        for index, piece in enumerate(pieces):  # one open at a time: a process may have 1024 files
            features[:, index] = np.load(folder / piece.name, mmap_mode="r")[start : start + count, 0]
        yield features


def assemble(out_dir: Path, folder: Path, pieces: list[Piece], store: PatchStore, rep_dim: int, width: int = 0) -> None:
    """Put the pieces together, some subjects at a time, and take each subject's mean over the locations."""
    means = np.empty((store.num_subjects, rep_dim), dtype=np.float32)
    shape = store.num_subjects, store.num_locations

    def write_both(patches, layers=None) -> None:
        patches.write(array_header((*shape, rep_dim), np.dtype("<f4")))
        if layers is not None:
            layers.write(array_header((*shape, width), np.dtype("<f4")))
        row = 0
        for found in read_subjects(folder, pieces, store, rep_dim + width):
            features = found[:, :, :rep_dim]
            means[row : row + len(features)] = features.mean(axis=1, dtype=np.float64)
            patches.write(np.ascontiguousarray(features, dtype="<f4").data)
            if layers is not None:
                layers.write(np.ascontiguousarray(found[:, :, rep_dim:], dtype="<f4").data)
            row += len(features)

    patch_file, layer_file = out_dir / "pred_arr_patch_full.npy", out_dir / LAYERS
    layer_file.unlink(missing_ok=True)
    if width:  # one file whole within the other's writing: both are there at its end, or neither
        write_whole(patch_file, lambda patches: write_whole(layer_file, lambda layers: write_both(patches, layers)))
    else:
        write_whole(patch_file, write_both)
    save_array(out_dir / "pred_arr_patient_full.npy", means)
    save_array(out_dir / "sid_arr_full.npy", np.array(store.sids, dtype=np.str_))
    write_text(out_dir / "patient_features.csv", feature_table(store.sids, means))


# ============================================================ the script


def encode_share(
    args: argparse.Namespace, encoder: Encoder, store: PatchStore, folder: Path, pieces: list[Piece]
) -> None:
    """Encode those of this rank's pieces that are not in the folder yet."""
    rank, world = process.rank(), process.world_size()
    # Consecutive pieces, because consecutive locations are frozen together.
    share = pieces[len(pieces) * rank // world : len(pieces) * (rank + 1) // world]
    todo = [piece for piece in share if not (folder / piece.name).is_file()]
    locations = torch.from_numpy(normalize_locations(store.locations))  # (L, 3)
    locations = locations.to(next(encoder.parameters()).device)
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float32
    bar = progress_bar(
        args.no_progress or rank != 0,
        total=len(share),
        initial=len(share) - len(todo),
        desc="extract_feature",
        unit="location" if store.grouped else f"{PIECE_SUBJECTS} subjects",
    )
    with bar:
        frozen = FrozenLocations(encoder, locations, dtype)
        for piece, features in encode_pieces(frozen, store, todo, args.batch_size, locations.device, args.layers):
            save_array(folder / piece.name, refuse_not_finite(features, piece, store))
            bar.update()


def extract(args: argparse.Namespace, device: torch.device) -> None:
    """All of it, on this rank."""
    rank = process.rank()
    say = print if rank == 0 else (lambda _: None)
    if device.type == "cpu":
        keep_freed_memory()

    # -------------------------------------------------------- inputs
    experiment = Experiment(args.exp_name)
    checkpoint = experiment.find_checkpoint(args.checkpoint_patch)
    check_sum(checkpoint, args.sha256)
    content = read_checkpoint(checkpoint)
    encoder, sizes = build_query_encoder(Encoder, content, checkpoint)
    root_dir = args.root_dir or experiment.root_dir()
    store = open_store(root_dir, content, checkpoint, say)
    place = position(content, checkpoint)
    out_dir = Path(args.out_dir or experiment.features(*place))
    if out_dir.exists() and not out_dir.is_dir():
        raise StoreError(f"--out-dir {out_dir} is a file; name a folder")
    if not args.out_dir:
        refuse_features_of_other_store(out_dir, experiment, store)
    labels = read_labels(args.labels, store.sids, note=say) if args.labels else None
    del content

    if args.amp == "bf16" and (factor := process.slow_bf16(device)):
        say(f"note: --amp bf16 is slow on this processor, {factor:.0f} times float32's time for a convolution; use off")
    made_by = describe_origin(checkpoint, place, store, args.amp, args.layers)
    process.agree({**vars(args), **made_by, **running_code()})
    with held(out_dir / ".lock", str(out_dir)) if rank == 0 else contextlib.nullcontext():
        # ---------------------------------------------------- encode
        folder, pieces = out_dir / ".pieces", list_pieces(store)
        if rank == 0:
            refuse_features_of_other_checkpoint(out_dir, made_by, say)
            resume_folder(folder, work_key(checkpoint, store, args.amp, args.layers))
        process.barrier()
        encode_share(args, encoder.to(device), store, folder, pieces)
        process.wait_for_all()

        # ---------------------------------------------------- put together
        if rank == 0:
            store.check_unchanged()
            (out_dir / MADE_BY).unlink(missing_ok=True)  # until all of them are these
            width = layer_width(encoder) if args.layers else 0
            assemble(out_dir, folder, pieces, store, sizes["rep_dim"], width)
            for name in ("feature_arr_patch_full.npy", "label_names.json"):
                (out_dir / name).unlink(missing_ok=True)
            if labels is not None:
                save_array(out_dir / "feature_arr_patch_full.npy", labels[0])
                write_text(out_dir / "label_names.json", json.dumps(labels[1]))
            write_json(out_dir / MADE_BY, {**made_by, "rep_dim": sizes["rep_dim"], **environment()})
            shutil.rmtree(folder)
            print(
                f"extract_feature: {store.num_subjects} subjects x {store.num_locations} patches x "
                f"{sizes['rep_dim']} features; {out_dir}"
            )


def main() -> None:
    args = parse_arguments()
    with process.joined(args.device) as device:
        extract(args, device)


if __name__ == "__main__":
    run(main, memory="--batch-size")
