"""Measures the memory of training: what an MLP keeps for its backward pass, and peaks of one layer."""

import json
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import default_loss
from rich.console import Console

import machine
import report_models
from models import TINY
from report import document
from scaling import with_memory
from whole import MODELS, NO_ATTENTION, NO_HEAD, NO_MLP, Family, random_tokens, training_step

SEQUENCE = 512  # tokens
KEPT = 128  # tokens with which that is measured: a page is little beside what they keep
MOST = 8192


def kept_by_layer(family: Family, patched: bool, tokens: int) -> float:
    """Bytes per token: what one layer more adds to what the forward pass leaves."""

    def kept(family: Family, layers: int) -> int:
        model = family.model(layers, patched, lora=True)
        batch, lengths = random_tokens(model, tokens + 1), mx.array([[0, tokens + 1]])
        mx.eval(lengths)
        mx.clear_cache()  # whose buffers may be larger than what is asked for
        before = mx.get_active_memory()
        (loss, _), held = nn.value_and_grad(model, default_loss)(model, batch, lengths)
        mx.eval(loss)  # the gradients are not evaluated, and hold what they need
        mx.synchronize()
        left = mx.get_active_memory() - before
        del held
        return left

    return (kept(family, 3) - kept(family, 2)) / tokens


def kept_by_mlp(family: Family, patched: bool, tokens: int) -> float:
    """The same of an MLP."""
    attentionless = family.without(NO_HEAD, NO_ATTENTION)
    return kept_by_layer(attentionless, patched, tokens) - kept_by_layer(
        attentionless.without(NO_MLP), patched, tokens
    )


def peak_of_layer(family: Family, patched: bool, tokens: int, sequence: int) -> int:
    """Bytes that a LoRA step of one layer allocates, weights not counted."""
    model = family.without(NO_HEAD).model(1, patched, lora=True)
    return with_memory(training_step(model, sequence, tokens // sequence))[1]


@click.command()
@click.option("--model", "name", type=click.Choice(list(MODELS)), default="Llama-3.2-1B")
@click.option("--weights", type=click.Choice(["bfloat16", "float32"]), default="bfloat16")
@click.option(
    "--most", type=click.IntRange(SEQUENCE), default=MOST, show_default=True, help="Tokens at most."
)
@click.option("--quick", is_flag=True, help="A tiny model: a check that everything runs.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Also put the tables into this folder's benchmarks.md.",
)
def main(name: str, weights: str, most: int, quick: bool, out: Path, docs: Path | None) -> None:
    """Measure the memory of training, stock and patched, which on a CPU takes stock many minutes."""
    console = Console()
    sequence, most = (16, 32) if quick else (SEQUENCE, most)
    family = Family(TINY if quick else MODELS[name], weights)
    kept, peaks = {}, {}
    for who in ("stock", "patched"):
        console.print(f"{who} ...")
        kept[who] = kept_by_mlp(family, who == "patched", KEPT)
        tokens = sequence
        while tokens <= most:
            peaks.setdefault(tokens, {})[who] = peak_of_layer(family, who == "patched", tokens, sequence)
            tokens *= 2
    result = {
        "model": "tiny" if quick else name,
        "weights": weights,
        "kept_bytes": kept,
        "peak_bytes": peaks,
        "machine": machine.describe("cpu" if mx.default_device() == mx.cpu else "gpu"),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.json").write_text(json.dumps(result, indent=1))
    report_models.show_memory(console, result)
    if docs:
        document(docs / "benchmarks.md", "training memory", report_models.markdown_of_memory(result))


if __name__ == "__main__":
    main()
