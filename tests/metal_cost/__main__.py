"""Writes cost.json and the tables of docs/design/metal_cost.md; ``--only NAME`` prints its cells instead."""

import argparse
import sys

from rich.console import Console
from rich.progress import track

from . import compiler, page, report
from .cells import CELLS, KERNELS
from .mistakes import MISTAKES

parser = argparse.ArgumentParser(prog="python -m metal_cost", description=__doc__)
parser.add_argument("--only", help="the cells whose name or kernel has this in it")
only = parser.parse_args().only
cells = [c for c in CELLS.values() if not only or only in f"{c.name} {c.ours}"]
if not cells:
    sys.exit(f"metal-cost: no cell is named {only}")
kernels = [k for k in KERNELS.values() if any(k.name in (c.ours, c.mlx) for c in cells)]
kernels += [] if only else [m.kernel for m in MISTAKES.values()]
try:
    compiler.compiler()
    bar = {"total": len(kernels), "console": Console(stderr=True)}
    found = report.measure_all(kernels, lambda results: track(results, "Measuring kernels", **bar))
except (compiler.Missing, RuntimeError) as error:
    sys.exit(f"metal-cost: {error}")
if only:
    print("\n".join(page.brief(found, cells)))
else:
    new = report.write(found)
    page.DOCUMENT.write_text(page.page(page.DOCUMENT.read_text(), found))
    for cell, reasons in new.items():
        print(f"metal-cost: worse than accepted: {cell}: {report.text_of(reasons)}")
    unseen = [name for name, mistake in MISTAKES.items() if not report.seen(mistake, found)]
    for name in unseen:
        print(f"metal-cost: not seen: {name}")
    sys.exit(bool(new or unseen))
