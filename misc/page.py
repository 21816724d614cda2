"""Write self-contained HTML pages: template, script and data in one file, usable without a network."""

import base64
import html
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from misc.files import write_text


def encode_array_as_base64(array: np.ndarray) -> dict[str, Any]:
    """Encode an array for a page's script as base64 of little-endian numbers.

    The result is about a third as large as JSON text. ``unpack`` in misc/page.js decodes the result to a typed array.
    """
    kind = array.dtype.newbyteorder("<")
    data = base64.b64encode(np.ascontiguousarray(array, dtype=kind).tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def write_page(path: Path, template_folder: Path, template_name: str, title: str, data: dict[str, Any]) -> None:
    """Write a page from {name}.html and {name}.js in ``template_folder``, with its data inside.

    The template contains the placeholders @title, @script and @data. User text (subject names, messages) is passed
    only as data. Scripts insert user text as text, so it is never interpreted as HTML.
    """
    template, own = (
        (template_folder / f"{template_name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "js")
    )
    shared = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"@title": html.escape(title), "@script": shared + own, "@data": text}
    assert "@data" in template, f"{template_name}.html has no @data"
    # Replace all placeholders in one pass, because the title may contain "@data", for example in a folder's name.
    write_text(path, re.sub("@title|@script|@data", lambda mark: parts[mark[0]], template))


def make_link(target: Path, page: Path) -> str:
    """Return a relative link from a page to a file or folder, so that page and target can be moved together."""
    return quote(Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix())
