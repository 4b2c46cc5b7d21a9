"""Tables of what was measured, and docs/design/metal_cost.md."""

from .cells import CELLS, FORMATS, HERE, KERNELS, METAL, MOST_VECTORS, ROWS
from .compiler import LLVM, MESA
from .report import cost, misses

DOCUMENT = HERE.parents[1] / "docs" / "design" / "metal_cost.md"
TEXT = f"""# What the kernels cost in an Apple GPU's instructions

Our Metal kernels, and those of MLX that they would replace, compiled to the instructions of the M1 and M2 by Mesa's open
compiler for them, and counted. **No Mac has run any of this. The figures compare two kernels through one open compiler. They
are not times, and not Apple's compiler's.** `make metal-cost` writes this page and `tests/metal_cost/cost.json`. The tests
check that both are of the sources as they are.

## How
- `tests/metal_cost/translate.py` makes C++ for OpenCL out of Metal, line by line, with `tests/metal_cost/metal.h` in place
  of Metal's library. clang {LLVM} and its SPIR-V translator, from Debian 12, and Mesa {MESA}, the source package of
  Debian 13, do the rest. The first run builds Mesa's compiler in `build/metal_cost`, in five minutes on two cores; if it
  lacks packages it says which. It was tried on Debian 12 alone.
- A run takes a minute. `PYTHONPATH=tests .venv/bin/python -m metal_cost --only projection_rows_1` takes seconds: it prints
  the cells that have this in their name or their kernel's.
- A kernel is measured in float16, without bias, residual and adapter. MLX's is told that its tiles are whole. For 2 to 8
  rows MLX's is the one that it takes from the M3 on. It takes at most {MOST_VECTORS} rows at a time; for more, its figure is that of
  two passes over the weights.
- The loop over K is found by its jump back. A **step** is one pass through it: of the ways that load the most, the shortest.
  So guards let all rows pass, and a step is a whole one, not the last.
- **Per weight** divides by the weights that a lane takes in a step, which the kernel's own constants say.
- **Cycles** are those of the busier of two units, by Mesa's model of them: one for floats, comparisons and bits, the other
  for integer products, shifts and bit fields. A conversion is not in the model. Here it takes four cycles of the second,
  as published measurements of an M1 have it. Loads, waits and branches take none, and are counted apart.
- **Threads** are how many fit a core by their registers; 1024 is full. Threadgroup memory is not considered.

## Limits
- M1 and M2 only. The compiler knows no bfloat16; float16 stands for it.
- It knows no matrix unit. A product of 8 by 8 matrices is two multiply-adds here, ours and MLX's, so the table of tiles
  compares what is around the products.
- A shuffle between lanes, which ends MLX's sums, is a broadcast here. It is in no loop.
- A load of a byte counts as one of 16 bits.
- MLX's `qmv`, for shapes that `qmv_fast` does not take, and its kernels that gather are not measured: none of ours
  replaces them.

A cell **misses** if it takes more cycles to a weight than MLX's kernel, if fewer threads fit a core, if its step has a
64-bit multiplication or more than one branch, or if the kernel spills. Such figures are bold.
`tests/metal_cost/accepted.txt` lists the misses that stand. `make metal-cost` takes out what is mended, and fails if
something is worse.
"""

KERNELS_TEXT = """*Per step* is how many weights a lane takes in a step, or multiply-adds of a tile. The columns from there to *local*,
accesses to threadgroup memory, are of a step, the last three of the whole kernel. Registers are of 16 bits.
"""


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i == 0 else "--:" for i in range(len(head))) + "|"
    yield from ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    yield ""


def _versus(ours, mlx, is_missed, form="{:.1f}"):
    ours, mlx = form.format(ours), form.format(mlx)
    return f"**{ours}** / {mlx}" if is_missed else f"{ours} / {mlx}"


def _few_rows(found, value, reason, form):
    """Of every format and number of rows: ours and MLX's."""
    for name in FORMATS:
        cells = [CELLS[f"{name}, rows {rows}"] for rows in ROWS]
        figures = (
            _versus(value(found[c.ours], 1), value(found[c.mlx], c.passes), reason in misses(c, found), form)
            for c in cells
        )
        yield [name, *figures]


def cell_rows(found, cells):
    for c in cells:
        ours, mlx = found[c.ours], found[c.mlx]
        missed = misses(c, found)
        yield (
            c.name,
            f"`{c.mlx}`" + (f" x {c.passes}" if c.passes > 1 else ""),
            _versus(cost(ours), c.passes * cost(mlx), "cycles" in missed, "{:.2f}"),
            _versus(ours["threads"], mlx["threads"], "threads" in missed, "{}"),
            ", ".join(missed) or "-",
        )


CELL_HEAD = ("cell", "MLX's kernel", "cycles, ours / MLX's", "threads", "misses")
KERNEL_HEAD = (
    *("kernel", "per step", "cycles", "instructions", "float", "integer", "converts", "64-bit x"),
    *("branches", "loads x bits", "local", "registers", "threads", "spills"),
)


def kernel_rows(found, names):
    for name in names:
        k = found[name]
        step = k["step"]
        loads = ", ".join(f"{n} x {bits}" for bits, n in step["loads"].items())
        yield (
            *(f"`{name}`", k["work"] // k["rows"], step["cycles"], step["instructions"], step["float"]),
            *(step["integer"], step["converts"], step["multiplies_64"], step["branches"], loads),
            *(step["local_loads"] + step["local_stores"], k["registers"], k["threads"], k["spills"]),
        )


def brief(found, cells):
    """For the terminal."""
    yield from table(CELL_HEAD, cell_rows(found, cells))
    yield from table(KERNEL_HEAD, kernel_rows(found, found))


def page(found):
    lines = [TEXT, "## Few rows", "", "Cycles to a weight, for all rows, ours / MLX's:", ""]
    head = ["rows", *map(str, ROWS)]
    lines += table(head, _few_rows(found, lambda k, passes: passes * cost(k), "cycles", "{:.1f}"))
    lines += ["Threads that fit a core:", ""]
    lines += table(head, _few_rows(found, lambda k, passes: k["threads"], "threads", "{}"))
    tiles = [c for c in CELLS.values() if KERNELS[c.ours].has_matrices]
    lines += ["## Tiles", "", "Cycles to a multiply-add:", ""]
    lines += table(CELL_HEAD, cell_rows(found, tiles))
    lines += ["## Every kernel", ""]
    lines += [KERNELS_TEXT]
    for title, is_ours in (("### Ours", True), ("### MLX's", False)):
        names = [n for n, k in KERNELS.items() if (k.source.parent == METAL) == is_ours]
        lines += [title, "", *table(KERNEL_HEAD, kernel_rows(found, names))]
    return "\n".join(lines).rstrip() + "\n"
