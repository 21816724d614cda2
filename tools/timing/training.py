"""Time the training step and its parts, and return the rows for the benchmark table."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

from data.store import PatchStore
from tools.dev.apart import LiteralProcess
from tools.timing.measure import NO_BF16, Row, list_precisions, make_comparison_row, synchronize, time_in_turns
from tools.timing.step import TimedStep

FORWARD_GFLOP = 0.194  # cost of encoding one patch; multiplications and additions both count
# 3 patches with a backward pass (3 times the cost of a forward pass), and 1 key without a backward pass.
STEP_GFLOP = FORWARD_GFLOP * (3 * 3 + 1)


def check_equal_losses(fast: TimedStep, apart: LiteralProcess) -> dict[str, float]:
    """Return the first-step losses of both versions, from the same weights and views. Raise if they differ."""
    batch = next(fast.batches)
    ours, slow = float(fast.compute_loss(fast.make_inputs(batch)).detach()), apart("loss")
    if abs(ours - slow) > 1e-4 * abs(slow):
        raise RuntimeError(
            f"the losses differ (fast path: {ours}, literal implementation: {slow}), so the timings are not comparable"
        )
    return {"ours": ours, "literal": slow}


def measure_training(
    store: PatchStore, K: int, apart: LiteralProcess, args: argparse.Namespace, machine: dict, report: dict
) -> list[Row]:
    """Time the encoder, and the whole training step with reading and augmentation."""
    device, B = args.device, args.batch
    kinds = list_precisions(machine)
    steps = {kind: TimedStep(store, B, K, device, bf16=kind == "bf16") for kind in kinds}
    report["first_step_loss"] = check_equal_losses(steps["float32"], apart)
    x = torch.randn(B, 1, 32, 32, 32, device=device)
    encoder, loc = steps["float32"].model.encoder_q, steps["float32"].step.table.locations[:1]

    def run_encoder_forward_backward(precision: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            z = encoder(x, loc)[0]
        z.float().sum().backward()

    jobs = {kind: functools.partial(run_encoder_forward_backward, kind) for kind in kinds}
    encoder_times = time_in_turns({**jobs, "literal": lambda: apart("encode")}, args.rounds)
    jobs = {kind: functools.partial(step.run_steps, args.steps) for kind, step in steps.items()}
    step_times = time_in_turns({**jobs, "literal": lambda: apart("step")}, args.rounds)
    what = f"training step, {store.num_locations} locations, K {K}, batch {B}"
    rows = []
    for name, times, ours, literal, gflop, goals in (
        (f"encoder, {B} patches, forward and backward", encoder_times, B, B, 3 * FORWARD_GFLOP, {}),
        (
            f"{what}, reading and augmentation included",
            step_times,
            B * args.steps,
            B,
            STEP_GFLOP,
            {"float32": "30; 4 times", "bf16": "50; 7 times"},
        ),
    ):
        for kind in ("float32", "bf16"):
            row = Row(f"{name}, {kind}", "samples/s", goal=goals.get(kind, ""), note=NO_BF16)
            if kind in kinds:
                rate = machine[f"matrix_gflops_{kind}"]
                row = make_comparison_row(row.what, row.unit, times[kind], times["literal"], ours, literal, gflop, rate)
                row.goal = goals.get(kind, "")
            rows.append(row)
    report["profile_ms"] = {kind: time_step_parts(step, args) for kind, step in steps.items()}
    return rows


def time_step_parts(step: TimedStep, args: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of each part of a step, as the median over steps."""
    parts: dict[str, list[float]] = {}

    def wrap_with_timer(name: str, function: Callable) -> Callable:
        def run_and_time(*inputs: object, **more: object) -> object:
            synchronize()
            start = time.perf_counter()
            result = function(*inputs, **more)
            synchronize()
            parts.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return run_and_time

    model = step.model
    inner = {name: getattr(model, name) for name in ("_update_key_encoder", "_encode_keys", "enqueue")}
    names = {"_update_key_encoder": "momentum", "_encode_keys": "forward, keys", "enqueue": "queue"}
    for method, name in names.items():
        setattr(model, method, wrap_with_timer(name, inner[method]))
    try:
        for _ in range(args.steps * args.rounds):
            batch = wrap_with_timer("reading", next)(step.batches)
            inputs = wrap_with_timer("copying", step.make_inputs)(batch)
            views = wrap_with_timer("augmenting", step.views)(inputs.patches, inputs.neighbors, inputs.draws)
            loss = wrap_with_timer("forward, all", step.step)(inputs.location, views, 1.0, inputs.subjects).loss
            step.descend.optimizer.zero_grad(set_to_none=True)
            wrap_with_timer("backward", loss.backward)()
            wrap_with_timer("update", step.descend.optimizer.step)()
    finally:
        for method, work in inner.items():
            setattr(model, method, work)
    middle = {name: 1e3 * statistics.median(values) for name, values in parts.items()}
    within = sum(middle[name] for name in names.values())
    middle["forward, queries and logits"] = middle.pop("forward, all") - within
    return {name: round(value, 3) for name, value in middle.items()}
