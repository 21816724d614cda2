"""Kill jobs at random moments, restart them, and compare the results with an undisturbed run, bit for bit.

    python tools/dev/soak.py --work-dir soak --trials 20

The jobs are training on one rank, training on two ranks, each stage of preprocessing, grouping of patches, and feature
extraction. Each job runs once undisturbed. Each trial starts the job in a new folder and sends a random signal to one
or all of its processes at a random moment, once or twice. After the signals, the trial restarts the job until the job
ends by itself. The results must be identical to those of the undisturbed run, and no process may remain. Twenty
trials of each job take at least an hour on two cores.

The script prints one line per job. The exit status is 1 if a trial failed. <work-dir>/trials.csv lists every trial with
its result. Run the same command again to resume after the finished trials. Folders of failed trials are not deleted.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from misc.command import Parser, UserError, at_least, run
from misc.progress import add_progress_flag, progress_bar

ROOT = Path(__file__).resolve().parents[2]
# SIGKILL is drawn twice as often as the other signals, because no process can catch SIGKILL.
SIGNALS = ("KILL", "KILL", "TERM", "INT", "USR1", "HUP")
TRAINING = (
    *("--epochs", "2", "--batch-size", "4", "--moco-k", "8", "--rep-dim", "8", "--moco-dim", "4", "--num-experts", "2"),
    *("--print-freq", "3", "--workers", "1", "--device", "cpu", "--save-minutes", "0.02", "--no-progress"),
)
TIME_LIMIT = 300.0  # seconds per start
LINGER = 20.0  # all other processes of a job must end within this many seconds after the main process
STARTS = 8  # maximum number of starts per trial, including the undisturbed last start


class Job(NamedTuple):
    """A command that the soak test starts and interrupts with signals.

    Attributes:
        command: command line, run in the folder of the trial.
        needs: parts of the prepared folder that the job reads.
        made: function that returns a fingerprint of each result in a folder, by the result's name.
    """

    command: tuple[str, ...]
    needs: tuple[str, ...]
    made: Callable[[Path], dict[str, str]]


# ============================================================ comparing


def make_fingerprint_function(*patterns: str) -> Callable[[Path], dict[str, str]]:
    """Return a function that computes fingerprints of the files that match the patterns."""

    def compute_fingerprints(folder: Path) -> dict[str, str]:
        paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    return compute_fingerprints


def fingerprint_training(folder: Path) -> dict[str, str]:
    """Compute fingerprints of each epoch's weights, queue, optimiser and random state, and of the log's entries."""
    import torch

    made = {}
    for path in sorted(folder.glob("ssl_exp/run/checkpoint_patch_[0-9]*.pth.tar")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        digest = hashlib.sha256()
        for name, tensor in sorted(content["state_dict"].items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        for _, entry in sorted(content["optimizer"]["state"].items()):
            digest.update(entry["momentum_buffer"].numpy().tobytes())
        made[path.name] = digest.hexdigest() + hashlib.sha256(content["rng_state"].numpy().tobytes()).hexdigest()
    log = folder / "ssl_exp" / "run" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    told = [[line[name] for name in ("kind", "epoch", "step", "loss") if name in line] for line in lines]
    made["log.jsonl"] = hashlib.sha256(
        json.dumps([line for line in told if line[0] in ("step", "epoch")]).encode()
    ).hexdigest()
    return made


# ============================================================ jobs


def list_jobs() -> dict[str, Job]:
    """Return all jobs in the order of the pipeline, from scans to features."""
    python, store = sys.executable, ("--root-dir", "store")
    scans = ("--input-csv", "cohort/dataset.csv", "--num-workers", "2", "--no-progress")
    atlas = ("--atlas-mask", "cohort/atlas_lung_mask.nii.gz")

    def make_command(name: str, *flags: str) -> tuple[str, ...]:
        return (python, str(ROOT / name), *flags)

    masks, transforms = "store/lung_mask", "store/transform"
    laid, cut = "store/atlas_patch_loc.npy", ("store/patch", "store/patch_loc")
    train = ("--root-dir", "store", "--exp-name", "run", "--resume", "auto", *TRAINING)
    grouped = (laid, "store/grouped_patch", "store/subjects.csv")
    segment = make_command("preprocess/segment_lung.py", *scans, *store, "--method", "threshold")
    launch = make_command("tools/launch.py", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *train)
    extract = ("--exp-name", "trained", "--checkpoint-patch", "checkpoint_patch_0002.pth.tar", *store)
    return {
        "segment_lung": Job(segment, ("cohort",), make_fingerprint_function("store/lung_mask/*")),
        "register": Job(
            make_command("preprocess/register.py", *scans, *store, *atlas),
            ("cohort", masks),
            make_fingerprint_function("store/transform/*"),
        ),
        "patchify_images": Job(
            make_command("preprocess/patchify_images.py", *scans, *store, *atlas),
            ("cohort", masks, transforms, laid),
            make_fingerprint_function("store/patch/*", "store/patch_loc/*", "store/qc/*.png"),
        ),
        "run_preprocess": Job(
            make_command("preprocess/run_preprocess.py", *scans, *store, *atlas, "--method", "threshold"),
            ("cohort",),
            make_fingerprint_function(
                "store/*/*.npy", "store/*.npy", "store/lung_mask/*", "store/transform/*", "store/subjects.csv"
            ),
        ),
        "group_patches": Job(
            make_command("preprocess/group_patches.py", *store, "--no-progress"),
            (laid, *cut),
            make_fingerprint_function("store/grouped_patch/*.npy", "store/subjects.csv"),
        ),
        "train, 1 rank": Job(make_command("train.py", *train), grouped, fingerprint_training),
        "train, 2 ranks": Job(launch, grouped, fingerprint_training),
        "extract_feature": Job(
            make_command("extract_feature.py", *extract, "--device", "cpu", "--no-progress", "--out-dir", "features"),
            (*grouped, "trained"),
            make_fingerprint_function("features/*.npy", "features/*.csv"),
        ),
    }


def make_store_and_trained_experiment(folder: Path, subjects: int) -> None:
    """Without sending any signals, make the inputs of the jobs: a cohort, its store and a trained experiment."""
    if (folder / "trained").is_dir():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make = (str(ROOT / "tools/make_cohort.py"), "--out-dir", "cohort", "--num-subjects", str(subjects), "--no-progress")
    every = list_jobs()
    for command in (
        (sys.executable, *make, "--num-workers", "2"),
        every["run_preprocess"].command,
        every["train, 1 rank"].command,
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise UserError(
                f"{Path(command[1]).name} failed with exit status {done.returncode} while the inputs were prepared: "
                f"{done.stderr[-400:]}"
            )
    shutil.move(folder / "ssl_exp" / "run", folder / "trained")


def copy_inputs(prepared: Path, folder: Path, needs: tuple[str, ...]) -> None:
    """Copy the inputs of a job to a new folder. Preserve modification times, because jobs compare these times."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in needs:
        source, target = prepared / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)


# ============================================================ killing


def list_running_session_processes(session_id: int) -> list:
    """Return the processes of a session that are still running."""
    import psutil

    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == session_id and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def start_job(job: Job, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = open(folder / "output.txt", "ab")  # noqa: SIM115 (the started process writes to this file)
    with log:
        return subprocess.Popen(
            job.command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def send_random_signal_after_delay(process: subprocess.Popen, rng: random.Random, delay_seconds: float) -> str:
    """Send a signal after ``delay_seconds`` seconds if the process still runs.

    Return the name of the signal and its targets, or ``""`` if the process has already ended.
    """
    try:
        process.wait(delay_seconds)
        return ""
    except subprocess.TimeoutExpired:
        pass
    name, there = rng.choice(SIGNALS), list_running_session_processes(process.pid)
    target = rng.choice(("main", "any", "all"))
    chosen = {
        "main": [p for p in there if p.pid == process.pid],
        "any": [rng.choice(there)] if there else [],
        "all": there,
    }
    for one in chosen[target]:
        try:
            os.kill(one.pid, getattr(signal, f"SIG{name}"))
        except ProcessLookupError:
            continue
    return f"{name} to {target} after {delay_seconds:.1f} s"


def wait_until_ended(process: subprocess.Popen) -> str:
    """Wait for the end of all processes of a job, and kill those that do not end. Return an error text, or ``""``."""
    try:
        process.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        wrong = f"did not end within {TIME_LIMIT:.0f} s"
    else:
        until = time.monotonic() + LINGER
        while (there := list_running_session_processes(process.pid)) and time.monotonic() < until:
            time.sleep(0.2)
        wrong = f"left {len(there)} processes" if there else ""
    for one in list_running_session_processes(process.pid):
        one.kill()
    process.wait()
    return wrong


def run_interrupted_job_and_compare(
    job: Job, folder: Path, expected_fingerprints: dict[str, str], max_delay_seconds: float, rng: random.Random
) -> tuple[list[str], str]:
    """Run one trial. Return the signals that were sent, and what is wrong with the result (``""`` if correct)."""
    sent = []
    for number in range(STARTS):
        process = start_job(job, folder)
        kills = number < rng.choice((1, 2))
        if kills and (text := send_random_signal_after_delay(process, rng, rng.uniform(0.0, max_delay_seconds))):
            sent.append(text)
        if wrong := wait_until_ended(process):
            return sent, wrong
        if process.returncode == 0:
            break
    else:
        return sent, f"did not finish within {STARTS} starts"
    found = job.made(folder)
    lacking, more = sorted(set(expected_fingerprints) - set(found)), sorted(set(found) - set(expected_fingerprints))
    other = sorted(
        name for name in set(expected_fingerprints) & set(found) if expected_fingerprints[name] != found[name]
    )
    for names, words in ((lacking, "lacks"), (more, "also has"), (other, "differs in")):
        if names:
            return sent, f"{words} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return sent, ""


# ============================================================ the command


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--work-dir", required=True, help="working folder; use the same folder to resume")
    add("--trials", type=at_least(int, 1), default=20, help="number of trials per job; more trials find rarer faults")
    add("--jobs", nargs="+", default=list(list_jobs()), metavar="JOB", help=f"jobs to run: {', '.join(list_jobs())}")
    add(
        "--num-subjects",
        type=at_least(int, 4),
        default=5,
        help="size of the synthetic cohort; larger cohorts take longer",
    )
    add("--seed", type=at_least(int, 0), default=0, help="random seed that decides when and how jobs are killed")
    add_progress_flag(parser)
    args = parser.parse_args()
    unknown = [name for name in args.jobs if name not in list_jobs()]
    if unknown:
        parser.error(f"--jobs {unknown[0]!r} is not a job; choose from {', '.join(list_jobs())}")
    return args


def read_trials(path: Path) -> dict[tuple[str, int], dict[str, str]]:
    """Read the rows of trials.csv, by job and trial number."""
    if not path.is_file():
        return {}
    with open(path, newline="") as stream:
        return {(row["job"], int(row["trial"])): row for row in csv.DictReader(stream)}


def run_trials(work: Path, name: str, job: Job, args: argparse.Namespace, done: dict) -> Iterator[dict[str, str]]:
    """Run the missing trials of a job and yield their rows."""
    missing = [number for number in range(args.trials) if (name, number) not in done]
    if not missing:
        return
    prepared, plain = work / "prepared", work / "undisturbed" / name.replace(", ", "-").replace(" ", "-")
    copy_inputs(prepared, plain, job.needs)
    began = time.monotonic()
    process = start_job(job, plain)
    if wait_until_ended(process) or process.returncode:
        raise UserError(
            f"{name} failed with exit status {process.returncode} in a run without interruptions; "
            f"see {plain / 'output.txt'}"
        )
    seconds, wanted = time.monotonic() - began, job.made(plain)
    for number in missing:
        rng, folder = random.Random(f"{args.seed} {name} {number}"), work / "trials" / f"{plain.name}-{number}"
        copy_inputs(prepared, folder, job.needs)
        began = time.monotonic()
        sent, wrong = run_interrupted_job_and_compare(job, folder, wanted, seconds, rng)
        if not wrong:
            shutil.rmtree(folder)
        took = f"{time.monotonic() - began:.1f}"
        yield {"job": name, "trial": str(number), "seconds": took, "sent": "; ".join(sent), "wrong": wrong}


def main() -> int:
    args = parse_arguments()
    work = Path(args.work_dir).resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_store_and_trained_experiment(work / "prepared", args.num_subjects)
    path = work / "trials.csv"
    done, every = read_trials(path), list_jobs()
    columns = ("job", "trial", "seconds", "sent", "wrong")
    with (
        open(path, "a", newline="") as stream,
        progress_bar(args.no_progress, total=args.trials * len(args.jobs), desc="soak", unit="trial") as bar,
    ):
        table = csv.DictWriter(stream, columns)
        if not done:
            table.writeheader()
        bar.update(sum(key[0] in args.jobs and key[1] < args.trials for key in done))
        for name in args.jobs:
            for row in run_trials(work, name, every[name], args, done):
                done[name, int(row["trial"])] = row
                table.writerow(row)
                stream.flush()
                bar.update()
    print("| job | trials | signals sent | as undisturbed | minutes |\n| --- | --- | --- | --- | --- |")
    wrong = []
    for name in args.jobs:
        rows = [done[name, number] for number in range(args.trials)]
        wrong += [row for row in rows if row["wrong"]]
        signals = sum(bool(text) for row in rows for text in row["sent"].split("; "))
        minutes = sum(float(row["seconds"]) for row in rows) / 60
        print(f"| {name} | {len(rows)} | {signals} | {sum(not row['wrong'] for row in rows)} | {minutes:.1f} |")
    for row in wrong:
        print(f"{row['job']}, trial {row['trial']} ({row['sent']}): {row['wrong']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
