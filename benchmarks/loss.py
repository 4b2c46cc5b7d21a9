"""Times the loss of a frozen head and the gradient of its input, MLX's and ours."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from rich.console import Console

import machine
import report_models
from mlx_fused import fused_linear_cross_entropy
from models import rates
from report import document
from timing import FULL, QUICK, quickest

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Work:
    dtype: str
    tokens: int
    hidden: int
    words: int

    def calls(self) -> dict[str, Callable[[], list[mx.array]]]:
        """What takes turns: the loss and x's gradient, of all rows and of every other."""
        mx.random.seed(0)
        dtype = getattr(mx, self.dtype)
        x = mx.random.normal((self.tokens, self.hidden)).astype(dtype)
        weight = (mx.random.normal((self.words, self.hidden)) * self.hidden**-0.5).astype(dtype)
        targets = mx.random.randint(0, self.words, (self.tokens,))
        half = mx.arange(self.tokens) % 2 == 0
        mx.eval(x, weight, targets, half)

        def stock(x: mx.array) -> mx.array:
            return nn.losses.cross_entropy(x @ weight.T, targets).astype(mx.float32).sum()

        def ours(x: mx.array, mask: mx.array | None = None) -> mx.array:
            return fused_linear_cross_entropy(x, weight, targets, mask=mask, reduction="sum")

        steps = {"stock": stock, "ours": ours, "ours, half of the rows": lambda x: ours(x, half)}

        def prepare(loss: Callable[[mx.array], mx.array]) -> Callable[[], list[mx.array]]:
            step = mx.compile(mx.value_and_grad(loss))

            def call() -> list[mx.array]:
                results = list(step(x))
                mx.eval(results)
                mx.synchronize()
                return results

            return call

        return {name: prepare(step) for name, step in steps.items()}

    @property
    def flops(self) -> int:
        """Of two products."""
        return 4 * self.tokens * self.hidden * self.words


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: a check that everything runs.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Also put the table into this folder's benchmarks.md.",
)
def main(quick: bool, out: Path, docs: Path | None) -> None:
    """Time the loss of a frozen head."""
    console, neighbours = Console(), machine.Neighbours()
    sizes, effort = ((32, 64, 160), QUICK) if quick else ((512, 2048, 8192), FULL)
    peaks, records = rates(DTYPES, effort), []
    for work in (Work(dtype, *sizes) for dtype in DTYPES):
        calls = work.calls()
        (loss, grad), (our_loss, our_grad) = (calls[name]() for name in ("stock", "ours"))
        size = mx.linalg.norm(grad.astype(mx.float32))
        records.append(
            {
                "dtype": work.dtype,
                "sizes": sizes,
                "seconds": quickest(calls, effort),
                "flops": work.flops,
                "difference": [
                    (mx.abs(our_loss - loss) / loss).item(),
                    (mx.linalg.norm((our_grad - grad).astype(mx.float32)) / size).item(),
                ],
            }
        )
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    about = machine.describe(device) | {"CPU used by others": neighbours.share()}
    result = {"records": records, "machine": about, "rates": peaks}
    out.mkdir(parents=True, exist_ok=True)
    (out / "loss.json").write_text(json.dumps(result, indent=1))
    columns, rows = table(result)
    report_models.show_tables(console, {"loss": "Loss of a frozen head"}, {"loss": (columns, rows)}, words=1)
    if docs:
        text = report_models.markdown_table(columns, rows, words=1)
        document(docs / "benchmarks.md", "loss", f"{report_models.about(result)}\n\n{text}")


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    rows = []
    for record in result["records"]:
        stock, ours, half = record["seconds"].values()
        rate, peak = record["flops"] / ours, result["rates"][record["dtype"]]
        shares = [f"{rate / 1e9:.0f} GFLOP/s", f"{rate / peak:.0%}"]
        times = [report_models.digits(s * 1e3) for s in (stock, ours, half)]
        ratios = [report_models.digits(ratio) for ratio in (stock / ours, half / ours)]
        rows.append([record["dtype"], *times, *ratios, *shares])
    columns = ["dtype", "stock ms", "ours ms", "half of the rows ms", "stock / ours", "half / all"]
    return [*columns, "rate", "of peak"], rows


if __name__ == "__main__":
    main()
