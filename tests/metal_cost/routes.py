"""The rows of the table of routes that come from the figures: where our kernels cost more than MLX's."""

import re
from dataclasses import dataclass
from math import inf

from .cells import CELLS, HERE, KERNELS, ROWS
from .report import cost, misses

INCLUDED = HERE.parents[1] / "mlx_fused" / "metal_cost.inc"
# A step of a kernel with matrices is 256 to 1024 multiply-adds of a lane, beside which a branch is little. A
# 64-bit multiplication is among its cycles.
DO_NOT_DECIDE = ("64-bit multiply", "branches")
KINDS = {"affine_4": "affine", "mxfp4": "fp"}  # the tiles of these stand for those of their kind
# Our kernels in the order of the table, with the part of a call that each does, and what taking MLX's gives up.
PARTS = {
    "adapter_grad": ("adapter_gradient", "one launch for all A or all B"),
    "low_rank_product": ("low_rank_product", "one launch for all adapters"),
    "weight_grad": ("weight_gradient", "one launch for a QKV call's 3, with bias 6"),
    "input_grad": ("input_gradient", "one launch for a QKV call's 5"),
    "projection": ("projection", "one launch for a QKV call's 3, with bias up to 6"),
}


@dataclass
class Run:
    """Cells of one kernel and adjacent numbers of rows that miss; of what they miss, the worst."""

    kernel: str
    weights: str
    first: int
    last: float
    missed: set[str]
    cycles: float  # ours by MLX's
    threads: float

    def merge(self, other):
        """Whether the other goes on where this ends, and is part of it now."""
        if (self.kernel, self.weights, self.last + 1) != (other.kernel, other.weights, other.first):
            return False
        self.last = other.last
        self.missed |= other.missed
        self.cycles, self.threads = max(self.cycles, other.cycles), min(self.threads, other.threads)
        return True

    def reason(self):
        words = {
            "cycles": f"{self.cycles:.2f} times the cycles",
            "threads": f"{self.threads:.2f} times the threads",
        }
        worst = ", ".join(words.get(name, name) for name in sorted(self.missed))
        return f"At worst {worst} of MLX's kernel. Given up: {PARTS[self.kernel][1]}."


def decisive(cell, found):
    """The misses that route a cell to MLX, and those that do not."""
    missed = misses(cell, found)
    passed = DO_NOT_DECIDE if KERNELS[cell.ours].has_matrices else ()
    return [m for m in missed if m not in passed], [m for m in missed if m in passed]


def place(cell):
    """The kernel, the weights, and the first and last number of rows that a cell is about."""
    if match := re.fullmatch(r"(.+), rows (\d)", cell.name):
        return "projection", match[1], int(match[2]), int(match[2])
    kernel, tile, form = re.fullmatch(r"([a-z_]+?)(?:_(32|64)_(\w+))?", cell.name).groups()
    least = max(ROWS) + 1 if kernel == "projection" else 1  # fewer rows have a kernel of their own
    if tile == "32":
        return kernel, KINDS.get(form, form), least, 32
    has_small = f"{kernel}_32_{form}" in CELLS
    return kernel, KINDS.get(form, form or "any"), 33 if has_small else least, inf


def runs(found):
    """All runs, in the order of the table."""
    every = []
    for cell in CELLS.values():
        missed, _ = decisive(cell, found)
        if missed:
            ours, mlx = found[cell.ours], found[cell.mlx]
            cycles = cell.our_passes * cost(ours) / (cell.mlx_passes * cost(mlx))
            run = Run(*place(cell), set(missed), cycles, ours["threads"] / mlx["threads"])
            if not any(before.merge(run) for before in every):
                every.append(run)
    return sorted(every, key=lambda run: [*PARTS].index(run.kernel))


def text(found):
    """The rows as routing.cpp includes them."""
    lines = ["// Written by `make metal-cost`: where our kernels cost more than MLX's.\n"]
    for run in runs(found):
        last = "any_rows" if run.last == inf else run.last
        condition = f'Part::{PARTS[run.kernel][0]}, "{run.weights}", {run.first}, {last}'
        lines.append(f'{{Device::metal, {condition}, composed,\n "{run.reason()}"}},\n')
    return "".join(lines)
