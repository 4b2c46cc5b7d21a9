"""Runs the linear layers of mlx-lm models as fused operations.

A module keeps its parameters and its code; only its class changes (see ``modules``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import mlx.nn as nn

from mlx_fused.patching import modules
from mlx_fused.patching.find import find
from mlx_fused.patching.projections import NotFused
from mlx_fused.patching.registry import Options, patch_of, roles_of
from mlx_fused.patching.report import Calls, LayerReport, Part, PatchReport, switched_off

__all__ = ["Calls", "LayerReport", "Part", "PatchReport", "patch", "patched", "unpatch"]


def patch(
    model: nn.Module,
    qkv: bool = True,
    o_residual: Literal["auto"] | bool = "auto",
    mlp: bool = True,
    linear: bool = True,
    norm: bool = True,
    rope: bool = True,
    attention: Literal["auto"] | bool = "auto",
    lora: bool = True,
    exact: bool = False,
    verbose: bool = False,
) -> PatchReport:
    """Run the linear layers of ``model`` as fused operations, where possible.

    The class of every module that has linear layers, of every RMS norm and of rotary positions becomes a
    subclass of its own class, and nothing else changes: parameters keep their names, and LoRA conversion,
    quantization, saving and loading work as before. What cannot be fused runs the model's own code. Patching
    a patched model only replaces its options. With the environment variable ``MLX_FUSED=0`` every call runs
    the model's own code.

    Other threads may be calling the model meanwhile: a call that is already running finishes the way it
    started.

    Args:
        model (mlx.nn.Module): A model of mlx-lm, or any part of one.
        qkv (bool): Project to queries, keys and values in one operation. Default: ``True``.
        o_residual (bool or str): Compute the last projection of attention, or of an MLP, and add the residual
            in one operation, if the layer's code adds them: ``"auto"`` with whichever kernels are expected to
            be faster, ``True`` with ours if there are any, ``False`` never. Default: ``"auto"``.
        mlp (bool): Compute the layers of an MLP before its last one, with the activation and the product with
            the gate, in one operation. Default: ``True``.
        linear (bool): Compute every other linear layer, such as the head, and the rows of quantized
            embeddings by our operations, where that may be faster. Default: ``True``.
        norm (bool): Compute every ``mlx.nn.RMSNorm`` by our operation; on a GPU, for few tokens, inside the
            operation after it. Default: ``True``.
        rope (bool): Compute rotary positions by our operation, where the code of a module that is nothing
            else calls ``mx.fast.rope``; on a GPU they stay MLX's. Default: ``True``.
        attention (bool or str): Compute attention itself, where a module calls mlx-lm's
            ``scaled_dot_product_attention``, by our operation: ``"auto"`` where that is expected to be
            faster, on a CPU; ``True`` where there are kernels of ours, which is the same today; ``False``
            never. Default: ``"auto"``.
        lora (bool): Make LoRA adapters part of the operation. If ``False``, or if an adapter has dropout,
            mlx-lm's own code adds the adapters to the QKV projection. Default: ``True``.
        exact (bool): Round after every step, as mlx-lm does, instead of once at the end. Default: ``False``.
        verbose (bool): Print the report to stderr. Default: ``False``.

    Returns:
        PatchReport: Which layers of the model in its present state are fused, why the others are not, and
        counters of their calls.

    Raises:
        TypeError: If ``model`` is not an ``mlx.nn.Module``.
        ValueError: If an option or the environment variable ``MLX_FUSED`` has an unknown value.
    """
    report = _patch(model, Options(qkv, o_residual, mlp, linear, norm, rope, attention, lora, exact))
    if verbose:
        print(report, file=sys.stderr)
    return report


def unpatch(model: nn.Module) -> None:
    """Restore the class of every patched module of ``model``.

    If another thread is calling a module, its class is restored when that call ends.

    Args:
        model (mlx.nn.Module): A model, patched or not.

    Raises:
        TypeError: If ``model`` is not an ``mlx.nn.Module``.
    """
    _check(model)
    for module in model.modules():
        modules.restore(module)


@contextmanager
def patched(
    model: nn.Module,
    qkv: bool = True,
    o_residual: Literal["auto"] | bool = "auto",
    mlp: bool = True,
    linear: bool = True,
    norm: bool = True,
    rope: bool = True,
    attention: Literal["auto"] | bool = "auto",
    lora: bool = True,
    exact: bool = False,
) -> Iterator[PatchReport]:
    """Patch ``model`` for a ``with`` block, which receives the report of :func:`patch`.

    After the block every module is as it was before, patched or not. The arguments and errors are those of
    :func:`patch`.

    Yields:
        PatchReport: The report.
    """
    _check(model)
    before = [(module, roles_of(module), patch_of(module)) for module in model.modules()]
    try:
        yield _patch(model, Options(qkv, o_residual, mlp, linear, norm, rope, attention, lora, exact))
    finally:
        for module, roles, earlier in before:
            if earlier is None:
                modules.restore(module)
            else:
                modules.set_patch(module, roles, earlier)


def _patch(model: nn.Module, options: Options) -> PatchReport:
    _check(model)
    for name in ("o_residual", "attention"):
        value = getattr(options, name)
        if not isinstance(value, bool) and value != "auto":
            raise ValueError(f"{name} must be 'auto', True or False but got {value!r}.")
    for name in ("qkv", "mlp", "linear", "norm", "rope", "lora", "exact"):
        if not isinstance(value := getattr(options, name), bool):
            raise ValueError(f"{name} must be True or False but got {value!r}.")
    switched_off()  # raises if MLX_FUSED has an unknown value
    reports = []
    for name, module, roles, obstacles in find(model):
        try:
            active = modules.fuse(module, roles, options, obstacles)
            reports.append(modules.report(name, module, roles, active))
        except NotFused as reason:
            reports.append(LayerReport(name, **dict.fromkeys(roles.parts, Part(str(reason)))))
    return PatchReport(tuple(report for report in reports if report.parts))


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an mlx.nn.Module but got {type(model).__name__}.")
