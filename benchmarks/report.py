"""Shows a benchmark's result: tables, JSON and a plot."""

import json
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt

TITLES = {
    "qkv": "QKV projection",
    "output": "Output projection + residual",
    "gated": "Gate and up with silu",
    "head": "Head",
    "norm": "RMS norm",
    "qkv 4-bit": "QKV projection, 4-bit weights",
    "output 4-bit": "Output projection + residual, 4-bit weights",
    "gated 4-bit": "Gate and up with silu, 4-bit weights",
    "head 4-bit": "Head, 4-bit weights",
    "qkv LoRA": "QKV projection with LoRA",
    "output LoRA": "Output projection + residual with LoRA",
    "gated LoRA": "Gate and up with silu and LoRA",
    "qkv 4-bit LoRA": "QKV projection with LoRA, 4-bit weights",
    "output 4-bit LoRA": "Output projection + residual with LoRA, 4-bit weights",
    "gated 4-bit LoRA": "Gate and up with silu and LoRA, 4-bit weights",
}
COLORS = {"composed": "#2f6db5", "torch": "#e08a2e", "routed": "#8a8a8a", "addmm": "#58a55c"}


def show(console: Console, result: dict) -> None:
    """Prints one table per operation and dtype, then the summary."""
    for (op, dtype), group in groupby(result["cells"], key=lambda c: (c["op"], c["dtype"])):
        cells = list(group)
        names = _names(cells)
        table = make_table(f"{TITLES[op]} {_shape(cells[0])} · {dtype}")
        times, ratios = [f"{n}\nms" for n in names], [f"vs\n{n}" for n in names[1:]]
        for column in ("M", *times, *ratios, "fused\nreaches", "of\npeak"):
            table.add_column(column, justify="right")
        for cell in cells:
            fused = cell["contenders"]["fused"]
            table.add_row(
                _rows(cell),
                *(_time(cell, name) for name in names),
                *(_ratio(cell, name) for name in names[1:]),
                f"{fused['rate']:.1f} {cell['unit']}",
                f"{100 * fused['share']:.0f}%",
            )
        console.print(table)
        inexact = max(_error(c) for c in cells)
        if inexact > 1:
            console.print(f"composed errs by up to {inexact:.0f} times the bound: MLX sums in 16 bits here")
    _show_summary(console, result)


def _show_summary(console: Console, result: dict) -> None:
    cells = result["cells"]
    columns = list(dict.fromkeys(_rows(c) for c in sorted(cells, key=lambda c: c["backward"])))
    table = make_table("Speedup over composed MLX (goal)")
    table.add_column()
    for column in columns:
        table.add_column(f"M = {column}", justify="right")
    for (op, dtype), group in groupby(cells, key=lambda c: (c["op"], c["dtype"])):
        by_rows = {_rows(c): _verdict(c) for c in group}
        table.add_row(f"{op} {dtype}", *(by_rows.get(column, "") for column in columns))
    console.print(table)

    judged = [c for c in cells if c["goal"]]
    if judged:
        reached = sum(c["ratios"].get("composed", 0) >= c["goal"] for c in judged)
        console.print(f"Goals reached: {reached} of {len(judged)}")
    if over_torch := _over_torch(cells):
        console.print(over_torch + (" (goal 1.0)" if judged else ""))
    about, ceilings = result["machine"], result["ceilings"]
    console.print(
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, "
        f"device {about['device']}: float32 GEMM {ceilings['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s, "
        f"stream {ceilings['stream_byte_per_s'] / 1e9:.0f} GB/s, "
        f"reading {ceilings['read_byte_per_s'] / 1e9:.0f} GB/s",
        highlight=False,
    )
    busy = about["CPU used by others"]
    console.print(
        f"CPU used by other processes during the run: {100 * busy:.0f}%",
        style="bold red" if busy > 0.05 else "",
    )
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    console.print(f"{versions}, numpy's BLAS {about['numpy BLAS']}, {about['date']}", highlight=False)


def _over_torch(cells: list[dict]) -> str:
    # The goal against torch covers the shapes that have one against composed MLX.
    judged = [c for c in cells if c["goal"]]
    ratios = [c["ratios"]["torch"] for c in judged or cells if "torch" in c["ratios"]]
    if not ratios:
        return ""
    mean = np.exp(np.mean(np.log(ratios)))
    return f"Speedup over torch, geometric mean of {len(ratios)} cells: {mean:.2f}"


def save(result: dict, folder: Path) -> None:
    """Writes ``bench.json`` and ``bench.png``."""
    (folder / "bench.json").write_text(json.dumps(result, indent=1))
    groups = [(key, list(g)) for key, g in groupby(result["cells"], key=lambda c: (c["op"], c["dtype"]))]
    ops, dtypes = (list(dict.fromkeys(key[i] for key, _ in groups)) for i in (0, 1))
    figure, axes = plt.subplots(
        len(ops),
        len(dtypes),
        figsize=(1.5 + 4.3 * len(dtypes), 1.2 + 3.1 * len(ops)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (op, dtype), cells in groups:
        axis = axes[ops.index(op), dtypes.index(dtype)]
        _bars(axis, cells)
        axis.set_title(f"{TITLES[op]} {_shape(cells[0])}, {dtype}", fontsize=10)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    for row in axes:
        row[0].set_ylabel("speedup of fused")
    for axis in axes[-1]:
        axis.set_xlabel("rows M")
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    about = result["machine"]
    figure.suptitle(
        f"mlx-fused, sizes of {result['model']}\n"
        f"{about['cpu']}, {about['cores']} cores, device {about['device']}",
        fontsize=11,
    )
    below = {"loc": "outside lower center", "ncols": len(handles), "frameon": False}
    figure.legend(handles.values(), handles.keys(), **below)
    figure.savefig(folder / "bench.png", dpi=120)
    plt.close(figure)


def _bars(axis: plt.Axes, cells: list[dict]) -> None:
    names = _names(cells)[1:]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        x = np.arange(len(cells)) + (i - (len(names) - 1) / 2) * width
        ratios = np.array([c["ratios"].get(name, np.nan) for c in cells])
        goals = np.array([c["goal"] or np.nan if name == "composed" else np.nan for c in cells])
        # Bars start at 1, so that a slower contender points up and a faster one down.
        axis.bar(x, ratios - 1, width, bottom=1, color=COLORS[name], label=f"over {name}")
        if not np.isnan(goals).all():
            axis.hlines(
                goals,
                x - width / 2,
                x + width / 2,
                "black",
                (0, (3, 1)),
                label="goal over composed",
            )
        for position, ratio, top in zip(x, ratios, np.fmax(ratios, goals), strict=True):
            if np.isnan(ratio):
                continue
            up = ratio >= 1 or top > ratio
            axis.annotate(
                f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}",
                (position, top),
                (0, 2 if up else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=8,
            )
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_xticks(range(len(cells)), [_rows(c).replace(" ", "\n") for c in cells])


def make_table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)


def _shape(cell: dict) -> str:
    return f"{cell['in_features']} → {sum(cell['out_features'])}"


def _names(cells: list[dict]) -> list[str]:
    """Of the contenders, in order; not every cell has them all."""
    return list(dict.fromkeys(name for c in cells for name in c["contenders"]))


def _error(cell: dict) -> float:
    return cell["contenders"].get("composed", {"error": 0})["error"]


def _time(cell: dict, name: str) -> str:
    if name not in cell["contenders"]:
        return f"≈ {cell['composed_estimate_s']:.0f} s"
    timing = cell["contenders"][name]
    spread = f" ±{50 * timing['spread']:.0f}%" if timing["calls"] > 1 else ""
    return _milliseconds(timing) + spread


def _milliseconds(timing: dict) -> str:
    return np.format_float_positional(1e3 * timing["median_s"], 3, fractional=False, trim="-")


def _ratio(cell: dict, name: str) -> str:
    return f"{cell['ratios'][name]:.2f}" if name in cell["ratios"] else ""


def _rows(cell: dict) -> str:
    return f"{cell['rows']} +bwd" if cell["backward"] else str(cell["rows"])


def _verdict(cell: dict) -> str:
    ratio, aim = cell["ratios"].get("composed"), cell["goal"]
    if ratio is None:
        return ""
    if aim is None:
        return f"{ratio:.1f}"
    return f"[{'green' if ratio >= aim else 'red'}]{ratio:.1f} ({aim}) {'✓' if ratio >= aim else '✗'}"


# The document


def document(page: Path, name: str, table: str) -> None:
    """Puts ``table`` on ``page`` between the comment called ``name`` and the next end."""
    head, begin, tail = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, tail = tail.partition("<!-- end -->\n")
    page.write_text(head + begin + table + end + tail)


def markdown(result: dict) -> str:
    ceilings, cells = result["ceilings"], result["cells"]
    judged = [c for c in cells if c["goal"]]
    reached = sum(c["ratios"].get("composed", 0) >= c["goal"] for c in judged)
    rates = (ceilings[n] / 1e9 for n in ("gemm_flop_per_s", "stream_byte_per_s", "read_byte_per_s"))
    gemm, stream, read = (f"{rate:.0f}" for rate in rates)
    columns = ("operation", "dtype", "M", "fused ms", "composed ms", "torch ms")
    columns += ("vs composed (goal)", "vs torch", "of peak")
    lines = [
        f"{place(result['machine'])} A float32 matrix product reached {gemm} GFLOP/s, copying {stream} GB/s "
        f"and reading {read} GB/s. "
        f"Goals over composed reached: {reached} of {len(judged)}. {_over_torch(cells)}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * 3}{'--:|' * 6}",
    ]
    for c in cells:
        times = [
            _milliseconds(c["contenders"][n]) if n in c["contenders"] else ""
            for n in ("fused", "composed", "torch")
        ]
        if "composed" not in c["contenders"]:
            times[1] = f"≈ {1e3 * c['composed_estimate_s']:.0f}"
        ratio = _ratio(c, "composed") + (f" ({c['goal']})" if c["goal"] else "")
        peak = f"{100 * c['contenders']['fused']['share']:.0f}% of {c['unit']}"
        what = f"{TITLES[c['op']]} {_shape(c)}"
        row = [what, c["dtype"], _rows(c), *times, ratio, _ratio(c, "torch"), peak]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def place(about: dict) -> str:
    """Where and when something was measured."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    return (
        f"{about['date'][:10]}, {about['cpu']}, {about['cores']} cores, {about['system']}, "
        f"device {about['device']}: {versions}, Python {about['python']}. "
        f"Other processes used {about['CPU used by others']:.0%} of the CPU."
    )
