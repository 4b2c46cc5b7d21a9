"""Measures the kernels, and says where ours cost more than MLX's, and by how much."""

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

NORM_FEATURES = 32  # of a threadgroup that norms its rows
TILE_THREADS = 512  # that fit a core in MLX's kernels for x W and x^T y
RESULT = HERE / "cost.json"
# Misses that stand as they are. `write` takes lines out; one that is new has to be written in by hand.
ACCEPTED = HERE / "accepted.txt"


@cache
def flattened(path):
    return flatten(path)


def fingerprint():
    """Of everything that the figures come from: the sources without comments, this package, the compiler."""
    digest = hashlib.sha256(f"{compiler.MESA} {compiler.LLVM}".encode())
    for path in sorted({k.source for k in KERNELS.values()}):
        digest.update("\n".join(line for line in flattened(path).split("\n") if line[:2] != "# ").encode())
    for name in (
        "metal.h",
        "compiler.py",
        "translate.py",
        "measure.py",
        "cells.py",
        "mistakes.py",
        "report.py",
    ):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def source_of(kernel):
    """A kernel in C++ for OpenCL, with its entry point."""
    text = flattened(kernel.source)
    for now, instead in kernel.edits:
        if now not in text:
            raise ValueError(f"no place has {now!r}")
        text = text.replace(now, instead)
    function = kernel.function or kernels(text)[f"{kernel.name.split(',')[0]}_float16"]
    return translate(text, kernel.constants) + entry(text, function, kernel.threads, kernel.work)


def measure_kernel(kernel):
    try:
        found = measure(*compiler.compile_kernel(source_of(kernel)), kernel.has_norm)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(f"{kernel.name}: {error}") from error
    done = found["step"]["multiply_adds"] * (8 if kernel.has_matrices else 1)
    if not found["work"] <= done <= 4 * found["work"]:
        raise RuntimeError(f"{kernel.name}: its loop multiplies {done} times, not {found['work']}")
    return found | {"rows": kernel.rows, "has_matrices": kernel.has_matrices}


def measure_all(every, progress=iter):
    with ThreadPoolExecutor(cpu_count()) as pool:
        results = pool.map(measure_kernel, every)
        return {k.name: r for k, r in zip(every, progress(results), strict=True)}


def cost(kernel):
    """Cycles to a weight, for all of its rows.

    A product of 8 by 8 matrices, which the compiler sees as two multiply-adds, is 16 of a lane: the M1 has no
    unit for it and takes a cycle for each.
    """
    unseen = kernel["work"] * 7 / 8 if kernel["has_matrices"] else 0
    return (kernel["step"]["cycles"] + unseen) * kernel["rows"] / kernel["work"]


def cost_with_norm(kernel):
    """The same with the norm before, which each threadgroup computes for itself."""
    return cost(kernel) + kernel.get("norm", 0) / NORM_FEATURES


def misses(cell, found):
    """In what a cell is worse than MLX's kernel, or than it should be: figures, of which more is worse."""
    ours, mlx = found[cell.ours], found[cell.mlx]
    step = ours["step"]
    figures = {  # and the most that they may be
        "cycles": (cell.our_passes * cost(ours) / (cell.mlx_passes * cost(mlx)), 1),
        "threads": (enough_threads(mlx) / ours["threads"], 1),
        "64-bit multiply": (step["multiplies_64"], 0),
        "branches": (step["branches"], 1),
        "spills": (ours["spills"], 0),
    }
    if "norm" in ours:
        figures["with norm"] = (cell.our_passes * cost_with_norm(ours) / (cell.mlx_passes * cost(mlx)), 1)
    return {name: round(figure, 2) for name, (figure, most) in figures.items() if round(figure, 2) > most}


def enough_threads(mlx):
    """In a kernel with matrices each thread has much to do between loads: as many as MLX's own tiles fit."""
    return min(mlx["threads"], TILE_THREADS) if mlx["has_matrices"] else mlx["threads"]


def accepted():
    lines = (line.split(": ") for line in ACCEPTED.read_text().splitlines())
    pairs = {cell: (reason.rsplit(" ", 1) for reason in reasons.split(", ")) for cell, reasons in lines}
    return {cell: {reason: float(figure) for reason, figure in some} for cell, some in pairs.items()}


def text_of(reasons):
    return ", ".join(f"{reason} {figure:g}" for reason, figure in reasons.items())


def all_misses(found):
    every = {name: misses(cell, found) for name, cell in CELLS.items()}
    return {name: reasons for name, reasons in every.items() if reasons}


def worse(reasons, than):
    return {reason: figure for reason, figure in reasons.items() if figure > than.get(reason, 0)}


def write(found):
    """Writes the figures, takes from the accepted misses what is mended, and returns those that are worse."""
    result = {"fingerprint": fingerprint(), "kernels": found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    before, now = accepted(), all_misses(found)
    lines = []
    for cell, reasons in before.items():
        still = {r: min(figure, now[cell][r]) for r, figure in reasons.items() if r in now.get(cell, {})}
        lines += [f"{cell}: {text_of(still)}\n"] if still else []
    ACCEPTED.write_text("".join(lines))
    new = {cell: worse(reasons, before.get(cell, {})) for cell, reasons in now.items()}
    return {cell: reasons for cell, reasons in new.items() if reasons}


def seen(mistake, found):
    """In what the report finds a cell worse with the mistake than without it."""
    return worse(misses(mistake.cell, found), misses(mistake.right, found))
