"""``mlx-fused info``: what is installed, what it runs on, and who computes what."""

import io
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import click
import mlx.core as mx

import mlx_fused
from mlx_fused import _ext, tuning
from mlx_fused.cli.calls import Call, Sizes, make_calls, make_weightless
from mlx_fused.cli.output import json_option, print_json

ROWS = (1, 8, 128, 1024)
_VARIABLES = (
    "MLX_FUSED",
    "MLX_FUSED_ROUTE",
    "MLX_FUSED_CACHE",
    "MLX_FUSED_NUM_THREADS",
    "MLX_FUSED_MAX_ISA",
)


class Decision(NamedTuple):
    """Who computes a call, ``"fused"`` or ``"composed"``, what decided that, and why."""

    route: str
    source: str
    reason: str


@click.command()
@json_option
def info(as_json: bool) -> None:
    """Print versions, the device, and who computes what: calls of Llama-3.2-1B's sizes."""
    facts = describe() | {"settings": {name: os.environ[name] for name in _VARIABLES if name in os.environ}}
    table = dict(routes())
    if as_json:
        print_json(facts | {"routes": {name: _by_rows(row) for name, row in table.items()}})
        return
    settings = facts.pop("settings")
    for name, value in (facts | settings).items():
        click.echo(f"{name:42}{value}")
    click.echo()
    decisions = list(dict.fromkeys(decision for row in table.values() for decision in row))
    cells = {decision: f"{decision.route} [{n}]" for n, decision in enumerate(decisions, 1)}
    for name, *row in (("tokens", *ROWS), *((name, *map(cells.get, row)) for name, row in table.items())):
        click.echo(f"{name:42}{''.join(f'{cell:<14}' for cell in row)}".rstrip())
    click.echo()
    for n, decision in enumerate(decisions, 1):
        click.echo(f"[{n}] {decision.source}: {decision.reason}")
    click.echo("The table and what it rests on: docs/design/routing.md")


def _by_rows(row: list[Decision]) -> dict[str, dict[str, str]]:
    return {str(rows): decision._asdict() for rows, decision in zip(ROWS, row, strict=True)}


def describe() -> dict[str, object]:
    """Versions, device and machine, to accompany results."""
    return {
        "mlx-fused": mlx_fused.__version__,
        "mlx": version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "default device": str(mx.default_device()),
        "device name": mx.device_info().get("device_name", platform.machine()),
        "kernels": _kernels(),
        "measured routes": tuning.in_use or "none",
    }


def _kernels() -> str:
    folder = Path(_ext.__file__).parent
    if mx.default_device() == mx.cpu:
        affinity = getattr(os, "sched_getaffinity", None)
        cpus = len(affinity(0)) if affinity else os.cpu_count()
        return f"C++, on {os.environ.get('MLX_FUSED_NUM_THREADS') or cpus} threads"
    if (metallib := folder / "mlx_fused.metallib").exists():
        return str(metallib)
    if sources := sorted(file.name for file in folder.glob("*kernels.metal")):
        return f"{', '.join(sources)} in {folder}, compiled by the device at first use"
    return "none for this device: MLX's own operations run"


def routes() -> Iterator[tuple[str, list[Decision]]]:
    """For each kind of call, what was decided at each of ``ROWS``: such calls are made, but not evaluated."""
    made = [(weights, make_calls, _decision) for weights in ("bfloat16", "4-bit", "4-bit + LoRA")]
    for weights, make, decide in [*made, ("bfloat16", make_weightless, _of_device)]:
        by_rows = [make(Sizes(), weights, rows) for rows in ROWS]
        for calls in zip(*by_rows, strict=True):
            yield f"{weights}: {calls[0].name}", [decide(call) for call in calls]
            yield f"{weights}: {calls[0].name}, gradient", [decide(call.gradient()) for call in calls]


def _decision(call: Call) -> Decision:
    call.fused(*call.inputs)
    return Decision(*_ext.last_decision())


def _of_device(call: Call) -> Decision:
    """Of an operation without a route, as its graph shows it."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *call.fused(*call.inputs))
    if "Fused" in graph.getvalue():
        return Decision("fused", "no route", "One operation, where MLX's is several on a CPU.")
    return Decision("composed", "no kernel", "MLX's own is one operation on a GPU.")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
