"""The rows of a training step, and its parts."""

import statistics
import time
from collections.abc import Callable

import torch

from data.store import PatchStore
from tools.timing.apart import Apart
from tools.timing.measure import Row, compare, in_turns, synchronize
from tools.timing.step import TimedStep

FORWARD_GFLOP = 0.194  # one patch, multiplications and additions
STEP_GFLOP = FORWARD_GFLOP * (3 * 3 + 1)  # patch and two neighbours forward and back, key forward


def check_equal_losses(fast: TimedStep, apart: Apart) -> dict[str, float]:
    """First-step losses of both from the same weights on the same views. Raises where they differ."""
    batch = next(fast.batches)
    ours, slow = float(fast.loss(batch.location, fast.views(batch)).detach()), apart("loss")
    if abs(ours - slow) > 1e-4 * abs(slow):
        raise RuntimeError(f"losses differ, {ours} here and {slow} in the literal version: the timings mean nothing")
    return {"ours": ours, "literal": slow}


def rows_training(store: PatchStore, K: int, apart: Apart, args, machine: dict, report: dict) -> list[Row]:
    """Encoder, and the whole step with reading and augmentation."""
    device, B = args.device, args.batch
    rate = {False: machine["matrix_gflops_float32"], True: machine["matrix_gflops_bf16"]}
    fast = TimedStep(store, B, K, device, bf16=False)
    report["first_step_loss"] = check_equal_losses(fast, apart)
    halved = TimedStep(store, B, K, device, bf16=True)
    no_bf16 = "" if machine["fast_bf16"] else "the processor has no bf16 arithmetic"
    x = torch.randn(B, 1, 32, 32, 32, device=device)
    encoder, loc = fast.model.encoder_q, fast.table.locations[:1]

    def encode(amp: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            z = encoder(x, loc)[0]
        z.float().sum().backward()

    encoder_times = in_turns(
        {False: lambda: encode(False), True: lambda: encode(True), "literal": lambda: apart("encode")}, args.rounds
    )
    step_times = in_turns(
        {False: lambda: fast.run(args.steps), True: lambda: halved.run(args.steps), "literal": lambda: apart("step")},
        args.rounds,
    )
    rows = []
    for amp in (False, True):
        kind = "bf16" if amp else "float32"
        rows.append(
            compare(
                f"encoder, {B} patches, forward and backward, {kind}",
                "samples/s",
                encoder_times[amp],
                encoder_times["literal"],
                B,
                B,
                3 * FORWARD_GFLOP,
                rate[amp],
                note=no_bf16 if amp else "",
            )
        )
    for amp in (False, True):
        rows.append(
            compare(
                f"training step, {store.num_locations} locations, K {K}, batch {B}, {'bf16' if amp else 'float32'}, "
                "reading and augmentation included",
                "samples/s",
                step_times[amp],
                step_times["literal"],
                B * args.steps,
                B,
                STEP_GFLOP,
                rate[amp],
                goal="50; 7 times" if amp else "30; 4 times",
                note=no_bf16 if amp else "",
            )
        )
    report["profile_ms"] = {"float32": profile(fast, args), "bf16": profile(halved, args)}
    return rows


def profile(step: TimedStep, args) -> dict[str, float]:
    """Milliseconds of each part of a step, median over steps."""
    parts: dict[str, list[float]] = {}

    def timed(name: str, work: Callable):
        def run(*inputs, **more):
            synchronize()
            start = time.perf_counter()
            result = work(*inputs, **more)
            synchronize()
            parts.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return run

    model = step.model
    inner = {name: getattr(model, name) for name in ("_update_key_encoder", "_encode_keys", "_enqueue")}
    names = {"_update_key_encoder": "momentum", "_encode_keys": "forward, keys", "_enqueue": "queue"}
    for method, name in names.items():
        setattr(model, method, timed(name, inner[method]))
    try:
        for _ in range(args.steps * args.rounds):
            batch = timed("reading", next)(step.batches)
            timed("copying", lambda batch: (batch.patches.to(step.device), batch.neighbors.to(step.device)))(batch)
            views = timed("augmenting", step.views)(batch)
            loss = timed("forward, all", step.loss)(batch.location, views)
            step.optimizer.zero_grad(set_to_none=True)
            timed("backward", loss.backward)()
            timed("update", step.optimizer.step)()
    finally:
        for method, work in inner.items():
            setattr(model, method, work)
    middle = {name: 1e3 * statistics.median(values) for name, values in parts.items()}
    within = sum(middle[name] for name in names.values())
    middle["forward, queries and logits"] = middle.pop("forward, all") - within
    return {name: round(value, 3) for name, value in middle.items()}
