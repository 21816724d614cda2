"""Read damaged copies of a file in a separate process. A crash, a hang or a large allocation affects only this process.

    python tests/fuzz_files.py KIND FILE SEED COUNT

The script prints every exception that is not one of this project's errors. Memory is limited to what a small file
needs.
"""

import random
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EXTREMES = (b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"99999999", b"-1", b"\x00\x00\xc0\x7f")
MEMORY = 3 << 30  # limit in bytes on the address space, in addition to what the libraries use


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change, delete or insert a few bytes of a file, or cut off its end."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        # A file starts with its header, so most changes are made at the start.
        place = min(int(rng.expovariate(1 / 200)), len(data)) if rng.random() < 0.7 else rng.randrange(len(data) + 1)
        change = rng.choice(("flip", "extreme", "cut", "delete", "insert", "repeat"))
        if change == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif change == "extreme":
            value = rng.choice(EXTREMES)
            data[place : place + len(value)] = value
        elif change == "cut" and rng.random() < 0.3:
            del data[place:]
        elif change == "delete":
            del data[place : place + rng.randint(1, 8)]
        elif change == "insert":
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        elif change == "repeat":
            data[place:place] = data[place : place + rng.randint(1, 64)]
    return bytes(data)


def readers() -> dict:
    """Return, for each kind of file, the function that the commands use to read such files."""
    from data.layout import load_locations
    from data.tables import read_table
    from misc.experiment import Experiment
    from models.checkpoint import build_query_encoder, find_epoch_and_step, read_checkpoint, verify_checkpoint
    from models.cnn3d import Encoder
    from preprocess.atlas import read_affine
    from preprocess.scan import load_scan, read_mask

    def checkpoint(path):
        verify_checkpoint(path)
        content = read_checkpoint(path)
        find_epoch_and_step(content, path)
        build_query_encoder(Encoder, content, path)

    def slices(path):
        load_scan(path.parent)

    return {
        "checkpoint": checkpoint,
        "configs": lambda path: Experiment(path.parent).read_config(),
        "table": read_table,
        "locations": load_locations,
        "transform": read_affine,
        "image": load_scan,
        "mask": read_mask,
        "dicom": slices,
    }


def read_damaged_copies(kind: str, source: Path, seed: int, count: int) -> None:
    """Read ``count`` damaged versions of a file; print every outcome except success and ``UserError``."""
    from misc.command import UserError

    read, rng = readers()[kind], random.Random(seed)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, resource.RLIM_INFINITY))
    content = source.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "in"
        if kind == "dicom":
            shutil.copytree(source.parent, place)
        place.mkdir(exist_ok=True)
        target = place / source.name
        for number in range(count):
            target.write_bytes(damage(content, rng))
            # After a crash, the last printed file is the one that caused the crash.
            print(f"{source.name} {number} {target.stat().st_size}", file=sys.stderr, flush=True)
            try:
                read(target)
            except UserError as error:
                if not str(error).strip() or len(str(error).splitlines()) > 3:
                    print(f"{source.name} {number}: says {str(error)!r}")
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__} {str(error)[:200]!r} ({where.filename}, line {where.lineno})"
                print(f"{source.name} {number}: {what}")
            if {path.name for path in Path(folder).iterdir()} != {"in"}:
                print(f"{source.name} {number}: wrote outside")


def main() -> None:
    from preprocess.scan import limit_threads

    limit_threads(1)
    seed, count, *files = sys.argv[1:]
    for kind, source in zip(files[::2], files[1::2], strict=True):
        read_damaged_copies(kind, Path(source), int(seed), int(count))


if __name__ == "__main__":
    main()
