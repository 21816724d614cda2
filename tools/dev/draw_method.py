"""Draw the picture of the method for the README.

    python tools/dev/draw_method.py --store ssl_exp/demo_data/patches --sid 0002 --out misc/pictures/method.png

The patches come from a store, so the picture shows real inputs of the network.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.augment import Augmentation
from data.locations import neighbor_table
from data.sampler import BatchIndex
from data.store import PatchStore
from data.views import StepDraws, StepViews
from misc.command import Parser, run
from misc.files import write_atomically

QUERY, NEIGHBOR, KEY, INK = "#1f77b4", "#2a9d4a", "#d1622b", "#222222"


def make_query_key_and_neighbor_views(
    store: PatchStore, subject_row: int, location: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and neighbours of one subject, at ``location`` or at the location that shows the most lung."""
    patches = np.stack([store.read(index, np.array([subject_row]))[0] for index in range(store.num_locations)])
    middle = patches[:, patches.shape[1] // 2]  # draw the middle slice of each patch
    lung = ((middle > -1000) & (middle < -500)).mean(axis=(1, 2))
    neighbors = neighbor_table(store.locations, 2)
    shown = np.minimum(lung, lung[neighbors].min(axis=1))
    location = int(shown.argmax()) if location is None else location
    draws = StepDraws(Augmentation("agc"), 1, range(1))
    views = StepViews(draws, torch.device("cpu"))
    views.seed_noise(0, location, 0)
    return views(
        torch.from_numpy(patches[location : location + 1].copy()),
        torch.from_numpy(patches[neighbors[location]][None].copy()),
        draws(BatchIndex(0, location, 0, np.array([subject_row])), True),
    )


class Canvas:
    """A drawing with a size of 130 by 52 units."""

    def __init__(self):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(13, 5.2))
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, 130)
        self.axes.set_ylim(0, 52)
        self.axes.set_axis_off()

    def draw_text(self, x: float, y: float, text: str, font_size: float = 10, color: str = INK) -> None:
        self.axes.text(x, y, text, ha="center", va="center", fontsize=font_size, color=color)

    def draw_box(
        self, x: float, y: float, width: float, height: float, text: str, color: str, font_size: float = 10
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        shape = dict(boxstyle="round,pad=0.4", facecolor="white", edgecolor=color, linewidth=1.8)
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, **shape))
        self.draw_text(x + width / 2, y + height / 2, text, font_size)

    def draw_arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
        from matplotlib.patches import FancyArrowPatch

        shape = dict(arrowstyle="-|>", mutation_scale=13, color=color, linewidth=1.4)
        self.axes.add_patch(FancyArrowPatch(start, end, **shape))

    def add_axes_at(self, x: float, y: float, width: float, height: float):
        return self.figure.add_axes((x / 130, y / 52, width / 130, height / 52))

    def draw_middle_slice(self, x: float, y: float, side: float, volume: np.ndarray, color: str) -> None:
        place = self.add_axes_at(x, y, side, side)
        place.imshow(volume[volume.shape[0] // 2], cmap="gray", vmin=-1, vmax=1, origin="lower")
        place.set_xticks([])
        place.set_yticks([])
        for spine in place.spines.values():
            spine.set_edgecolor(color)
            spine.set_linewidth(2)


def draw_inputs(canvas: Canvas, views: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scan: Path) -> None:
    """Draw the left half of the figure: the picture of the scan, and the views."""
    query, key, neighbors = (view[0].numpy() for view in views)
    if scan.is_file():
        from matplotlib.image import imread

        drawn = imread(scan)
        place = canvas.add_axes_at(1, 12, 27, 28)
        place.imshow(drawn[int(0.155 * drawn.shape[0]) :, : drawn.shape[1] // 3])
        place.set_axis_off()
    canvas.draw_text(14.5, 43.5, "scan, lung mask,\natlas locations", 11)
    canvas.draw_text(14.5, 8.5, "registered by the mask,\ncut at every location l", 9.5)
    canvas.draw_middle_slice(36, 37, 10.5, query[0], QUERY)
    canvas.draw_middle_slice(32, 20, 10.5, neighbors[0], NEIGHBOR)
    canvas.draw_middle_slice(40, 20, 10.5, neighbors[1], NEIGHBOR)
    canvas.draw_middle_slice(36, 3, 10.5, key[0], KEY)
    canvas.draw_text(41.2, 49.3, "patch at l, view 1", 9.5, QUERY)
    canvas.draw_text(41.2, 32.5, "its k nearest patches, one view", 9.5, NEIGHBOR)
    canvas.draw_text(41.2, 15.3, "patch at l, view 2", 9.5, KEY)


def draw_method(canvas: Canvas) -> None:
    """Draw the right half of the figure: encoders, queues and tasks."""
    rows = ((38, QUERY, "q"), (21, NEIGHBOR, "r$_1$ ... r$_k$"), (4, KEY, "key"))
    for height, color, name in rows:
        canvas.draw_arrow((29, 26), (31 if color == NEIGHBOR else 35, height + 4.3), color)
        canvas.draw_arrow((51.5, height + 4.3), (56, height + 4.3), color)
        canvas.draw_arrow((76, height + 4.3), (82, height + 4.3), color)
        canvas.draw_text(85.2, height + 4.3, name, 12, color)
    words = "query encoder\n\nkernel(l) =\n$\\sum_e$ sigmoid(W l + b)$_e$ · W$_e$\n\n3-D CNN, 13 layers"
    canvas.draw_box(57, 22, 18, 24, words, QUERY, 9.5)
    canvas.draw_box(57, 3, 18, 11, "key encoder\nmomentum of\nthe query encoder", KEY, 9.5)
    canvas.draw_arrow((66, 21.3), (66, 14.9))
    canvas.draw_text(69.5, 18, "m = 0.999", 8.5)
    words = "queues: K keys for each location l\n(other subjects, same location)"
    canvas.draw_box(93, 3, 34, 11, words, KEY, 9.5)
    canvas.draw_arrow((88, 8.3), (92.2, 8.3), KEY)
    canvas.draw_box(93, 36, 34, 12, "patch task\n\n[ q · key,  q · queue$_l$ ] / T", QUERY, 10.5)
    words = "neighbour task\n\n[ $\\sum_k$ r$_k$ · key,  $\\sum_k$ r$_k$ · queue$_l$ ] / T"
    canvas.draw_box(93, 20, 34, 12, words, NEIGHBOR, 10.5)
    canvas.draw_arrow((88, 42.3), (92.2, 42.3), QUERY)
    canvas.draw_arrow((89.5, 25.3), (92.2, 25.3), NEIGHBOR)
    canvas.draw_arrow((110, 14.8), (110, 19.3), KEY)
    canvas.draw_arrow((110, 32.8), (110, 35.3), KEY)
    canvas.draw_text(110, 50.3, "which key is mine?  loss = CE(patch) + β CE(neighbour)", 9.5)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--store", required=True, help="folder of the patch store")
    parser.add_argument("--sid", help="subject to show (default: the first)")
    text = "location to show (default: the location whose patch and neighbours show the most lung)"
    parser.add_argument("--location", type=int, help=text)
    parser.add_argument("--out", required=True, help="path of the PNG file to write")
    args = parser.parse_args()
    store = PatchStore(args.store)
    row = store.sids.index(args.sid) if args.sid in store.sids else 0
    canvas = Canvas()
    draw_inputs(
        canvas, make_query_key_and_neighbor_views(store, row, args.location), store.layout.qc_picture(store.sids[row])
    )
    draw_method(canvas)
    write_atomically(args.out, lambda stream: canvas.figure.savefig(stream, dpi=80, format="png"))
    print(f"draw_method: wrote {args.out}")


if __name__ == "__main__":
    run(main)
