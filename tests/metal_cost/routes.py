"""The rows of the table of routes that come from the figures: where our kernels cost more than MLX's."""

import re
from dataclasses import dataclass
from math import ceil, inf

from .cells import CELLS, HERE, KERNELS, MOST_VECTORS, ROWS, TILE_FORMATS, mlx_vectors
from .report import cost, misses

INCLUDED = HERE.parents[1] / "mlx_fused" / "metal_cost.inc"
# A step of a kernel with matrices is 256 to 1024 multiply-adds of a lane, beside which a branch is little. A
# 64-bit multiplication is among its cycles. In place of a norm before the loop MLX has a launch and a stage.
DO_NOT_DECIDE = {True: ("64-bit multiply", "branches"), False: ("with norm",)}  # with matrices and without
KINDS = {"affine_4": "affine", "mxfp4": "fp"}  # the tiles of these stand for those of their kind
RANKS = {"8": "low", "32": "mid", "64": "high"}
MOST_VECTOR_ROWS = (
    33,
    15,
)  # of MLX's kernels for few rows, on whatever GPU, with quantized weights and dense
MOST_ROWS = 512  # after which a tile that is not full is little beside those that are
HIGH_TILES_FROM = 1024  # rows; many_rows in backend/metal/plan_adapters.cpp
# Parts of a call in the order of the table, with what taking MLX's kernels gives up.
PARTS = {
    "adapter_gradient": "one launch for all A or all B",
    "mid_rank_gradient": "one launch for all A or all B",
    "high_rank_gradient": "one launch for all A or all B",
    "low_rank_product": "one launch for all adapters",
    "mid_rank_product": "one launch for all adapters",
    "high_rank_product": "one launch for all adapters",
    "weight_gradient": "one launch for a QKV call's 3, with bias 6",
    "input_gradient": "one launch for a QKV call's 5",
    "normed": "the launch and stage of the norm",
    "gated": "one launch and stage for the 3 of gate, up and activation in 2",
    "projection": "one launch for a QKV call's 3, with bias up to 6",
}


@dataclass
class Run:
    """Cells of one part and adjacent numbers of rows that miss, and the worst figure of each miss."""

    part: str
    weights: str
    first: int
    last: float
    worst: dict[str, float]

    def merge(self, other):
        """Whether the other is of these rows or goes on where this ends, and is part of it now."""
        if (self.part, self.weights) != (other.part, other.weights):
            return False
        if not self.first <= other.first <= self.last + 1:
            return False
        self.last = max(self.last, other.last)
        for name, figure in other.worst.items():
            self.worst[name] = max(figure, self.worst.get(name, 0))
        return True

    def reason(self):
        figures = {
            "cycles": lambda figure: f"{figure:.2f} times the cycles",
            "threads": lambda figure: f"{1 / figure:.2f} times the threads",
        }
        worst = [
            figures[name](figure) if name in figures else name for name, figure in sorted(self.worst.items())
        ]
        return f"At worst {', '.join(worst)} of MLX's kernel. Given up: {PARTS[self.part]}."


def decisive(cell, found):
    """The misses that route a cell to MLX, and those that do not."""
    missed = misses(cell, found)
    passed = DO_NOT_DECIDE[KERNELS[cell.ours].has_matrices]
    decide = {name: figure for name, figure in missed.items() if name not in passed}
    return decide, {name: figure for name, figure in missed.items() if name in passed}


def place(cell):
    """The part of a call, the weights, and the first and last number of rows that a cell is about."""
    if match := re.fullmatch(r"(\w+)(?:, (gated|normed))?, rows (\d)", cell.name):
        form = KINDS.get(match[1], match[1]) if match[2] else match[1]  # of the others all are measured
        return match[2] or "projection", form, int(match[3]), int(match[3])
    if match := re.fullmatch(r"low_rank_product_(\d)x\d, rank (\d+)", cell.name):
        part = f"{RANKS[match[2]]}_rank_product"
        return part, "any", *((1, HIGH_TILES_FROM - 1) if match[1] == "1" else (HIGH_TILES_FROM, inf))
    if match := re.fullmatch(r"adapter_grad_\d, rank (\d+)", cell.name):
        part = "adapter_gradient" if match[1] == "8" else f"{RANKS[match[1]]}_rank_gradient"
        return part, "any", 1, inf
    if cell.name == "weight_grad":
        return "weight_gradient", "any", 1, inf
    kernel, tile, form, gated = re.fullmatch(
        r"(projection|input_grad)_(32|64)_(\w+?)(?:, (?:ragged rows|(gated)))?", cell.name
    ).groups()
    part = gated or ("projection" if kernel == "projection" else "input_gradient")
    least = 1 if part == "input_gradient" else max(ROWS) + 1  # fewer rows have a kernel of their own
    if tile == "32":
        return part, KINDS.get(form, form), least, 32
    return part, KINDS.get(form, form), 33 if f"{kernel}_32_{form}" in CELLS else least, inf


def cycles(found, part, form, rows):
    """To a weight, for so many rows: of our tiles, full or not, and of the cheapest that MLX may launch."""

    def tiles(kernel, height):
        return cost(found[kernel]) * height * ceil(rows / height)

    height = 32 if rows <= 32 and (part != "input_gradient" or form == "dense") else 64
    if part == "input_gradient":
        mlx = tiles("gemm_nn", 64) if form == "dense" else tiles(f"qmm_n_{form}", 32)
        return tiles(f"input_grad_{height}_{form}", height), mlx
    passes = ceil(rows / MOST_VECTORS)
    vectors = mlx_vectors(form, ceil(rows / passes)).name
    mlx = [passes * cost(found[vectors])] if rows <= MOST_VECTOR_ROWS[form == "dense"] else []
    if form == "dense":
        mlx += [tiles("gemm_splitk_nt", 16) if rows < 40 else tiles("gemm_nt", 64)]
    else:
        mlx += [tiles(f"qmm_t_{form}", 32)]
    return tiles(f"projection_{height}_{form}{', gated' * (part == 'gated')}", height), min(mlx)


def unfilled(found):
    """Where our tiles, because rows of theirs are missing, take more cycles than what MLX launches."""
    for part in ("projection", "gated", "input_gradient"):
        for form in TILE_FORMATS:
            first = 1 if part == "input_gradient" else max(ROWS) + 1
            for rows in range(first, MOST_ROWS + 1):
                ours, mlx = cycles(found, part, form, rows)
                if round(ours / mlx, 2) > 1:
                    yield Run(part, KINDS.get(form, form), rows, rows, {"cycles": ours / mlx})


def runs(found):
    """All runs, in the order of the table."""
    every = []
    of_cells = (Run(*place(cell), decisive(cell, found)[0]) for cell in CELLS.values())
    for run in (*(run for run in of_cells if run.worst), *unfilled(found)):
        if not any(before.merge(run) for before in every):
            every.append(run)
    return sorted(every, key=lambda run: [*PARTS].index(run.part))


def text(found):
    """The rows as routing.cpp includes them."""
    lines = ["// Written by `make metal-cost`: where our kernels cost more than MLX's.\n"]
    for run in runs(found):
        last = "any_rows" if run.last == inf else run.last
        condition = f'Part::{run.part}, "{run.weights}", {run.first}, {last}'
        lines.append(f'{{Device::metal, {condition}, composed,\n "{run.reason()}"}},\n')
    return "".join(lines)
