"""How the products of attention's projections are launched, ours and MLX's on each class of Apple GPU.

``python tests/launches.py`` counts anew, to tests/launches.json and as tables to docs/design/launches.md.
"""

import json
from collections import namedtuple
from math import ceil, prod
from pathlib import Path

import mlx.core as mx

import ledger
from mlx_kernels import FORM, Device, Grid, Kernels

GOLDEN = Path(__file__).with_name("launches.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "design" / "launches.md"

# hidden_size, and (num_heads, num_kv_heads, head_dim)
MODELS = {
    "Llama-3.2-1B": (2048, (32, 8, 64)),
    "Llama-3.1-8B": (4096, (32, 8, 128)),
    "Qwen3-0.6B": (1024, (16, 8, 128)),
}
ROWS = (1, 2, 4, 5, 8, 9, 16, 32, 64, 128, 512, 2048)
TRAINING_ROWS = (128, 512, 2048)
WEIGHTS = {"dense": "dense", f"affine_{FORM[2]}": f"{FORM[2]} bits"}

# A class is called as its oldest GPU, whose architecture applegpu_g13g ends so; MLX does the same on those of
# the next generation.
CLASSES = {f"g{g}{size}": Device(g, size) for g in (13, 15, 17) for size in "gsd" if (g, size) != (17, "d")}
CORES = {"g": 10, "s": 40, "d": 80}  # nominal
ENOUGH_PER_CORE = 8

Call = namedtuple("Call", "title call weights operation rows")
CALLS = [
    Call("QKV", "qkv", "dense", "qkv", ROWS),
    Call("QKV", "qkv", "affine_4", "quantized_qkv", ROWS),
    Call("Output + residual", "output", "dense", "output", ROWS),
    Call("Output + residual", "output", "affine_4", "quantized_output", ROWS),
    Call("Gate and up", "gated", "dense", "gated", ROWS),
    Call("Gate and up", "gated", "affine_4", "quantized_gated", ROWS),
    Call("dX of QKV", "qkv_grad", "dense", "dx", TRAINING_ROWS),
    Call("dX of QKV", "qkv_grad", "affine_4", "quantized_qkv_grad", TRAINING_ROWS),
]

DEPTH = 32  # tile_depth in metal/params.h


def total(grids):
    """Of launches side by side: threadgroups, simdgroups, and steps where they are most."""
    grids = list(grids)
    groups = sum(g.threadgroups for g in grids)
    return Grid(groups, sum(g.threadgroups * g.simdgroups for g in grids), max(g.steps for g in grids))


def steps(launch, case):
    """Of the launch's loop over K; by rows there are no barriers."""
    if launch["kernel"].startswith("projection_rows"):
        return 0
    op = ledger.call_of(case)
    summed = sum(op.features) if launch["kernel"].startswith("input_grad") else op.x.shape[-1]
    splits = launch["grid"][2]  # the rows are one batch
    return ceil(summed / DEPTH / splits)


def ours(case, size):
    call = ledger.run_plan(case, library_of=ledger.NotRun(), cores=CORES[size])
    products = [p for p in call.plan if p["kernel"].startswith(("projection", "input_grad"))]
    products = [p for p in products if "_splits_" not in p["kernel"]]
    return total(Grid(prod(p["grid"]), prod(p["threadgroup"]) // 32, steps(p, case)) for p in products)


def mlx(case):
    nodes = ledger.graph(case, "mlx-lm")
    return {name: total(Kernels(nodes, device).grids) for name, device in CLASSES.items()}


def is_missed(our_groups, their_groups, name):
    """Whether fewer threadgroups than MLX's leave the cores of that class without enough."""
    enough = ENOUGH_PER_CORE * CORES[CLASSES[name].size]
    return our_groups < min(their_groups, enough)


def row(model, call, rows):
    hidden, heads = MODELS[model]
    case = ledger.Case(call.operation, rows, hidden, heads, False, False)
    op, their_grids = ledger.call_of(case), mlx(case)
    our_grids = {size: ours(case, size) for size in CORES}
    return {
        "call": call.call,
        "weights": call.weights,
        "model": model,
        "in_features": op.x.shape[-1],
        "features": list(op.features),
        "rows": rows,
        "ours": our_grids,
        "mlx": their_grids,
        "misses": [c for c in CLASSES if is_missed(our_grids[c[-1]][0], their_grids[c].threadgroups, c)],
    }


def count():
    return [row(model, call, rows) for call in CALLS for model in MODELS for rows in call.rows]


def to_json(rows):
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def cell(grid, is_bold=False):
    groups, simdgroups, its_steps = grid
    groups = f"**{groups:,}**" if is_bold else f"{groups:,}"
    return f"{groups} / {simdgroups:,} / {its_steps or '-'}"


def markdown(lines):
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def table(rows):
    head = ["model", "M", *(f"ours, {size}" for size in CORES), *CLASSES]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for r in rows:
        theirs = (cell(r["mlx"][name], name in r["misses"]) for name in CLASSES)
        lines.append([r["model"], r["rows"], *map(cell, r["ours"].values()), *theirs])
    return markdown(lines)


def summary(rows):
    """How many cells each class misses, by M."""
    lines = [["M", "cells", *CLASSES], ["--:"] * (2 + len(CLASSES))]
    for m in ROWS:
        here = [r for r in rows if r["rows"] == m]
        lines.append([m, len(here), *(sum(name in r["misses"] for r in here) or "-" for name in CLASSES)])
    return markdown(lines)


def page(text, rows):
    """The document, its tables those of the rows."""
    begin = "<!-- what follows is written by tests/launches.py -->\n"
    text = f"{text.partition(begin)[0]}{begin}\n## Misses\n\n{summary(rows)}"
    for call in CALLS:
        here = [r for r in rows if (r["call"], r["weights"]) == (call.call, call.weights)]
        text += f"\n## {call.title}, {WEIGHTS[call.weights]}\n\n{table(here)}"
    return text


def main():
    mx.set_default_device(mx.cpu)
    rows = count()
    GOLDEN.write_text(to_json(rows))
    DOCUMENT.write_text(page(DOCUMENT.read_text(), rows))


if __name__ == "__main__":
    main()
