"""Compares a model's numbers, tokens, speed and memory, stock and patched, in float32 and in its own dtype.

The error of an array is its distance from the stock model's float32 result, divided by the norm of that
result. docs/cli.md explains the bounds.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf, isfinite, isinf, sqrt
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step

import mlx_fused
from mlx_fused import losses
from mlx_fused.losses import cross_entropy_loss
from mlx_fused.patching import PatchReport
from mlx_fused.patching.report import TITLES
from mlx_fused.validate.bounds import DTYPES, NOTICEABLE
from mlx_fused.validate.checkpoint import (
    CannotValidate,
    batch_of,
    dtype_of,
    in_float32,
    unpatched,
)
from mlx_fused.validate.operations import exact

AFTER_A_STEP = "logits after a step"
_ROUNDS = 3  # how often generation is timed
_STEP = 0.1  # the change of parameters relative to their size; moves logits by far more than rounding
_LEAST_SIZE = 0.01


class Runs:
    """Runs functions of the model: stock or patched, in float32 or in its own dtype.

    Records the peak memory of runs in its own dtype, and how many calls of patched layers were fused.
    """

    def __init__(self, model: nn.Module, on_step: Callable[[], None]):
        self.model, self.on_step = model, on_step
        self.dtype = dtype_of(model)
        self.dtypes = list(dict.fromkeys([mx.float32, self.dtype]))
        self.memory: dict[str, int] = {}
        self.calls = {part: {"total": 0, "fused": 0, "composed": 0} for part in TITLES}

    @property
    def count(self) -> int:
        """The number of runs in a validation."""
        return 2 * len(self.dtypes) * 2 + 2 * (_ROUNDS + len(self.dtypes) - 1)

    @contextmanager
    def variant(self, name: str, dtype: mx.Dtype) -> Iterator[PatchReport | None]:
        with ExitStack() as stack:
            if dtype != self.dtype:
                stack.enter_context(in_float32(self.model))
            yield stack.enter_context(unpatched() if name == "stock" else mlx_fused.patched(self.model))

    def run(self, name: str, dtype: mx.Dtype, function: Callable):
        mx.clear_cache()
        mx.reset_peak_memory()
        with self.variant(name, dtype) as report:
            result = function()
            mx.eval(result)
            of_loss = {"loss": losses.calls(self.model)} if report else {}
        if dtype == self.dtype:
            self.memory[name] = max(self.memory.get(name, 0), mx.get_peak_memory())
        modules = report.modules if report else ()
        parts = [(part, of.calls) for module in modules for part, of in module.parts.items()]
        for part, counter in [*parts, *of_loss.items()]:
            calls = self.calls[part]
            calls |= {name: n + getattr(counter, name) for name, n in calls.items()}
        self.on_step()
        return result

    def compare(
        self, function: Callable[[], dict[str, mx.array]], bound: float
    ) -> dict[str, dict[str, dict]]:
        """The comparison of each array that ``function`` returns, by dtype and name."""
        # Its own dtype comes first: a model that fails in it cannot be validated.
        stock = {dtype: self.run("stock", dtype, function) for dtype in reversed(self.dtypes)}
        if not all(mx.isfinite(result).all() for result in stock[mx.float32].values()):
            raise CannotValidate("The model's own results are not finite.")
        lines = {}
        for dtype in self.dtypes:
            patched = self.run("patched", dtype, function)
            lines[name_of(dtype)] = {
                name: line(stock[dtype][name], patched[name], reference, bound)
                for name, reference in stock[mx.float32].items()
            }
        return lines


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def error(actual: mx.array, reference: mx.array) -> float:
    right = exact(reference)
    with np.errstate(invalid="ignore"):
        off = exact(actual) - right
    # Hardware may treat smaller numbers as zero.
    distance = float(np.linalg.norm(np.where(np.abs(off) < 2.0**-126, 0.0, off)))
    norm = float(np.linalg.norm(right))
    return distance / norm if norm else inf if distance else 0.0


def line(stock: mx.array, patched: mx.array, reference: mx.array, bound: float) -> dict:
    """The comparison of two results, whose errors may be ``bound`` because sums are reordered."""
    stock_error, patched_error = error(stock, reference), error(patched, reference)
    if reference.dtype != mx.float32:  # a gradient of 16-bit adapters: both round it
        bound += 2 * DTYPES[reference.dtype].unit
    tolerance = max(bound, 2 * stock_error) if isfinite(stock_error) else inf
    if isinf(tolerance):
        verdict = "inconclusive"
    elif not patched_error <= tolerance:  # NaN too
        verdict = "failed"
    else:
        verdict = "passed" if patched_error <= max(bound, NOTICEABLE) else "inconclusive"
    return {
        "stock_error": stock_error,
        "patched_error": patched_error,
        "tolerance": tolerance,
        "rms": float(np.sqrt(np.mean(np.square(exact(reference))))),
        "verdict": verdict,
    }


def logits(model: nn.Module, tokens: mx.array) -> mx.array:
    return model(tokens[None])[0]


def training_step(model: nn.Module, tokens: mx.array) -> dict[str, mx.array]:
    """The gradients on ``tokens``, and the logits after a change of the trainable parameters.

    The gradients of one kind of parameter are concatenated over all layers.
    """
    batch, lengths = batch_of(tokens)
    model.train()
    mx.random.seed(0)  # the same dropout in every run
    _, gradients = nn.value_and_grad(model, cross_entropy_loss)(model, batch, lengths)
    model.eval()
    kinds = defaultdict(list)
    for name, gradient in tree_flatten(gradients):
        kind = re.sub(r"\.\d+\.", ".*.", name)
        # The gradient of k's bias almost cancels, so it is grouped with the other biases.
        kinds[re.sub(r"\w+(\.linear)?\.bias$", "*.bias", kind)].append(gradient.flatten())
    found = {kind: mx.concatenate(arrays) for kind, arrays in kinds.items()}
    with _changed(model):
        return {**found, AFTER_A_STEP: model(batch)}


@contextmanager
def _changed(model: nn.Module) -> Iterator[None]:
    """Change the trainable parameters, equally in every run, and restore them at the end."""

    def step(parameter: mx.array) -> mx.array:
        # At least _LEAST_SIZE, so that parameters that are zero change too.
        size = mx.maximum(mx.abs(parameter.astype(mx.float32)).mean(), _LEAST_SIZE)
        return parameter + (_STEP * size * mx.random.normal(parameter.shape)).astype(parameter.dtype)

    before = model.trainable_parameters()
    mx.random.seed(1)
    model.update(tree_map(step, before))
    try:
        yield
    finally:
        model.update(before)


def generate(
    runs: Runs, tokens: mx.array, num_tokens: int, logits_lines: dict[str, dict]
) -> tuple[dict[str, dict], dict]:
    """Continue ``tokens`` greedily, stock and patched in turns; returns comparisons by dtype, and speeds.

    Args:
        runs (Runs): The model's runs.
        tokens (mlx.core.array): The prompt.
        num_tokens (int): How many tokens to generate.
        logits_lines (dict): The comparisons of the logits, by dtype.
    """
    lines, speed = {}, {}
    for dtype in runs.dtypes:
        made = defaultdict(list)
        for _ in range(_ROUNDS if dtype == runs.dtype else 1):
            for name in ("stock", "patched"):
                made[name].append(
                    runs.run(name, dtype, lambda: continue_greedily(runs.model, tokens, num_tokens))
                )
        if dtype == runs.dtype:
            speed = _speed(made, len(tokens), num_tokens)
        stock, patched = (made[name][0]["tokens"] for name in ("stock", "patched"))
        logits_line = logits_lines[name_of(dtype)]
        # The gap is between two logits, each with an error of this spread; 8 spreads are never reached.
        largest_gap = 8 * logits_line["tolerance"] * logits_line["rms"]
        at, gap = next((i for i in range(num_tokens) if stock[i] != patched[i]), None), 0.0
        if at is not None:
            with runs.variant("stock", dtype):
                gap = _gap(runs.model, mx.array([*tokens.tolist(), *stock[:at]]), stock[at], patched[at])
        if at is not None and isinf(largest_gap):  # the stock model's logits are not finite
            verdict = "inconclusive"
        elif not gap <= largest_gap:
            verdict = "failed"
        else:
            conclusive = at is None or logits_line["verdict"] == "passed"
            verdict = "passed" if conclusive else "inconclusive"
        lines[name_of(dtype)] = {
            "tokens": num_tokens,
            "diverges_at": at,
            "gap": gap,
            "tolerance": largest_gap,
            "verdict": verdict,
        }
    return lines, speed


def _speed(made: dict[str, list[dict]], num_prompt: int, num_tokens: int) -> dict:
    return {
        "prefill": {name: num_prompt / median(r["prefill_s"] for r in runs) for name, runs in made.items()},
        "decode": {
            name: (num_tokens - 1) / median(r["decode_s"] for r in runs) for name, runs in made.items()
        },
    }


def _gap(model: nn.Module, tokens: mx.array, first: int, second: int) -> float:
    """The difference between the logits of tokens ``first`` and ``second`` after ``tokens``."""
    last = logits(model, tokens)[-1].astype(mx.float32)
    return (last[first] - last[second]).item()


def continue_greedily(model: nn.Module, tokens: mx.array, num_tokens: int) -> dict:
    start = time.perf_counter()
    times, chosen = [], []
    for token, _ in generate_step(tokens, model, max_tokens=num_tokens):
        times.append(time.perf_counter())
        chosen.append(token)
    return {"tokens": chosen, "prefill_s": times[0] - start, "decode_s": times[-1] - times[0]}


def sum_error(terms: int) -> float:
    """How far a result may move if float32 sums with this many terms in all are reordered.

    The rounding errors of n additions are practically independent, so their sum exceeds 8 sqrt(n) roundoffs
    with a probability below 3e-14 (Higham and Mary, 2019).
    """
    return 8 * sqrt(terms) * 2.0**-24
