"""The page of all preprocessed subjects, worst first: qc/index.html in the store.

    python tools/qc_page.py --root-dir /data/patches

run_preprocess.sh ends with it; run it again after single steps. It opens from the disk with any browser, and needs no
network.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreLayout
from misc.command import Parser, UserError, run
from preprocess.qc_page import STEPS, write_qc_page


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--root-dir", required=True, help="patch store, or one whose preprocessing is under way")
    return parser.parse_args()


def main() -> None:
    root = parse_arguments().root_dir
    layout = StoreLayout(root)
    if not any(layout.report(step).is_file() for step in STEPS):
        raise UserError(f"--root-dir {root} has no report of preprocessing; run preprocess/run_preprocess.sh")
    print(f"qc_page: open {write_qc_page(root)} in a browser")


if __name__ == "__main__":
    run(main)
