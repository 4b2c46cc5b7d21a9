"""Measures the kernels, and says where ours cost more than MLX's."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from os import cpu_count

from msl_sim.toolchain import flatten

from . import compiler
from .cells import CELLS, HERE, KERNELS
from .measure import measure
from .translate import entry, kernels, translate

RESULT = HERE / "cost.json"
# Misses that stand as they are. `write` takes lines out; one that is new has to be written in by hand.
ACCEPTED = HERE / "accepted.txt"
# What a kernel is measured without: bias, residual, adapter. MLX's are told that shapes are whole tiles.
CONSTANTS = ("align_M", "align_N", "align_K")


@cache
def flattened(path):
    return flatten(path)


def fingerprint():
    """Of everything that the figures come from: the sources without comments, this package, the compiler."""
    digest = hashlib.sha256(f"{compiler.MESA} {compiler.LLVM}".encode())
    for path in sorted({k.source for k in KERNELS.values()}):
        digest.update("\n".join(line for line in flattened(path).split("\n") if line[:2] != "# ").encode())
    for name in ("metal.h", "translate.py", "measure.py", "cells.py", "report.py"):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def source_of(kernel):
    """A kernel in C++ for OpenCL, with its entry point."""
    text = flattened(kernel.source)
    function = kernel.function or kernels(text)[f"{kernel.name}_float16"]
    return translate(text, CONSTANTS + kernel.constants) + entry(text, function, kernel.threads, kernel.work)


def measure_kernel(kernel):
    try:
        found = measure(*compiler.compile_kernel(source_of(kernel)))
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(f"{kernel.name}: {error}") from error
    done = found["step"]["multiply_adds"] * (8 if kernel.has_matrices else 1)
    if not found["work"] <= done <= 4 * found["work"]:
        raise RuntimeError(f"{kernel.name}: its loop multiplies {done} times, not {found['work']}")
    return found | {"rows": kernel.rows}


def measure_all(names, progress=iter):
    with ThreadPoolExecutor(cpu_count()) as pool:
        results = pool.map(measure_kernel, [KERNELS[name] for name in names])
        return dict(zip(names, progress(results), strict=True))


def cost(kernel):
    """Cycles to a weight, for all of its rows."""
    return kernel["step"]["cycles"] * kernel["rows"] / kernel["work"]


def misses(cell, found):
    """In what a cell is worse than MLX's kernel, or than it should be."""
    ours, mlx = found[cell.ours], found[cell.mlx]
    step = ours["step"]
    return [
        name
        for name, is_missed in {
            "cycles": cell.our_passes * cost(ours) > cell.mlx_passes * cost(mlx),
            "threads": ours["threads"] < mlx["threads"],
            "64-bit multiply": step["multiplies_64"] > 0,
            "branches": step["branches"] > 1,
            "spills": ours["spills"] > 0,
        }.items()
        if is_missed
    ]


def accepted():
    lines = (line.split(": ") for line in ACCEPTED.read_text().splitlines())
    return {cell: reasons.split(", ") for cell, reasons in lines}


def all_misses(found):
    every = {name: misses(cell, found) for name, cell in CELLS.items()}
    return {name: reasons for name, reasons in every.items() if reasons}


def write(found):
    """Writes the figures, takes from the accepted misses what is mended, and returns the new ones."""
    result = {"fingerprint": fingerprint(), "kernels": found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    before, now = accepted(), all_misses(found)
    still = {cell: [r for r in reasons if r in now.get(cell, [])] for cell, reasons in before.items()}
    ACCEPTED.write_text(
        "".join(f"{cell}: {', '.join(reasons)}\n" for cell, reasons in still.items() if reasons)
    )
    new = {cell: [r for r in reasons if r not in before.get(cell, [])] for cell, reasons in now.items()}
    return {cell: reasons for cell, reasons in new.items() if reasons}
