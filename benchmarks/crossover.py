"""Times our kernels against MLX's own operations on every kind of call that ``routing`` decides about."""

import json
import os
from pathlib import Path

os.environ["MLX_FUSED_CACHE"] = os.devnull  # what is judged is the built-in table, not one measured here

import click
import mlx.core as mx
from rich.console import Console
from rich.progress import track

import machine
from bench import DTYPES, LLAMA, TINY
from cases import BITS, GROUP_SIZE, RANK, Model
from mlx_fused.tuning import Kind
from mlx_fused.tuning.measure import (
    QUICK,
    ROWS,
    Effort,
    has_choice,
    measure,
    route_of,
    with_gradients,
)
from mlx_fused.tuning.table import Timing
from report import make_table

# Quantized, bias, rank of the adapters.
FORMS = ((False, False, 0), (False, True, 0), (True, False, 0), (False, False, RANK), (True, False, RANK))


def kinds(model: Model, dtype: str) -> list[Kind]:
    """Every kind of calls of an attention block, and their gradients."""
    heads = tuple(n * model.head_dim for n in model.heads)
    shapes = (model.hidden, heads), (heads[0], (model.hidden,))
    forward = [
        Kind(
            gradient=False,
            of_weights=False,
            dtype=getattr(mx, dtype),
            format=("affine", BITS, GROUP_SIZE) if quantized else None,
            bias=bias,
            in_features=in_features,
            features=features,
            ranks=(rank,) * len(features),
        )
        for in_features, features in shapes
        for quantized, bias, rank in FORMS
    ]
    return [kind for one in forward for kind in with_gradients(one)]


def record(kind: Kind, rows: int, timing: Timing, choice: str) -> dict[str, object]:
    """Says which route is the faster, and whether it is the one that routing chooses."""
    faster = timing.route or "even"
    return {
        "call": str(kind),
        "dtype": str(kind.dtype).removeprefix("mlx.core."),
        "rows": rows,
        "seconds": {"fused": timing.fused, "composed": timing.composed},
        "speedup": timing.composed / timing.fused,
        "faster": faster,
        "routed": choice,
        "routed_well": faster in ("even", choice),
    }


def show(console: Console, cells: list[dict]) -> None:
    """Prints a table of speedups per dtype, and every call that is routed to the slower of the two."""
    for dtype in dict.fromkeys(c["dtype"] for c in cells):
        table = make_table(f"Speedup of our kernels over MLX's operations · {dtype}")
        found = {(c["call"], c["rows"]): _verdict(c) for c in cells if c["dtype"] == dtype}
        columns = sorted({rows for _, rows in found})
        table.add_column("M", overflow="fold")
        for rows in columns:
            table.add_column(str(rows), justify="right", no_wrap=True)
        for call in dict.fromkeys(call for call, _ in found):
            table.add_row(call, *(found.get((call, rows), "") for rows in columns))
        console.print(table)
    wrong = [c for c in cells if not c["routed_well"]]
    console.print("(c): routed to MLX's operations. !: routed to the slower of the two.", highlight=False)
    console.print(f"Routed to the slower: {len(wrong)} of {len(cells)}")
    for c in wrong:
        by = max(c["speedup"], 1 / c["speedup"])
        line = f"  {c['call']}, M = {c['rows']}: {c['faster']} is {by:.2f}x as fast"
        console.print(line, soft_wrap=True, highlight=False)


def _verdict(cell: dict) -> str:
    text = f"{cell['speedup']:.2f}" + (" (c)" if cell["routed"] == "composed" else "")
    return text if cell["routed_well"] else f"[red]{text} ![/red]"


@click.command()
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Repeatable. Default: all.")
@click.option("--rows", multiple=True, type=click.IntRange(1), help="A number of rows M; repeatable.")
@click.option("--quick", is_flag=True, help="Tiny shapes and few rounds: a check that everything runs.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="benchmarks/results",
    show_default=True,
    help="Folder for the JSON.",
)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="Default: MLX's default device.")
def main(dtypes: tuple, rows: tuple, quick: bool, out: Path, device: str | None) -> None:
    """Time both routes of every call, to correct routing.cpp's table from."""
    if device:
        mx.set_default_device(mx.Device(getattr(mx, device)))
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    model, effort = (TINY, QUICK) if quick else (LLAMA, Effort())
    chosen = [kind for dtype in dtypes or DTYPES for kind in kinds(model, dtype) if has_choice(kind)]
    console = Console()
    cells = [
        record(kind, m, timing, route_of(kind, m))
        for kind in track(chosen, "Measuring", console=console, transient=True)
        for m, timing in measure(kind, sorted(rows) or ROWS, effort).items()
    ]
    out.mkdir(parents=True, exist_ok=True)
    result = {"model": model.name, "machine": machine.describe(device), "cells": cells}
    (out / "crossover.json").write_text(json.dumps(result, indent=1))
    show(console, cells)
    about = result["machine"]
    console.print(f"{model.name}, {about['cpu']}, device {device}, {about['date']}", highlight=False)
    console.print(f"\nWritten: {out / 'crossover.json'}")


if __name__ == "__main__":
    main()
