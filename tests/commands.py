"""Runs mlx-lm's commands, and reads what mlx-fused says about them."""

import re
import sys

import mlx.core as mx

COMMAND = [sys.executable, "-c", "from mlx_fused.cli import main; main()"]
CLOSING = re.compile(
    r"mlx-fused: ran fused: the QKV projection in (\d+) of (\d+) calls(.*), "
    r"the output projection with its residual in (\d+) of (\d+) calls(.*)"
)
TOKENS = mx.array([[1, 2, 3]])


def counts(err):
    """Of the closing line: calls that ran fused and all calls, of both parts, and what else it says."""
    *_, line = err.splitlines()
    fused_qkv, qkv, of_qkv, fused_residual, residual, rest = CLOSING.fullmatch(line).groups()
    return (int(fused_qkv), int(qkv)), (int(fused_residual), int(residual)), of_qkv + rest


def train(checkpoint, folder, *more):
    arguments = ["lora", "--model", checkpoint / "model-4bit", "--data", checkpoint / "data", "--train"]
    arguments += ["--iters", 2, "--num-layers", 2, "--batch-size", 1, "--val-batches", 1]
    return [str(argument) for argument in [*arguments, "--adapter-path", folder, *more]]
