"""Runs the query, key and value projections of mlx-lm models as one operation.

An attention module keeps its parameters and its code; only its class changes, to a subclass in which
``q_proj``, ``k_proj`` and ``v_proj`` are properties. While the module's ``__call__`` runs they give
stand-ins, of which the first to meet an input projects it for all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from math import prod
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from mlx_fused._ext import fused_qkv_projection

_NAMES = ("q_proj", "k_proj", "v_proj")
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class LayerReport:
    """One attention layer: its name in the model and, if it is not fused, why."""

    name: str
    obstacle: str | None

    @property
    def fused(self) -> bool:
        return self.obstacle is None


@dataclass(frozen=True, repr=False)
class PatchReport:
    """What :func:`patch` did, layer by layer; prints as a table."""

    layers: tuple[LayerReport, ...]

    def __repr__(self) -> str:
        if not self.layers:
            return f"nothing to patch: no module has {', '.join(_NAMES)}"
        width = max(len(layer.name) for layer in self.layers)
        fused = sum(layer.fused for layer in self.layers)
        rows = [f"QKV projection fused in {fused} of {len(self.layers)} attention layers"]
        for layer in self.layers:
            state = "fused" if layer.fused else f"not fused: {layer.obstacle}"
            rows.append(f"{layer.name:{width}}  {state}")
        return "\n".join(rows)


def patch(model: nn.Module) -> PatchReport:
    """Project to queries, keys and values in one operation wherever ``model`` allows it.

    Every module with ``q_proj``, ``k_proj`` and ``v_proj`` gets a subclass of its class, and nothing
    else changes: parameters and their names, LoRA conversion, quantization, saving and loading work
    as before, before and after patching. What cannot be fused runs the model's own code. Patching
    twice is patching once.

    Args:
        model (mlx.nn.Module): A model of mlx-lm, or any part of one.

    Returns:
        PatchReport: Which layers are fused as the model is now, and why the others are not.

    Raises:
        TypeError: If ``model`` is not an ``mlx.nn.Module``.
    """
    attentions = _attentions(model)
    for _, attention in attentions:
        if callable(attention) and not isinstance(attention, _FusedProjections):
            attention.__class__ = _fused_class(type(attention))
    return PatchReport(tuple(LayerReport(name, _obstacle(a)) for name, a in attentions))


def unpatch(model: nn.Module) -> None:
    """Give every patched module of ``model`` its own class back.

    Args:
        model (mlx.nn.Module): A model, patched or not.

    Raises:
        TypeError: If ``model`` is not an ``mlx.nn.Module``.
    """
    for _, attention in _attentions(model):
        _restore(attention)


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """Patch ``model`` for a ``with`` block, which receives the report of :func:`patch`.

    Modules that were patched before the block stay patched after it.

    Args:
        model (mlx.nn.Module): A model of mlx-lm, or any part of one.

    Raises:
        TypeError: If ``model`` is not an ``mlx.nn.Module``.
    """
    stock = [a for _, a in _attentions(model) if not isinstance(a, _FusedProjections)]
    try:
        yield patch(model)
    finally:
        for attention in stock:
            _restore(attention)


class _FusedProjections:
    """Put before an attention class: its projections are one operation during a call."""

    def __call__(self, *args, **kwargs):
        token = _running.set(_Call(self))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _running.reset(token)

    def __reduce_ex__(self, protocol):
        # Pickle finds classes by name, and this one, made on demand, has a name but no place.
        _, (cls, *_), *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (cls._original,), *state


@cache
def _fused_class(original: type) -> type:
    # One class for all layers: mlx-lm's grad_checkpoint edits the class of the first, to reach all.
    properties = {name: _property(name) for name in _NAMES}
    return type(original.__name__, (_FusedProjections, original), {**properties, "_original": original})


def _property(name: str) -> property:
    def get(self):
        if (module := self.get(name)) is None:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        call = _running.get()
        # Code outside the call, or of a module called inside it, sees the module itself.
        return _StandIn(call, name, module) if call and call.attention is self else module

    return property(get)


def _new(original: type) -> nn.Module:
    cls = _fused_class(original)
    return cls.__new__(cls)


def _restore(attention: nn.Module) -> None:
    if isinstance(attention, _FusedProjections):
        attention.__class__ = attention._original


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an mlx.nn.Module, got {type(model).__name__}")
    found = [
        (name or type(module).__name__, module)
        for name, module in model.named_modules()
        if isinstance(module, _FusedProjections) or all(name in module for name in _NAMES)
    ]
    return found[::-1]  # named_modules goes from the last child to the first


class _Call:
    """One running call of an attention module, and the projections of its latest input."""

    def __init__(self, attention: nn.Module):
        self.attention = attention
        self.input = None
        self.outputs: dict[str, mx.array] = {}

    def project(self, name: str, module: nn.Module, x: mx.array) -> mx.array:
        if x is not self.input:
            self.input, self.outputs = x, _project(self.attention, x)
        y = self.outputs.pop(name, None)
        if y is None:
            return module(x)
        if type(module) is nn.Linear:
            return y
        # The adapter's own code, on a layer that differs only in having its base product already.
        layer = SimpleNamespace(**vars(module), **{**module, "linear": lambda _: y})
        return type(module).__call__(layer, x)


# Per thread; a call inside a call puts the outer one back when it ends.
_running: ContextVar[_Call | None] = ContextVar("mlx_fused_running_call", default=None)


class _StandIn:
    """Takes the place of a projection module while its attention module runs."""

    def __init__(self, call: _Call, name: str, module: nn.Module):
        self._call, self._name, self._module = call, name, module

    def __call__(self, x: mx.array) -> mx.array:
        return self._call.project(self._name, self._module, x)

    def __getattr__(self, attribute: str):
        return getattr(self._module, attribute)


def _project(attention: nn.Module, x: mx.array) -> dict[str, mx.array]:
    """All three projections of ``x`` by name, none if they cannot be fused."""
    if x.dtype not in _DTYPES or _obstacle(attention):
        return {}
    linears = [_linear(attention[name]) for name in _NAMES]
    weight = tuple(linear["weight"] for linear in linears)
    bias = tuple(linear["bias"] for linear in linears) if "bias" in linears[0] else None
    q_dims, kv_dims = weight[0].shape[0], weight[1].shape[0]
    # As a batch of sequences of one token the head-major results lie in memory token by token,
    # which is what the model's code goes on with: no reshape here moves a byte.
    tokens = x.reshape(prod(x.shape[:-1]), 1, x.shape[-1])
    outputs = fused_qkv_projection(tokens, weight, bias, q_dims // kv_dims, 1, kv_dims)
    return {
        name: y.reshape(*x.shape[:-1], len(w)) for name, w, y in zip(_NAMES, weight, outputs, strict=True)
    }


def _obstacle(attention: nn.Module) -> str | None:
    """Why the projections of ``attention`` cannot be one operation, None if they can."""
    if not isinstance(attention, _FusedProjections):
        return f"{type(attention).__name__} has no __call__"
    if vars(attention).get("is_kv_shared_layer"):
        return "it takes keys and values from another layer"
    modules = [attention.get(name) for name in _NAMES]
    linears = [_linear(module) for module in modules]
    for name, module, linear in zip(_NAMES, modules, linears, strict=True):
        if linear is None:
            base = f" of {type(module.linear).__name__}" if _is_lora(module) else ""
            return f"{name} is {type(module).__name__}{base}"
    (q, k, v), inputs = zip(*(linear["weight"].shape for linear in linears), strict=True)
    if len(set(inputs)) > 1:
        return f"input sizes differ: {inputs}"
    if k != v or q % k:
        return f"output sizes do not form heads: {(q, k, v)}"
    if len({"bias" in linear for linear in linears}) > 1:
        return "only some projections have a bias"
    dtypes = {p.dtype for linear in linears for p in linear.values()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return f"parameter types: {', '.join(sorted(str(d) for d in dtypes))}"
    return None


def _linear(module: nn.Module | None) -> nn.Linear | None:
    """The plain linear layer inside a projection; None if it is anything but plain or LoRA."""
    base = module.linear if _is_lora(module) else module
    return base if type(base) is nn.Linear else None


def _is_lora(module: nn.Module | None) -> bool:
    # By name, since importing mlx-lm takes seconds and not every user has it.
    cls = type(module)
    return (cls.__module__, cls.__qualname__) == ("mlx_lm.tuner.lora", "LoRALinear")
