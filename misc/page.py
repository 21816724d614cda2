"""Pages of HTML that need no network: a template with its data inside, in one file."""

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


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array for a page's script, as base64 of little-endian numbers: a third of JSON's size.

    ``unpack`` of misc/page.js makes it a typed array again.
    """
    kind = array.dtype.newbyteorder("<")
    data = base64.b64encode(np.ascontiguousarray(array, dtype=kind).tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def write_page(path: Path, folder: Path, name: str, title: str, data: dict[str, Any]) -> None:
    """Write a page of ``folder``'s {name}.html and {name}.js with its data.

    The template has the marks @title, @script and @data. Text of users (subject names, messages) reaches the page
    as data only, and scripts put it there as text, so none of it can be taken for HTML.
    """
    template, own = ((folder / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "js"))
    shared = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"@title": html.escape(title), "@script": shared + own, "@data": text}
    assert "@data" in template, f"{name}.html has no @data"
    # In one pass: a folder may be called @data, and its name is part of the title.
    write_text(path, re.sub("@title|@script|@data", lambda mark: parts[mark[0]], template))


def link_to(target: Path, page: Path) -> str:
    """A file's or folder's address in a page that lies beside it: both can be moved together."""
    return quote(Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix())
