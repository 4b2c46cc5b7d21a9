"""``mlx-fused validate``: a checkpoint's model, stock and patched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_fused.cli.info import describe
from mlx_fused.cli.output import console, json_option, print_json

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("model")
@click.option(
    "--adapter-path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="LoRA adapters."
)
@click.option("--prompt", help="What to compute logits for and to continue. Default: a paragraph.")
@click.option(
    "--tokens", type=click.IntRange(min=2), default=32, show_default=True, help="How many to generate."
)
@json_option
def validate(model: str, adapter_path: Path | None, prompt: str | None, tokens: int, as_json: bool) -> None:
    """Compare MODEL, a directory or a name on the hub, with itself patched.

    Logits, the gradients of a LoRA step, greedy tokens, speed and memory. Fails if numbers differ by
    more than rounding explains.
    """
    from rich.progress import Progress

    from mlx_fused import validate as checks

    out = console(as_json)
    try:
        loaded, tokenizer = checks.load(model, adapter_path)
        ids = tokenizer.encode(checks.PROMPT if prompt is None else prompt)
        if len(ids) < 2:
            raise click.BadParameter("It takes two tokens at least.", param_hint="--prompt")
        with Progress(console=out, transient=True) as progress:
            task = progress.add_task("Validating", total=checks.STEPS)
            measured = checks.validate(loaded, ids, tokens, lambda: progress.advance(task))
    except checks.CannotValidate as error:
        raise click.BadParameter(str(error), param_hint="MODEL") from error
    adapters = str(adapter_path) if adapter_path else None
    call = {"machine": describe(), "model": model, "adapters": adapters, "prompt_tokens": len(ids)}
    results = call | measured
    _show(out, results)
    if as_json:
        print_json(results)
    if not results["passed"]:
        sys.exit(1)


def _show(out: Console, results: dict) -> None:
    from rich.markup import escape
    from rich.table import Table

    adapters = f" with {results['adapters']}" if results["adapters"] else ""
    table = Table(title=escape(f"{results['model']}{adapters}"))
    for title in (results["dtype"], "stock", "patched", ""):
        number = title in ("stock", "patched")  # what must not be cut where a terminal is narrow
        table.add_column(title, justify="right" if table.columns else "left", no_wrap=number)

    gradients = results["gradients"]
    worst = max(gradients, key=lambda kind: _badness(gradients[kind]))
    for title, check in (
        ("logits", results["logits"]),
        (f"gradient of {'.'.join(worst.split('.')[-2:])}", gradients[worst]),
    ):
        errors = (f"{check[name]:.1e}" for name in ("stock_error", "patched_error"))
        table.add_row(f"error of {title}", *errors, f"at most {check['tolerance']:.1e}", style=_style(check))
    greedy = results["greedy"]
    at, number = greedy["diverges_at"], str(greedy["tokens"])
    if at is None:
        table.add_row("greedy tokens", number, number, "the same")
    else:
        gap = f"gap {greedy['gap']:.1e}, at most {greedy['tolerance']:.1e}"
        table.add_row("greedy tokens", number, f"{at} the same", gap, style=_style(greedy))
    table.add_section()
    for phase, of in results["tokens_per_second"].items():
        stock, patched = of["stock"], of["patched"]
        table.add_row(f"{phase}, tokens/s", f"{stock:.1f}", f"{patched:.1f}", f"{patched / stock:.2f} x")
    for phase, of in results["peak_memory"].items():
        stock, patched = of["stock"] / 1e6, of["patched"] / 1e6
        table.add_row(
            f"peak memory, {phase}, MB", f"{stock:.1f}", f"{patched:.1f}", f"{patched / stock:.2f} x"
        )
    out.print(table)

    qkv, residual = (f"{calls['fused']} of {calls['total']}" for calls in results["calls"].values())
    out.print(
        f"calls that ran fused: {qkv} of QKV projections, {residual} of output projections + residual; "
        f"on {results['machine']['default device']}",
        soft_wrap=True,
    )
    if results["obstacles"]:
        out.print(escape(f"not fused: {'; '.join(results['obstacles'])}"), soft_wrap=True)
    out.print("[bold green]PASSED[/]" if results["passed"] else "[bold red]FAILED[/]")


def _badness(check: dict) -> tuple[bool, float]:
    return not check["passed"], check["patched_error"] / (check["tolerance"] or 1)


def _style(check: dict) -> str | None:
    return None if check["passed"] else "red"
