"""Reads the linear layers of an attention module and runs them as one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import prod
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    sum_gradients,
)

from mlx_fused._ext import alias, difference, has_quantized_kernels, is_same
from mlx_fused.linear import LinearOperands, is_lora, lora_obstacle, type_name
from mlx_fused.operations import fused_output_projection_residual, fused_qkv_projection

DTYPES = frozenset({mx.float32, mx.float16, mx.bfloat16})
_SHARDED = (AllToShardedLinear, QuantizedAllToShardedLinear)
_KNOWN = (nn.Linear, nn.QuantizedLinear, *_SHARDED)


class NotFused(Exception):
    """A part of a layer runs the model's own code; the message says why."""


class QKV(NamedTuple):
    """The projections of queries, keys and values as one operation."""

    names: tuple[str, str, str]
    layers: tuple[LinearOperands, LinearOperands, LinearOperands]
    group: mx.distributed.Group | None  # of sharded layers: each member has some of the output features
    adapters_apart: str | None  # why mlx-lm's own code adds the adapters; None if the operation does


def is_known(module: nn.Module) -> bool:
    """Whether the operations compute exactly what the class of ``module`` does. Subclasses may differ."""
    return type(module) in _KNOWN or is_lora(type(module))


# All that a layer of a known type computes with: its arrays, and the types and settings of its modules.
Operands = tuple[list[mx.array], list]


def operands(module: nn.Module) -> Operands:
    """The present operands of ``module``. If an array is later changed in place, so is the one in here."""
    arrays, settings = [], [type(module), *vars(module).values()]
    for value in module.values():
        if isinstance(value, mx.array):
            arrays.append(value)
        elif isinstance(value, nn.Module):  # of a LoRALinear: the layer it wraps, and its dropout
            settings += type(value), *vars(value).values()
            arrays += [a for a in value.values() if isinstance(a, mx.array)]
    return arrays, settings


def kept(module: nn.Module) -> Operands:
    """The present operands of ``module``, safe from later changes in place."""
    arrays, settings = operands(module)
    return [alias(a) for a in arrays], settings


def is_unchanged(module: nn.Module, before: Operands) -> bool:
    """Whether ``module`` still has the operands that :func:`kept` returned."""
    arrays, settings = operands(module)
    arrays_before, settings_before = before
    if len(arrays) != len(arrays_before) or settings != settings_before:
        return False
    return all(map(is_same, arrays, arrays_before))


def read_qkv(attention: nn.Module, names: tuple[str, ...], lora: bool, exact: bool) -> QKV:
    """The three projections in their present state.

    Raises:
        NotFused: If one operation cannot compute them.
    """
    modules = [attention.get(name) for name in names]
    layers = [_read(name, module) for name, module in zip(names, modules, strict=True)]
    if reason := difference(layers):
        raise NotFused(reason)
    dtypes = [_dtype(layer) for layer in layers]
    if len(set(dtypes)) > 1:
        raise NotFused(f"parameter types differ: {', '.join(map(str, dtypes))}")
    sizes = tuple(layer.weight.shape[0] for layer in layers)
    if 0 in sizes:
        raise NotFused(f"a projection has no outputs: {sizes}")
    groups = [module.group if type(module) in _SHARDED else None for module in modules]
    if any(group is not groups[0] for group in groups):
        raise NotFused("they are sharded over different groups")
    try:
        adapted = [_with_lora(*of, lora, exact) for of in zip(names, modules, layers, strict=True)]
    except NotFused as reason:
        return QKV(names, tuple(layers), groups[0], str(reason))
    return QKV(names, tuple(adapted), groups[0], None)


# Called with (attention module, operation, its arguments by name, its result).
Watcher = Callable[[nn.Module, Callable, dict, object], None]
_watcher: ContextVar[Watcher | None] = ContextVar("mlx_fused_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher`` for every fused operation that patched models run in a ``with`` block, on this thread.

    Args:
        watcher (callable): Called as ``watcher(module, operation, arguments, outputs)`` with the attention
            module, the function of ``mlx_fused``, its arguments by name, and its result, an array or a tuple.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def _run(attention: nn.Module, operation: Callable, **arguments):
    outputs = operation(**arguments)
    if (watcher := _watcher.get()) is not None:
        watcher(attention, operation, arguments, outputs)
    return outputs


def project(attention: nn.Module, qkv: QKV, x: mx.array, exact: bool) -> dict[str, mx.array]:
    """The outputs of the three projections for ``x``; without adapters if mlx-lm's own code adds them."""
    # Heads are not split here: the model's code expects the plain outputs and splits them itself.
    tokens = x if x.ndim == 3 else x.reshape(1, prod(x.shape[:-1]), x.shape[-1])
    if qkv.group is not None:
        tokens = sum_gradients(qkv.group)(tokens)
    outputs = _run(
        attention, fused_qkv_projection, input=tokens, weight=qkv.layers, split_heads=False, exact=exact
    )
    if x.ndim != 3:
        outputs = [y.reshape((*x.shape[:-1], y.shape[-1])) for y in outputs]
    return dict(zip(qkv.names, outputs, strict=True))


def read_output(attention: nn.Module, name: str, lora: bool, exact: bool) -> Callable:
    """The output projection as a function of ``x``, ``residual`` and ``alpha``.

    Raises:
        NotFused: If our operation cannot compute it.
    """
    module = attention.get(name)
    layer = _read(name, module)
    if type(module) in _SHARDED:
        raise NotFused(f"{name} is {type(module).__name__}")
    layer = _with_lora(name, module, layer, lora, exact)
    # The operation runs later, when the residual is added. Changes in place until then must not affect it.
    kept = LinearOperands(*(alias(a) if isinstance(a, mx.array) else a for a in layer))
    return partial(_run, attention, fused_output_projection_residual, weight=kept, exact=exact)


def _read(name: str, module: nn.Module | None) -> LinearOperands:
    """The present operands of a layer without its adapter."""
    base = module["linear"] if is_lora(type(module)) else module
    # An adapter around a sharded layer is not sharded itself, so that combination is not fused.
    if type(base) not in _KNOWN or (base is not module and type(base) in _SHARDED):
        raise NotFused(f"{name} is {type_name(module)}")
    layer = LinearOperands.of_base(base)
    group_size, bits, mode = layer.group_size, layer.bits, layer.mode
    if layer.scales is not None and not has_quantized_kernels(group_size, bits, mode):
        raise NotFused(f"{name} is quantized in a format without kernels: {mode} {bits} bits by {group_size}")
    if layer.weight.ndim != 2 or (layer.bias is not None and layer.bias.shape != layer.weight.shape[:1]):
        raise NotFused(f"{name} has parameters of unusual shapes")
    dtype = _dtype(layer)
    if dtype is not None and (dtype not in DTYPES or (layer.bias is not None and layer.bias.dtype != dtype)):
        raise NotFused(f"{name} has parameters of {', '.join(sorted({str(p.dtype) for p in base.values()}))}")
    return layer


def _dtype(layer: LinearOperands) -> mx.Dtype | None:
    """The dtype of the layer's floating-point arrays; None if it has none."""
    if layer.scales is None:
        return layer.weight.dtype
    if layer.biases is not None:
        return layer.scales.dtype
    # The scales of the other modes (mxfp4, ...) are encoded in bytes and have no dtype to compare.
    return None if layer.bias is None else layer.bias.dtype


def _with_lora(
    name: str, module: nn.Module, layer: LinearOperands, lora: bool, exact: bool
) -> LinearOperands:
    if not is_lora(type(module)):
        return layer
    if not lora:
        raise NotFused("lora=False")
    if reason := lora_obstacle(module):
        raise NotFused(f"{name} {reason}")
    layer = layer.with_lora(module)
    a, b = layer.lora_a, layer.lora_b
    if not a.ndim == b.ndim == 2 or not {a.dtype, b.dtype} <= DTYPES:
        raise NotFused(f"{name} has adapters of {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    if exact and not layer.lora_a.dtype == layer.lora_b.dtype == mx.float32:
        raise NotFused(f"{name} has adapters of {layer.lora_a.dtype}, which are not rounded exactly")
    return layer
