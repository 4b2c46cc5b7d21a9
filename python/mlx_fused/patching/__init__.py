"""Runs the projections of mlx-lm models as fused operations.

An attention module keeps its parameters and its code; only its class changes (see ``attention``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import mlx.nn as nn

from mlx_fused.patching import attention, residual
from mlx_fused.patching.attention import Names, Obstacles, Options
from mlx_fused.patching.projections import NotFused
from mlx_fused.patching.report import Calls, LayerReport, Part, PatchReport, switched_off

__all__ = ["Calls", "LayerReport", "Part", "PatchReport", "patch", "patched", "unpatch"]

# The names that models give to the projections of queries, keys and values, to the output projection, and to
# the method that calls them; and the modules that stand instead of the three, with the reason to report.
_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("c_q", "c_k", "c_v"),
    ("attn_query", "attn_key", "attn_value"),
)
_OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "c_proj", "attn_resid")
_ENTRIES = ("__call__", "get_qkv")
_INSTEAD = {
    **dict.fromkeys(
        ("qkv_proj", "q_k_v_proj", "qkvg_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
        "they are one projection already: {}",
    ),
    **dict.fromkeys(("kv_a_proj_with_mqa", "q_a_proj"), "they are made from latents: {}"),
    "q_proj": "it does not project to all three",
}


def patch(
    model: nn.Module,
    qkv: bool = True,
    o_residual: Literal["auto"] | bool = "auto",
    lora: bool = True,
    exact: bool = False,
    verbose: bool = False,
) -> PatchReport:
    """Run the projections of ``model``'s attention layers as fused operations, where possible.

    The class of every attention module becomes a subclass of its own class, and nothing else changes:
    parameters keep their names, and LoRA conversion, quantization, saving and loading work as before. What
    cannot be fused runs the model's own code. Patching a patched model only replaces its options. With the
    environment variable ``MLX_FUSED=0`` every call runs the model's own code.

    Other threads may be calling the model meanwhile: a call that is already running finishes the way it
    started.

    Args:
        model (mlx.nn.Module): A model of mlx-lm, or any part of one.
        qkv (bool): Project to queries, keys and values in one operation. Default: ``True``.
        o_residual (bool or str): Project attention's output and add the residual in one operation, if the
            layer's code adds them: ``"auto"`` with whichever kernels are expected to be faster, ``True`` with
            ours if there are any, ``False`` never. Default: ``"auto"``.
        lora (bool): Make LoRA adapters part of the operation. If ``False``, or if an adapter has dropout,
            mlx-lm's own code adds the adapters to the QKV projection. Default: ``True``.
        exact (bool): Round after every step, as mlx-lm does, instead of once at the end. Default: ``False``.
        verbose (bool): Print the report to stderr. Default: ``False``.

    Returns:
        PatchReport: Which layers of the model in its present state are fused, why the others are not, and
        counters of their calls.

    Raises:
        TypeError: If ``model`` is not an ``mlx.nn.Module``.
        ValueError: If ``o_residual`` or the environment variable ``MLX_FUSED`` has an unknown value.
    """
    report = _patch(model, qkv, o_residual, lora, exact)
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
    for _, module, *_ in _attentions(model):
        attention.restore(module)


@contextmanager
def patched(
    model: nn.Module,
    qkv: bool = True,
    o_residual: Literal["auto"] | bool = "auto",
    lora: bool = True,
    exact: bool = False,
) -> Iterator[PatchReport]:
    """Patch ``model`` for a ``with`` block, which receives the report of :func:`patch`.

    After the block every module is as it was before, patched or not. The arguments and errors are those of
    :func:`patch`.

    Yields:
        PatchReport: The report.
    """
    before = [(module, names, attention.patch_of(module)) for _, module, names, _ in _attentions(model)]
    try:
        yield _patch(model, qkv, o_residual, lora, exact)
    finally:
        for module, names, earlier in before:
            if earlier is None:
                attention.restore(module)
            else:
                attention.set_patch(module, names, earlier)


def _patch(model: nn.Module, qkv: bool, o_residual: str | bool, lora: bool, exact: bool) -> PatchReport:
    if o_residual != "auto" and not isinstance(o_residual, bool):
        raise ValueError(f"o_residual must be 'auto', True or False but got {o_residual!r}.")
    switched_off()  # raises if MLX_FUSED has an unknown value
    options = Options(qkv, o_residual, lora, exact)
    layers = []
    for name, module, names, obstacles in _attentions(model):
        try:
            fused = attention.fuse(module, names, options, obstacles)
            layers.append(attention.report(name, module, names, fused))
        except NotFused as reason:
            layers.append(LayerReport(name, Part(str(reason)), Part(str(reason))))
    return PatchReport(tuple(layers))


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module, Names, Obstacles]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an mlx.nn.Module but got {type(model).__name__}.")
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        names = attention.names_of(module) or _names(module)
        instead = next((text.format(key) for key, text in _INSTEAD.items() if key in module), None)
        if names.inputs or (names.output and instead):
            obstacles = Obstacles(None if names.inputs else instead, _residual_obstacle(name, names, modules))
            found.append((name or type(module).__name__, module, names, obstacles))
    return found[::-1]  # named_modules goes from the last child to the first


def _names(module: nn.Module) -> Names:
    return Names(
        next((names for names in _INPUTS if all(name in module for name in names)), ()),
        next((name for name in _OUTPUTS if name in module), None),
        next((name for name in _ENTRIES if hasattr(module, name)), None),
    )


def _residual_obstacle(name: str, names: Names, modules: dict[str, nn.Module]) -> str | None:
    if names.output is None:
        return f"none of {', '.join(_OUTPUTS)} is there"
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        if callable(layer := modules.get(parent)):
            return residual.obstacle(type(layer), name.removeprefix(parent).lstrip("."))
    return "no layer calls it"
