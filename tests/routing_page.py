"""Writes the tables of docs/design/routing.md: ``python tests/routing_page.py``."""

import json
from pathlib import Path

import mlx.core as mx

from metal_cost import report
from metal_cost.cells import CELLS
from metal_cost.routes import decisive
from mlx_fused._ext import _internals

DOCUMENT = Path(__file__).parents[1] / "docs" / "design" / "routing.md"
MARKER = "<!-- what follows is written by tests/routing_page.py -->"
ROWS = (1, 8, 32, 128, 512, 2048)
CLASSES = {"g": "M1 to M4", "s": "their Max"}  # without matrix units
FOUR_BITS, LORA = {"quantization": ("affine", 4, 64)}, {"rank": 8}
TRAINED = {"wanted": ["input", "lora_a", "lora_b"]}
# Of Llama-3.2-1B's sizes, in bfloat16.
QKV, OUTPUT = {"features": [2048, 512, 512], "in_features": 2048}, {"features": [2048], "in_features": 2048}
GATED = {"features": [8192, 8192], "in_features": 2048}
CALLS = {
    "QKV": ("qkv", QKV),
    "output + residual": ("output", OUTPUT),
    "QKV, 4 bits": ("qkv", QKV | FOUR_BITS),
    "output + residual, 4 bits": ("output", OUTPUT | FOUR_BITS),
    "QKV, 4 bits and LoRA": ("qkv", QKV | FOUR_BITS | LORA),
    "its gradient": ("qkv_grad", QKV | FOUR_BITS | LORA | TRAINED),
    "gate and up": ("gated", GATED),
    "gate and up, 4 bits": ("gated", GATED | FOUR_BITS),
    "QKV with LoRA": ("qkv", QKV | LORA),
    "its gradient ": ("qkv_grad", QKV | LORA | TRAINED),
}
HEAD = ("device", "part of the call", "weights", "rows", "route", "reason")


def _table(head, rows):
    yield from (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    yield ""


def _rows(first, last):
    if last is None:
        return f"{first} or more" if first else "any"
    return str(first) if first == last else f"{first} to {last}"


def _examples():
    for name, (operation, about) in CALLS.items():
        for size, on in CLASSES.items():
            routes = (
                _internals.route(operation, [mx.bfloat16], rows, device="metal", size=size, **about)
                for rows in ROWS
            )
            yield name, on, *({"fused": "ours", "composed": "MLX's"}[route] for route in routes)


def page(text):
    """The document with today's tables."""
    lines = [text.partition(MARKER)[0] + MARKER, "", "## The table", ""]
    rows = (
        (device, part, weights, _rows(first, last), route, reason)
        for device, part, weights, first, last, route, reason in _internals.route_table()
    )
    lines += _table(HEAD, rows)
    lines += ["## What it comes to", "", "For a layer of Llama-3.2-1B's sizes in bfloat16, by tokens:", ""]
    lines += _table(("call", "on", *map(str, ROWS)), _examples())
    lines += ["## Misses that do not decide", ""]
    found = json.loads(report.RESULT.read_text())["kernels"]
    others = ((f"`{name}`", ", ".join(decisive(cell, found)[1])) for name, cell in CELLS.items())
    lines += _table(("cell", "misses"), ((name, missed) for name, missed in others if missed))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(page(DOCUMENT.read_text()))
