"""``mlx-fused tune``: measures routes on this machine."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click
import mlx.core as mx

from mlx_fused import tuning
from mlx_fused.cli.calls import Sizes, kinds
from mlx_fused.cli.info import describe
from mlx_fused.cli.output import console, json_option, print_json
from mlx_fused.cli.settings import must_be_on
from mlx_fused.tuning import Kind, measure, table

EFFORT = measure.Effort()
_WEIGHTS = ("bfloat16", "4-bit", "4-bit + LoRA")


@click.command()
@click.argument("model", required=False)
@click.option(
    "--adapter-path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="LoRA adapters."
)
@click.option("--remove", is_flag=True, help="Remove what was measured, and use the built-in routes again.")
@json_option
def tune(model: str | None, adapter_path: Path | None, remove: bool, as_json: bool) -> None:
    """Measure which of MODEL's calls our kernels compute faster than MLX's operations on this machine.

    MODEL is a directory or a name on the hub; without it, Llama-3.2-1B's sizes. Its linear layers, those
    of attention, of MLPs, the head and any others, forward and backward, with and without adapters, with 1 to
    2048 tokens. From the next import of mlx_fused on they are routed by what was measured.
    """
    if remove:
        if model or adapter_path:
            raise click.UsageError("--remove takes no MODEL and no --adapter-path.")
        _remove()
        return
    if adapter_path and not model:
        raise click.UsageError("--adapter-path needs a MODEL.")
    must_be_on("tune")
    out = console(as_json)
    found = _of_model(model, adapter_path) if model else _of_llama()
    found = [kind for kind in found if measure.has_choice(kind)]
    if not found:
        raise click.UsageError(f"There are no kernels for {mx.default_device()}, so nothing is to be chosen.")
    with table.locked(tuning.path()):
        pass  # better here than after minutes: it can be written
    calls = _measure(out, found)
    table.write(tuning.path(), calls)
    _show(out, calls)
    out.print(f"Written: {tuning.path()}", soft_wrap=True)
    if as_json:
        print_json({"machine": describe(), "model": model, "calls": table.to_json(calls)})


def _remove() -> None:
    try:
        os.remove(tuning.path())
    except (FileNotFoundError, NotADirectoryError):
        click.echo(f"Nothing to remove: there is no {tuning.path()}")
    except OSError as error:
        raise click.ClickException(f"{tuning.path()} cannot be removed: {error.strerror}.") from error
    else:
        click.echo(f"Removed: {tuning.path()}")


def _of_llama() -> list[Kind]:
    forward = [k for weights in _WEIGHTS for k in kinds(Sizes(), weights).values() if not k.gradient]
    return [kind for one in dict.fromkeys(forward) for kind in measure.with_gradients(one)]


def _of_model(model: str, adapter_path: Path | None) -> list[Kind]:
    from mlx_fused.tuning.calls import kinds_of
    from mlx_fused.validate import CannotValidate, load

    try:
        return kinds_of(load(model, adapter_path, lazy=True)[0])
    except CannotValidate as error:
        raise click.BadParameter(str(error), param_hint="MODEL") from error


def _measure(out, kinds: list[Kind]) -> table.Calls:
    from rich.progress import Progress

    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("Measuring", total=len(kinds) * len(measure.ROWS))
        on_rows = partial(progress.advance, task)
        return {kind: measure.measure(kind, measure.ROWS, EFFORT, on_rows) for kind in kinds}


def _show(out, calls: table.Calls) -> None:
    from rich import box
    from rich.table import Table

    # No padding, so that a terminal of 80 columns has room for all.
    caption = "speedup of our kernels over MLX's operations"
    shown = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption)
    shown.add_column("tokens", no_wrap=True)
    for m in measure.ROWS:
        shown.add_column(str(m), justify="right", no_wrap=True)
    for n, timings in enumerate(calls.values(), 1):
        shown.add_row(f"[{n}]", *(_speedup(timings.get(m)) for m in measure.ROWS))
    out.print(shown)
    for n, kind in enumerate(calls, 1):
        out.print(f"[{n}] {kind}", soft_wrap=True, markup=False, highlight=False)


def _speedup(timing: table.Timing | None) -> str:
    if timing is None:
        return ""
    speedup = timing.composed / timing.fused
    return f"{speedup:.2f}" if speedup < 10 else f"{speedup:.0f}"
