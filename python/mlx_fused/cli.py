"""The ``mlx-fused`` command."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

import mlx_fused

_INSTALL = "This needs more packages: pip install 'mlx-fused[lm]'"

try:
    import click
except ModuleNotFoundError:
    sys.exit(_INSTALL)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlx_fused.__version__, prog_name="mlx-fused")
def main() -> None:
    """Fused attention projections for MLX."""


@main.command()
def info() -> None:
    """Print the versions and the device in use."""
    rows = {
        "mlx-fused": mlx_fused.__version__,
        "mlx": version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "default device": mx.default_device(),
    }
    for name, value in rows.items():
        click.echo(f"{name:16}{value}")


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("mlx_fused_demo"),
    show_default=True,
    help="Directory for the checkpoint, the adapters and results.json.",
)
@click.option("--iters", type=click.IntRange(min=1), default=48, show_default=True, help="LoRA steps.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def demo(out: Path, iters: int, seed: int) -> None:
    """Fine-tune a small model with mlx-lm, stock and patched, and compare.

    Fails if the losses of the two runs differ by more than the tolerance.
    """
    try:
        from rich.console import Console

        from mlx_fused.demo import Settings, run
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}. {_INSTALL}") from error
    # The file is given so that what redirects stdout later does not redirect the demo.
    console = Console(file=sys.stdout, highlight=False)
    try:
        results = run(out, Settings(iters=iters, seed=seed), console)
    except FileExistsError as error:
        raise click.ClickException(str(error)) from error
    difference, tolerance = results["largest_relative_difference"], results["tolerance"]
    verdict = f"largest relative difference of the losses {difference:.1e}, tolerance {tolerance:.0e}"
    if not results["passed"]:
        console.print(f"[bold red]FAILED: {verdict}[/]")
        sys.exit(1)
    console.print(f"[bold green]PASSED: {verdict}[/]")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
