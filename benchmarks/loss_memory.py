"""Measures the memory of a LoRA step by its loss, and works out that of whole models (docs/memory.md)."""

import json
import subprocess
import sys
from pathlib import Path

import click
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from rich.console import Console

import machine
from memory import KEPT, kept_by_layer, kept_by_mlp
from mlx_fused.losses import cross_entropy_loss
from models import TINY
from report import document
from scaling import with_memory
from whole import MODELS, NO_HEAD, Config, Family, training_step

_LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "head_dim": 128}
_QWEN_8B = {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "head_dim": 128}
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
# As in the config.json of each, but that Gemma's head is an array of its own: it is frozen, so only weights
# grow.
FAMILIES: dict[str, Config] = {
    "Llama-3.2-1B": MODELS["Llama-3.2-1B"],
    "Llama-3.1-8B": MODELS["Llama-3.2-1B"] | _LLAMA_8B | _HEADS,
    "Qwen3-8B": MODELS["Qwen3-0.6B"] | _QWEN_8B | _HEADS,
    "Gemma3-1B": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "sliding_window_pattern": 1,  # all layers alike, so that one can be measured
    },
}
_TINY = "tiny"
WAYS = {"stock": "stock", "loss": "patched, MLX's loss", "ours": "patched, our loss"}
MEASURED = {"Llama-3.2-1B": (128, 1024), "Gemma3-1B": (128, 1024)}
MOST_OF_STOCK = 128  # tokens, of which its products on a CPU take a minute
TOKENS = (2048, 4096, 8192)
DTYPE = "bfloat16"
# Of an adapter: itself, its gradient and two moments of Adam, in float32.
_ADAPTER_BYTES = 4 * 4


def peak(name: str, way: str, tokens: int) -> int:
    """Bytes that a LoRA step of one layer and the head allocates, weights not counted."""
    model = Family(_config(name), DTYPE).model(1, way != "stock", lora=True)
    loss = cross_entropy_loss if way == "ours" else default_loss
    return with_memory(training_step(model, tokens, loss=loss))[1]


def parts(name: str) -> dict[str, float]:
    """Of a patched model: bytes that a layer and its MLP keep per token, and those of a layer's adapters."""
    family = Family(_config(name), DTYPE).without(NO_HEAD)
    adapters = sum(a.size for _, a in tree_flatten(family.model(1, True, lora=True).trainable_parameters()))
    return {
        "layer": kept_by_layer(family, True, KEPT),
        "mlp": kept_by_mlp(family, True, KEPT),
        "adapters": adapters * _ADAPTER_BYTES,
    }


def _config(name: str) -> Config:
    return TINY if name == _TINY else FAMILIES[name]


def in_fresh_process(*arguments: object):
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measured_table(peaks: dict[str, dict[int, dict[str, int]]]) -> str:
    rows = ["| model, one layer and the head | tokens | " + " | ".join(WAYS.values()) + " |"]
    rows.append("|---|--:|" + "--:|" * len(WAYS))
    for name, by_tokens in peaks.items():
        for tokens, by_way in by_tokens.items():
            cells = [f"{by_way[way] / 1e6:.0f} MB" if way in by_way else "" for way in WAYS]
            rows.append(f"| {name} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def arithmetic_table(found: dict[str, dict[str, float]]) -> str:
    columns = (
        "MLX's loss: logits",
        "our loss: dx",
        "MLPs",
        "attention and norms",
        "adapters",
        "without logits",
    )
    rows = ["| model | tokens | " + " | ".join(columns) + " | largest part |"]
    rows.append("|---|--:|" + "--:|" * len(columns) + "---|")
    for name, of in found.items():
        config = _config(name)
        layers = config["num_hidden_layers"]
        for tokens in TOKENS:
            logits = 4 * 2 * tokens * config["vocab_size"]
            kept = {
                "our loss": 2 * 2 * tokens * config["hidden_size"],
                "MLPs": tokens * layers * of["mlp"],
                "attention and norms": tokens * layers * (of["layer"] - of["mlp"]),
                "adapters": layers * of["adapters"],
            }
            share = sum(kept.values()) / (sum(kept.values()) - kept["our loss"] + logits)
            cells = [f"{size / 1e9:.2f}" for size in (logits, *kept.values())]
            rows.append(
                f"| {name} | {tokens} | {' | '.join(cells)} | {share:.0%} | {max(kept, key=kept.get)} |"
            )
    return "\n".join(rows)


@click.command()
@click.option("--one", is_flag=True, help="Measure one thing and print it, in this process.")
@click.argument("what", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option(
    "--docs", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Write memory.md."
)
@click.option("--quick", is_flag=True, help="A tiny model: a check that everything runs.")
def main(one: bool, what: tuple[str, ...], out: Path, docs: Path | None, quick: bool) -> None:
    """Measure LoRA steps with and without logits, each in a process of its own."""
    if one:
        print(json.dumps(parts(*what) if len(what) == 1 else peak(*what[:2], int(what[2]))))
        return
    console = Console()
    peaks = {}
    for name, counts in ({_TINY: (KEPT,)} if quick else MEASURED).items():
        for tokens in counts:
            for way in WAYS:
                if way != "stock" or tokens <= MOST_OF_STOCK:
                    found = in_fresh_process(name, way, tokens)
                    peaks.setdefault(name, {}).setdefault(tokens, {})[way] = found
                    console.print(f"{name}, {tokens} tokens, {WAYS[way]}: {found / 1e6:.0f} MB")
    found = {name: in_fresh_process(name) for name in ([_TINY] if quick else FAMILIES)}
    out.mkdir(parents=True, exist_ok=True)
    described = machine.describe("cpu" if mx.default_device() == mx.cpu else "gpu")
    result = {"peaks": peaks, "parts": found, "machine": described}
    (out / "loss_memory.json").write_text(json.dumps(result, indent=1))
    for table in (measured_table(peaks), arithmetic_table(found)):
        console.print(table)
    if docs:
        document(docs / "memory.md", "measured", measured_table(peaks) + "\n")
        document(docs / "memory.md", "arithmetic", arithmetic_table(found) + "\n")


if __name__ == "__main__":
    main()
