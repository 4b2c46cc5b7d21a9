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

TITLES = {"qkv": "QKV projection", "output": "Output projection + residual"}
COLORS = {"composed": "#2f6db5", "torch": "#e08a2e", "routed": "#8a8a8a", "addmm": "#58a55c"}


def show(console: Console, result: dict) -> None:
    """Prints one table per operation and dtype, then the summary."""
    for (op, dtype), group in groupby(result["cells"], key=lambda c: (c["op"], c["dtype"])):
        cells = list(group)
        names = list(cells[0]["contenders"])
        table = make_table(f"{TITLES[op]} {_shape(cells[0])} · {dtype}")
        times, ratios = [f"{n}\nms" for n in names], [f"vs\n{n}" for n in names[1:]]
        for column in ("M", *times, *ratios, "fused\nreaches", "of\npeak"):
            table.add_column(column, justify="right")
        for cell in cells:
            fused = cell["contenders"]["fused"]
            table.add_row(
                _rows(cell),
                *(_time(c) for c in cell["contenders"].values()),
                *(f"{ratio:.2f}" for ratio in cell["ratios"].values()),
                f"{fused['rate']:.1f} {cell['unit']}",
                f"{100 * fused['share']:.0f}%",
            )
        console.print(table)
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
        reached = sum(c["ratios"]["composed"] >= c["goal"] for c in judged)
        console.print(f"Goals reached: {reached} of {len(judged)}")
    # The goal against torch covers the shapes that have one against composed MLX.
    against_torch = [c["ratios"]["torch"] for c in judged or cells if "torch" in c["ratios"]]
    if against_torch:
        mean = np.exp(np.mean(np.log(against_torch)))
        aim = " (goal 1.0)" if judged else ""
        count = len(against_torch)
        console.print(f"Speedup over torch, geometric mean of {count} cells: {mean:.2f}{aim}")
    about, ceilings = result["machine"], result["ceilings"]
    console.print(
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, "
        f"device {about['device']}: float32 GEMM {ceilings['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s, "
        f"stream {ceilings['stream_byte_per_s'] / 1e9:.0f} GB/s",
        highlight=False,
    )
    busy = about["CPU used by others"]
    console.print(
        f"CPU used by other processes during the run: {100 * busy:.0f}%",
        style="bold red" if busy > 0.05 else "",
    )
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    console.print(f"{versions}, numpy's BLAS {about['numpy BLAS']}, {about['date']}", highlight=False)


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
    )
    for (op, dtype), cells in groups:
        axis = axes[ops.index(op), dtypes.index(dtype)]
        _bars(axis, cells)
        axis.set_title(f"{TITLES[op]} {_shape(cells[0])}, {dtype}", fontsize=10)
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
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(folder / "bench.png", dpi=120)
    plt.close(figure)


def _bars(axis: plt.Axes, cells: list[dict]) -> None:
    names = list(cells[0]["ratios"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        x = np.arange(len(cells)) + (i - (len(names) - 1) / 2) * width
        ratios = np.array([c["ratios"][name] for c in cells])
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
            up = ratio >= 1 or top > ratio
            axis.annotate(
                f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}",
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


def _time(timing: dict) -> str:
    milliseconds = np.format_float_positional(1e3 * timing["median_s"], 3, fractional=False, trim="-")
    return f"{milliseconds} ±{50 * timing['spread']:.0f}%"


def _rows(cell: dict) -> str:
    return f"{cell['rows']} +bwd" if cell["backward"] else str(cell["rows"])


def _verdict(cell: dict) -> str:
    ratio, aim = cell["ratios"]["composed"], cell["goal"]
    if aim is None:
        return f"{ratio:.1f}"
    return f"[{'green' if ratio >= aim else 'red'}]{ratio:.1f} ({aim}) {'✓' if ratio >= aim else '✗'}"
