"""Times attention by itself, MLX's, ours and torch's, and measures the memory of its training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from math import ceil
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import psutil
from rich.console import Console

import machine
import report_models
from mlx_fused import fused_attention
from models import rates
from report import document
from scaling import with_memory
from timing import FULL, QUICK, Effort, quickest

DTYPES = ("float32", "bfloat16")
TOKENS, KEYS, MOST = (512, 1024, 2048), 2048, 4096


@dataclass(frozen=True)
class Heads:
    queries: int
    keys: int
    size: int


LLAMA, TINY = Heads(32, 8, 64), Heads(4, 2, 16)  # Llama-3.2-1B's


@dataclass(frozen=True)
class Work:
    """Causal attention of so many queries, the last of so many keys."""

    heads: Heads
    dtype: str
    queries: int
    keys: int
    backward: bool = False

    @property
    def name(self) -> str:
        if self.queries == 1:
            return f"decode, {self.keys} keys"
        return f"{self.keys} tokens, {'with backward' if self.backward else 'forward'}"

    @property
    def amount(self) -> int:
        """Bytes of keys and values in decode, else flops: two products forward, and five backward."""
        if self.queries == 1:
            return 2 * self.heads.keys * self.keys * self.heads.size * getattr(mx, self.dtype).size
        pairs = self.queries * (self.queries + 1) // 2
        return (7 if self.backward else 2) * 2 * self.heads.queries * self.heads.size * pairs

    def draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        """q, k, v and the cotangent of the result."""
        h = self.heads
        rows = [
            (h.queries, self.queries),
            (h.keys, self.keys),
            (h.keys, self.keys),
            (h.queries, self.queries),
        ]
        return [rng.standard_normal((1, *of, h.size), np.float32) for of in rows]

    def copies(self, rotated: int) -> int:
        """A cache of keys is not in the CPU's when its turn comes; what a layer has just computed is."""
        return ceil(rotated / self.amount) if self.queries == 1 else 1


class MLX:
    """Calls one of MLX's signature; each call takes the next of several copies."""

    def __init__(self, attention: Callable, work: Work, arrays: list[np.ndarray], copies: int) -> None:
        sets = [[mx.array(a).astype(getattr(mx, work.dtype)) for a in arrays] for _ in range(copies)]
        mx.eval(sets)
        self._sets, self._backward = cycle(sets), work.backward
        mask = None if work.queries == 1 else "causal"
        self._run = lambda *qkv: [attention(*qkv, scale=work.heads.size**-0.5, mask=mask)]

    def __call__(self) -> list[mx.array]:
        *qkv, cotangent = next(self._sets)
        if self._backward:
            outputs, gradients = mx.vjp(self._run, qkv, [cotangent])
            results = [*outputs, *gradients]
        else:
            results = self._run(*qkv)
        mx.eval(results)
        mx.synchronize()
        return results


class Torch:
    """The same in torch, which repeats keys and values itself, or is given them repeated."""

    def __init__(self, repeats: bool, work: Work, arrays: list[np.ndarray], copies: int) -> None:
        import torch

        torch.set_num_threads(machine.cores())
        dtype = getattr(torch, work.dtype)
        sets = [[torch.from_numpy(a).to(dtype, copy=True) for a in arrays] for _ in range(copies)]
        for qkv in (of[:3] for of in sets):
            for a in qkv:
                a.requires_grad_(work.backward)
        self._sets, self._work, self._repeats, self._torch = cycle(sets), work, repeats, torch

    def __call__(self) -> list:
        q, k, v, cotangent = next(self._sets)
        if self._repeats:
            group = self._work.heads.queries // self._work.heads.keys
            keys = [a.repeat_interleave(group, 1) for a in (k, v)]
        attention = self._torch.nn.functional.scaled_dot_product_attention
        options = {"is_causal": self._work.queries > 1, "enable_gqa": not self._repeats}
        out = attention(q, *(keys if self._repeats else (k, v)), **options)
        gradients = self._torch.autograd.grad(out, (q, k, v), cotangent) if self._work.backward else []
        return [out, *gradients]


def contenders(work: Work, torch: bool, copies: int) -> dict[str, Callable]:
    arrays = work.draw(np.random.default_rng(0))
    makers = {
        "stock": partial(MLX, mx.fast.scaled_dot_product_attention),
        "ours": partial(MLX, fused_attention),
    }
    if torch:
        makers |= {"torch": partial(Torch, False), "torch, repeated": partial(Torch, True)}
    return {name: make(work, arrays, copies) for name, make in makers.items()}


def difference(ours: Sequence[mx.array], stock: Sequence[mx.array]) -> float:
    """How far results are apart at most, as a part of their norm."""

    def apart(a: mx.array, b: mx.array) -> float:
        a, b = (x.astype(mx.float32).flatten() for x in (a, b))
        return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()

    return max(map(apart, ours, stock))


def time_work(work: Work, torch: bool, effort: Effort) -> dict:
    calls = contenders(work, torch, work.copies(effort.rotated))
    apart = difference(calls["ours"](), calls["stock"]())
    seconds = quickest(calls, effort)
    repeated = seconds.pop("torch, repeated", None)
    if repeated:
        seconds["torch"] = min(seconds["torch"], repeated)
    return {
        "dtype": work.dtype,
        "work": work.name,
        "seconds": seconds,
        "unit": "GB/s" if work.queries == 1 else "GFLOP/s",
        "amount": work.amount,
        "difference": apart,
    }


def memory(heads: Heads, tokens: int, most: int) -> dict[int, dict[str, int]]:
    """The most bytes that outputs and gradients in bfloat16 allocate, operands not counted."""
    peaks, stock = {}, 0
    while tokens <= most:
        work = Work(heads, "bfloat16", tokens, tokens, backward=True)
        calls = contenders(work, torch=False, copies=1)
        # With twice the tokens MLX keeps four times as much.
        if 4 * stock > psutil.virtual_memory().available:
            del calls["stock"]
        peaks[tokens] = {name: with_memory(call)[1] for name, call in calls.items()}
        stock = peaks[tokens].get("stock", 4 * stock)
        tokens *= 2
    return peaks


def tables(result: dict) -> dict[str, report_models.Table]:
    return {
        "attention": (
            [
                "dtype",
                "",
                "stock ms",
                "ours ms",
                "torch ms",
                "stock / ours",
                "torch / ours",
                "rate",
                "of peak",
            ],
            [_times(record, result["rates"]) for record in result["records"]],
        ),
        "attention memory": (
            ["tokens", "stock MB", "ours MB", "ratio"],
            [[str(tokens), *_peaks(**of)] for tokens, of in result["memory"].items()],
        ),
    }


def _times(record: dict, rates: dict[str, float]) -> list[str]:
    digits, seconds = report_models.digits, record["seconds"]
    rate = record["amount"] / seconds["ours"]
    peak = rates["read" if record["unit"] == "GB/s" else record["dtype"]]
    times = [digits(1e3 * seconds[who]) if who in seconds else "" for who in ("stock", "ours", "torch")]
    ratios = [digits(seconds[w] / seconds["ours"]) if w in seconds else "" for w in ("stock", "torch")]
    rates_of_ours = [f"{rate / 1e9:.3g} {record['unit']}", f"{rate / peak:.0%}"]
    return [record["dtype"], record["work"], *times, *ratios, *rates_of_ours]


def _peaks(ours: int, stock: int | None = None) -> list[str]:
    megabytes = [report_models.digits(of / 1e6) if of else "" for of in (stock, ours)]
    return [*megabytes, f"{ours / stock:.3f}" if stock else ""]


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: a check that everything runs.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Also put the tables into this folder's benchmarks.md.",
)
@click.option("--no-torch", is_flag=True, help="Leave torch out even if it is installed.")
def main(quick: bool, out: Path, docs: Path | None, no_torch: bool) -> None:
    """Time attention on the CPU, and measure the memory of its training."""
    mx.set_default_device(mx.cpu)
    console, neighbours = Console(), machine.Neighbours()
    heads, tokens, keys, most, effort = (
        (TINY, (16,), 32, 32, QUICK) if quick else (LLAMA, TOKENS, KEYS, MOST, FULL)
    )
    torch = not no_torch and find_spec("torch") is not None
    works = [
        Work(heads, dtype, n, n, backward) for dtype in DTYPES for n in tokens for backward in (False, True)
    ]
    works += [Work(heads, dtype, 1, keys) for dtype in DTYPES]
    peaks, records = [rates(DTYPES, effort)], []
    for work in works:
        console.print(f"{work.dtype}, {work.name} ...")
        records.append(time_work(work, torch, effort))
    console.print("Memory ...")
    of_training = memory(heads, tokens[0], most)
    peaks.append(rates(DTYPES, effort))
    result = {
        "records": records,
        "memory": of_training,
        "machine": machine.describe("cpu") | {"CPU used by others": neighbours.share()},
        "rates": {name: max(p[name] for p in peaks) for name in peaks[0]},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "sdpa.json").write_text(json.dumps(result, indent=1))
    found = tables(result)
    titles = {"attention": "Attention", "attention memory": "Peak memory of attention and its gradients"}
    report_models.show_tables(console, titles, found, words=2)
    console.print(report_models.about(result), highlight=False)
    if docs:
        for name, (columns, rows) in found.items():
            text = report_models.markdown_table(columns, rows, words=2 if name == "attention" else 1)
            about = f"{report_models.about(result)}\n\n" if name == "attention" else ""
            document(docs / "benchmarks.md", name, about + text)


if __name__ == "__main__":
    main()
