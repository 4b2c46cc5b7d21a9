"""``mlx-fused info``: what is installed, what it runs on, and who computes what."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import mlx.core as mx

import mlx_fused
from mlx_fused import _ext
from mlx_fused.cli.calls import Sizes, kinds
from mlx_fused.cli.output import json_option, print_json
from mlx_fused.tuning import Kind, path
from mlx_fused.tuning.measure import route_of

ROWS = (1, 8, 128, 1024)
_VARIABLES = (
    "MLX_FUSED",
    "MLX_FUSED_ROUTE",
    "MLX_FUSED_CACHE",
    "MLX_FUSED_NUM_THREADS",
    "MLX_FUSED_MAX_ISA",
)
_MARKS = {"tuned": "*", "built-in": "", "MLX_FUSED_ROUTE": ""}


@click.command()
@json_option
def info(as_json: bool) -> None:
    """Print versions, the device, and who computes what."""
    facts = describe() | {"settings": {name: os.environ[name] for name in _VARIABLES if name in os.environ}}
    table = dict(routes())
    if as_json:
        print_json(facts | {"routes": _by_rows(table, 0), "sources": _by_rows(table, 1)})
        return
    settings = facts.pop("settings")
    for name, value in (facts | settings).items():
        click.echo(f"{name:42}{value}")
    click.echo()
    lines = [(name, *(route + _MARKS[source] for route, source in row)) for name, row in table.items()]
    for name, *row in (("tokens", *ROWS), *lines):
        click.echo(f"{name:42}{''.join(f'{cell:<11}' for cell in row)}".rstrip())
    if any(source == "tuned" for row in table.values() for _, source in row):
        click.echo(f"\n* as measured: {path()}")


def _by_rows(table: dict[str, list], item: int) -> dict[str, dict[str, str]]:
    rows = [str(m) for m in ROWS]
    return {n: dict(zip(rows, [cell[item] for cell in cells], strict=True)) for n, cells in table.items()}


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


def routes() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """For each kind of call, who computes it at each of ``ROWS``, and what decides that.

    The former, ``"fused"`` or ``"composed"``, is found in the graphs of such calls, which are not evaluated.
    """
    for weights in ("bfloat16", "4-bit", "4-bit + LoRA"):
        for name, kind in kinds(Sizes(), weights).items():
            yield f"{weights}: {name}", [(route_of(kind, m), _source(kind, m)) for m in ROWS]


def _source(kind: Kind, rows: int) -> str:
    if os.environ.get("MLX_FUSED_ROUTE"):
        return "MLX_FUSED_ROUTE"
    return "tuned" if _ext.tuned_route(kind, rows) else "built-in"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
