"""Runs an MLP as two operations: its layers up to the product with the gate, and the one after it.

What the MLP computes is read from its own code (see ``formula``), so this runs instead of that code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_fused._ext import has_kernels
from mlx_fused.operations import fused_gated_projection, fused_linear
from mlx_fused.operations.linear import gated_operation, linear_operation
from mlx_fused.patching import calls, formula, projections
from mlx_fused.patching.formula import Unknown
from mlx_fused.patching.norm import unnormed
from mlx_fused.patching.projections import NotFused, Operation
from mlx_fused.patching.registry import Active

_ACTIVATIONS = ("silu", "gelu", "gelu_approx", "relu", "relu2")


class Recipe(NamedTuple):
    """What an MLP computes: ``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))``."""

    down: str
    hidden: tuple[str, ...]  # gate and up, or the layer that packs both, or the only one before down
    function: Callable  # of mlx_fused
    settings: dict[str, object]  # its arguments
    first: str | None  # the layer that makes their input of the MLP's, such as a norm
    method: Callable  # whose code it is; kept, so that no other function can get its address


def recipe_of(mlp: nn.Module, method: Callable) -> Recipe:
    """What ``method`` computes for ``mlp``.

    Raises:
        Unknown: If it is something else than an MLP.
    """
    of = formula.formula_of(mlp, method, _is_leaf)
    match of:
        case ("layer", down, inner):
            hidden, operation, settings, first = _hidden(inner)
        case _:
            raise Unknown("does not return the output of a layer")
    return Recipe(down, hidden, operation, settings, first, method)


def run(mlp: nn.Module, active: Active, method: Callable, x: object) -> mx.array | None:
    """The output of ``mlp``, to which the residual is added as a part of the operation; None if its own code
    must run."""
    patch = active.patch
    counter = patch.calls["mlp"]
    try:
        recipe, operation, obstacle = read(mlp, active, method)
        if not has_kernels(x):
            raise NotFused("it is not called with one array of a type with kernels")
    except NotFused as reason:
        counter.add(1, reason=str(reason))
        return None
    if recipe.first is not None:
        first = mlp[recipe.first]
        x = calls.alone(mlp, active, recipe.first, first, x) if projections.is_known(first) else first(x)
    x, norm = unnormed(x)
    (hidden,) = operation(mlp, tuple(map(mlp.__getitem__, recipe.hidden)), x, norm)
    counter.add(1, 1)
    return calls.project_output(mlp, active, recipe.down, mlp[recipe.down], hidden, obstacle)


def read(mlp: nn.Module, active: Active, method: Callable) -> tuple[Recipe, Operation, str | None]:
    """What the MLP computes, the operation of its first half, and why its last layer is not one with the
    residual.

    Raises:
        NotFused: If our operation cannot compute that half.
    """
    options = active.patch.options
    if not options.mlp:
        raise NotFused("mlp=False")

    def read() -> tuple[Recipe, Operation, str | None]:
        try:
            recipe = recipe_of(mlp, method)
        except Unknown as reason:
            raise NotFused(f"{type(mlp).__name__} {reason}") from None
        layers = [mlp.get(name) for name in recipe.hidden]
        together = projections.read_together(recipe.hidden, layers, options.lora, options.exact)
        if together.adapters_apart:
            raise NotFused(together.adapters_apart)
        if together.group is not None:
            raise NotFused(f"{recipe.hidden[0]} is {type(layers[0]).__name__}")
        make = gated_operation if recipe.function is fused_gated_projection else linear_operation
        settings = recipe.settings | {"exact": options.exact}
        obstacle = calls.why_not(calls.read_output, mlp, active, recipe.down)
        return recipe, Operation(recipe.function, make(**settings), settings), obstacle

    return active.reading("mlp", (mlp, method), read)


def read_note(mlp: nn.Module, active: Active, method: Callable) -> str:
    """What is fused, for the report."""
    recipe, *_ = read(mlp, active, method)
    return recipe.settings["activation"]


def _is_leaf(layer: nn.Module) -> bool:
    return hasattr(layer, "weight") or "lora_a" in layer


def _hidden(of) -> tuple[tuple[str, ...], Callable, dict[str, object], str | None]:
    match of:
        case ("*", (kind, gate), up) | ("*", up, (kind, gate)) if kind in _ACTIVATIONS:
            return _gated(gate, up, {"activation": kind})
        case ("square", ("relu", ("layer", name, x))):
            return (name,), fused_linear, {"activation": "relu2"}, _first(x)
        case (kind, ("layer", name, x)) if kind in _ACTIVATIONS:
            return (name,), fused_linear, {"activation": kind}, _first(x)
        case (
            "*",
            ("+", ("clip", up, low, high), 1.0),
            ("*", ("minimum", gate, limit) as cut, ("sigmoid", ("*", alpha, again))),
        ) if _are_numbers(alpha, limit) and limit >= 0 and (low, high, again) == (-limit, limit, cut):
            settings = {"activation": "clipped_swiglu", "alpha": alpha, "limit": limit}
            return _gated(gate, up, settings)
    raise Unknown("computes something else than the MLPs that are known")


def _are_numbers(*values) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _gated(gate, up, settings: dict[str, object]):
    match gate, up:
        case ("half", i, ("layer", name, x)), ("half", j, other) if i != j and other == ("layer", name, x):
            settings["packing"] = "gate_up" if i == 0 else "up_gate"
            return (name,), fused_gated_projection, settings, _first(x)
        case ("layer", first, x), ("layer", second, other) if x == other:
            return (first, second), fused_gated_projection, settings, _first(x)
    raise Unknown("computes gate and up from different inputs")


def _first(x) -> str | None:
    match x:
        case ("x",):
            return None
        case ("layer", name, ("x",)):
            return name
    raise Unknown("computes something with its input before the first layer")
