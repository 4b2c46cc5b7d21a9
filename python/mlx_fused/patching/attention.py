"""Gives the code of an attention module our attention, under the name that it knows mlx-lm's by.

No global is changed: while a patched module runs, its code is a copy that looks its globals up elsewhere.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType

import mlx.core as mx
import mlx.nn as nn

from mlx_fused._ext import has_kernels, is_gpu, running
from mlx_fused.operations import fused_attention
from mlx_fused.patching import projections
from mlx_fused.patching.projections import NotFused
from mlx_fused.patching.registry import Active

_NAME = "scaled_dot_product_attention"


class _Globals(dict):
    """Those of a function as they are at any time, but for our attention."""

    def __init__(self, of: dict, attention: Callable):
        # What Python looks up without __missing__, such as __package__.
        super().__init__({name: value for name, value in of.items() if name.startswith("__")})
        self[_NAME] = attention
        self._of = of

    def __missing__(self, name: str):
        return self._of[name]


def seeing_ours(active: Active, method: Callable) -> Callable:
    """A copy of ``method`` that sees our attention; ``method`` itself if it does not call mlx-lm's."""
    if type(method) is not FunctionType:
        return method
    of, code, defaults, keywords, copy = active.copied
    is_same = of is method and code is method.__code__
    if not is_same or defaults is not method.__defaults__ or keywords is not method.__kwdefaults__:
        copy = _copy(method)
        active.copied = method, method.__code__, method.__defaults__, method.__kwdefaults__, copy
    return copy


def _copy(method: FunctionType) -> FunctionType:
    names, codes = method.__globals__, list(_codes(method.__code__))
    calls_it = _NAME in names and any(_NAME in code.co_names for code in codes)
    if not calls_it or any(map(_assigns_globals, codes)):  # which a copy would do elsewhere
        return method
    own = _Globals(names, partial(_attend, method))
    copy = FunctionType(codes[0], own, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _assigns_globals(code: CodeType) -> bool:
    return any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for i in dis.get_instructions(code))


def read(active: Active, method: Callable) -> None:
    """Raises ``NotFused`` if the attention that ``method`` calls is not to be ours."""
    if seeing_ours(active, method) is method:
        raise NotFused(f"its code does not call {_NAME}")
    _check(active, method)


def _check(active: Active, method: FunctionType) -> None:
    options = active.patch.options
    if options.attention is False:
        raise NotFused("attention=False")
    if options.exact:
        raise NotFused("exact=True, and MLX rounds scores")
    # A wrapper may carry the name of what it wraps, but neither its globals nor its type.
    names = getattr(method.__globals__[_NAME], "__globals__", {})
    is_of_mlx = type(mx.fast.scaled_dot_product_attention) is type(mx.eval)
    if names.get("__name__") != "mlx_lm.models.base" or not is_of_mlx:
        raise NotFused(f"{_NAME} was replaced")
    if is_gpu(mx.default_device()):
        raise NotFused("on a GPU it is MLX's")


def _attend(method: FunctionType, *args, **kwargs) -> mx.array:
    """What the code of ``method`` calls."""
    call = running()
    if call is not None:
        counter = call.active.patch.calls["attention"]
        try:
            _check(call.active, method)
            y = _run(call.module, *args, **kwargs)
        except NotFused as reason:
            counter.add(1, reason=str(reason))
        else:
            counter.add(1, 1, is_routed=False)
            return y
    return method.__globals__[_NAME](*args, **kwargs)


def _run(module: nn.Module, queries, keys, values, cache, scale, mask, sinks=None) -> mx.array:
    """mlx-lm's attention as one operation."""
    if hasattr(cache, "bits"):
        raise NotFused("its cache is quantized")
    if not (has_kernels(queries) and has_kernels(keys) and has_kernels(values)):
        raise NotFused("it is not called with arrays of a type with kernels")
    if isinstance(scale, mx.array):
        raise NotFused("its scale is an array")
    return projections.run(
        module, fused_attention, q=queries, k=keys, v=values, scale=scale, mask=mask, sinks=sinks
    )
