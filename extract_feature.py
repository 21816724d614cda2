"""Compute the features of every patch and every subject in a patch store.

Run on one GPU if there is one, otherwise on the CPU:

    python extract_feature.py --exp-name=ssl_exp/NAME --checkpoint-patch=checkpoint_patch_0020.pth.tar

Run on four GPUs of one machine, and save a table of labels next to the features:

    python tools/launch.py --standalone --nproc-per-node 4 extract_feature.py --exp-name=ssl_exp/NAME \\
        --checkpoint-patch=checkpoint_patch_0020.pth.tar --labels labels.csv

Use the published weights on your own store, which must have the published atlas_patch_loc.npy:

    python extract_feature.py --exp-name=weights --checkpoint-patch=checkpoint_patch_0002.pth.tar \\
        --root-dir=/data/patches --out-dir=features

The output goes to <exp-name>/patch_rep/<epoch>/ or to --out-dir: sid_arr_full.npy (N,), pred_arr_patch_full.npy
(N, L, rep_dim), pred_arr_patient_full.npy (N, rep_dim), patient_features.csv, and features.json, which records the
checkpoint and the store. N is the number of subjects, and L is the number of locations. --layers adds
layer_arr_patch_full.npy (N, L, 1216), the mean and SD of each of the encoder's 608 channels. --labels adds
label_names.json with the names of the P labels, and their values in feature_arr_patch_full.npy (N, P). To continue an
interrupted extraction, run the same command again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# Set OMP_WAIT_POLICY before torch loads OpenMP, so that waiting threads sleep.
# By default, waiting threads spin and block a core that another process could use.
# On 2 cores shared with a busy process, a training step takes 228 ms if waiting threads sleep, and 262 ms if they spin.
# On idle cores, a training step takes 145 ms if waiting threads sleep, and 149 ms if they spin.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from data.labels import read_labels
from data.layout import StoreError
from data.locations import normalize_locations, table_fingerprint
from data.pieces import PIECE_SUBJECTS, Piece, encode_pieces, split_store_into_pieces
from data.store import PatchStore
from data.tables import format_feature_table
from misc import process
from misc.command import OneOf, Parser, UserError, at_least, run
from misc.experiment import Experiment, collect_environment, describe_running_code
from misc.files import (
    hash_file,
    hold_lock_or_raise,
    make_array_header,
    prepare_resumable_folder,
    save_array,
    write_atomically,
    write_json,
    write_text,
)
from misc.progress import add_progress_flag, progress_bar
from models.checkpoint import (
    build_query_encoder,
    check_same_location_table,
    check_sha256,
    find_epoch_and_step,
    read_checkpoint,
)
from models.cnn3d import Encoder
from models.fast.memory import keep_freed_memory_in_process
from models.frozen import FrozenLocations, count_layer_features

MADE_BY = "features.json"  # file that records the checkpoint, the store and the settings of the features
LAYERS = "layer_arr_patch_full.npy"
ASSEMBLY_BYTES = 64 * 2**20  # maximum number of bytes of features held in memory while the output files are written


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--exp-name", required=True, help="folder of the experiment, for example ssl_exp/NAME")
    parser.add_argument(
        "--checkpoint-patch", required=True, help="name of a checkpoint in the --exp-name folder, or a path"
    )
    parser.add_argument("--sha256", help="expected SHA-256 of the checkpoint; give it to verify downloaded weights")
    parser.add_argument("--root-dir", help="patch store (default: the store named in the experiment's configs.json)")
    text = (
        "also write the mean and SD of every encoder channel (2.8 MB per subject), which --patient-vector layers needs"
    )
    parser.add_argument("--layers", action="store_true", help=text)
    text = "CSV with a sid column and numeric label columns; the labels are saved next to the features"
    parser.add_argument("--labels", help=text)
    parser.add_argument("--out-dir", help="output folder (default: <exp-name>/patch_rep/<epoch>)")
    parser.add_argument(
        "--batch-size",
        type=at_least(int, 1),
        default=256,
        help="number of patches to read and encode at a time; lower it if GPU memory runs out",
    )
    parser.add_argument(
        "--amp",
        type=OneOf("off", "bf16"),
        default="off",
        help="off: float32; bf16: faster, with features within 1 %% of those in float32",
    )
    parser.add_argument(
        "--device",
        type=OneOf("auto", "cpu", "cuda"),
        default="auto",
        help="device of the encoder; auto uses a GPU if there is one",
    )
    add_progress_flag(parser)
    return parser.parse_args(argv)


# ============================================================ inputs


def refuse_features_of_other_store(out_dir: Path, experiment: Experiment, store: PatchStore) -> None:
    """Raise StoreError if --out-dir is not given and its default folder has features from a different store."""
    try:
        own = Path(experiment.root_dir())
    except (UserError, OSError):
        return
    there = (out_dir / "sid_arr_full.npy").is_file() and own.is_dir()
    if there and own.resolve() != store.layout.root.resolve():
        raise StoreError(
            f"{out_dir} already has features of {own}, the store that the experiment was trained on; set --out-dir "
            f"to another folder for the features of --root-dir {store.layout.root}"
        )


def open_store(root_dir: str, content: Mapping[str, Any], checkpoint: Path, say: Callable[[str], None]) -> PatchStore:
    """Open the store and check that it has the checkpoint's table of locations. Raises StoreError, CheckpointError."""
    store = PatchStore(root_dir)
    table = (store.num_locations, table_fingerprint(store.locations), store.layout.root)
    for text in (check_same_location_table(content, checkpoint, *table), *store.describe_outdated_grouped_files()):
        if text:
            say(f"note: {text}")
    return store


def collect_feature_origin(
    checkpoint: Path, epoch_and_step: tuple[int, int], store: PatchStore, amp: str, layers: bool
) -> dict[str, Any]:
    """Return the content of MADE_BY: the checkpoint, the store and the numerical settings of the extraction."""
    where = {"checkpoint": str(checkpoint.resolve()), "checkpoint_sha256": hash_file(checkpoint)}
    where |= {"epoch": epoch_and_step[0], "step": epoch_and_step[1], "root_dir": str(store.layout.root.resolve())}
    return {
        **where,
        **store.collect_identity(),
        "num_locations": store.num_locations,
        "amp": amp,
        "dtype": "float32",
    } | {
        "precision": "bf16" if amp == "bf16" else process.find_gpu_matmul_precision(),
        "layers": layers,
    }


def refuse_features_of_other_checkpoint(
    out_dir: Path, new_settings: Mapping[str, Any], print_note: Callable[[str], None]
) -> None:
    """Raise StoreError if the folder has features from a different checkpoint.

    Print a note if features of the same checkpoint will be replaced because the store version or --amp changed.
    """
    try:
        theirs = json.loads((out_dir / MADE_BY).read_text(encoding="utf-8"))
        before = {name: theirs.get(name) for name in ("checkpoint_sha256", "store_version", "amp")}
    except (OSError, ValueError, AttributeError):
        return  # the folder has no features, or no valid MADE_BY file
    if before["checkpoint_sha256"] != new_settings["checkpoint_sha256"]:
        raise StoreError(
            f"{out_dir} has features from a different checkpoint, {theirs.get('checkpoint')}: its SHA-256 starts with "
            f"{str(before['checkpoint_sha256'])[:12]}, not {new_settings['checkpoint_sha256'][:12]}. "
            "Give another --out-dir, or remove these features"
        )
    for name in ("store_version", "amp"):
        if before[name] != new_settings[name]:
            print_note(
                f"note: the features in {out_dir} are replaced, because {name.replace('_', ' ')} changed from "
                f"{before[name]} to {new_settings[name]}"
            )


# ============================================================ encoding


def refuse_nonfinite_features(features: np.ndarray, piece: Piece, store: PatchStore) -> np.ndarray:
    """Return the features (rows, locations, rep_dim) unchanged if they are all finite.

    Raises:
        StoreError: a feature is not finite; the message names its patch.
    """
    if np.isfinite(features).all():
        return features
    row, column = np.argwhere(~np.isfinite(features))[0][:2]
    raise StoreError(
        f"features of subject {store.sids[piece.rows[row]]} at location {piece.locations[column]} are not finite: "
        "either training diverged or the patch is damaged. Use an earlier checkpoint, or check the patch"
    )


# ============================================================ output


def hash_inputs(checkpoint: Path, store: PatchStore, amp: str, layers: bool = False) -> str:
    """Hash everything that the features depend on, so that pieces of another extraction are not reused."""
    digest = hashlib.sha256()
    for path in (checkpoint, *store.patch_file_paths):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(repr((store.grouped, store.sids, store.locations.tolist(), amp, layers)).encode())
    return digest.hexdigest()


def iterate_features_from_pieces(
    pieces_folder: Path, pieces: list[Piece], store: PatchStore, num_features: int
) -> Iterator[np.ndarray]:
    """Read the pieces and yield features of a few subjects at a time, in row order: (n, L, width) float32."""
    if not store.grouped:
        for piece in pieces:
            yield np.load(pieces_folder / piece.name)
        return
    step = max(1, ASSEMBLY_BYTES // (store.num_locations * num_features * 4))
    for start in range(0, store.num_subjects, step):
        count = min(step, store.num_subjects - start)
        features = np.empty((count, store.num_locations, num_features), dtype=np.float32)
        # Open one file at a time, because many systems allow only 1024 open files per process.
        for index, piece in enumerate(pieces):
            features[:, index] = np.load(pieces_folder / piece.name, mmap_mode="r")[start : start + count, 0]
        yield features


def join_pieces_into_feature_files(
    out_dir: Path,
    pieces_folder: Path,
    pieces: list[Piece],
    store: PatchStore,
    rep_dim: int,
    num_layer_features: int = 0,
) -> None:
    """Join the pieces into the output files, and also write the mean of each subject's features over locations."""
    means = np.empty((store.num_subjects, rep_dim), dtype=np.float32)
    shape = store.num_subjects, store.num_locations

    def write_feature_files(patch_stream: BinaryIO, layer_stream: BinaryIO | None = None) -> None:
        patch_stream.write(make_array_header((*shape, rep_dim), np.dtype("<f4")))
        if layer_stream is not None:
            layer_stream.write(make_array_header((*shape, num_layer_features), np.dtype("<f4")))
        row = 0
        for found in iterate_features_from_pieces(pieces_folder, pieces, store, rep_dim + num_layer_features):
            features = found[:, :, :rep_dim]
            means[row : row + len(features)] = features.mean(axis=1, dtype=np.float64)
            patch_stream.write(np.ascontiguousarray(features, dtype="<f4").data)
            if layer_stream is not None:
                layer_stream.write(np.ascontiguousarray(found[:, :, rep_dim:], dtype="<f4").data)
            row += len(features)

    patch_file, layer_file = out_dir / "pred_arr_patch_full.npy", out_dir / LAYERS
    layer_file.unlink(missing_ok=True)
    if (
        num_layer_features
    ):  # the calls are nested, so that an error in ``write_feature_files`` leaves neither file behind
        write_atomically(
            patch_file,
            lambda patches: write_atomically(layer_file, lambda layers: write_feature_files(patches, layers)),
        )
    else:
        write_atomically(patch_file, write_feature_files)
    save_array(out_dir / "pred_arr_patient_full.npy", means)
    save_array(out_dir / "sid_arr_full.npy", np.array(store.sids, dtype=np.str_))
    write_text(out_dir / "patient_features.csv", format_feature_table(store.sids, means))


# ============================================================ script


def encode_own_pieces(
    args: argparse.Namespace, encoder: Encoder, store: PatchStore, folder: Path, pieces: list[Piece]
) -> None:
    """Encode this rank's pieces, except those that are already in the folder."""
    rank, world = process.rank(), process.world_size()
    # Each rank gets consecutive locations, because one call computes the kernels for several consecutive locations.
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
            save_array(folder / piece.name, refuse_nonfinite_features(features, piece, store))
            bar.update()


def extract_features(args: argparse.Namespace, device: torch.device) -> None:
    """Run the whole extraction on this rank."""
    rank = process.rank()
    say = print if rank == 0 else (lambda _: None)
    if device.type == "cpu":
        keep_freed_memory_in_process()

    # -------------------------------------------------------- inputs
    experiment = Experiment(args.exp_name)
    checkpoint = experiment.find_checkpoint(args.checkpoint_patch)
    check_sha256(checkpoint, args.sha256)
    content = read_checkpoint(checkpoint)
    encoder, sizes = build_query_encoder(Encoder, content, checkpoint)
    root_dir = args.root_dir or experiment.root_dir()
    store = open_store(root_dir, content, checkpoint, say)
    place = find_epoch_and_step(content, checkpoint)
    out_dir = Path(args.out_dir or experiment.features(*place))
    if out_dir.exists() and not out_dir.is_dir():
        raise StoreError(f"--out-dir {out_dir} is a file; give a folder")
    if not args.out_dir:
        refuse_features_of_other_store(out_dir, experiment, store)
    labels = read_labels(args.labels, store.sids, note=say) if args.labels else None
    del content

    if args.amp == "bf16" and (factor := process.measure_bf16_slowdown(device)):
        say(
            f"note: --amp bf16 is slow on this processor: a convolution takes {factor:.0f} times as long as in "
            "float32; use --amp off"
        )
    made_by = collect_feature_origin(checkpoint, place, store, args.amp, args.layers)
    process.check_ranks_agree({**vars(args), **made_by, **describe_running_code()})
    with hold_lock_or_raise(out_dir / ".lock", str(out_dir)) if rank == 0 else contextlib.nullcontext():
        # ---------------------------------------------------- encode
        folder, pieces = out_dir / ".pieces", split_store_into_pieces(store)
        if rank == 0:
            refuse_features_of_other_checkpoint(out_dir, made_by, say)
            prepare_resumable_folder(folder, hash_inputs(checkpoint, store, args.amp, args.layers))
        process.barrier()
        encode_own_pieces(args, encoder.to(device), store, folder, pieces)
        process.wait_for_slow_ranks()

        # ---------------------------------------------------- assemble
        if rank == 0:
            store.check_store_files_unchanged()
            (out_dir / MADE_BY).unlink(missing_ok=True)  # rewritten below, after all other files are complete
            width = count_layer_features(encoder) if args.layers else 0
            join_pieces_into_feature_files(out_dir, folder, pieces, store, sizes["rep_dim"], width)
            for name in ("feature_arr_patch_full.npy", "label_names.json"):
                (out_dir / name).unlink(missing_ok=True)
            if labels is not None:
                save_array(out_dir / "feature_arr_patch_full.npy", labels[0])
                write_text(out_dir / "label_names.json", json.dumps(labels[1]))
            write_json(out_dir / MADE_BY, {**made_by, "rep_dim": sizes["rep_dim"], **collect_environment()})
            shutil.rmtree(folder)
            print(
                f"extract_feature: {store.num_subjects} subjects x {store.num_locations} patches x "
                f"{sizes['rep_dim']} features; saved in {out_dir}"
            )


def main() -> None:
    args = parse_arguments()
    with process.join_process_group(args.device) as device:
        extract_features(args, device)


if __name__ == "__main__":
    run(main, memory="--batch-size")
