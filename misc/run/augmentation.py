"""The letters of the transforms and the ranges that they draw from, with their flags. data/augment.py computes them."""

import argparse
from typing import NamedTuple

from misc.command import UserError, at_least, between
from misc.sizes import HU_MAX, HU_MIN

LETTERS = {
    "f": "flip",
    "a": "affine",
    "e": "elastic",
    "g": "Gaussian noise",
    "c": "contrast",
    "s": "smoothing",
    "i": "intensity shift",
    "b": "breath",
    "k": "reconstruction kernel",
    "t": "slice thickness",
}


class Ranges(NamedTuple):
    """What the transforms' parameters are drawn from; the defaults are the published ones."""

    rotate: float = 10.0  # degrees, about each axis, either way
    translate: float = 12.0  # voxels, along each axis, either way
    scale: float = 0.1  # about 1, on each axis, either way
    elastic: float = float(HU_MAX - HU_MIN)  # voxels before smoothing, largest; as published
    noise_prob: float = 0.25
    noise_std: float = 50.0  # HU, largest
    contrast_prob: float = 0.25
    gamma: tuple[float, float] = (0.5, 4.5)
    smooth: float = 2.0  # voxels, largest sigma; unpublished
    shift: float = 30.0  # HU, either way; unpublished
    breath: float = 0.2  # share of the volume, either way; unpublished
    kernel: float = 0.6  # share of the fine detail, added or taken; unpublished
    thickness: float = 1.0  # voxels, largest sigma along z; unpublished


PUBLISHED = Ranges()


def list_letters() -> str:
    """Every letter with its transform, for help and errors."""
    return ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())


def refuse_unknown_letters(letters: str) -> None:
    """Raise UserError if a letter has no transform."""
    unknown = sorted(set(letters) - set(LETTERS))
    if unknown:
        raise UserError(f"--augmentation {letters!r} has the unknown letter {unknown[0]!r}; known are {list_letters()}")


def add_augmentation_flags(group: argparse._ArgumentGroup) -> None:
    """--augmentation, and a flag for each range that a user may change."""

    def add(name: str, kind: object, text: str, **more: object) -> None:
        default = getattr(PUBLISHED, name)
        default = list(default) if isinstance(default, tuple) else default
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text, **more)

    group.add_argument(
        "--augmentation",
        default="agc",
        help=f"transforms in order: {list_letters()}; drop c if density itself matters",
    )
    amount = at_least(float, 0)
    add("rotate", amount, "degrees about each axis; lower it if pose matters")
    add("translate", amount, "voxels along each axis; lower it if views share too little: 12 is a third of a patch")
    add("scale", between(float, 0, 0.9), "zoom, a share either way; lower it if size matters")
    add("noise_std", amount, "HU, the largest of g; raise it for cohorts of many doses")
    add("noise_prob", between(float, 0, 1), "how often g is applied; raise it likewise")
    add("smooth", amount, "voxels, the largest sigma of s; raise it for thick slices")
    add("shift", amount, "HU, the largest of i, either way; raise it if breath differs much")
    add(
        "breath",
        between(float, 0, 0.9),
        "share of the lung's volume, the largest of b; raise it if breath differs much",
    )
    add("kernel", between(float, 0, 1), "share of fine detail that k adds or takes; raise it for many kernels")
    add("thickness", amount, "voxels, the largest sigma of t; raise it for thick slices")
    add("gamma", at_least(float, 0.01), "smallest and largest exponent of c; narrow it if density matters", nargs=2)


def ranges_of(args: argparse.Namespace) -> Ranges:
    """The ranges that the flags give."""
    return Ranges(**{name: value for name, value in vars(args).items() if name in Ranges._fields})
