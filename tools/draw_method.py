"""Draw the README's picture of the method.

    python tools/draw_method.py --store ssl_exp/demo_data/patches --sid 0002 --out misc/method.png

Patches come from a store, so the picture shows what the network sees.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.augment import Augmentation, make_views, step_generators
from data.layout import StoreError
from data.locations import neighbor_table
from data.store import PatchStore

QUERY, NEIGHBOR, KEY, INK = "#1f77b4", "#2a9d4a", "#d1622b", "#222222"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="patch store")
    parser.add_argument("--sid", help="subject to show (default: the first)")
    parser.add_argument(
        "--location", type=int, help="location to show (default: where it and its neighbours show most lung)"
    )
    parser.add_argument("--out", required=True, help="PNG to write")
    args = parser.parse_args()

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    store = PatchStore(args.store)
    row = store.sids.index(args.sid) if args.sid else 0
    everywhere = np.stack([store.read(index, np.array([row]))[0] for index in range(store.num_locations)])
    middle = everywhere[:, everywhere.shape[1] // 2]  # what is drawn of a patch
    lung = ((middle > -1000) & (middle < -500)).mean(axis=(1, 2))
    neighbors = neighbor_table(store.locations, 2)
    shown = np.minimum(lung, lung[neighbors].min(axis=1))
    location = args.location if args.location is not None else int(shown.argmax())
    near = neighbors[location]
    query, key, around = make_views(
        torch.from_numpy(everywhere[location : location + 1].copy()),
        torch.from_numpy(everywhere[near][None].copy()),
        Augmentation("agc"),
        step_generators(1, 0, location, 0, 0, torch.device("cpu")),
    )

    figure = Figure(figsize=(13, 5.2))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 130)
    axes.set_ylim(0, 52)
    axes.set_axis_off()

    def text(x, y, words, size=10, color=INK, **more):
        axes.text(x, y, words, ha="center", va="center", fontsize=size, color=color, **more)

    def box(x, y, w, h, words, color, size=10):
        axes.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.4", facecolor="white", edgecolor=color, linewidth=1.8)
        )
        text(x + w / 2, y + h / 2, words, size)

    def arrow(start, end, color=INK, style="-|>"):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13, color=color, linewidth=1.4))

    def picture(x, y, side, volume, color):
        place = figure.add_axes((x / 130, y / 52, side / 130, side / 52))
        place.imshow(volume[volume.shape[0] // 2], cmap="gray", vmin=-1, vmax=1, origin="lower")
        place.set_xticks([])
        place.set_yticks([])
        for spine in place.spines.values():
            spine.set_edgecolor(color)
            spine.set_linewidth(2)

    scan = Path(store.layout.qc(store.sids[row]))
    if scan.is_file():
        from matplotlib.image import imread

        drawn = imread(scan)
        panel = drawn[int(0.155 * drawn.shape[0]) :, : drawn.shape[1] // 3]
        place = figure.add_axes((1 / 130, 12 / 52, 27 / 130, 28 / 52))
        place.imshow(panel)
        place.set_axis_off()
    text(14.5, 43.5, "scan, lung mask,\natlas locations", 11)
    text(14.5, 8.5, "registered by the mask,\ncut at every location l", 9.5)

    rows = {"query": (38, QUERY), "neighbors": (21, NEIGHBOR), "key": (4, KEY)}
    picture(36, 37, 10.5, query[0, 0].numpy(), QUERY)
    picture(32, 20, 10.5, around[0, 0].numpy(), NEIGHBOR)
    picture(40, 20, 10.5, around[0, 1].numpy(), NEIGHBOR)
    picture(36, 3, 10.5, key[0, 0].numpy(), KEY)
    text(41.2, 49.3, "patch at l, view 1", 9.5, QUERY)
    text(41.2, 32.5, "its k nearest patches, one view", 9.5, NEIGHBOR)
    text(41.2, 15.3, "patch at l, view 2", 9.5, KEY)
    for height, color in rows.values():
        arrow((29, 26), (31 if color == NEIGHBOR else 35, height + 4.3), color)
        arrow((51.5, height + 4.3), (56, height + 4.3), color)

    box(
        57,
        22,
        18,
        24,
        "query encoder\n\nkernel(l) =\n$\\sum_e$ sigmoid(W l + b)$_e$ · W$_e$\n\n3-D CNN, 13 layers",
        QUERY,
        9.5,
    )
    box(57, 3, 18, 11, "key encoder\nmomentum of\nthe query encoder", KEY, 9.5)
    arrow((66, 21.3), (66, 14.9), INK, "-|>")
    text(69.5, 18, "m = 0.999", 8.5)
    for (height, color), name in zip(rows.values(), ("q", "r$_1$ ... r$_k$", "key")):
        arrow((76, height + 4.3), (82, height + 4.3), color)
        text(85.2, height + 4.3, name, 12, color)

    box(93, 3, 34, 11, "queues: one of K keys for each location l\n(other subjects, the same place)", KEY, 9.5)
    arrow((88, 8.3), (92.2, 8.3), KEY)
    box(93, 36, 34, 12, "patch task\n\n[ q · key,  q · queue$_l$ ] / T", QUERY, 10.5)
    box(93, 20, 34, 12, "neighbour task\n\n[ $\\sum_k$ r$_k$ · key,  $\\sum_k$ r$_k$ · queue$_l$ ] / T", NEIGHBOR, 10.5)
    arrow((88, 42.3), (92.2, 42.3), QUERY)
    arrow((89.5, 25.3), (92.2, 25.3), NEIGHBOR)
    arrow((110, 14.8), (110, 19.3), KEY)
    arrow((110, 32.8), (110, 35.3), KEY)
    text(110, 50.3, "which key is mine?  loss = CE(patch) + β CE(neighbour)", 9.5)
    figure.savefig(args.out, dpi=80)
    print(f"draw_method: {args.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
