"""Times whole models with random weights, stock and patched: ``make bench``.

One layer and the head are timed, and added up to the model: a whole one takes minutes per step on a CPU.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.console import Console

import machine
import mlx_fused
import report
from timing import FULL, QUICK, Effort, first_call, measure

MODELS = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}
TINY = MODELS["Llama-3.2-1B"] | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
WEIGHTS = ("float32", "bfloat16", "4-bit bfloat16")
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}  # mlx-lm's defaults
CONTEXT = 128
TOKENS = {"float32": 128, "bfloat16": 128, "4-bit bfloat16": 16}  # stock takes minutes for more


class Work(NamedTuple):
    """Something that users wait for: the calls of one layer and of the head that it takes."""

    name: str
    layer: Callable
    head: Callable


def make(config: dict, weights: str) -> nn.Module:
    """A model with one layer."""
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config | {"num_hidden_layers": 1}))
    model.set_dtype(getattr(mx, weights.split()[-1]))
    if weights.startswith("4-bit"):
        nn.quantize(model, group_size=32 if config is TINY else 64, bits=4)
    model.freeze()
    mx.eval(model.parameters())
    return model


def works(model: nn.Module, tokens: int) -> Iterator[Work]:
    """What is timed, in this order: the last one adds adapters to the model."""
    mx.random.seed(1)
    layer, dtype = model.layers[0], model.model.norm.weight.dtype
    draw = lambda *shape: mx.random.normal(shape).astype(dtype)  # noqa: E731
    one, many, cotangent = (draw(1, n, model.args.hidden_size) for n in (1, tokens, tokens))
    targets = mx.random.randint(0, model.args.vocab_size, (1, tokens))
    cache = KVCache()
    filling = [draw(1, model.args.num_key_value_heads, CONTEXT, model.args.head_dim) for _ in range(2)]
    mx.eval(one, many, cotangent, targets, cache.update_and_fetch(*filling))

    def decode() -> mx.array:
        y = _run(layer, one, None, cache)
        cache.trim(1)
        return y

    def logits(x: mx.array) -> mx.array:
        return model.model.embed_tokens.as_linear(model.model.norm(x))

    def layer_loss(adapters: dict, x: mx.array) -> mx.array:
        layer.update(adapters)
        return (layer(x, "causal") * cotangent).sum()

    def head_loss(x: mx.array) -> mx.array:
        return nn.losses.cross_entropy(logits(x), targets, reduction="mean")

    last = partial(_run, logits, one)  # generation needs the logits of the last token only
    yield Work(f"decode after {CONTEXT} tokens", decode, last)
    yield Work(f"prefill of {tokens} tokens", partial(_run, layer, many, "causal"), last)
    mx.random.seed(2)
    linear_to_lora_layers(model, -1, LORA)
    mx.eval(model.parameters())
    step = mx.compile(mx.value_and_grad(layer_loss, argnums=(0, 1)))
    head_step = partial(_run, mx.compile(mx.value_and_grad(head_loss)), many)
    yield Work(
        f"LoRA step of {tokens} tokens", partial(_run, step, layer.trainable_parameters(), many), head_step
    )


def _run(function: Callable, *args: object) -> object:
    results = function(*args)
    mx.eval(results)
    mx.synchronize()
    return results


def time_model(name: str, config: dict, weights: str, tokens: int, effort: Effort) -> list[dict]:
    """The record of each work: seconds of the whole model, and what they are made of."""
    stock, patched = make(config, weights), make(config, weights)
    mlx_fused.patch(patched)
    pairs = [works(model, tokens) for model in (stock, patched)]
    records = []
    for works_of_stock, works_of_patched in zip(*pairs, strict=True):
        calls = {
            "stock": works_of_stock.layer,
            "patched": works_of_patched.layer,
            "head": works_of_stock.head,  # patching does not change it
        }
        results, seconds = _time(calls, effort)
        layers = config["num_hidden_layers"]
        total = {who: layers * seconds[who] + seconds["head"] for who in ("stock", "patched")}
        records.append(
            {
                "model": name,
                "weights": weights,
                "work": works_of_stock.name,
                "layer_s": {who: seconds[who] for who in total},
                "head_s": seconds["head"],
                "total_s": total,
                "ratio": total["stock"] / total["patched"],
                "difference": _difference(results["patched"], results["stock"]),
            }
        )
    return records


def _time(calls: dict[str, Callable], effort: Effort) -> tuple[dict, dict[str, float]]:
    """The results of the calls, and their median seconds; if one is slow, each has one more call."""
    first = {name: first_call(call) for name, call in calls.items()}  # compiles, and warms up
    if max(seconds for _, seconds in first.values()) > effort.once:
        effort = replace(effort, cell=0, min_rounds=1, turn=0)
    medians = {name: float(np.median(samples)) for name, samples in measure(calls, effort).items()}
    return {name: result for name, (result, _) in first.items()}, medians


def _difference(actual: object, expected: object) -> float:
    """The largest norm of a difference, as a part of the expected array's norm."""
    pairs = zip(tree_flatten(actual), tree_flatten(expected), strict=True)
    parts = [(a.astype(mx.float32), b.astype(mx.float32)) for (_, a), (_, b) in pairs]
    return max(
        (mx.linalg.norm((a - b).flatten()) / mx.linalg.norm(b.flatten())).item()
        for a, b in parts
        if mx.any(b).item()
    )


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Repeatable.")
@click.option("--weights", multiple=True, type=click.Choice(WEIGHTS), help="Repeatable.")
@click.option("--quick", is_flag=True, help="A tiny model: a check that everything runs.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Also put the table into this folder's benchmarks.md.",
)
def main(models: tuple, weights: tuple, quick: bool, out: Path, docs: Path | None) -> None:
    """Time whole models with random weights, stock and patched."""
    console, neighbours = Console(), machine.Neighbours()
    configs = {"tiny": TINY} if quick else {name: MODELS[name] for name in models or MODELS}
    records = []
    for name, config in configs.items():
        for kind in weights or WEIGHTS:
            console.print(f"{name}, {kind} ...")
            tokens = 8 if quick else TOKENS[kind]
            records += time_model(name, config, kind, tokens, QUICK if quick else FULL)
    about = machine.describe(str(mx.default_device().type).split(".")[-1])
    result = {"machine": about | {"CPU used by others": neighbours.share()}, "records": records}
    out.mkdir(parents=True, exist_ok=True)
    (out / "models.json").write_text(json.dumps(result, indent=1))
    report.show_models(console, result)
    if docs:
        report.document(docs, "models", report.markdown_of_models(result))


if __name__ == "__main__":
    main()
