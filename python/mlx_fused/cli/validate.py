"""``mlx-fused validate``: a checkpoint's model, stock and patched."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_fused.cli.info import describe
from mlx_fused.cli.output import console, json_option, print_json
from mlx_fused.cli.settings import must_be_on
from mlx_fused.patching import Calls
from mlx_fused.patching.report import TITLES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from rich.table import Table

_BADNESS = ["passed", "inconclusive", "failed"]
_STYLES = {"passed": "green", "inconclusive": "yellow", "failed": "red"}
_WORST = "each line shows the worst of its checks; --json has them all"
_NUMBERS = ("of its bound", "stock", "patched", "at most", "ratio")


def _text(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Rejects bytes that are not UTF-8: Python passes them as surrogates, which tokenizers do not accept."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter("It is not UTF-8.") from error
    return value


@click.command()
@click.argument("model")
@click.option(
    "--adapter-path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="LoRA adapters."
)
@click.option(
    "--prompt", callback=_text, help="What to compute logits for and to continue. Default: a paragraph."
)
@click.option(
    "--tokens",
    type=click.IntRange(2, 65536),
    default=32,
    show_default=True,
    help="How many to generate.",
)
@json_option
def validate(model: str, adapter_path: Path | None, prompt: str | None, tokens: int, as_json: bool) -> None:
    """Check MODEL, a directory or a name on the hub, patched.

    Every fused operation and its gradients against float64 where it runs; logits, the gradients of a LoRA
    step and greedy tokens against the model as it is, with speed and memory. Fails if numbers differ by more
    than rounding explains.
    """
    from rich.progress import Progress

    from mlx_fused import validate as checks

    must_be_on("validate")
    out = console(as_json)
    try:
        loaded, tokenizer = checks.load(model, adapter_path)
        ids = tokenizer.encode(checks.PROMPT if prompt is None else prompt)
        if len(ids) < 3:
            raise click.BadParameter("It takes three tokens at least.", param_hint="--prompt")
        with Progress(console=out, transient=True) as progress:
            task = progress.add_task("Validating")
            measured = checks.validate(
                loaded, ids, tokens, lambda done, total: progress.update(task, completed=done, total=total)
            )
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

    adapters = f" with {results['adapters']}" if results["adapters"] else ""
    out.print(escape(f"{results['model']}{adapters}"), style="bold", soft_wrap=True)
    out.print(_operations(results["operations"]))
    out.print(_end_to_end(results["end_to_end"]))
    out.print(_costs(results))
    shares = [
        f"{TITLES[part]} in {Calls(**of).share}" for part, of in results["calls"].items() if of["total"]
    ]
    out.print(f"ran fused: {', '.join(shares)}; on {results['machine']['default device']}", soft_wrap=True)
    if results["obstacles"]:
        out.print(escape(f"not fused: {'; '.join(results['obstacles'])}"), soft_wrap=True)
    passed, failed, inconclusive = (results["verdicts"][v] for v in ("passed", "failed", "inconclusive"))
    counts = f"{passed} checks passed, {failed} failed, {inconclusive} were inconclusive"
    word = "[bold green]PASSED[/]" if results["passed"] else "[bold red]FAILED[/]"
    out.print(f"{word}: {counts}", soft_wrap=True)


def _table(*titles: str, caption: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for title in titles:
        # In a narrow terminal names are folded, but numbers and verdicts must not be cut.
        number = title in _NUMBERS
        table.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _operations(operations: dict) -> Table:
    table = _table("operations against float64", "of its bound", "the worst", "", caption=_WORST)
    for step, found in operations.items():
        table.add_section()
        table.add_row(f"{step}: {found['count']}")
        for part, findings in found.items():
            if part == "count":
                continue
            worst = max(findings, key=lambda kind: _rank(findings[kind], findings[kind]["share"]))
            finding = findings[worst]
            where = f"{worst}, {_short(finding['layer'])}"
            table.add_row(f"  {part}", f"{finding['share']:.2g}", where, _verdict(findings.values()))
    return table


def _end_to_end(lines: dict) -> Table:
    table = _table("end to end, errors", "stock", "patched", "at most", "", caption=_WORST)
    for dtype, checks in lines.items():
        gradients, step, greedy = checks["gradients"], checks["logits_after_a_step"], checks["greedy"]
        worst = max(gradients, key=lambda kind: _rank(gradients[kind], _share(gradients[kind])))
        table.add_section()
        table.add_row(dtype)
        for title, line, group in (
            ("logits", checks["logits"], [checks["logits"]]),
            (f"gradient of {'.'.join(worst.split('.')[-2:])}", gradients[worst], gradients.values()),
            ("logits after a step", step, [step]),
        ):
            numbers = (f"{line[name]:.1e}" for name in ("stock_error", "patched_error", "tolerance"))
            table.add_row(f"  {title}", *numbers, _verdict(group))
        at, number = greedy["diverges_at"], str(greedy["tokens"])
        same = number if at is None else f"{at} the same"
        table.add_row("  greedy tokens", number, same, "", _verdict([greedy]))
        if at is not None:
            table.add_row("  gap where they part", "", f"{greedy['gap']:.1e}", f"{greedy['tolerance']:.1e}")
    return table


def _costs(results: dict) -> Table:
    table = _table("cost", "stock", "patched", "ratio")
    for phase, speeds in results["tokens_per_second"].items():
        stock, patched = speeds["stock"], speeds["patched"]
        table.add_row(f"{phase}, tokens/s", f"{stock:.1f}", f"{patched:.1f}", f"{patched / stock:.2f} x")
    for phase, sizes in results["peak_memory"].items():
        stock, patched = sizes["stock"] / 1e6, sizes["patched"] / 1e6
        ratio = f"{patched / stock:.2f} x"
        table.add_row(f"peak memory, {phase}, MB", f"{stock:.1f}", f"{patched:.1f}", ratio)
    return table


def _verdict(checks: Iterable[dict]) -> str:
    """The worst verdict of the checks, with how many of them have it."""
    verdicts = [check["verdict"] for check in checks]
    worst = max(verdicts, key=_BADNESS.index)
    count = f"{verdicts.count(worst)} " if len(verdicts) > 1 and worst != "passed" else ""
    return f"[{_STYLES[worst]}]{count}{worst}[/]"


def _short(layer: str) -> str:
    """A layer's number, or its name if it has none."""
    number = re.search(r"\.(\d+)\.", layer)
    return f"layer {number[1]}" if number else layer


def _rank(check: dict, share: float) -> tuple[int, float]:
    return _BADNESS.index(check["verdict"]), share


def _share(line: dict) -> float:
    return line["patched_error"] / (line["tolerance"] or 1)
