"""Compares a patched model with float64, operation by operation, and with the stock model, end to end.

``operations`` checks each fused operation and its gradients right where it runs, so that no later layer
dilutes or amplifies its errors. ``end_to_end`` checks that the operations are used in the right places, by
the whole model's logits, gradients of adapters and greedy tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

import mlx_fused
from mlx_fused import losses
from mlx_fused.patching import PatchReport
from mlx_fused.patching.projections import EMBEDDINGS, watching
from mlx_fused.validate import end_to_end
from mlx_fused.validate.checkpoint import (
    CannotValidate,
    attach_adapters,
    batch_of,
    in_float32,
    linears,
    load,
    modules_of,
    unpatched,
)
from mlx_fused.validate.end_to_end import Runs, sum_error
from mlx_fused.validate.operations import OperationChecks, check_operations

__all__ = ["PROMPT", "CannotValidate", "load", "sum_error", "sum_terms", "validate"]

PROMPT = (
    "A plugin adds one line to a program and is to change nothing that it prints. Whether that is so, "
    "two runs tell, one with it and one without it, on the same input: where numbers differ, the "
    "difference must be one that rounding explains."
)


def validate(
    model: nn.Module,
    prompt: list[int],
    num_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict:
    """Check ``model`` patched, and compare it with the unpatched model.

    Args:
        model (mlx.nn.Module): A model from :func:`load`. If it has no adapters, it gets some.
        prompt (list): The tokens to compute logits and gradients for, and to continue, at least 2.
        num_tokens (int): How many tokens to generate, at least 2.
        on_progress (callable): Called with the number of steps that are done, and the number of all steps.

    Returns:
        dict: The measurements; ``passed`` is the verdict.

    Raises:
        CannotValidate: If the unpatched model fails, if nothing runs fused, or if the model does not compute
            in float32 when its embeddings are float32.
    """
    tokens, attended = mx.array(prompt), []
    with unpatched(), in_float32(model):
        dtype = model(tokens[None]).dtype
    with mlx_fused.patched(model) as report:
        terms = sum_terms(model, report)
        with watching(lambda *call: attended.append(_sums_of_attention(call[2]))):
            model(tokens[None])  # only traced, to count the operations
        # Norms by themselves and rotary positions are compared as a part of the whole.
        parts = [part for module in report.modules for part in module.parts.items()]
        checked = sum(part.calls.fused for name, part in parts if name not in ("norm", "rope"))
        losses.cross_entropy_loss(model, *batch_of(tokens))
        checked_losses = losses.calls(model).fused
    terms += sum(attended)
    if dtype != mx.float32:
        raise CannotValidate("The model does not compute in float32 when its embeddings are float32.")
    parts = report.parts
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    runs = Runs(model, on_step)
    # Prompt and token, with and without adapters; and the loss of both.
    total = runs.count + 4 * checked + 2 * checked_losses
    logits = runs.compare(lambda: {"logits": end_to_end.logits(model, tokens)}, sum_error(terms))
    operations = {"as loaded": check_operations(model, tokens, on_step)}
    logits = {dtype: lines["logits"] for dtype, lines in logits.items()}
    runs.memory.clear()
    greedy, speed = end_to_end.generate(runs, tokens, num_tokens, logits)
    memory = {"generation": dict(runs.memory)}

    with unpatched():
        attach_adapters(model, tokens, report.modules)
    operations["LoRA step"] = check_operations(model, tokens, on_step)
    runs.memory.clear()
    # The backward has two products for each product of the forward.
    gradients = runs.compare(lambda: end_to_end.training_step(model, tokens), sum_error(3 * terms))
    after_a_step = {dtype: lines.pop(end_to_end.AFTER_A_STEP) for dtype, lines in gradients.items()}
    memory["LoRA step"] = runs.memory
    if not any(checks.count for checks in operations.values()):
        raise CannotValidate(f"Nothing of it ran fused, so there is nothing to compare.\n{report}")
    results = {
        "dtype": end_to_end.name_of(runs.dtype),
        "layers": {x.name: {name: str(part) for name, part in x.parts.items()} for x in report.modules},
        "obstacles": sorted({part.obstacle for part in parts if part.obstacle}),
        "calls": runs.calls,
        "operations": {step: _described(checks) for step, checks in operations.items()},
        "end_to_end": {
            dtype: {
                "logits": logits[dtype],
                "gradients": gradients[dtype],
                "logits_after_a_step": after_a_step[dtype],
                "greedy": greedy[dtype],
            }
            for dtype in logits
        },
        "tokens_per_second": speed,
        "peak_memory": memory,
    }
    verdicts = list(_verdicts(results))
    counts = {verdict: verdicts.count(verdict) for verdict in ("passed", "failed", "inconclusive")}
    return {**results, "verdicts": counts, "passed": not counts["failed"]}


def sum_terms(model: nn.Module, report: PatchReport) -> int:
    """The number of additions that patching reorders: the lengths of all dot products in the fused layers."""
    fused, modules = [x for x in report.modules if any(p.fused for p in x.parts.values())], modules_of(model)
    heads = [child for x in fused for child in modules[x.name].values() if type(child) in EMBEDDINGS]
    layers = [*linears(model, fused), *heads]
    return sum(m["weight"].shape[-1] * (32 // m.bits if "scales" in m else 1) for m in layers)


def _sums_of_attention(arguments: dict) -> int:
    """Their lengths, of a score and of a result."""
    return arguments["q"].shape[-1] + arguments["k"].shape[2] if "q" in arguments else 0


def _described(checks: OperationChecks) -> dict:
    return {
        "count": checks.count,
        **{
            part: {
                kind: {
                    "share": finding.share,
                    "layer": finding.layer,
                    "noticeable": sum(finding.noticeable.values()) / len(finding.noticeable),
                    "verdict": finding.verdict,
                }
                for kind, finding in findings.items()
            }
            for part, findings in checks.findings.items()
        },
    }


def _verdicts(results: dict) -> Iterator[str]:
    """All verdicts in ``results``, at any depth."""
    for key, value in results.items():
        if key == "verdict":
            yield value
        elif isinstance(value, dict):
            yield from _verdicts(value)
