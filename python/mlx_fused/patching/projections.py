"""What the linear layers of an attention module are now, and the one operation that does their work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from math import prod
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    sum_gradients,
)

from mlx_fused._ext import (
    alias,
    fused_lora_output_projection_residual,
    fused_lora_qkv_projection,
    fused_output_projection_residual,
    fused_qkv_projection,
    fused_quantized_output_projection_residual,
    fused_quantized_qkv_projection,
    has_quantized_kernels,
    is_same,
)

DTYPES = frozenset({mx.float32, mx.float16, mx.bfloat16})
_DENSE = (nn.Linear, AllToShardedLinear)
_QUANTIZED = (nn.QuantizedLinear, QuantizedAllToShardedLinear)
_SHARDED = (AllToShardedLinear, QuantizedAllToShardedLinear)


class Projection(NamedTuple):
    """The operands of a linear layer; those it does not have are None."""

    weight: mx.array
    bias: mx.array | None
    scales: mx.array | None
    biases: mx.array | None
    format: tuple[int, int, str] | None  # group size, bits and mode of quantization
    group: mx.distributed.Group | None  # whose members each have some of the outputs
    lora: nn.Module | None
    dtype: mx.Dtype | None  # of all that is not quantized


class Adapter(NamedTuple):
    """Adds ``scale * (x @ a) @ b``."""

    a: mx.array | None
    b: mx.array | None
    scale: float


class QKV(NamedTuple):
    """The operands of the projections of queries, keys and values as one operation."""

    names: tuple[str, str, str]
    weight: tuple[mx.array, mx.array, mx.array]
    bias: tuple[mx.array, mx.array, mx.array] | None
    scales: tuple[mx.array, mx.array, mx.array] | None
    biases: tuple[mx.array, mx.array, mx.array] | None
    format: tuple[int, int, str] | None
    group: mx.distributed.Group | None
    adapters: list[Adapter] | str | None  # text: why mlx-lm's own code runs them


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is of one of the types whose code the operations stand for, to the last line."""
    cls = type(module)
    return cls in _DENSE or cls in _QUANTIZED or _is_lora(cls)


# The arrays that a layer of a known type computes with, and the types and settings of its parts.
Operands = tuple[list[mx.array], list]


def operands(module: nn.Module) -> Operands:
    """Those of now; the arrays are others once they are changed in place."""
    arrays, settings = [], [type(module), *vars(module).values()]
    for value in module.values():
        if isinstance(value, mx.array):
            arrays.append(value)
        elif isinstance(value, nn.Module):  # what an adapter is put around, and its dropout
            settings += type(value), *vars(value).values()
            arrays += [a for a in value.values() if isinstance(a, mx.array)]
    return arrays, settings


def kept(module: nn.Module) -> Operands:
    """Those of now, for good."""
    arrays, settings = operands(module)
    return [alias(a) for a in arrays], settings


def is_unchanged(module: nn.Module, before: Operands) -> bool:
    """Whether ``module`` still has the operands that :func:`kept` gave."""
    arrays, settings = operands(module)
    arrays_before, settings_before = before
    if len(arrays) != len(arrays_before) or settings != settings_before:
        return False
    return all(map(is_same, arrays, arrays_before))


def read(name: str, module: nn.Module | None) -> Projection | str:
    """The operands of ``module`` as they are now; text if the operations do not know its type."""
    cls, lora = type(module), None
    if _is_lora(cls):
        lora, module = module, module["linear"]
        cls = type(module)
    if lora is not None and cls in _SHARDED:  # its adapter is not
        return f"{name} is LoRALinear of {cls.__name__}"
    if cls in _DENSE:
        weight, bias, scales, biases, form = module["weight"], module.get("bias"), None, None, None
        dtype = weight.dtype
    elif cls in _QUANTIZED:
        weight, bias = module["weight"], module.get("bias")
        scales, biases = module["scales"], module.get("biases")
        form = module.group_size, module.bits, module.mode
        if not has_quantized_kernels(*form):
            return f"{name} is quantized in a format without kernels: {_format(form)}"
        # The scales of mxfp4 and its like are no numbers.
        dtype = scales.dtype if biases is not None else bias.dtype if bias is not None else None
    else:
        return f"{name} is {f'LoRALinear of {cls.__name__}' if lora else cls.__name__}"
    if dtype is not None and (dtype not in DTYPES or (bias is not None and bias.dtype != dtype)):
        return f"{name} has parameters of {', '.join(sorted({str(p.dtype) for p in module.values()}))}"
    group = module.group if cls in _SHARDED else None
    return Projection(weight, bias, scales, biases, form, group, lora, dtype)


def read_qkv(attention: nn.Module, names: tuple[str, ...], lora: bool, exact: bool) -> QKV | str:
    """The three projections as they are now; text if they cannot be one operation."""
    three = []
    for name in names:
        if isinstance(projection := read(name, attention.get(name)), str):
            return projection
        three.append(projection)
    q, k, v = three
    if not q.format == k.format == v.format:
        return f"quantization differs: {', '.join(_format(p.format) for p in three)}"
    if not q.weight.shape[1] == k.weight.shape[1] == v.weight.shape[1]:
        return f"input sizes differ: {tuple(p.weight.shape[1] for p in three)}"
    if not (q.bias is None) == (k.bias is None) == (v.bias is None):
        return "only some projections have a bias"
    if not q.dtype == k.dtype == v.dtype:
        return f"parameter types differ: {', '.join(str(p.dtype) for p in three)}"
    if not q.group is k.group is v.group:
        return "they are sharded over different groups"
    sizes = tuple(p.weight.shape[0] for p in three)
    if 0 in sizes or sizes[0] % sizes[1]:
        return f"output sizes do not form heads: {sizes}"
    weight, bias, scales, biases, *_ = zip(*three, strict=True)
    adapters = None
    if q.lora or k.lora or v.lora:
        adapters = _adapters(names, three, lora, exact)
    return QKV(
        names,
        weight,
        None if bias[0] is None else bias,
        None if scales[0] is None else scales,
        None if biases[0] is None else biases,
        q.format,
        q.group,
        adapters,
    )


# (attention module, operation, its arguments by name, what it gave)
Watcher = Callable[[nn.Module, Callable, dict, object], None]
_watcher: ContextVar[Watcher | None] = ContextVar("mlx_fused_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show ``watcher`` every fused operation that patched models run in the block, on this thread."""
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
    """What the three projections make of ``x``, without adapters if mlx-lm's own code runs them."""
    # Token by token, as the model's code goes on with it; heads it splits off itself.
    tokens = x if x.ndim == 3 else x.reshape(1, prod(x.shape[:-1]), x.shape[-1])
    if qkv.group is not None:
        tokens = sum_gradients(qkv.group)(tokens)
    q_size, k_size, v_size = (w.shape[0] for w in qkv.weight)
    options = {
        "input": tokens,
        "weight": qkv.weight,
        "num_heads": q_size // k_size,
        "num_kv_heads": 1,
        "head_dim": k_size,
        "v_head_dim": v_size,
        "split_heads": False,
    }
    if qkv.format:
        options |= _quantization(qkv)
    bias, added = qkv.bias, None
    if isinstance(qkv.adapters, list):
        options["lora_a"], options["lora_b"], options["scale"] = zip(*qkv.adapters, strict=True)
        operation, options["exact"] = fused_lora_qkv_projection, exact
    elif qkv.format:
        if exact:  # mlx-lm rounds before it adds the bias
            bias, added = None, bias
        operation = fused_quantized_qkv_projection
    else:
        operation = fused_qkv_projection
    outputs = _run(attention, operation, bias=bias, **options)
    if x.ndim != 3:
        outputs = [y.reshape((*x.shape[:-1], y.shape[-1])) for y in outputs]
    if added is not None:
        outputs = [y + b for y, b in zip(outputs, added, strict=True)]
    return dict(zip(qkv.names, outputs, strict=True))


def read_output(attention: nn.Module, name: str, lora: bool, exact: bool) -> Callable | str:
    """The operation ``(attn_out=, residual=, alpha=)`` of the output projection; text if there is none."""
    module = attention.get(name)
    if isinstance(p := read(name, module), str):
        return p
    if p.group is not None:
        return f"{name} is {type(module).__name__}"
    operation, options = fused_output_projection_residual, {"weight": p.weight, "bias": p.bias}
    if p.format:
        operation, options = fused_quantized_output_projection_residual, options | _quantization(p)
    if p.lora is not None:
        one = _adapter(name, p.lora, exact) if lora else "lora=False"
        if isinstance(one, str):
            return one
        operation = fused_lora_output_projection_residual
        options |= {"lora_a": one.a, "lora_b": one.b, "scale": one.scale}
    # The residual is added later: what the model's code changes until then, in place, it changes too late.
    options = {key: alias(a) if isinstance(a, mx.array) else a for key, a in options.items()}
    return partial(_run, attention, operation, exact=exact, **options)


def _adapters(
    names: tuple[str, ...], three: list[Projection], lora: bool, exact: bool
) -> list[Adapter] | str:
    if not lora:
        return "lora=False"
    adapters = []
    for name, projection in zip(names, three, strict=True):
        one = _adapter(name, projection.lora, exact) if projection.lora else Adapter(None, None, 0.0)
        if isinstance(one, str):
            return one
        adapters.append(one)
    return adapters


def _adapter(name: str, module: nn.Module, exact: bool) -> Adapter | str:
    """The adapter of a LoRALinear; text if only mlx-lm's own code can run it."""
    dropout = getattr(module, "dropout", None)
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"{name} has a dropout of type {type(dropout).__name__}"
    if type(dropout) is nn.Dropout and dropout.training and dropout._p_1 != 1:
        return f"{name} has dropout"
    a, b, scale = module["lora_a"], module["lora_b"], module.scale
    if not isinstance(scale, (int, float)):
        return f"{name} has a scale of type {type(scale).__name__}"
    if exact and not a.dtype == b.dtype == mx.float32:
        return f"{name} has adapters of {a.dtype}, which are not rounded exactly"
    return Adapter(a, b, scale)


def _quantization(operands: Projection | QKV) -> dict:
    group_size, bits, mode = operands.format
    return {
        "scales": operands.scales,
        "biases": operands.biases,
        "group_size": group_size,
        "bits": bits,
        "mode": mode,
    }


def _format(form: tuple[int, int, str] | None) -> str:
    if form is None:
        return "none"
    group_size, bits, mode = form
    return f"{mode} {bits} bits by {group_size}"


@cache
def _is_lora(cls: type) -> bool:
    # By name, since importing mlx-lm takes seconds and not every user has it.
    return (cls.__module__, cls.__qualname__) == ("mlx_lm.tuner.lora", "LoRALinear")
