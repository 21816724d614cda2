"""Rewind the logs of a resumed run to its checkpoint, so that every step is logged once.

A copy of the full log.jsonl is kept as superseded-TIME-log.jsonl.
"""

import itertools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from misc.files import write_atomically, write_text


def parse_log_line_kind_and_position(line: str) -> tuple[str, tuple[int, int]] | None:
    """Return the kind and the position of a line of log.jsonl, or None for a partial line.

    The position consists of the number of finished epochs and the number of finished steps in the next epoch.
    """
    try:
        record: dict[str, Any] = json.loads(line)
        epoch = int(record["epoch"])
        if record["kind"] == "step":
            return "step", (epoch - 1, int(record["step"]))
        return str(record["kind"]), (epoch, 0)
    except (ValueError, TypeError, KeyError):
        return None


def rewind_log(log: TextIO, position: tuple[int, int], copy_path: Path) -> dict[str, int]:
    """Remove the lines of log.jsonl after a position. If any line is removed, the whole file is copied first.

    Args:
        log: the file, open for reading and appending. This function does not open the file again,
            because a process loses its lock on a file when it closes another stream of the same file.
        position: number of finished epochs, and number of finished steps in the next epoch.
        copy_path: path for the copy of the whole file.

    Returns:
        The number of lines of each kind, such as "step" and "epoch", that remain in the log.
    """
    file = log.fileno()
    text = os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", errors="replace")
    kept, counts, last = [], {"step": 0, "epoch": 0}, {}
    for line in text.splitlines(keepends=True):
        told = parse_log_line_kind_and_position(line)
        if told is None or not line.endswith("\n"):
            continue
        kind, place = told
        if place > position or (kind in counts and place <= last.get(kind, (-1, 0))):
            continue
        kept.append(line)
        last[kind] = place
        counts[kind] = counts.get(kind, 0) + 1
    whole = "".join(kept)
    if whole != text:
        write_text(copy_path, text)
        start = text.startswith(whole)
        os.ftruncate(file, len(whole.encode()) if start else 0)
        if not start:
            with open(file, "a", encoding="utf-8", closefd=False) as stream:
                stream.write(whole)
    return counts


class Record(NamedTuple):
    """One record of a TensorBoard file."""

    content: bytes
    step: int
    tags: list[str]  # names of the curves in this record


def read_tensorboard_records(path: Path) -> Iterator[Record]:
    """Read the complete records of a TensorBoard file. A killed run may leave an incomplete last record."""
    from tensorboard_logger.tf_protobuf.event_pb2 import Event

    data, offset = path.read_bytes(), 0
    # A record has a length, a checksum of the length, an event and a checksum of the event.
    while offset + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        record = data[offset : offset + 16 + length]
        if len(record) < 16 + length:
            return
        offset += len(record)
        event = Event.FromString(record[12:-4])
        tags = [value.tag for value in event.summary.value if value.WhichOneof("value") == "simple_value"]
        yield Record(record, event.step, tags)


def truncate_tensorboard_curves(folder: Path, points_to_keep: dict[str, int]) -> int:
    """Cut the TensorBoard curves at the last step and epoch in log.jsonl.

    Args:
        folder: folder with the events.out.tfevents.* files.
        points_to_keep: how many points to keep: ``step`` for the longest ``train/`` curve, ``epoch`` for the longest
            ``epoch/`` curve. All other curves are cut at the same step as the longest curve.

    Returns:
        The last step that remains in the ``train/`` curves; 0 if no step remains.
    """
    paths = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    files = {path: list(read_tensorboard_records(path)) for path in paths}
    curves: dict[str, list[int]] = {}  # step numbers of each curve, in increasing order
    for record in itertools.chain(*files.values()):
        for tag in record.tags:
            points = curves.setdefault(tag, [])
            if not points or record.step > points[-1]:
                points.append(record.step)
    ends = {}
    for family, most in (("train", points_to_keep["step"]), ("epoch", points_to_keep["epoch"])):
        longest = max((points for tag, points in curves.items() if tag.split("/")[0] == family), key=len, default=[])
        ends[family] = longest[:most][-1] if longest[:most] else -1

    last: dict[str, int] = {}
    for path, records in files.items():
        kept = []
        for record in records:
            late = any(record.step > ends.get(tag.split("/")[0], -1) for tag in record.tags)
            if late or any(record.step <= last.get(tag, -1) for tag in record.tags):
                continue
            last |= dict.fromkeys(record.tags, record.step)
            kept.append(record.content)
        whole = b"".join(kept)
        if len(whole) != path.stat().st_size:
            write_atomically(path, lambda stream, whole=whole: stream.write(whole))
    return max(ends["train"], 0)
