"""Recipes: sets of training defaults. A flag on the command line overrides the recipe's value."""

import argparse
from collections.abc import Sequence
from typing import Any

from misc.command import OneOf, Parser

RECIPES: dict[str, dict[str, Any]] = {
    "published": {},  # the flags' own defaults
    # This recipe is for about a hundred subjects and for training in minutes on a CPU.
    # The negatives are keys of the same step, and the two views show mostly the same part of a patch.
    # The neighbour task is off, because a network does not learn this task from about a hundred subjects.
    # Neighbouring patches have little in common except the subject and the scanner.
    # Without the neighbour task, a training step takes less than half as long.
    # The augmentation varies sharpness and noise, because these would otherwise reveal the scanner settings.
    # A network that recognises the scanner settings could solve the patch task without learning about disease.
    # The measurements behind these settings are in README.md (Results) and misc/results.
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


def add_recipe_flag(parser: Parser, argv: Sequence[str] | None) -> None:
    """Add the flag --recipe, and make the settings of the chosen recipe the parser's defaults."""
    small = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in RECIPES["small"].items())
    text = f"set of defaults: published suits thousands of subjects; small suits fewer than about 500 and sets {small}"
    parser.add_argument("--recipe", type=OneOf(*RECIPES), default="published", help=text)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="published")
    parser.set_defaults(**RECIPES.get(first.parse_known_args(argv)[0].recipe, {}))
