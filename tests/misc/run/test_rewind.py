"""Test rewinding a log and its curves to the step where a run resumes."""

import json

from tensorboard_logger import Logger
from tensorboard_logger.tf_protobuf.event_pb2 import Event

from misc.run.rewind import rewind_log, truncate_tensorboard_curves


def steps_of(folder, tag="train/loss"):
    found = []
    for path in sorted(folder.glob("events*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            length = int.from_bytes(data[offset : offset + 8], "little")
            event = Event.FromString(data[offset + 12 : offset + 12 + length])
            found += [event.step for value in event.summary.value if value.tag == tag]
            offset += length + 16
    return found


def test_each_step_is_told_once(tmp_path):
    log, aside = tmp_path / "log.jsonl", tmp_path / "aside"
    places = [("step", 1, 2), ("step", 1, 4), ("epoch", 1, 0), ("step", 2, 2), ("step", 2, 2), ("step", 2, 4)]
    text = "".join(json.dumps({"kind": k, "epoch": e, "step": s}) + "\n" for k, e, s in places) + '{"kind": "st'
    log.write_text(text)
    curves = Logger(str(tmp_path))
    for step in (2, 4, 6, 8):
        curves.log_value("train/loss", 1.0, step)
    curves.log_value("epoch/loss", 1.0, 1)
    with open(log, "a+") as stream:  # a run opens its log in this mode
        counts = rewind_log(stream, (1, 3), aside)
        stream.write("next\n")
    assert counts["step"] == 3 and counts["epoch"] == 1 and aside.read_text() == text
    kept = log.read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in kept[:-1]] == places[:4] and kept[-1] == "next"
    assert truncate_tensorboard_curves(tmp_path, counts) == 6 and steps_of(tmp_path) == [2, 4, 6]
    assert truncate_tensorboard_curves(tmp_path, {"step": 0, "epoch": 0}) == 0 and steps_of(tmp_path) == []


def test_a_curve_that_began_later_is_cut_at_the_same_step(tmp_path):
    """The curve of the neighbour loss begins later than other curves if --beta was 0 at first."""
    curves = Logger(str(tmp_path))
    for step in range(1, 8):
        curves.log_value("train/loss", 1.0, step)
        if step > 3:
            curves.log_value("train/loss_neighbor", 1.0, step)
    assert truncate_tensorboard_curves(tmp_path, {"step": 5, "epoch": 0}) == 5
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5] and steps_of(tmp_path, "train/loss_neighbor") == [4, 5]


def test_nothing_to_rewind_changes_nothing(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "step", "epoch": 1, "step": 2}\n')
    with open(log, "a+") as stream:
        assert rewind_log(stream, (0, 2), tmp_path / "aside")["step"] == 1 and not (tmp_path / "aside").exists()
