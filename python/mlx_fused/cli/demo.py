"""``mlx-fused demo``: a small model fine-tuned twice."""

import sys
from pathlib import Path

import click

from mlx_fused.cli.output import console, json_option, print_json
from mlx_fused.cli.settings import must_be_on


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("mlx_fused_demo"),
    show_default=True,
    help="Directory for the checkpoints, the adapters and results.json.",
)
@click.option("--iters", type=click.IntRange(min=1), default=48, show_default=True, help="LoRA steps.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--dense", is_flag=True, help="LoRA on float32 weights instead of QLoRA on 4-bit ones.")
@json_option
def demo(out: Path, iters: int, seed: int, dense: bool, as_json: bool) -> None:
    """Fine-tune a small 4-bit model with mlx-lm, stock and patched, and compare.

    Fails if the losses of the two runs differ by more than rounding explains.
    """
    from mlx_fused.demo import Settings, run

    must_be_on("the demo")
    people = console(as_json)
    results = run(out, Settings(iters=iters, seed=seed, dense=dense), people)
    if as_json:
        print_json(results)
    share = max(loss["difference"] / loss["tolerance"] for loss in results["losses"])
    verdict = f"the losses differ by {share:.1%} of what is allowed, at most"
    if not results["passed"]:
        people.print(f"[bold red]FAILED: {verdict}[/]")
        sys.exit(1)
    people.print(f"[bold green]PASSED: {verdict}[/]")
