"""Times whole models with random weights, stock and patched, and outside contenders: ``make bench``."""

import gc
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import mlx.core as mx
from rich.console import Console

import machine
import outside
import report
import report_models
from parts import graph_building, layer_seconds, parts
from scaling import scale, size, with_memory
from timing import FULL, QUICK, Effort, first_call, take_turns
from whole import KINDS, MODELS, NO_HEAD, Family, Work, works

TINY = MODELS["Llama-3.2-1B"] | {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 3}
# Of which a whole takes seconds, to compare with what scaling says.
SMALL = MODELS["Llama-3.2-1B"] | {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 6}
WHO = ("stock", "patched")


def time_work(family: Family, work: Work, effort: Effort, rivals: dict) -> dict:
    """A record: who took how many seconds and how much memory, and from how many tokens that was scaled."""
    seconds, memory, scaled, calls = {}, {}, {}, {}
    for who in WHO:
        estimate = scale(family, work, who == "patched", effort)
        seconds[who], memory[who] = estimate.seconds, estimate.memory
        scaled[who] = estimate.tokens
        if estimate.seconds <= effort.never:
            del scaled[who]
            model = family.model(patched=who == "patched", lora=work.trains)
            calls[who] = work.prepare(model, work.tokens)
            memory[who] = with_memory(calls[who])[1] + size(model)
    for name, rival in rivals.items():
        if call := rival.prepare(work):
            calls[name] = call
            call()
    turns = take_turns(calls, replace(effort, cell=effort.decode) if work.decodes else effort)
    seconds |= {who: min(times) for who, times in turns.items()}
    return {
        "work": work.name,
        "tokens": work.tokens,
        "seconds": seconds,
        "median_s": {who: median(times) for who, times in turns.items()},
        "calls": {who: len(times) for who, times in turns.items()},
        "tokens_per_s": {who: work.tokens / s for who, s in seconds.items()},
        "ratio": seconds["stock"] / seconds["patched"],
        "memory": memory,
        "scaled": scaled,
        "difference": difference(family, work),
        "parts": parts(family, work, seconds["patched"], effort) if "patched" in calls else None,
        "layer_s": layer_seconds(family, work, effort),
        # Decode reads all weights for every token, and the rest multiplies with them.
        "amount": work.tokens * family.bytes() if work.decodes else family.flops(work),
    }


def difference(family: Family, work: Work) -> float:
    """How far logits or losses of stock and patched are apart, as a part of their norm, at one layer."""
    headless = family.without(NO_HEAD)
    stock, patched = (
        work.prepare(headless.model(1, patched, work.trains), min(16, work.tokens))().astype(mx.float32)
        for patched in (False, True)
    )
    return (mx.linalg.norm((patched - stock).flatten()) / mx.linalg.norm(stock.flatten())).item()


def check_scaling(tokens: int, effort: Effort) -> list[dict]:
    """Stock models that are small enough to be timed whole, and what scaling says of them."""
    found = []
    for kind in KINDS:
        family = Family(SMALL, kind)
        for work in works(tokens):
            whole = work.prepare(family.model(lora=work.trains), work.tokens)
            _, allocated = with_memory(whole)
            seconds = min(first_call(whole)[1] for _ in range(2))
            memory = allocated + size(family.model(lora=work.trains))
            for name, limit in (("layers", effort.never), ("tokens", 0)):
                scaled = scale(family, work, False, replace(effort, never=limit))
                found.append(
                    {
                        "weights": kind,
                        "work": work.name,
                        "scaled_in": name,
                        "tokens": scaled.tokens,
                        "seconds": scaled.seconds / seconds,
                        "memory": scaled.memory and scaled.memory / memory,
                    }
                )
    return found


def rates(kinds: Iterable[str], effort: Effort) -> dict[str, float]:
    """This machine's, measured now: bytes/s of reading, and flop/s of the products of each kind."""
    ceilings = machine.measure(effort.ceiling_size)
    found = {"read": ceilings.read}
    for kind in kinds:
        rate = outside.matrix_rate(kind, effort.ceiling_size) if mx.default_device() == mx.cpu else None
        found[kind] = max(rate or 0, ceilings.flops)
    return found


def add_shares(records: list[dict], peaks: dict[str, float]) -> None:
    """Compares each with the machine's rate that limits it."""
    for record in records:
        decodes = record["work"] == "decode"
        peak = peaks["read" if decodes else record["weights"]]
        amount = record["amount"]
        record["peak"] = {"unit": "GB/s" if decodes else "GFLOP/s", "rate": peak / 1e9}
        record["share_of_peak"] = {who: amount / s / peak for who, s in record["seconds"].items()}


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Repeatable.")
@click.option("--weights", multiple=True, type=click.Choice(KINDS), help="Repeatable.")
@click.option("--quick", is_flag=True, help="A tiny model: a check that everything runs.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Also put the tables into this folder's benchmarks.md, and the first into the README.md above it.",
)
@click.option("--no-rivals", is_flag=True, help="Leave llama.cpp and torch out even if they are installed.")
def main(models: tuple, weights: tuple, quick: bool, out: Path, docs: Path | None, no_rivals: bool) -> None:
    """Time whole models with random weights, stock and patched, and outside contenders."""
    console, neighbours = Console(), machine.Neighbours()
    configs = {"tiny": TINY} if quick else {name: MODELS[name] for name in models or MODELS}
    effort, tokens = (QUICK, 32) if quick else (FULL, 512)
    on_cpu = mx.default_device() == mx.cpu
    kinds = weights or KINDS
    out.mkdir(parents=True, exist_ok=True)
    peaks = [rates(kinds, effort)]
    records = []
    for name, config in configs.items():
        for kind in kinds:
            console.print(f"{name}, {kind} ...")
            found = outside.contenders(config, kind) if on_cpu and not no_rivals else {}
            rivals = {rival: make(config, kind) for rival, make in found.items()}
            family = Family(config, kind)
            for work in works(tokens):
                record = time_work(family, work, effort, rivals)
                records.append({"model": name, "weights": kind} | record)
            del family, rivals
            gc.collect()  # torch's models are cycles
            peaks.append(rates(kinds, effort))
            # A run takes most of an hour; one that is cut off leaves what it has.
            (out / "models.json").write_text(json.dumps({"records": records}, indent=1))
    best = {name: max(p[name] for p in peaks) for name in peaks[0]}
    add_shares(records, best)
    console.print("Graphs, and what scaling says of a small model ...")
    result = {
        "records": records,
        "graph_us": {name: graph_building(config, effort) for name, config in configs.items()},
        "scaling": [] if quick else check_scaling(128, effort),
        "machine": machine.describe("cpu" if on_cpu else "gpu") | {"CPU used by others": neighbours.share()},
        "rates": best,
    }
    (out / "models.json").write_text(json.dumps(result, indent=1))
    report_models.show(console, result)
    if docs:
        tables = report_models.markdown(result)
        for name, text in tables.items():
            report.document(docs / "benchmarks.md", name, text)
        report.document(docs.parent / "README.md", "models", tables["models"])


if __name__ == "__main__":
    main()
