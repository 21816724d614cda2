"""Defaults of training as a set; a flag that is given wins."""

import argparse
from collections.abc import Sequence
from typing import Any

from misc.command import OneOf, Parser

RECIPES: dict[str, dict[str, Any]] = {
    "published": {},  # the flags' own defaults
    # Some hundred subjects, minutes on a CPU: negatives as old as the key, and views that share most of a patch. No
    # neighbour task, which so few subjects do not learn: what neighbours share is the person and the scanner. A step
    # takes less than half the time so. Views that differ in sharpness and noise, for both say who was scanned how, and
    # would win the task without disease (README, Results; misc/results).
    "small": {
        "epochs": 10,
        "beta": 0.0,
        "k_neighbors": 1,
        "batch_size": 16,
        "lr": 0.3,
        "moco_k": 32,
        "moco_m": 0.9,
        "num_experts": 4,
        "augmentation": "asg",
        "noise_prob": 0.75,
        "translate": 3.0,
        "negatives": "batch",
        "bn_groups": 2,
    },
}


def add_recipe(parser: Parser, argv: Sequence[str] | None) -> None:
    """The flag --recipe, and its set as the parser's defaults."""
    small = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in RECIPES["small"].items())
    text = f"defaults as a set: published, for thousands of subjects; small, for under some 500: {small}"
    parser.add_argument("--recipe", type=OneOf(*RECIPES), default="published", help=text)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="published")
    parser.set_defaults(**RECIPES.get(first.parse_known_args(argv)[0].recipe, {}))
