"""Progress bars of long work, and the flag that switches them off."""

import argparse
import sys
from typing import Any

from tqdm import tqdm


def add_progress_flag(parser: argparse._ActionsContainer) -> None:
    """--no-progress."""
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (none is drawn without a terminal)")


def progress_bar(off: bool, **more: Any) -> tqdm:
    """tqdm, drawn unless ``off`` or if standard error is not a terminal."""
    return tqdm(disable=off or not sys.stderr.isatty(), dynamic_ncols=True, **more)
