"""A run that goes on from a checkpoint takes back what it told of later steps, so that each is told once.

What log.jsonl said of them is kept under another name, as the checkpoints further on are.
"""

import itertools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from misc.files import write_text, write_whole


def _told(line: str) -> tuple[str, tuple[int, int]] | None:
    """Kind and position of a line of log.jsonl; an epoch's line comes after its steps'. None for half a line."""
    try:
        record: dict[str, Any] = json.loads(line)
        epoch = int(record["epoch"])
        if record["kind"] == "step":
            return "step", (epoch - 1, int(record["step"]))
        return str(record["kind"]), (epoch, 0)
    except (ValueError, TypeError, KeyError):
        return None


def rewind_log(log: TextIO, position: tuple[int, int], aside: Path) -> dict[str, int]:
    """Cut log.jsonl down to what was done at a position; what goes is copied to ``aside`` first.

    Args:
        log: the file, open to read and append. It is read through this stream: a process that closes another stream of
            a file loses its lock on it.
        position: finished epochs, and steps of the next.
        aside: where the whole of it is kept if a line goes.

    Returns:
        How many lines of each kind stay.
    """
    file = log.fileno()
    text = os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", errors="replace")
    kept, counts, last = [], {"step": 0, "epoch": 0}, {}
    for line in text.splitlines(keepends=True):
        told = _told(line)
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
        write_text(aside, text)
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
    tags: list[str]  # of its curves


def read_records(path: Path) -> Iterator[Record]:
    """The whole records of a TensorBoard file; a killed run may have left half a record at its end."""
    from tensorboard_logger.tf_protobuf.event_pb2 import Event

    data, offset = path.read_bytes(), 0
    while offset + 12 <= len(data):  # length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, offset)
        record = data[offset : offset + 16 + length]
        if len(record) < 16 + length:
            return
        offset += len(record)
        event = Event.FromString(record[12:-4])
        tags = [value.tag for value in event.summary.value if value.WhichOneof("value") == "simple_value"]
        yield Record(record, event.step, tags)


def rewind_curves(folder: Path, counts: dict[str, int]) -> int:
    """Cut TensorBoard's curves where log.jsonl ends.

    Args:
        folder: of the events.out.tfevents.* files.
        counts: points that stay, of the longest ``train/`` curve (step) and of the longest ``epoch/`` curve (epoch).
            A curve that began later has fewer; all are cut at the same place.

    Returns:
        The last step of the ``train/`` curves that stays; 0 if none does.
    """
    paths = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    files = {path: list(read_records(path)) for path in paths}
    curves: dict[str, list[int]] = {}  # rising steps of each curve
    for record in itertools.chain(*files.values()):
        for tag in record.tags:
            points = curves.setdefault(tag, [])
            if not points or record.step > points[-1]:
                points.append(record.step)
    ends = {}
    for family, most in (("train", counts["step"]), ("epoch", counts["epoch"])):
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
            write_whole(path, lambda stream, whole=whole: stream.write(whole))
    return max(ends["train"], 0)
