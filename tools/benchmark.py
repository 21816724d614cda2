"""How fast is it on this machine, part by part, beside the same thing written out slowly?

    python tools/benchmark.py --quick            under 2 minutes on 2 cores
    python tools/benchmark.py --json speed.json  the whole table, some 10 minutes on 2 cores

Every row has two timings taken in turns in the same run: this project's, and a literal version that
is written out in literal.py and runs in a process of its own (a loop over samples in every
convolution, a loop over MONAI's transforms, a queue of shape (moco_dim, K, L), a subject's patches
encoded at once). The figure that carries over between machines is their ratio, given as the median
over the rounds with the smallest and the largest. Before anything is timed the two must give the
same loss. Rows that this machine cannot measure stay in the table, marked so.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.augment import Augmentation, make_views, step_generators, to_input
from data.dataset import PatchBatch, PatchDataset, make_loader
from data.layout import save_array
from data.locations import normalize_locations
from data.prefetch import FileWarmer
from data.sampler import LocationBatchSampler
from data.store import PatchStore
from models import first_layers
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.device import keep_freed_memory
from models.frozen import TOGETHER, freeze
from tools.literal import LiteralAugmentation, LiteralStep, literal_encode, literal_views

PUBLISHED_LOCATIONS = 581
FORWARD_GFLOP = 0.194  # one patch, multiplications and additions
STEP_GFLOP = FORWARD_GFLOP * (3 * 3 + 1)  # patch and two neighbours forward and back, key forward
EXTRACT_BATCH = 256  # the default of extract_feature.py
DISTINCT_FILES = 8  # contents of a benchmark store's location files; the others are links to these


# ============================================================ timing


@dataclass
class Row:
    """One line of the table; None where it was not measured."""

    what: str
    unit: str
    ours: float | None = None
    literal: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    of_matrix_rate: float | None = None
    goal: str = ""
    note: str = ""


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def in_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time the jobs one after the other, several times over, after one call that does not count."""
    for work in jobs.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, work in jobs.items():
            times[name].append(seconds(work))
    return times


def compare(
    what: str,
    unit: str,
    ours: list[float],
    literal: list[float] | None,
    amount: float,
    literal_amount: float = 0.0,
    gflop: float = 0.0,
    rate: float = 0.0,
    **more,
) -> Row:
    """A row from timings of the same rounds.

    Args:
        what, unit: the row's name; a unit that ends in '/s' is a rate, else a time per amount.
        ours, literal: seconds a round.
        amount, literal_amount: how much was done in a round.
        gflop: arithmetic of one unit of the amount, for the share of ``rate`` (GFLOP/s).
    """
    row = Row(what, unit, **more)
    middle = statistics.median(ours)
    is_rate = unit.endswith("/s")
    row.ours = amount / middle if is_rate else middle / amount
    if gflop and rate:
        row.of_matrix_rate = gflop * amount / middle / rate
    if literal:
        slow = statistics.median(literal)
        row.literal = literal_amount / slow if is_rate else slow / literal_amount
        ratios = [(b / literal_amount) / (a / amount) for a, b in zip(ours, literal)]
        row.ratio, row.ratio_low, row.ratio_high = statistics.median(ratios), min(ratios), max(ratios)
    return row


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product: what the machine's own library reaches."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = in_turns({"product": lambda: a @ b}, 5)["product"]
    return 2 * size**3 / statistics.median(times) / 1e9


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def describe(device: torch.device) -> dict[str, object]:
    """The machine, as far as it matters for a timing."""
    name = platform.processor() or platform.machine()
    flags = ""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", text)[1]
        flags = " ".join(sorted(set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16)\b", text))))
    except (OSError, TypeError):
        pass
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": name,
        "instructions": flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    found["matrix_gflops_float32"] = matrix_rate(device, torch.float32)
    found["matrix_gflops_bf16"] = matrix_rate(device, torch.bfloat16)
    return found


# ============================================================ a store to read from


def make_store(folder: Path, locations: int, subjects: int, seed: int = 0) -> PatchStore:
    """A grouped store of smooth random patches; few distinct files, linked under every location's name."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    side = int(np.ceil(locations ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:locations]
    save_array(folder / "atlas_patch_loc.npy", (grid * 26 + 5).astype(np.int64))
    (folder / "subjects.csv").write_text("sid\n" + "".join(f"{n:05d}\n" for n in range(subjects)))
    grouped = folder / "grouped_patch"
    for index in range(min(DISTINCT_FILES, locations)):
        noise = ndimage.gaussian_filter(rng.normal(size=(32, 32, 32 * 16)), 2)
        noise = noise / noise.std() * 200 - 700
        patches = [np.roll(noise, int(rng.integers(512)), axis=2)[:, :, :32] for _ in range(subjects)]
        save_array(grouped / f"patch_loc_{index}.npy", np.clip(patches, -1024, 240).astype(np.int16))
    for index in range(DISTINCT_FILES, locations):
        os.link(grouped / f"patch_loc_{index % DISTINCT_FILES}.npy", grouped / f"patch_loc_{index}.npy")
    return PatchStore(folder, require_grouped=True)


# ============================================================ this project's step


class Step:
    """Reading, augmenting and one step of training, composed as train.py composes them."""

    def __init__(self, store: PatchStore, batch: int, K: int, device: torch.device, amp: bool, workers: int = 0):
        torch.manual_seed(0)
        self.device, self.amp = device, amp
        self.dataset = PatchDataset(store, 2)
        self.sampler = LocationBatchSampler(store.num_subjects, store.num_locations, batch, seed=0)
        self.loader = make_loader(self.dataset, self.sampler, workers, pin_memory=device.type == "cuda")
        self.locations = torch.from_numpy(normalize_locations(store.locations)).to(device)
        self.near = self.locations[torch.from_numpy(self.dataset.neighbors)]  # (L, k, 3)
        self.augmentation = Augmentation("agc")
        self.model = DrasCLR(Encoder, store.num_locations, 128, 128, 8, 1, K, 0.999, 0.2, True).to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, foreach=True)
        self.batches = self._forever()

    def _forever(self) -> Iterator[PatchBatch]:
        epoch = 0
        while True:
            self.sampler.set_epoch(epoch, 0)
            yield from self.loader
            epoch += 1

    def views(self, batch: PatchBatch):
        generators = step_generators(0, batch.epoch, batch.location, batch.step, 0, self.device)
        patches = batch.patches.to(self.device, non_blocking=True)
        around = batch.neighbors.to(self.device, non_blocking=True)
        return make_views(patches, around, self.augmentation, generators)

    def here_and_near(self, location: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The location, (1, 3), and its neighbours', (1, k, 3)."""
        return self.locations[location : location + 1], self.near[location : location + 1]

    def loss(self, location: int, query, key, around) -> torch.Tensor:
        here, near = self.here_and_near(location)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            pch, ngb, labels = self.model(location, [query, here], [key, here], [around, near])
        return F.cross_entropy(pch, labels) + F.cross_entropy(ngb, labels)

    def descend(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches)
            self.descend(self.loss(batch.location, *self.views(batch)))


# ============================================================ the literal versions' process


def literal_process(pipe, store_folder: str, K: int, batch: int, device: torch.device) -> None:
    """Answer the names of literal jobs by doing them, with memory allocated as the system does by default."""
    fast = Step(PatchStore(store_folder, require_grouped=True), batch, K, device, amp=False)  # weights and batches
    literal = LiteralStep(fast.model)
    encoder = trained_encoder(device)
    augment = LiteralAugmentation("agc")
    x = torch.randn(batch, 1, 32, 32, 32, device=device)
    everywhere = torch.rand(PUBLISHED_LOCATIONS, 3, device=device)

    def loss() -> float:
        drawn = next(fast.batches)
        return float(literal.losses(drawn.location, *fast.views(drawn), *fast.here_and_near(drawn.location)).detach())

    def encode() -> None:
        literal_encode(literal.encoder_q, x, everywhere[:1].expand(batch, 3))[0].sum().backward()

    def step() -> None:
        drawn = next(fast.batches)
        views = literal_views(drawn.patches, drawn.neighbors, augment)
        literal.step(drawn.location, *(view.to(device) for view in views), *fast.here_and_near(drawn.location))

    @torch.no_grad()
    def features() -> None:
        patches = torch.zeros(PUBLISHED_LOCATIONS, 32, 32, 32, dtype=torch.int16).to(device)
        literal_encode(encoder, to_input(patches), everywhere)[1].cpu()

    jobs = {work.__name__: work for work in (loss, encode, step, features)}
    while (name := pipe.recv()) is not None:
        result = jobs[name]()
        synchronize()
        pipe.send(result)


class Apart:
    """The literal versions in a process of their own: call it with a job's name."""

    def __init__(self, store: PatchStore, K: int, args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        inputs = (theirs, str(store.layout.root), K, args.batch, args.device)
        self.process = context.Process(target=literal_process, args=inputs, daemon=True)
        self.process.start()
        theirs.close()  # so that its death is an error here, not a wait

    def __call__(self, name: str):
        self.pipe.send(name)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


# ============================================================ rows


def check_equal_losses(fast: Step, apart: Apart) -> dict[str, float]:
    """First-step losses of both from the same weights on the same views. Raises where they differ."""
    batch = next(fast.batches)
    ours, slow = float(fast.loss(batch.location, *fast.views(batch)).detach()), apart("loss")
    if abs(ours - slow) > 1e-4 * abs(slow):
        raise RuntimeError(f"losses differ, {ours} here and {slow} in the literal version: the timings mean nothing")
    return {"ours": ours, "literal": slow}


def rows_training(store: PatchStore, K: int, apart: Apart, args, machine: dict, report: dict) -> list[Row]:
    """Encoder, and the whole step with reading and augmentation."""
    device, B = args.device, args.batch
    rate = {False: machine["matrix_gflops_float32"], True: machine["matrix_gflops_bf16"]}
    fast = Step(store, B, K, device, amp=False)
    report["first_step_loss"] = check_equal_losses(fast, apart)
    halved = Step(store, B, K, device, amp=True)
    no_bf16 = "" if machine["fast_bf16"] else "the processor has no bf16 arithmetic"
    x = torch.randn(B, 1, 32, 32, 32, device=device)
    encoder, here = fast.model.encoder_q, fast.locations[:1]

    def encode(amp: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            z = encoder(x, here)[0]
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


def profile(step: Step, args) -> dict[str, float]:
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
            loss = timed("forward, all", step.loss)(batch.location, *views)
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


def trained_encoder(device: torch.device) -> Encoder:
    """In eval mode, with statistics as after training and not the identity."""
    torch.manual_seed(0)
    encoder = Encoder(128, 128, 8, 1).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.01, 0.1)
    return encoder.to(device)


def rows_extraction(store: PatchStore, apart: Apart, args, machine: dict) -> list[Row]:
    """Features of a 581-patch subject over a cohort, location by location."""
    device, N = args.device, store.num_subjects
    encoder = trained_encoder(device)
    locations = torch.from_numpy(normalize_locations(store.locations)).to(device)
    batches = np.array_split(np.arange(N), math.ceil(N / EXTRACT_BATCH))

    def read(location: int, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(store.read(location, rows)).to(device)

    def features(dtype: torch.dtype) -> None:
        for location, frozen in enumerate(freeze(encoder, locations[:TOGETHER], dtype)):
            for rows in batches:
                frozen(read(location, rows), to_input).cpu()

    x = to_input(read(0, batches[0]))
    with torch.no_grad():
        wanted = literal_encode(encoder, x, locations[:1].expand(len(x), 3))[1]
    times = in_turns(
        {
            torch.float32: lambda: features(torch.float32),
            torch.bfloat16: lambda: features(torch.bfloat16),
            "literal": lambda: apart("features"),
        },
        args.rounds,
    )
    made = []
    for dtype, kind, goal in (
        (torch.float32, "float32", "1.5 s; 9 times"),
        (torch.bfloat16, "bf16", "0.6 s; 20 times"),
    ):
        error = float((freeze(encoder, locations[:1], dtype)[0](x) - wanted).norm() / wanted.norm())
        note = f"error of h {error:.0e}"
        if kind == "bf16" and not machine["fast_bf16"]:
            note += "; the processor has no bf16 arithmetic"
        elif device.type == "cpu" and first_layers.load(dtype) is None:
            note += "; the first layers by the library, there is no C compiler or no AVX-512"
        made.append(
            compare(
                f"features of a subject of {PUBLISHED_LOCATIONS} patches, in a cohort of {N}, {kind}, reading included",
                "s",
                times[dtype],
                times["literal"],
                N * TOGETHER / PUBLISHED_LOCATIONS,
                1.0,
                FORWARD_GFLOP * PUBLISHED_LOCATIONS,
                machine[f"matrix_gflops_{kind}"],
                goal=goal,
                note=note,
            )
        )
    return made


def rows_augmentation(args) -> list[Row]:
    """One view of one patch on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = []
    try:
        for letters, count, slow_count, goal in (("agc", 64, 64, "0.5 ms; 3 times"), ("e", 32, 2, "10 ms; 10 times")):
            volumes = torch.rand(count, 1, 32, 32, 32) * 1264
            ours, literal = Augmentation(letters), LiteralAugmentation(letters)
            generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
            times = in_turns(
                {
                    "ours": lambda ours=ours, volumes=volumes, pair=generators: ours(volumes, *pair),
                    "literal": lambda literal=literal, volumes=volumes, n=slow_count: [literal(v) for v in volumes[:n]],
                },
                args.rounds,
            )
            made.append(
                compare(
                    f"augmentation {letters}, one view, one core",
                    "ms",
                    times["ours"],
                    times["literal"],
                    count / 1e3,
                    slow_count / 1e3,
                    goal=goal,
                )
            )
    finally:
        torch.set_num_threads(threads)
    return made


def rows_reading(folder: Path, args) -> list[Row]:
    """Rows of shuffled batches out of location files in turn, beside dd on the same files."""
    store = make_store(folder, DISTINCT_FILES, args.reading_subjects)
    paths = [store.layout.grouped(location) for location in range(DISTINCT_FILES)]
    total = sum(path.stat().st_size for path in paths)
    order = np.random.default_rng(0).permutation(store.num_subjects)

    def forget() -> None:
        """Drop the files from the page cache."""
        for path in paths:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def batches(warmer: Callable[[list[Path]], None] = lambda _: None) -> None:
        fresh = PatchStore(folder, require_grouped=True)  # opened anew, or its mapping keeps the pages
        for location in range(DISTINCT_FILES):
            warmer(paths[location + 1 : location + 2])
            for start in range(0, len(order), 32):
                fresh.read(location, order[start : start + 32])

    def dd() -> None:
        for path in paths:
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)

    made = []
    for cold, ahead in ((True, False), (True, True), (False, True)):
        times: dict[str, list[float]] = {"ours": [], "dd": []}
        for _ in range(args.rounds):
            jobs = {"ours": (lambda: batches(FileWarmer())) if ahead else batches, "dd": dd}
            for name, work in jobs.items():
                if cold:
                    forget()
                else:
                    work()
                times[name].append(seconds(work))
        made.append(
            compare(
                f"reading shuffled batches of 32, {'cold' if cold else 'from the page cache'}, "
                f"{'next location read ahead' if ahead else 'not read ahead'} (beside it: dd)",
                "GB/s",
                times["ours"],
                times["dd"],
                total / 1e9,
                total / 1e9,
            )
        )
    return made


def launch_training(store: PatchStore, folder: Path, ranks: int, flags: dict[str, object]) -> subprocess.Popen:
    """train.py on the store, in its own process group."""
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), "--root-dir", str(store.layout.root)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
    return subprocess.Popen(
        [*command, "--exp-name", "x", "--no-progress", *(f"--{name}={value}" for name, value in flags.items())],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def row_memory(store: PatchStore, K: int, folder: Path, args) -> Row:
    """Peak memory of train.py itself, from the kernel's own count."""
    row = Row(f"memory of train.py, {store.num_locations} locations, K {K}, batch {args.batch}", "GB", goal="3 GB")
    if not Path("/proc/self/status").exists():
        row.note = "unmeasured: this system does not tell a process's peak memory"
        return row
    sizes = {"batch-size": args.batch, "moco-k": K, "epochs": 1, "workers": 1, "device": args.device.type}
    process = launch_training(store, folder, 1, {**sizes, "print-freq": 2})
    try:
        printed = 0
        for line in process.stdout:
            printed += line.startswith("epoch")
            if printed == 4:
                status = Path(f"/proc/{process.pid}/status").read_text()
                row.ours = int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024 / 1e9
                break
        if row.ours is None:
            row.note = "unmeasured: train.py ended early"
    finally:
        stop(process)
    return row


def ranks_rate(folder: Path, ranks: int, args) -> float | None:
    """Samples a second of train.py over several ranks on this machine, the batch shared among them."""
    store = make_store(folder / "store", 8, 64)
    sizes = {"batch-size": args.batch, "moco-k": 4 * args.batch, "epochs": 2, "workers": 1, "device": args.device.type}
    process = launch_training(store, folder, ranks, sizes)
    try:
        process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        stop(process)
        return None
    lines = (folder / "ssl_exp/x/log.jsonl").read_text().splitlines()
    epochs = [entry for entry in map(json.loads, lines) if entry["kind"] == "epoch"]
    steps = 8 * (64 // args.batch)
    return steps * args.batch / epochs[-1]["seconds"]


def scaling(folder: Path, args) -> list[dict]:
    """Milliseconds a step as one size grows and the others stay."""
    base = dict(batch=args.batch, locations=37, subjects=64, K=1024)
    cases: list[dict] = []
    grown = {
        "batch": [8, 16, 32, 64],
        "locations": [37, PUBLISHED_LOCATIONS],
        "subjects": [64, 512],
        "K": [1024, 4096, 16384],
    }
    for what, values in grown.items():
        steps = {}
        for value in values:
            size = {**base, what: value}
            store = make_store(folder / f"{what}_{value}", size["locations"], size["subjects"])
            steps[value] = Step(store, size["batch"], size["K"], args.device, amp=False)
        jobs = {value: (lambda step=step: step.run(2)) for value, step in steps.items()}
        for value, times in in_turns(jobs, args.rounds).items():
            cases.append({"grown": what, "value": value, "ms_per_step": 1e3 * statistics.median(times) / 2})
        del steps, jobs
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 4
    for ranks in (1, 2, 4):
        if ranks <= gpus:
            rate = ranks_rate(folder / f"ranks_{ranks}", ranks, args)
            cases.append(
                {"grown": "ranks", "value": ranks, "ms_per_step": None if rate is None else 1e3 * args.batch / rate}
            )
    return cases


def rows_gpu(args, store_folder: Path, machine: dict) -> list[Row]:
    """The GPU's rows; marked unmeasured where there is none."""
    rows = [
        Row("training, one GPU, reading from a store and agc, batch 128, bf16", "samples/s", goal="10,000"),
        Row("features, one GPU, from the page cache, bf16", "subjects/s", goal="over 100"),
    ]
    if args.device.type != "cuda":
        for row in rows:
            row.note = "unmeasured: no GPU at hand"
        return rows
    store = make_store(store_folder, PUBLISHED_LOCATIONS, 512)
    step = Step(store, 128, 4096, args.device, amp=True, workers=min(16, os.cpu_count() or 1))
    times = in_turns({"ours": lambda: step.run(50)}, args.rounds)["ours"]
    rows[0].ours = 128 * 50 / statistics.median(times)
    rows[0].of_matrix_rate = STEP_GFLOP * rows[0].ours / machine["matrix_gflops_bf16"]
    encoder = Encoder(128, 128, 8, 1).to(args.device).eval()
    locations = torch.from_numpy(normalize_locations(store.locations)).to(args.device)

    @torch.inference_mode()
    def extract() -> None:
        for start in range(0, 32, TOGETHER):
            for index, frozen in enumerate(freeze(encoder, locations[start : start + TOGETHER], torch.bfloat16)):
                patches = torch.from_numpy(store.read(start + index, np.arange(512))).to(args.device)
                frozen(patches, to_input).cpu()

    times = in_turns({"ours": extract}, args.rounds)["ours"]
    rows[1].ours = 512 * 32 / PUBLISHED_LOCATIONS / statistics.median(times)
    return rows


# ============================================================ the table


def show(rows: list[Row]) -> str:
    """The rows as a Markdown table."""

    def number(value: float | None, unit: str) -> str:
        return "unmeasured" if value is None else f"{value:.3g} {unit}"

    lines = [
        "| what | here | literal | ratio (range) | of the matrix rate | goal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.1f} ({row.ratio_low:.1f} to {row.ratio_high:.1f})"
        share = "" if row.of_matrix_rate is None else f"{100 * row.of_matrix_rate:.0f} %"
        what = f"{row.what} ({row.note})" if row.note else row.what
        literal = "" if row.literal is None else number(row.literal, row.unit)
        lines.append(f"| {what} | {number(row.ours, row.unit)} | {literal} | {ratio} | {share} | {row.goal} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds, no scaling section")
    parser.add_argument("--json", help="write all figures here too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="timings of each job (default: 5, with --quick 2)")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda, but this machine has no usable GPU")
    args.device = torch.device("cuda" if gpu and args.device != "cpu" else "cpu")
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.steps = 2 if args.quick else 6
    args.reading_subjects = 64 if args.quick else 1024
    if args.batch < 2 or args.rounds < 1:
        parser.error("--batch is at least 2, --rounds at least 1")
    return args


def main() -> int:
    args = parse_arguments()
    if args.device.type == "cpu":
        keep_freed_memory()
    machine = {**describe(args.device), "fast_bf16": has_fast_bf16(args.device)}
    print(
        ", ".join(
            f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in machine.items()
        )
    )
    locations, K = (64, 512) if args.quick else (PUBLISHED_LOCATIONS, 4096)
    report: dict = {"machine": machine, "quick": args.quick}
    with tempfile.TemporaryDirectory(prefix="drasclr-benchmark-") as scratch:
        folder = Path(scratch)
        store = make_store(folder / "store", locations, 64 if args.quick else 256)
        apart = Apart(store, K, args)
        rows = rows_training(store, K, apart, args, machine, report)
        rows += rows_extraction(store, apart, args, machine)
        apart.close()
        rows += rows_augmentation(args)
        rows += rows_reading(folder / "reading", args)
        rows.append(row_memory(store, K, folder / "memory_run", args))
        rows += rows_gpu(args, folder / "gpu", machine)
        print(show(rows))
        print(f"\nfirst-step loss {report['first_step_loss']}")
        for name, parts in report["profile_ms"].items():
            listed = ", ".join(
                f"{part} {value:.1f}" for part, value in sorted(parts.items(), key=lambda item: -item[1])
            )
            print(f"profile of a step, ms, {name}: {listed}")
        if not args.quick:
            report["scaling"] = scaling(folder / "scaling", args)
            print("\n| grown | to | ms a step |\n| --- | --- | --- |")
            for case in report["scaling"]:
                value = "unmeasured" if case["ms_per_step"] is None else f"{case['ms_per_step']:.0f}"
                print(f"| {case['grown']} | {case['value']} | {value} |")
    report["rows"] = [asdict(row) for row in rows]
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
