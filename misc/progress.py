"""Progress bars of long work."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(off: bool, **more: Any) -> tqdm:
    """tqdm, drawn unless ``off`` or where standard error is no terminal."""
    return tqdm(disable=off or not sys.stderr.isatty(), dynamic_ncols=True, **more)
