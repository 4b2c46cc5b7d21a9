"""Tables of what was measured, for the terminal and docs/design/metal_cost.md."""

import re

from .cells import CELLS, FORMATS, HERE, KERNELS, METAL, ROWS, VARIANTS
from .mistakes import MISTAKES
from .report import cost, cost_with_norm, misses, seen, text_of

DOCUMENT = HERE.parents[1] / "docs" / "design" / "metal_cost.md"
VARIANT = rf", (?:{'|'.join(VARIANTS)}), rows"
MARKER = "<!-- what follows is written by make metal-cost -->"


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
            _versus(
                value(found[c.ours], c.our_passes),
                value(found[c.mlx], c.mlx_passes),
                reason in misses(c, found),
                form,
            )
            for c in cells
        )
        yield [name, *figures]


def _norm(kernel, passes):
    return f" + {passes * (cost_with_norm(kernel) - cost(kernel)):.2f}" if "norm" in kernel else ""


def cell_rows(found, cells):
    for c in cells:
        ours, mlx = found[c.ours], found[c.mlx]
        missed = misses(c, found)
        cycles = _versus(c.our_passes * cost(ours), c.mlx_passes * cost(mlx), "cycles" in missed, "{:.2f}")
        yield (
            c.name,
            f"`{c.mlx}`" + (f" x {c.mlx_passes}" if c.mlx_passes > 1 else ""),
            cycles.replace(" /", f"{_norm(ours, c.our_passes)} /"),
            _versus(ours["threads"], mlx["threads"], "threads" in missed, "{}"),
            text_of(missed) or "-",
        )


def mistake_rows(found):
    for name, mistake in MISTAKES.items():
        without, with_it = misses(mistake.right, found), misses(mistake.cell, found)
        new = seen(mistake, found)
        marked = ", ".join(f"**{r} {f:g}**" if r in new else f"{r} {f:g}" for r, f in with_it.items())
        yield name, mistake.right.name, text_of(without) or "-", marked or "-"


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


def page(text, found):
    """The document with today's tables."""
    lines = [text.partition(MARKER)[0] + MARKER, "", "## Few rows", ""]
    lines += ["Cycles to a weight, for all rows, ours / MLX's:", ""]
    head = ["rows", *map(str, ROWS)]
    lines += table(head, _few_rows(found, lambda k, passes: passes * cost(k), "cycles", "{:.1f}"))
    lines += ["Threads that fit a core:", ""]
    lines += table(head, _few_rows(found, lambda k, passes: k["threads"], "threads", "{}"))
    tiles = [c for c in CELLS.values() if KERNELS[c.ours].has_matrices]
    lines += ["## Few rows, gated or with a norm", ""]
    lines += ["Cycles to a weight, for all rows, + those of the norm:", ""]
    lines += table(CELL_HEAD, cell_rows(found, [c for n, c in CELLS.items() if re.search(VARIANT, n)]))
    lines += ["## Tiles", "", "Cycles to a multiply-add:", ""]
    lines += table(CELL_HEAD, cell_rows(found, tiles))
    lines += ["## Mistakes put back", "", "What our kernels once did. Bold is what the report sees.", ""]
    head = ("mistake", "cell", "misses", "with the mistake")
    lines += table(head, mistake_rows(found))
    for title, is_ours in (("## Our kernels", True), ("## MLX's kernels", False)):
        names = [n for n, k in KERNELS.items() if (k.source.parent == METAL) == is_ours]
        lines += [title, "", *table(KERNEL_HEAD, kernel_rows(found, names))]
    return "\n".join(lines).rstrip() + "\n"
