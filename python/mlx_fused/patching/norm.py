"""Runs an RMS norm, and lets the operation after it take its input un-normed."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_fused import _ext
from mlx_fused._ext import alias, can_norm, count, norm_of, of_class
from mlx_fused.operations.call import Norm
from mlx_fused.patching.derived import Derived
from mlx_fused.patching.projections import NotFused
from mlx_fused.patching.registry import Active

_CALL = nn.RMSNorm.__call__


class Normed(Derived):
    """What a norm returns on a GPU: the kernel of the operation after it may norm by itself."""

    _origin: tuple[mx.array, tuple[mx.array, float]] | None  # the norm's input, its weight and eps


def is_norm(module: nn.Module) -> bool:
    """Whether it is MLX's RMS norm. Subclasses may differ."""
    return type(module) is nn.RMSNorm


def run(norm: nn.Module, active: Active, method: Callable, x: object) -> mx.array | None:
    """The norm of ``x``; None if its own code must run."""
    counter = active.patch.calls["norm"]
    try:
        read(active, method)
        y = norm_of(norm, x)
        if y is None:
            raise NotFused("it is not called with one array, or has a weight and eps, of types with kernels")
    except NotFused as reason:
        count(counter, 1, 0, str(reason))
        return None
    if not _ext.on_gpu():
        count(counter, 1, 1, None, False)
        return y
    count(counter, 1, 0, "on a GPU it is MLX's, or a part of the operation after it")
    return of_class(Normed, y, (alias(x), (alias(norm["weight"]), norm.eps))) if can_norm(x) else y


def read(active: Active, method: Callable) -> None:
    """Raises ``NotFused`` if our operation cannot compute the norm."""
    if not active.patch.options.norm:
        raise NotFused("norm=False")
    if method is not _CALL:
        raise NotFused("its __call__ was replaced")


def unnormed(x: mx.array) -> tuple[mx.array, Norm]:
    """The array that ``x`` is the norm of, with the norm for the operation; or ``x`` itself and no norm."""
    return x._origin if type(x) is Normed and x._origin is not None else (x, None)
