"""``mlx-fused bench``: the operations and a transformer block, stock and fused, in turns."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import mlx.core as mx

from mlx_fused.cli.calls import (
    GROUP_SIZE,
    WEIGHTS,
    Call,
    Sizes,
    make_block,
    make_calls,
    make_embedding,
    make_loss,
    make_weightless,
    peak_memory,
)
from mlx_fused.cli.info import describe
from mlx_fused.cli.output import console, json_option, print_json

_ROUNDS = 5
_WORDS = 8192  # the most of a head and its loss: more would take stock minutes on some devices
_LARGEST = 2**31 - 1  # the largest size that an MLX shape can have
_TURN, _LIMIT = 0.02, 2  # seconds: the least for a turn, and after which no further round begins


@click.command()
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkpoint directory, for the sizes of its config.json. Default: those of Llama-3.2-1B.",
)
@click.option(
    "--weights",
    type=click.Choice(list(WEIGHTS)),
    multiple=True,
    default=list(WEIGHTS),
    help="Repeatable. Default: all.",
)
@click.option(
    "--rows",
    type=click.IntRange(1, _LARGEST),
    multiple=True,
    default=(1, 32),
    show_default=True,
    help="Tokens; repeatable.",
)
@json_option
def bench(model: Path | None, weights: tuple[str, ...], rows: tuple[int, ...], as_json: bool) -> None:
    """Time every operation, and a transformer block of mlx-lm, stock and fused in turns.

    Only the ratios mean something: other work on the machine slows down both. The head and the loss are
    timed with 8192 words at most.
    """
    from rich import box
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table

    sizes = _sizes_of(model) if model else Sizes()
    sizes = replace(sizes, vocabulary=min(sizes.vocabulary, _WORDS))
    widths = sizes.hidden, sizes.num_heads * sizes.head_dim, sizes.intermediate
    if any(kind.startswith("4-bit") for kind in weights) and any(width % GROUP_SIZE for width in widths):
        raise click.UsageError(f"Widths of 4-bit weights must be divisible by {GROUP_SIZE} but got {widths}.")
    needed = max(peak_memory(sizes, kind, m) for kind in weights for m in rows)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:  # MLX would make the machine swap, or be killed
        raise click.UsageError(
            f"What is timed must fit in this machine's {memory // 10**9} GB of memory "
            f"but got {max(rows)} tokens, {sizes}, which take {needed // 10**9} GB or more."
        )
    out = console(as_json)
    cells = []
    plan = [(kind, _with_weights, m) for kind in weights for m in rows]
    dtypes = dict.fromkeys(str(WEIGHTS[kind]).removeprefix("mlx.core.") for kind in weights)
    plan += [(dtype, make_weightless, m) for dtype in dtypes for m in rows]
    for kind, make, m in track(plan, "Measuring", console=out, transient=True):
        forward = make(sizes, kind, m)
        for call in [*forward, *(call.gradient() for call in forward if call.inputs)]:
            stock, fused = side_by_side(call)
            cells.append(
                {"weights": kind, "operation": call.name, "tokens": m, "stock_s": stock, "fused_s": fused}
            )

    # No padding, so that a terminal of 80 columns has room for all.
    title = escape(f"{model or 'Llama-3.2-1B'}: {sizes}")
    shown = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False}
    table = Table(title=title, caption="milliseconds, medians", **shown)
    for heading in ("weights", "operation", "tokens", "stock", "fused", "speedup"):
        table.add_column(heading, justify="right" if len(table.columns) > 1 else "left", no_wrap=True)
    for cell in cells:
        stock, fused = cell["stock_s"], cell["fused_s"]
        times = _short(1e3 * stock, 3), _short(1e3 * fused, 3), _short(stock / fused, 2)
        table.add_row(cell["weights"], cell["operation"], str(cell["tokens"]), *times)
    machine = describe()
    out.print(table)
    out.print(", ".join(f"{name} {value}" for name, value in machine.items()), soft_wrap=True)
    if as_json:
        print_json({"machine": machine, "sizes": vars(sizes), "cells": cells})


def _with_weights(sizes: Sizes, weights: str, rows: int) -> list[Call]:
    given = sizes, weights, rows
    return [make_embedding(*given), *make_calls(*given), make_loss(*given), make_block(*given)]


def _short(number: float, decimals: int) -> str:
    return f"{number:.{decimals}f}" if number < 1000 else f"{number:.0f}"


def side_by_side(call: Call) -> tuple[float, float]:
    """Seconds per call, stock and fused: the medians of turns."""
    mx.eval(call.inputs)
    samples = [], []
    start = time.perf_counter()
    while len(samples[0]) < _ROUNDS and (not samples[0] or time.perf_counter() - start < _LIMIT):
        for function, seconds in zip((call.stock, call.fused), samples, strict=True):
            mx.eval(function(*call.inputs))  # not timed: wakes the threads and fills the caches
            seconds.append(_turn(lambda f=function: mx.eval(f(*call.inputs))))
    return median(samples[0]), median(samples[1])


def _turn(work: Callable[[], None]) -> float:
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < _TURN:
        work()
        count += 1
    return (time.perf_counter() - start) / count


def _sizes_of(model: Path) -> Sizes:
    try:
        config = json.loads((model / "config.json").read_text())
        config = config.get("text_config") or config
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        # A model of experts may have no other MLP.
        intermediate, words = config.get("intermediate_size") or hidden, config.get("vocab_size") or _WORDS
        sizes = hidden, heads, kv_heads, head_dim, intermediate, words
        if (
            not all(type(size) is int and 0 < size <= _LARGEST for size in sizes)
            or heads % kv_heads
            or head_dim % 2
        ):
            raise ValueError(sizes)
        return Sizes(*sizes)
    except (ArithmeticError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise click.BadParameter(
            f"config.json must have the sizes of a transformer block but got {error!r} in {model}.",
            param_hint="--model",
        ) from error
