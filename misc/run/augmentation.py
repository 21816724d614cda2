"""Letters, parameter ranges and flags of the augmentation transforms, which data/augment.py implements."""

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
    """Ranges from which the transforms draw their parameters. The defaults are the published values."""

    rotate: float = 10.0  # largest rotation about each axis, in degrees
    translate: float = 12.0  # largest shift along each axis, in voxels
    scale: float = 0.1  # zoom factor 1 ± scale on each axis
    elastic: float = float(HU_MAX - HU_MIN)  # largest offset before smoothing, in voxels; 1264 in the published code
    noise_prob: float = 0.25
    noise_std: float = 50.0  # largest standard deviation, HU
    contrast_prob: float = 0.25
    gamma: tuple[float, float] = (0.5, 4.5)
    smooth: float = 2.0  # largest sigma of the blur, in voxels; not in the published method
    shift: float = 30.0  # largest offset added to all voxels, in HU; not in the published method
    breath: float = 0.2  # lung volume changes by a factor of 1 ± breath; not in the published method
    kernel: float = 0.6  # largest fraction of fine detail to add or remove; not in the published method
    thickness: float = 1.0  # largest sigma of the blur along z, in voxels; not in the published method


PUBLISHED = Ranges()


def list_augmentation_letters() -> str:
    """List every letter with its transform, for help texts and error messages."""
    return ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())


def check_augmentation_letters(letters: str) -> None:
    """Raise UserError if a letter does not stand for a transform."""
    unknown = sorted(set(letters) - set(LETTERS))
    if unknown:
        raise UserError(
            f"--augmentation {letters!r}: unknown letter {unknown[0]!r}; "
            f"known letters are {list_augmentation_letters()}"
        )


def add_augmentation_flags(group: argparse._ArgumentGroup) -> None:
    """Add --augmentation and one flag for each range that users may change."""

    def add_range_flag(name: str, argument_type: object, help_text: str, **more: object) -> None:
        default = getattr(PUBLISHED, name)
        default = list(default) if isinstance(default, tuple) else default
        group.add_argument(f"--{name.replace('_', '-')}", type=argument_type, default=default, help=help_text, **more)

    group.add_argument(
        "--augmentation",
        default="agc",
        help=f"letters of the transforms, in the order applied: {list_augmentation_letters()}; "
        "omit c if density matters",
    )
    amount = at_least(float, 0)
    add_range_flag("rotate", amount, "largest rotation about each axis, degrees; lower it if orientation matters")
    add_range_flag(
        "translate",
        amount,
        "largest shift along each axis, voxels (a patch has 32); lower it to make the two views overlap more",
    )
    add_range_flag("scale", between(float, 0, 0.9), "largest relative change of size; lower it if size matters")
    add_range_flag("noise_std", amount, "largest standard deviation of the noise g, HU; raise it if doses vary widely")
    add_range_flag("noise_prob", between(float, 0, 1), "probability of the noise g; raise it if doses vary widely")
    add_range_flag("smooth", amount, "largest sigma of the smoothing s, voxels; raise it for thick slices")
    add_range_flag("shift", amount, "largest intensity shift of i, HU; raise it if breath-hold levels vary widely")
    add_range_flag(
        "breath",
        between(float, 0, 0.9),
        "largest relative change of lung volume by b; raise it if breath-hold levels vary widely",
    )
    add_range_flag(
        "kernel",
        between(float, 0, 1),
        "largest fraction of fine detail that k adds or removes; raise it if kernels vary",
    )
    add_range_flag("thickness", amount, "largest sigma of t along z, voxels; raise it for thick slices")
    add_range_flag(
        "gamma", at_least(float, 0.01), "smallest and largest exponent of c; narrow it if density matters", nargs=2
    )


def collect_ranges(args: argparse.Namespace) -> Ranges:
    """Collect the ranges of the augmentation from the parsed flags."""
    return Ranges(**{name: value for name, value in vars(args).items() if name in Ranges._fields})
