"""Writes the tables of docs/design/routing.md: ``python tests/routing_page.py``."""

import json
from pathlib import Path

from metal_cost import report
from metal_cost.cells import CELLS
from metal_cost.routes import decisive
from mlx_fused._ext import _internals

DOCUMENT = Path(__file__).parents[1] / "docs" / "design" / "routing.md"
MARKER = "<!-- what follows is written by tests/routing_page.py -->"
HEAD = ("device", "part of the call", "weights", "rows", "route", "reason")


def _table(head, rows):
    yield from (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    yield ""


def _rows(first, last):
    if last is None:
        return f"{first} or more" if first else "any"
    return str(first) if first == last else f"{first} to {last}"


def page(text):
    """The document with today's tables."""
    lines = [text.partition(MARKER)[0] + MARKER, "", "## The table", ""]
    rows = (
        (device, part, weights, _rows(first, last), route, reason)
        for device, part, weights, first, last, route, reason in _internals.route_table()
    )
    lines += _table(HEAD, rows)
    lines += ["## Misses that do not decide", ""]
    found = json.loads(report.RESULT.read_text())["kernels"]
    others = ((f"`{name}`", ", ".join(decisive(cell, found)[1])) for name, cell in CELLS.items())
    lines += _table(("cell", "misses"), ((name, missed) for name, missed in others if missed))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(page(DOCUMENT.read_text()))
