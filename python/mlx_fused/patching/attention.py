"""Gives the code of an attention module our attention, under the name that it knows mlx-lm's by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType

import mlx.core as mx
import mlx.nn as nn

from mlx_fused import _ext
from mlx_fused._ext import count, has_kernels, running
from mlx_fused.operations import fused_attention
from mlx_fused.patching import copied
from mlx_fused.patching.projections import NotFused, tell, watcher_of_thread
from mlx_fused.patching.registry import Active

_NAME = "scaled_dot_product_attention"


def ours(active: Active, method: FunctionType) -> dict[str, object]:
    """What the code of ``method`` is to see; nothing if it does not call mlx-lm's."""
    calls_it = _NAME in method.__globals__ and _NAME in copied.read_globals(method)
    return {_NAME: partial(_attend, method)} if calls_it else {}


def read(active: Active, method: Callable) -> None:
    """Raises ``NotFused`` if the attention that ``method`` calls is not to be ours."""
    if copied.seeing(active, method, ours) is method:
        raise NotFused(f"its __call__ does not call mlx-lm's {_NAME}")
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
    if _ext.on_gpu():
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
            count(counter, 1, 0, str(reason))
        else:
            count(counter, 1, 1, None, False)
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
    y = fused_attention(q=queries, k=keys, v=values, scale=scale, mask=mask, sinks=sinks)
    if watcher_of_thread() is not None:
        given = {"q": queries, "k": keys, "v": values, "scale": scale, "mask": mask, "sinks": sinks}
        tell(module, fused_attention, given, y)
    return y
