"""Runs the demo, from an empty directory to the verdict."""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mlx_fused.cli.output import to_json
from mlx_fused.validate import sum_error

from .checkpoint import build, quantize
from .corpus import PROMPT, help_texts, read_modules, train_tokenizer
from .finetune import Run, finetune, write_dataset
from .settings import Settings

_MARKER = ".mlx-fused-demo"


def run(out: Path, settings: Settings, console: Console) -> dict:
    """Build a checkpoint in ``out``, fine-tune it stock and patched, compare and generate.

    Args:
        out (Path): A directory that is new, empty, or an earlier demo's.
        settings (Settings): The sizes of the model and its trainings.
        console (rich.console.Console): Where to print.

    Returns:
        dict: The results, as written to ``results.json`` in ``out``. ``passed`` tells whether all losses of
        the two runs agree within their tolerances.

    Raises:
        FileExistsError: If ``out`` holds files that are not the demo's.
        RuntimeError: If a layer of the patched model was not fused.
    """
    _claim(out)
    model_path, data_path = out / "model", out / "data"
    method = "LoRA" if settings.dense else "QLoRA"
    adapter_paths = {name: out / f"adapters-{name}" for name in ("stock", "patched")}
    start = time.perf_counter()
    seconds = {}

    console.print("Reading the standard library, training a tokenizer")
    modules = read_modules()
    tokenizer = train_tokenizer(list(modules.values()), settings.vocab_size)
    write_dataset(data_path, help_texts(modules, settings.seed), settings)

    with _progress(console, "pretraining", settings.pretrain_steps, seconds) as on_step:
        model = build(model_path, list(modules.values()), tokenizer, settings, on_step)
    parameters, share = _sizes(model)
    console.print(
        f"{model_path}: Llama, {settings.num_layers} layers, {parameters / 1e6:.2f} M parameters; "
        f"{share:.0%} of the weights in its products are the QKV projections'",
        soft_wrap=True,
        markup=False,
    )
    del model
    if not settings.dense:
        dense_path, model_path = model_path, out / "model-4bit"
        quantize(dense_path, model_path, settings)
        console.print(f"{model_path}: the same in 4 bits", soft_wrap=True, markup=False)

    runs = {}
    for name, adapter_path in adapter_paths.items():
        with _progress(console, f"{method}, {name}", settings.iters, seconds) as on_report:
            runs[name] = finetune(model_path, data_path, adapter_path, settings, name == "patched", on_report)

    texts = {"base": _generate(model_path, None, settings)}
    for name, adapter_path in adapter_paths.items():
        texts[name] = _generate(model_path, adapter_path, settings)
    seconds["total"] = time.perf_counter() - start

    losses = compare(runs["stock"], runs["patched"])
    results = {
        "device": str(mx.default_device()),
        "model": str(model_path),
        "weights": "float32" if settings.dense else "4-bit",
        "seed": settings.seed,
        "iters": settings.iters,
        "parameters": parameters,
        "qkv_share": share,
        "runs": {name: _as_json(run) for name, run in runs.items()},
        "losses": losses,
        "passed": all(loss["difference"] <= loss["tolerance"] for loss in losses),  # False for NaN
        "texts": texts,
        "seconds": seconds,
    }
    (out / "results.json").write_text(to_json(results) + "\n")
    _show(console, results)
    return results


def _claim(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise FileExistsError(f"--out must be new, empty or an earlier demo's but got {out}.")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


@contextmanager
def _progress(
    console: Console, title: str, total: int, seconds: dict[str, float]
) -> Iterator[Callable[[int, float], None]]:
    """Show a bar for one training, print a line for every eighth of it, and add its time to ``seconds``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    start = time.perf_counter()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def advance(step: int, loss: float) -> None:
            progress.update(task, completed=step)
            if step % max(1, total // 8) == 0:
                progress.console.print(f"{title:14} step {step:3} of {total}  loss {loss:.4f}")

        yield advance
    seconds[title] = time.perf_counter() - start


def _sizes(model: nn.Module) -> tuple[int, float]:
    """The number of parameters, and the QKV projections' share of those that are used in matrix products."""
    sizes = {name: weight.size for name, weight in tree_flatten(model.parameters())}
    in_products = sum(n for name, n in sizes.items() if "proj" in name or "lm_head" in name)
    qkv = sum(n for name, n in sizes.items() if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"))
    return sum(sizes.values()), qkv / in_products


def _generate(model_path: Path, adapter_path: Path | None, settings: Settings) -> str:
    """Continue the prompt greedily with the unpatched model."""
    adapters = str(adapter_path) if adapter_path else None
    model, tokenizer = mlx_lm.load(str(model_path), adapter_path=adapters)
    return PROMPT + mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=settings.max_new_tokens)


def compare(stock: Run, patched: Run) -> list[dict]:
    """Each loss of both runs, their relative difference, and the largest that reordered sums explain.

    The sums behind a loss are those of its own forward, and of the forward and backward (two products for
    each of the forward) of every step before it.
    """
    return [
        {
            "kind": kind,
            "step": step,
            "stock": a,
            "patched": (b := getattr(patched, f"{kind}_losses")[step]),
            "difference": abs(a - b) / abs(a),
            "tolerance": sum_error((1 + 3 * step) * patched.terms),
        }
        for kind in ("train", "val")
        for step, a in getattr(stock, f"{kind}_losses").items()
    ]


def _as_json(run: Run) -> dict:
    return {
        "train_losses": run.train_losses,
        "val_losses": run.val_losses,
        "tokens_per_second": run.tokens_per_second,
        "peak_memory": run.peak_memory,
    }


def _show(console: Console, results: dict) -> None:
    stock, patched = results["runs"]["stock"], results["runs"]["patched"]
    table = Table(title=f"mlx-lm LoRA on {results['weights']} weights, the same seed and data twice")
    for title in ("", "stock", "patched", "difference", "at most"):
        table.add_column(title, justify="right" if title else "left")
    for loss in results["losses"]:
        values = (f"{loss[name]:.6f}" for name in ("stock", "patched"))
        limits = (f"{loss[name]:.1e}" for name in ("difference", "tolerance"))
        table.add_row(f"{loss['kind']} loss, step {loss['step']}", *values, *limits)
    table.add_section()
    a, b = stock["tokens_per_second"], patched["tokens_per_second"]
    table.add_row("tokens per second", f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f} x")
    a, b = stock["peak_memory"], patched["peak_memory"]
    table.add_row("peak memory, MB", f"{a / 1e6:.1f}", f"{b / 1e6:.1f}", f"{b / a:.2f} x")
    console.print(table)

    titles = {
        "base": "The base model continues the prompt",
        "stock": "with the adapters of the stock run",
        "patched": "with the adapters of the patched run, in an unpatched model",
    }
    for name, title in titles.items():
        console.print(Panel(Text(results["texts"][name].rstrip()), title=title, title_align="left"))
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items())
    console.print(f"{phases}, on {results['device']}", soft_wrap=True)
    more = f"More of this checkpoint: mlx-fused validate {shlex.quote(results['model'])}"
    console.print(more, soft_wrap=True, markup=False)
