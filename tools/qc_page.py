"""Write qc/index.html in the store: a page of all preprocessed subjects, worst first.

    python tools/qc_page.py --root-dir /data/patches

run_preprocess.sh runs this script at the end. After running a single stage of preprocessing, run this script again to
update the page. The page opens in any browser without a network connection.
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
    parser.add_argument("--root-dir", required=True, help="patch store; preprocessing may still be running")
    return parser.parse_args()


def main() -> None:
    root = parse_arguments().root_dir
    layout = StoreLayout(root)
    if not any(layout.report_path(step).is_file() for step in STEPS):
        raise UserError(f"--root-dir {root} has no preprocessing report; run preprocess/run_preprocess.sh")
    print(f"qc_page: open {write_qc_page(root)} in a browser")


if __name__ == "__main__":
    run(main)
