"""Finds a model's modules with linear layers, and what the layers are for."""

from __future__ import annotations

import re

import mlx.nn as nn
from mlx.nn.layers import distributed

from mlx_fused._ext import own_method
from mlx_fused.patching import mlp, norm, residual, rope
from mlx_fused.patching.formula import Unknown
from mlx_fused.patching.projections import EMBEDDINGS
from mlx_fused.patching.registry import Obstacles, Roles, original_of, roles_of

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
_DOWNS = ("down_proj", "w2", "c_proj", "fc2")  # of MLPs whose code is not known


_LINEAR = (
    nn.Linear,
    nn.QuantizedLinear,
    distributed.AllToShardedLinear,
    distributed.ShardedToAllLinear,
    distributed.QuantizedAllToShardedLinear,
    distributed.QuantizedShardedToAllLinear,
)


def find(model: nn.Module) -> list[tuple[str, nn.Module, Roles, Obstacles]]:
    """The modules of ``model`` to patch, by their names."""
    modules = dict(model.named_modules())
    heads = _heads(modules)
    found = []
    seen = set()  # a module may be in two places
    for name, module in modules.items():
        if _is_layer(module) or id(module) in seen:
            continue
        seen.add(id(module))
        roles = roles_of(module) or _roles(module, heads.get(id(module), ()))
        if roles.names or roles.kind or id(module) in heads:
            qkv = None if roles.inputs or roles.kind != "attention" else _instead(module)
            has_residual = "residual" in roles.parts
            residual = _residual_obstacle(name, roles, modules) if has_residual else None
            found.append((name or type(module).__name__, module, roles, Obstacles(qkv, residual)))
    return found[::-1]  # named_modules goes from the last child to the first


def _heads(modules: dict[str, nn.Module]) -> dict[int, tuple[str, ...]]:
    """The embeddings that models use as their heads: their names, by the ``id`` of the module they are in.

    The module that calls them is there too, if it is another.
    """
    heads = {}
    for module in modules.values():
        code = getattr(getattr(original_of(module), "__call__", None), "__code__", None)  # noqa: B004
        if code is None or "as_linear" not in code.co_names or any(map(_is_linear, module.values())):
            continue
        heads[id(module)] = ()
        for owner in (module, *(child for child in module.values() if isinstance(child, nn.Module))):
            if names := tuple(name for name, layer in owner.items() if type(layer) in EMBEDDINGS):
                heads[id(owner)] = names
    return heads


def _roles(module: nn.Module, heads: tuple[str, ...]) -> Roles:
    if norm.is_norm(module):
        return Roles("__call__", "norm", (), None, ())
    if rope.is_rope(module):
        return Roles("__call__", "rope", (), None, ())
    entry = next((name for name in _ENTRIES if hasattr(module, name)), None)
    linears = [name for name, layer in module.items() if _is_linear(layer)]
    inputs = next((names for names in _INPUTS if all(name in module for name in names)), ())
    kind, output = None, next((name for name in _OUTPUTS if name in module), None)
    if inputs or (output and _instead(module)):
        kind = "attention"
    else:
        kind, output = _mlp(module) if len(linears) > 1 and entry == "__call__" else (None, None)
    if kind is None and any(map(_is_switch, module.values())):
        kind = "experts"
    tables = (name for name, layer in module.items() if type(layer) is nn.QuantizedEmbedding)
    others = dict.fromkeys((*linears, *heads, *tables))
    return Roles(entry, kind, inputs, output, tuple(name for name in others if name not in (*inputs, output)))


def _mlp(module: nn.Module) -> tuple[str | None, str | None]:
    """Whether ``module`` is an MLP, and the name of its last layer."""
    try:
        return "mlp", mlp.recipe_of(module, own_method(type(module), "__call__")).down
    except Unknown:
        if not re.search("mlp|feed_?forward", type(module).__name__, re.IGNORECASE):
            return None, None
        return "mlp", next((name for name in _DOWNS if name in module), None)


def _is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a layer itself: an adapter around one, or one of mlx-fused."""
    return "lora_a" in module or original_of(module).__module__ == "mlx_fused.nn"


def _is_switch(layer: object) -> bool:
    return type(layer).__name__.endswith("SwitchLinear")  # mlx-lm's, quantized ones and adapters too


def _is_linear(layer: object) -> bool:
    if isinstance(layer, nn.Module) and "lora_a" in layer:  # an adapter, such as DoRA's
        layer = layer.get("linear")
    return isinstance(layer, _LINEAR)


def _instead(module: nn.Module) -> str | None:
    return next((text.format(key) for key, text in _INSTEAD.items() if key in module), None)


def _residual_obstacle(name: str, roles: Roles, modules: dict[str, nn.Module]) -> str | None:
    if roles.output is None:
        names = _OUTPUTS if roles.kind == "attention" else _DOWNS
        return f"none of {', '.join(names)} is there"
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        if callable(layer := modules.get(parent)):
            return residual.obstacle(original_of(layer), name.removeprefix(parent).lstrip("."))
    return "no layer calls it"
