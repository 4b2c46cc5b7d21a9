"""Checks the environment variables that set how mlx-fused runs."""

import os

import click
import mlx.core as mx

import mlx_fused
from mlx_fused.patching.report import switched_off


def check() -> None:
    """Report invalid environment variables, which making a call (without evaluating it) finds."""
    one = mx.ones((1, 1, 1))
    try:
        switched_off()
        mlx_fused.fused_output_projection_residual(one, one[0], None, one, stream=mx.cpu)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def must_be_on(command: str) -> None:
    """Refuse ``MLX_FUSED=0`` where nothing would be left to do."""
    if switched_off():
        value = os.environ["MLX_FUSED"]
        raise click.UsageError(f"MLX_FUSED must be unset or on for {command} but is {value!r}.")
