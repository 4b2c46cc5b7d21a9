"""Times the fused projections against the composed MLX form and torch: ``make bench``."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from contenders import Case, Model, WrongResult, contenders, operands, reference, verify

LLAMA = Model("Llama-3.2-1B", hidden=2048, num_heads=32, num_kv_heads=8, head_dim=64)
TINY = Model("tiny", hidden=64, num_heads=4, num_kv_heads=2, head_dim=16)
DTYPES = ("float32", "bfloat16", "float16")
GRADIENT_ROWS = 128

# The speedups over the composed form that the CPU backend aims for with LLAMA, by dtype and rows.
FORWARD_GOALS = {
    "float32": {1: 5, 32: 25, 128: 45, 512: 60},
    "bfloat16": {1: 6, 32: 20, 128: 30, 512: 40},
    "float16": {1: 8, 32: 20, 128: 20, 512: 25},
}
GRADIENT_GOALS = {"float32": 15, "bfloat16": 12}


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds per cell, seconds per turn, and the pause between turns."""

    cell: float
    turn: float
    # Idle workers spin before they sleep: OpenBLAS for some 50 ms, OpenMP for 5 ms.
    pause: float
    ceiling_size: int
    min_rounds: int = 3


FULL = Effort(cell=5, turn=0.15, pause=0.06, ceiling_size=2048)
QUICK = Effort(cell=0.02, turn=0.002, pause=0.001, ceiling_size=256)


def measure(calls: dict[str, Callable], effort: Effort) -> dict[str, list[float]]:
    """Lets the contenders take turns, so that drift hits all alike; returns seconds per call."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + effort.cell
    rounds = 0
    while rounds < effort.min_rounds or time.perf_counter() < deadline:
        for name, call in calls.items():
            time.sleep(effort.pause)
            samples[name] += _turn(call, effort.turn)
        rounds += 1
    return samples


def _turn(call: Callable, seconds: float) -> list[float]:
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    # The first of several calls wakes the thread pool and refills the caches.
    return times[1:] or times


def goal(case: Case) -> int | None:
    """Returns the speedup over the composed form that this case aims for, if there is one."""
    if case.model != LLAMA or mx.default_device() != mx.cpu:
        return None
    if not case.backward:
        return FORWARD_GOALS[case.dtype].get(case.rows)
    return GRADIENT_GOALS.get(case.dtype) if case.rows == GRADIENT_ROWS else None


def chain_length(rows: int) -> int:
    """Calls to evaluate together on a GPU, where one alone may take less time than its evaluation."""
    return max(1, min(32, 4096 // rows))


def run(
    case: Case, torch: bool, effort: Effort, ceilings: machine.Ceilings, gpu: bool = False
) -> dict[str, object]:
    """Verifies and times every contender of one case; returns its record."""
    given = operands(case)
    expected = reference(case, given)
    calls = contenders(case, given, torch, gpu)
    length = chain_length(case.rows) if gpu else 1
    error = {name: verify(case, name, call, expected) for name, call in calls.items()}
    unit = ceilings.bound(case.flops, case.bytes)
    work, ceiling = (case.flops, ceilings.flops) if unit == "GFLOP/s" else (case.bytes, ceilings.bandwidth)
    results = {}
    timed = {name: partial(call.chain, length) for name, call in calls.items()} if gpu else calls
    for name, seconds in measure(timed, effort).items():
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
    fused = results["fused"]["median_s"]
    return {
        "op": case.op,
        "in_features": case.in_features,
        "out_features": case.out_features,
        "dtype": case.dtype,
        "rows": case.rows,
        "backward": case.backward,
        "unit": unit,
        "contenders": results,
        "ratios": {name: r["median_s"] / fused for name, r in results.items() if name != "fused"},
        "goal": goal(case),
    }


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
@click.option("--no-torch", is_flag=True, help="Leave torch out even if it is installed.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="Default: MLX's default device.")
def main(dtypes: tuple, rows: tuple, quick: bool, out: Path, no_torch: bool, device: str | None) -> None:
    """Time the fused projections against the composed MLX form and torch."""
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

    cases = [
        Case(model, op, dtype, m, backward)
        for op in ("qkv", "output")
        for dtype in dtypes or DTYPES
        for backward in (False, True)
        for m in rows
        if not backward or m in gradient_rows
    ]
    console = Console()
    neighbours = machine.Neighbours()
    ceilings = machine.measure(effort.ceiling_size)
    progress = track(cases, "Measuring", console=console, transient=True)
    try:
        cells = [run(case, torch, effort, ceilings, gpu=not on_cpu) for case in progress]
    except WrongResult as wrong:
        raise click.ClickException(str(wrong)) from None

    result = {
        "model": model.name,
        "machine": machine.describe("cpu" if on_cpu else "gpu") | {"CPU used by others": neighbours.share()},
        "ceilings": {"gemm_flop_per_s": ceilings.flops, "stream_byte_per_s": ceilings.bandwidth},
        "cells": cells,
    }
    out.mkdir(parents=True, exist_ok=True)
    report.show(console, result)
    report.save(result, out)
    console.print(f"\nWritten: {out / 'bench.json'} and {out / 'bench.png'}")


if __name__ == "__main__":
    main()
