"""Progress bars for long tasks, and the flag that turns them off."""

import argparse
import sys
from typing import Any

from tqdm import tqdm


def add_progress_flag(parser: argparse._ActionsContainer) -> None:
    """Add the flag --no-progress."""
    parser.add_argument(
        "--no-progress", action="store_true", help="hide progress bars (always hidden without a terminal)"
    )


def progress_bar(off: bool, **more: Any) -> tqdm:
    """Return a tqdm bar. The bar is hidden if ``off`` is set or standard error is not a terminal."""
    return tqdm(disable=off or not sys.stderr.isatty(), dynamic_ncols=True, **more)
