"""Times our kernels against MLX's own operations on every kind of call that ``routing`` decides about."""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import click
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.progress import track

import machine
import mlx_fused
from bench import DTYPES, LLAMA, TINY, chain_length
from cases import Model
from contenders import chain
from report import make_table
from timing import FULL, QUICK, Effort, measure

ROWS = (1, 2, 4, 8, 9, 16, 32, 64, 128, 512, 2048)
OPERATIONS = ("qkv", "qkv + bias", "output", "output + bias", "qkv gradients")
EVEN = 0.03  # closer than this, neither route is the faster


def call(model: Model, operation: str, rows: int, dtype: mx.Dtype) -> tuple[Callable, list[mx.array]]:
    """Returns a function of operands and a route, and the operands."""
    features = [n * model.head_dim for n in model.heads]
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    x, weights = (1, rows, model.hidden), [(n, model.hidden) for n in features]
    biases = [(n,) for n in features]

    def qkv(x: mx.array, *p: mx.array, route: str | None) -> Sequence[mx.array]:
        return mlx_fused.fused_qkv_projection(x, p[:3], p[3:] or None, *heads, route=route)

    def output(*p: mx.array, route: str | None) -> Sequence[mx.array]:
        x, residual, w, bias = p if len(p) == 4 else (*p, None)
        return [mlx_fused.fused_output_projection_residual(x, w, bias, residual, route=route)]

    def qkv_grad(*p: mx.array, route: str | None) -> Sequence[mx.array]:
        d_x, d_weight, _ = mlx_fused.fused_qkv_projection_bwd(*p[:4], p[4:], False, *heads, route=route)
        return [d_x, *d_weight]

    y, w = (1, rows, features[0]), (model.hidden, features[0])
    function, shapes = {
        "qkv": (qkv, [x, *weights]),
        "qkv + bias": (qkv, [x, *weights, *biases]),
        "output": (output, [y, x, w]),
        "output + bias": (output, [y, x, w, (model.hidden,)]),
        "qkv gradients": (qkv_grad, [*((1, n, rows, model.head_dim) for n in model.heads), x, *weights]),
    }[operation]
    operands = [mx.random.normal(shape).astype(dtype) for shape in shapes]
    mx.eval(operands)
    return function, operands


def routed(function: Callable, operands: list[mx.array]) -> str:
    """The route that a user gets, told from the graph."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *function(*operands, route=None))
    return "fused" if "Fused" in graph.getvalue() else "composed"


def by_route(route: str, function: Callable, *operands: mx.array) -> Sequence[mx.array]:
    """A call as `routing` would have it made, which in the composed form adds biases in its products."""
    with mock.patch.dict(os.environ, MLX_FUSED_ROUTE=route):
        return function(*operands, route=None)


def compare(model: Model, operation: str, dtype: str, rows: int, effort: Effort) -> dict[str, object]:
    """Times both routes of one call; returns its record."""
    function, operands = call(model, operation, rows, getattr(mx, dtype))
    length = chain_length(rows)
    calls = {
        r: partial(chain, partial(by_route, r, function), operands, length) for r in ("fused", "composed")
    }
    for warm in calls.values():
        warm()
    seconds = {r: float(np.median(s)) / length for r, s in measure(calls, effort).items()}
    return record(operation, dtype, rows, seconds, routed(function, operands))


def record(operation: str, dtype: str, rows: int, seconds: dict[str, float], choice: str) -> dict:
    """Says which route is the faster, and whether it is the one that routing chooses."""
    speedup = seconds["composed"] / seconds["fused"]
    faster = "even" if abs(np.log(speedup)) < np.log1p(EVEN) else "fused" if speedup > 1 else "composed"
    return {
        "operation": operation,
        "dtype": dtype,
        "rows": rows,
        "seconds": seconds,
        "speedup": speedup,
        "faster": faster,
        "routed": choice,
        "routed_well": faster in ("even", choice),
    }


def show(console: Console, cells: list[dict]) -> None:
    """Prints a table of speedups per dtype, and every call that is routed to the slower of the two."""
    for dtype in dict.fromkeys(c["dtype"] for c in cells):
        table = make_table(f"Speedup of our kernels over MLX's operations · {dtype}")
        found = {(c["operation"], c["rows"]): _verdict(c) for c in cells if c["dtype"] == dtype}
        operations = list(dict.fromkeys(operation for operation, _ in found))
        for column in ("M", *operations):
            table.add_column(column, justify="right")
        for rows in dict.fromkeys(rows for _, rows in found):
            table.add_row(str(rows), *(found[operation, rows] for operation in operations))
        console.print(table)
    wrong = [c for c in cells if not c["routed_well"]]
    console.print("(c): routed to MLX's operations. !: routed to the slower of the two.", highlight=False)
    console.print(f"Routed to the slower: {len(wrong)} of {len(cells)}")
    for c in wrong:
        by = max(c["speedup"], 1 / c["speedup"])
        console.print(f"  {c['operation']} {c['dtype']} M = {c['rows']}: {c['faster']} is {by:.2f}x as fast")


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
    model, effort = (TINY, QUICK) if quick else (LLAMA, replace(FULL, cell=1, turn=0.05, pause=0))
    cases = [
        (operation, dtype, m)
        for operation in OPERATIONS
        for dtype in dtypes or DTYPES
        for m in sorted(rows) or ROWS
    ]
    console = Console()
    progress = track(cases, "Measuring", console=console, transient=True)
    cells = [compare(model, *case, effort) for case in progress]
    out.mkdir(parents=True, exist_ok=True)
    result = {"model": model.name, "machine": machine.describe(device), "cells": cells}
    (out / "crossover.json").write_text(json.dumps(result, indent=1))
    show(console, cells)
    about = result["machine"]
    console.print(f"{model.name}, {about['cpu']}, device {device}, {about['date']}", highlight=False)
    console.print(f"\nWritten: {out / 'crossover.json'}")


if __name__ == "__main__":
    main()
