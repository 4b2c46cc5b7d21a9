"""Runs mlx-lm's commands, and reads what mlx-fused says about them."""

import re
import sys

import mlx.core as mx

from mlx_fused.patching.report import TITLES

COMMAND = [sys.executable, "-c", "from mlx_fused.cli import main; main()"]
_PART = r"({}) in (\d+) of (\d+) calls"
TOKENS = mx.array([[1, 2, 3]])


def counts(err):
    """Of the closing line: by part, calls that ran fused and all calls, and what else it says."""
    *_, line = err.splitlines()
    rest, found = line.removeprefix("mlx-fused: ran fused: "), {}
    for part, title in TITLES.items():
        if match := re.search(_PART.format(title), rest):
            found[part] = int(match[2]), int(match[3])
            rest = rest.replace(match[0], "", 1)
    return found, re.sub("^(, )+", "", rest)


def all_fused(found, of_training=False):
    of_parts = found.keys() == TITLES.keys() - ({"experts"} if of_training else {"experts", "loss"})
    return of_parts and all(fused == total > 0 for fused, total in found.values())


def train(checkpoint, folder, *more):
    arguments = ["lora", "--model", checkpoint / "model-4bit", "--data", checkpoint / "data", "--train"]
    arguments += ["--iters", 2, "--num-layers", 2, "--batch-size", 1, "--val-batches", 1]
    return [str(argument) for argument in [*arguments, "--adapter-path", folder, *more]]
