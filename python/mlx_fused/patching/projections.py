"""Reads the linear layers of a module and runs them as one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import AllToShardedLinear, QuantizedAllToShardedLinear

from mlx_fused import _ext
from mlx_fused._ext import alias, difference, has_quantized_kernels
from mlx_fused.linear import LinearOperands, is_lora, lora_obstacle, type_name
from mlx_fused.operations.call import Norm, batched, unbatched

DTYPES = frozenset({mx.float32, mx.float16, mx.bfloat16})
_PLAIN = (nn.Linear, nn.QuantizedLinear)
_SHARDED = (AllToShardedLinear, QuantizedAllToShardedLinear)
KNOWN = {*_PLAIN, *_SHARDED}  # and mlx-lm's LoRALinear, when one was seen
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class NotFused(Exception):
    """A part of a module runs the model's own code; the message says why."""


class Together(NamedTuple):
    """Layers that one operation computes from the same input."""

    group: mx.distributed.Group | None  # of sharded layers: each member has some of the output features
    adapters_apart: str | None  # why mlx-lm's own code adds the adapters; None if the operation does


def is_known(module: nn.Module) -> bool:
    """Whether the operations compute exactly what the class of ``module`` does. Subclasses may differ."""
    return type(module) in KNOWN or is_lora(type(module))


def operands(module: nn.Module) -> LinearOperands:
    """The present operands of a layer that was read. A later change in place does not reach them."""
    layer = LinearOperands.of_base(module["linear"] if is_lora(type(module)) else module)
    layer = layer.with_lora(module) if is_lora(type(module)) else layer
    return LinearOperands(*(alias(value) if isinstance(value, mx.array) else value for value in layer))


def read_together(names: Sequence[str], modules: Sequence, lora: bool, exact: bool) -> Together:
    """Read layers of the same input.

    Raises:
        NotFused: If one operation cannot compute them.
    """
    layers = [_read_base(name, module) for name, module in zip(names, modules, strict=True)]
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
        for name, module in zip(names, modules, strict=True):
            _check_adapter(name, module, lora, exact)
    except NotFused as reason:
        return Together(groups[0], str(reason))
    return Together(groups[0], None)


def read(name: str, module: nn.Module | None, lora: bool, exact: bool) -> None:
    """Read one layer, with its adapter.

    Raises:
        NotFused: If our operations cannot compute it.
    """
    _read_base(name, module)
    if type(module) in _SHARDED:
        raise NotFused(f"{name} is {type(module).__name__}")
    _check_adapter(name, module, lora, exact)


# Called with (module, operation, its arguments by name, its result).
Watcher = Callable[[nn.Module, Callable, dict, object], None]
_watcher: ContextVar[Watcher | None] = ContextVar("mlx_fused_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher`` for every fused operation that patched models run in a ``with`` block, on this thread.

    Args:
        watcher (callable): Called as ``watcher(module, operation, arguments, outputs)`` with the patched
            module, the function of ``mlx_fused``, its arguments by name, and its result, an array or a tuple.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def run(module: nn.Module, operation: Callable, **arguments):
    """Run ``operation`` for ``module``."""
    outputs = operation(**arguments)
    tell(module, operation, arguments, outputs)
    return outputs


def is_watched() -> bool:
    return _watcher.get() is not None


def tell(module: nn.Module, operation: Callable, arguments: dict, outputs) -> None:
    if (watcher := _watcher.get()) is not None:
        watcher(module, operation, arguments, outputs)


class Operation(NamedTuple):
    """An operation without its arrays, made once."""

    function: Callable  # of mlx_fused
    made: _ext.Operation
    settings: dict[str, object]  # the function's arguments that it was made of

    def arguments(self, x: mx.array, layers: Sequence[nn.Module], **others) -> dict[str, object]:
        """All arguments of the function."""
        weights = tuple(map(operands, layers))
        weight = weights[0] if len(weights) == 1 else weights
        return {self.made.input: alias(x), "weight": weight, **others, **self.settings}

    def __call__(
        self, module: nn.Module, layers: Sequence[nn.Module], x: mx.array, norm: Norm = None
    ) -> list[mx.array]:
        """Run it for ``module``, with the present arrays of layers that were read."""
        rows, leading = (x, None) if x.ndim == 3 else batched(self.made.name, x)
        outputs = _ext.project(self.made, rows, norm, layers, None, 1.0, None)
        if is_watched():
            result = outputs[0] if len(outputs) == 1 else tuple(outputs)
            tell(module, self.function, self.arguments(rows, layers, norm=norm), result)
        return outputs if leading is None else [unbatched(y, leading) for y in outputs]


def _read_base(name: str, module: nn.Module | None) -> LinearOperands:
    """The present operands of a layer without its adapter, which are fit for our operations."""
    base = module["linear"] if is_lora(type(module)) else module
    # An adapter around a sharded layer is not sharded itself, so that combination is not fused.
    known = type(base) in _PLAIN or (base is module and type(base) in (*_SHARDED, *EMBEDDINGS))
    if not known:
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


def _check_adapter(name: str, module: nn.Module, lora: bool, exact: bool) -> None:
    if not is_lora(type(module)):
        return
    if not lora:
        raise NotFused("lora=False")
    if reason := lora_obstacle(module):
        raise NotFused(f"{name} {reason}")
    a, b = module["lora_a"], module["lora_b"]
    if not a.ndim == b.ndim == 2 or not {a.dtype, b.dtype} <= DTYPES:
        raise NotFused(f"{name} has adapters of {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    if exact and not a.dtype == b.dtype == mx.float32:
        raise NotFused(f"{name} has adapters of {a.dtype}, which are not rounded exactly")
