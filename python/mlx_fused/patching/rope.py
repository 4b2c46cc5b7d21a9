"""Gives the code of rotary positions ours, under the name that it knows MLX's by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType

import mlx.core as mx
import mlx.nn as nn

from mlx_fused import _ext
from mlx_fused._ext import count, has_kernels, own_method
from mlx_fused.operations import fused_rope
from mlx_fused.patching import copied
from mlx_fused.patching.projections import NotFused
from mlx_fused.patching.registry import Active


class _With:
    """A Python module with something else in it."""

    def __init__(self, module: object, **other: object):
        self.__dict__.update(other)
        self._module = module

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


def is_rope(module: nn.Module) -> bool:
    """Whether it is rotary positions and nothing else: mlx-lm's models have several kinds of their own."""
    has_children = any(isinstance(child, nn.Module) for child in module.values())
    return not has_children and callable(module) and _calls_it(own_method(type(module), "__call__"))


def _calls_it(method: Callable) -> bool:
    if type(method) is not FunctionType or method.__globals__.get("mx") is not mx:
        return False
    return {"fast", "rope"} <= set(method.__code__.co_names) and "mx" in copied.read_globals(method)


def ours(active: Active, method: FunctionType) -> dict[str, object]:
    """What the code of ``method`` is to see; nothing if it does not call MLX's."""
    if not _calls_it(method):
        return {}
    return {"mx": _With(mx, fast=_With(mx.fast, rope=partial(_rope, active)))}


def read(active: Active, method: Callable) -> None:
    """Raises ``NotFused`` if the operation that ``method`` calls is not to be ours."""
    if copied.seeing(active, method, ours) is method:
        raise NotFused("its code does not call mx.fast.rope")
    _check(active)


def _check(active: Active) -> None:
    options = active.patch.options
    if not options.rope:
        raise NotFused("rope=False")
    if options.exact:
        raise NotFused("exact=True, and MLX rounds sines")
    if type(mx.fast.rope) is not type(mx.eval):
        raise NotFused("mx.fast.rope was replaced")
    if _ext.on_gpu():
        raise NotFused("on a GPU it is MLX's")


def _rope(active: Active, *args, **kwargs) -> mx.array:
    """What the code calls."""
    counter = active.patch.calls["rope"]
    try:
        _check(active)
        if not (args and has_kernels(args[0])):
            raise NotFused("it is not called with an array of a type with kernels")
        if kwargs.get("base") is None and kwargs.get("freqs") is None:
            raise NotFused("it is called without base and freqs")
        y = fused_rope(*args, **kwargs)
    except (NotFused, TypeError, ValueError) as reason:  # of a wrong argument MLX's own error tells
        count(counter, 1, 0, str(reason))
        return mx.fast.rope(*args, **kwargs)
    count(counter, 1, 1, None, False)
    return y
