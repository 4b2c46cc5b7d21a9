"""The kinds of calls that a model of mlx-lm makes."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

import mlx_fused
from mlx_fused.linear import LinearOperands
from mlx_fused.patching import PatchReport
from mlx_fused.patching.projections import watching
from mlx_fused.tuning import Kind
from mlx_fused.tuning.measure import with_gradients
from mlx_fused.validate.checkpoint import CannotValidate, add_adapters, unpatched
from mlx_fused.validate.operations import input_of, is_gated, layers_of


def kinds_of(model: nn.Module) -> list[Kind]:
    """What ``model`` calls, as it is and in a LoRA step: with mlx-lm's default adapters if it has none.

    Nothing is evaluated, but the model may be left with adapters.

    Raises:
        CannotValidate: If the model fails unpatched, or nothing of it runs fused.
    """
    tokens = mx.array([0])
    found: dict[Kind, None] = {}

    def record(module: nn.Module, operation: Callable, arguments: dict, outputs) -> None:
        if layers_of(arguments):  # attention has none, and no routes
            found.update(dict.fromkeys(with_gradients(_kind(arguments, outputs))))

    def run() -> PatchReport:
        with unpatched():
            model(tokens[None])
        with mlx_fused.patched(model) as report, watching(record):
            model(tokens[None])
        return report

    report = run()
    with unpatched():
        add_adapters(model, tokens, report.modules)
    run()
    if not found:
        raise CannotValidate(f"Nothing of it runs fused, so there is nothing to measure.\n{report}")
    return list(found)


def _kind(arguments: dict, outputs: mx.array | tuple[mx.array, ...]) -> Kind:
    layers: list[LinearOperands] = layers_of(arguments)
    x = input_of(arguments)
    one = layers[0]
    features = [layer.weight.shape[0] for layer in layers]
    ranks = [0 if layer.lora_a is None else layer.lora_a.shape[1] for layer in layers]
    if is_gated(arguments) and len(layers) == 1:
        features, ranks = [features[0] // 2] * 2, ranks * 2
    return Kind(
        gradient=False,
        of_weights=False,
        dtype=(outputs if isinstance(outputs, mx.array) else outputs[0]).dtype,
        format=None if one.scales is None else (one.mode, one.bits, one.group_size),
        bias=one.bias is not None,
        in_features=x.shape[-1],
        features=tuple(features),
        ranks=tuple(ranks),
    )
