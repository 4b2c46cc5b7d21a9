"""Times the fused projections against MLX's own operations and torch: ``make bench``."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.progress import track

import machine
import report
from cases import Case, Model, operands
from contenders import contenders
from reference import WrongResult, reference, verify
from timing import FULL, QUICK, Effort, first_call, measure

# A quarter of its vocabulary: time, and the reference's memory, grow with that alone.
LLAMA = Model("Llama-3.2-1B", 2048, 32, 8, head_dim=64, intermediate=8192, vocabulary=32064)
TINY = Model("tiny", 64, 4, 2, head_dim=16, intermediate=96, vocabulary=160)
DTYPES = ("float32", "bfloat16", "float16")
GRADIENT_ROWS = 128
HEAD_ROWS = 32

# The speedups over the composed form that the CPU backend aims for with LLAMA, by dtype and rows.
FORWARD_GOALS = {
    "float32": {1: 5, 32: 25, 128: 45, 512: 60},
    "bfloat16": {1: 6, 32: 20, 128: 30, 512: 40},
    "float16": {1: 8, 32: 20, 128: 20, 512: 25},
}
GRADIENT_GOALS = {"float32": 15, "bfloat16": 12}
QUANTIZED_GOALS = {
    "float32": {1: 15, 128: 20},
    "bfloat16": {1: 80, 128: 20},
    "float16": {1: 80, 128: 20},
}


def goal(case: Case) -> int | None:
    """Returns the speedup over the composed form that this case aims for, if there is one."""
    if case.model != LLAMA or mx.default_device() != mx.cpu or case.lora or case.op not in ("qkv", "output"):
        return None
    if case.quantized:
        return None if case.backward else QUANTIZED_GOALS[case.dtype].get(case.rows)
    if not case.backward:
        return FORWARD_GOALS[case.dtype].get(case.rows)
    return GRADIENT_GOALS.get(case.dtype) if case.rows == GRADIENT_ROWS else None


def chain_length(rows: int) -> int:
    """Calls to evaluate together on a GPU, where one alone may take less time than its evaluation."""
    return max(1, min(32, 4096 // rows))


def cases(model: Model, dtypes: tuple, rows: tuple, gradient_rows: tuple) -> list[Case]:
    """Every cell; rows ascend, for the pace of fewer tells what more would take."""
    pairs = [(m, b) for b in (False, True) for m in sorted(rows) if not b or m in gradient_rows]
    adapted = [(op, quantized) for quantized in (False, True) for op in ("qkv", "output", "gated")]
    kinds = [*adapted, ("head", False), ("head", True), ("norm", False)]
    found = [
        Case(model, op, dtype, m, b, quantized)
        for op, quantized in kinds
        for dtype in dtypes or DTYPES
        for m, b in pairs
        if op != "head" or (m <= HEAD_ROWS and not b)
    ]
    if find_spec("mlx_lm") is None:
        return found
    return found + [
        Case(model, op, dtype, m, backward, quantized, lora=True)
        for op, quantized in adapted
        for dtype in dtypes or DTYPES
        if dtype != "float16"  # nobody trains in it
        for m in gradient_rows
        if m in rows
        for backward in (False, True)
    ]


def run(
    case: Case,
    torch: bool,
    effort: Effort,
    ceilings: machine.Ceilings,
    gpu: bool = False,
    pace: float = 0,
) -> dict[str, object]:
    """Verifies and times every contender of one case; returns its record.

    ``pace`` is the composed form's seconds per row, as far as they are known.
    """
    given = operands(case)
    expected = reference(case, given)
    calls = contenders(case, given, torch, effort.rotated, gpu)
    estimate = pace * case.rows * (2 if case.backward else 1)
    if estimate > effort.never:
        del calls["composed"]
    length = chain_length(case.rows) if gpu else 1
    error, slow = {}, {}
    for name, call in calls.items():
        if case.lora:
            call()  # compiles
        results, seconds = first_call(call)
        if seconds > effort.once:
            slow[name] = [seconds * length]
        error[name] = verify(case, name, [call.to_numpy(r) for r in results], expected)
    read = ceilings.read if case.quantized else ceilings.bandwidth
    unit = "GFLOP/s" if case.flops / ceilings.flops > case.bytes / read else "GB/s"
    work, ceiling = (case.flops, ceilings.flops) if unit == "GFLOP/s" else (case.bytes, read)
    results = {}
    timed = {name: partial(c.chain, length) if gpu else c for name, c in calls.items() if name not in slow}
    for name, seconds in (measure(timed, effort) | slow).items():
        p10, median, p90 = np.percentile(seconds, [10, 50, 90]) / length
        results[name] = {
            "median_s": median,
            "p10_s": p10,
            "p90_s": p90,
            "spread": (p90 - p10) / median,
            "calls": len(seconds),
            "rate": work / median / 1e9,
            "share": work / median / ceiling,
            "error": error[name],
        }
    results = {name: results[name] for name in calls}
    fused = results["fused"]["median_s"]
    return {
        "op": case.name,
        "in_features": case.in_features,
        "out_features": case.out_features,
        "dtype": case.dtype,
        "rows": case.rows,
        "backward": case.backward,
        "unit": unit,
        "contenders": results,
        "ratios": {name: r["median_s"] / fused for name, r in results.items() if name != "fused"},
        "goal": goal(case),
        "composed_estimate_s": None if "composed" in calls else estimate,
    }


def run_all(cases: Iterable[Case], *args: object, **options: object) -> list[dict[str, object]]:
    cells, paces = [], {}
    for case in cases:
        kind = (case.name, case.dtype)
        cells.append(run(case, *args, **options, pace=paces.get(kind, 0)))
        composed = cells[-1]["contenders"].get("composed")
        if composed and not case.backward:
            paces[kind] = composed["median_s"] / case.rows
    return cells


@click.command()
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(DTYPES),
    help="A dtype; repeatable. Default: all.",
)
@click.option("--rows", multiple=True, type=click.IntRange(1), help="A number of rows M; repeatable.")
@click.option("--quick", is_flag=True, help="Tiny shapes and few rounds: a check that everything runs.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="benchmarks/results",
    show_default=True,
    help="Folder for the JSON and the plot.",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Also put the numbers into this folder's benchmarks.md and benchmarks.png.",
)
@click.option("--no-torch", is_flag=True, help="Leave torch out even if it is installed.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="Default: MLX's default device.")
def main(
    dtypes: tuple, rows: tuple, quick: bool, out: Path, docs: Path | None, no_torch: bool, device: str | None
) -> None:
    """Time the fused projections against MLX's own operations and torch."""
    if device:
        mx.set_default_device(mx.Device(getattr(mx, device)))
    on_cpu = mx.default_device() == mx.cpu
    model, effort = (TINY, QUICK) if quick else (LLAMA, FULL)
    if not on_cpu:
        # MLX would round float32 to TF32 on some GPUs. In a pause a GPU's clock falls.
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
        effort = replace(effort, pause=0)
    rows = rows or ((1, 4) if quick else (1, 32, 128, 512))
    gradient_rows = (4,) if quick else (GRADIENT_ROWS,)
    torch = on_cpu and not no_torch and find_spec("torch") is not None

    console = Console()
    neighbours = machine.Neighbours()
    ceilings = machine.measure(effort.ceiling_size)
    chosen = cases(model, dtypes, rows, gradient_rows)
    progress = track(chosen, "Measuring", console=console, transient=True)
    try:
        cells = run_all(progress, torch, effort, ceilings, gpu=not on_cpu)
    except WrongResult as wrong:
        raise click.ClickException(str(wrong)) from None

    result = {
        "model": model.name,
        "machine": machine.describe("cpu" if on_cpu else "gpu") | {"CPU used by others": neighbours.share()},
        "ceilings": {
            "gemm_flop_per_s": ceilings.flops,
            "stream_byte_per_s": ceilings.bandwidth,
            "read_byte_per_s": ceilings.read,
        },
        "cells": cells,
    }
    out.mkdir(parents=True, exist_ok=True)
    report.show(console, result)
    report.save(result, out)
    if docs:
        report.document(docs / "benchmarks.md", "measured", report.markdown(result))
        shutil.copy(out / "bench.png", docs / "benchmarks.png")
    console.print(f"\nWritten: {out / 'bench.json'} and {out / 'bench.png'}")


if __name__ == "__main__":
    main()
