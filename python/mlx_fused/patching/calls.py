"""A running call of a patched module, in which stand-ins replace the module's linear layers.

The first of the stand-ins for queries, keys and values that is called with an input projects it for all
three. That of the output projection returns an array that can add itself to the residual (see ``residual``).
Any other runs its own layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from mlx_fused import _ext
from mlx_fused._ext import count, has_kernels, is_new_input, of_class, share
from mlx_fused.linear import is_lora, type_name
from mlx_fused.operations import fused_linear, fused_qkv_projection
from mlx_fused.operations.call import batched, unbatched
from mlx_fused.operations.linear import linear_operation
from mlx_fused.operations.qkv import qkv_operation
from mlx_fused.patching import projections, residual
from mlx_fused.patching.norm import unnormed
from mlx_fused.patching.projections import EMBEDDINGS, KNOWN, NotFused, Operation, Together, watcher_of_thread
from mlx_fused.patching.registry import Active, Patch, Roles, active_of
from mlx_fused.patching.residual import Projected
from mlx_fused.patching.stand_in import StandIn

# By whether every step is rounded. Heads are not split: the model's code expects the plain outputs and splits
# them itself.
_QKV = {
    exact: Operation(fused_qkv_projection, qkv_operation(exact), {"split_heads": False, "exact": exact})
    for exact in (False, True)
}
_LINEAR = {
    exact: Operation(fused_linear, linear_operation(exact=exact), {"exact": exact}) for exact in (False, True)
}


class Call:
    """One running call of a module."""

    __slots__ = ("active", "module", "roles", "unknown")

    def __init__(self, module: nn.Module, roles: Roles, active: Active):
        self.module, self.roles, self.active = module, roles, active
        self.unknown: dict[str, str] = {}  # parts with a layer of a type that the operations do not know

    def stand_in(
        self, owner: nn.Module, name: str, run: Callable | None, layer: nn.Module
    ) -> nn.Module | StandIn:
        """What the attribute ``name`` of ``owner`` is in this call, where the layer's type does not tell."""
        is_own = owner is self.module
        if type(layer) in EMBEDDINGS:
            # A model reads the embedding of its child, as its head.
            is_head = is_own or any(child is owner for child in self.module.values())
            if not is_head or (active := self.active if is_own else active_of(owner)) is None:
                return layer
            embed = Call._embed if is_own and type(layer) is nn.QuantizedEmbedding else None
            return StandIn(layer, self, name, embed, partial(self.run_linear, owner, active, name, layer))
        if not is_own or (run is None and not saves(layer)):
            return layer
        if run is None:
            return StandIn(layer, self, name, Call._linear)
        if not projections.is_known(layer):
            self.unknown.setdefault(self.roles.part(name), f"{name} is {type_name(layer)}")
            return layer
        KNOWN.add(type(layer))
        return StandIn(layer, self, name, run)

    def _project(self, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """The call of the projection of queries, keys or values that is not shared yet."""
        outputs = self._project_all(x) if is_new_input(x) else None
        if outputs is None:
            return alone(self.module, self.active, name, layer, x)
        y = share(self.roles.inputs, outputs, name)
        return y(layer, x) if type(y) is partial else y

    def _project_all(self, x: mx.array) -> list[mx.array | Callable] | None:
        module, names, calls = self.module, self.roles.inputs, self.active.patch.calls["qkv"]
        self.unknown.pop("qkv", None)  # counted now
        try:
            if not has_kernels(x):
                raise NotFused(f"its input is {x.dtype}")
            together = read_qkv(module, self.roles, self.active)
        except NotFused as reason:
            count(calls, 1, 0, str(reason))
            return None
        layers = whole = tuple(map(module.__getitem__, names))
        if together.adapters_apart is not None:
            layers = tuple(layer.get("linear", layer) for layer in layers)
        tokens, norm = unnormed(x)
        if together.group is not None:
            tokens, norm = sum_gradients(together.group)(x), None
        outputs = _QKV[self.active.patch.options.exact](module, layers, tokens, norm)
        count(calls, 1, 1)
        if together.adapters_apart is not None:
            both = zip(outputs, whole, strict=True)
            return [partial(_adapted, y) if "lora_a" in layer else y for y, layer in both]
        return outputs

    def _add(self, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        self.unknown.pop("residual", None)
        reason = output_obstacle(self.module, self.active, name)
        return project_output(self.module, self.active, name, layer, x, reason)

    def _linear(self, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        return self.run_linear(self.module, self.active, name, layer, x)

    def _embed(self, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """The call of an embedding."""
        calls = self.active.patch.calls["linear"]
        try:
            read_embedding(self.module, self.active, name, layer)
            y = _ext.embedding(x, layer, None)
        except (NotFused, ValueError) as reason:  # of a wrong argument MLX's own error tells
            count(calls, 1, 0, str(reason))
            return layer(x)
        count(calls, 1, 1, None, False)
        return y

    def run_linear(
        self, module: nn.Module, active: Active, name: str, layer: nn.Module, x: mx.array
    ) -> mx.array:
        """The call of a layer by itself."""
        calls = active.patch.calls["linear"]
        try:
            y = linear(module, active, name, layer, x)
        except NotFused as reason:
            count(calls, 1, 0, str(reason))
            return layer.as_linear(x) if type(layer) in EMBEDDINGS else layer(x)
        count(calls, 1, 1)
        return y

    def end(self) -> None:
        for part, reason in self.unknown.items():
            count(self.active.patch.calls[part], 1, 0, reason)


def read_qkv(module: nn.Module, roles: Roles, active: Active) -> Together:
    """The projections of queries, keys and values as one operation.

    Raises:
        NotFused: If it cannot compute them.
    """
    if vars(module).get("is_kv_shared_layer"):
        raise NotFused("it takes keys and values from another layer")
    layers = tuple(map(module.get, roles.inputs))
    return active.reading("qkv", layers, _read_qkv, roles.inputs, layers, active.patch)


def _read_qkv(names: tuple[str, ...], layers: tuple, patch: Patch) -> Together:
    if not patch.options.qkv:
        raise NotFused("qkv=False")
    if patch.obstacles.qkv:
        raise NotFused(patch.obstacles.qkv)
    return projections.read_together(names, layers, patch.options.lora, patch.options.exact)


def _adapted(y: mx.array, layer: nn.Module, x: mx.array) -> mx.array:
    """The output of an adapter's own code, around a layer with the output ``y``."""
    copy = SimpleNamespace(**vars(layer), **{**layer, "linear": lambda _: y})
    return type(layer).__call__(copy, x)


def qkv_note(module: nn.Module, roles: Roles, active: Active) -> str | None:
    """What there is to know of a fused QKV projection."""
    apart = read_qkv(module, roles, active).adapters_apart
    return apart and f"adapters apart: {apart}"


def output_obstacle(module: nn.Module, active: Active, name: str) -> str | None:
    """Why the output projection and the residual cannot be one operation; None if they can."""
    layer = module.get(name)
    try:
        active.reading("residual", (layer,), _read_output, name, layer, active.patch)
    except NotFused as reason:
        return str(reason)
    return None


def _read_output(name: str, layer: nn.Module | None, patch: Patch) -> None:
    options = patch.options
    if options.o_residual is False:
        raise NotFused("o_residual=False")
    if patch.obstacles.residual:
        raise NotFused(patch.obstacles.residual)
    projections.read(name, layer, options.lora, options.exact)


def project_output(
    module: nn.Module, active: Active, name: str, layer: nn.Module, x: mx.array, reason: str | None = None
) -> mx.array:
    """The output projection of ``x``, to which the residual is added as a part of the operation; by itself if
    there is a reason against that."""
    options, calls = active.patch.options, active.patch.calls["residual"]
    if reason is None and not has_kernels(x):
        reason = f"its input is {x.dtype} {x.shape}"
    if reason is not None:
        count(calls, 1, 0, reason)
        return alone(module, active, name, layer, x)
    count(calls, 1, 0)
    # The operation runs later, when the residual is added, with the product's arrays.
    made = _LINEAR[options.exact].made
    rows, leading = (x, None) if x.ndim == 3 else batched(made.name, x)
    (y,) = _ext.project(made, rows, None, (layer,), None, 1.0, None)
    operation = residual.OPERATIONS[options.exact, options.o_residual is True]
    arguments = operation.arguments(rows, (layer,)) if watcher_of_thread() is not None else {}
    whole, shape = (y, None) if leading is None else (unbatched(y, leading), (*leading, y.shape[-1]))
    origin = ((partial(residual.plus, y, operation, calls, module, arguments, shape), 1.0),)
    return of_class(Projected, whole, origin)


def alone(module: nn.Module, active: Active, name: str, layer: nn.Module, x: mx.array) -> mx.array:
    """The layer by itself, by our operation if that can compute it."""
    try:
        return linear(module, active, name, layer, x)
    except NotFused:
        return layer(x)


def linear(module: nn.Module, active: Active, name: str, layer: nn.Module, x: mx.array) -> mx.array:
    """The layer by itself.

    Raises:
        NotFused: If our operation cannot compute it.
    """
    read_linear(module, active, name, layer)
    if not has_kernels(x):
        raise NotFused(f"its input is {x.dtype} {x.shape}")
    x, norm = unnormed(x)
    (y,) = _LINEAR[active.patch.options.exact](module, (layer,), x, norm)
    return y


def read_linear(module: nn.Module, active: Active, name: str, layer: nn.Module) -> None:
    """Raises ``NotFused`` if our operation cannot compute the layer, or has no reason to."""
    if not active.patch.options.linear:
        raise NotFused("linear=False")
    options = active.patch.options
    active.reading(name, (layer,), projections.read, name, layer, options.lora, options.exact)
    if not saves(layer):
        raise NotFused(f"{name} is one launch on a GPU in MLX too")


def read_embedding(module: nn.Module, active: Active, name: str, layer: nn.Module) -> None:
    """Raises ``NotFused`` if our operation cannot take the rows, or has no reason to."""
    if _ext.on_gpu():
        raise NotFused(f"on a GPU {name} is MLX's")
    read_linear(module, active, name, layer)


def read_linears(module: nn.Module, active: Active, names: tuple[str, ...]) -> None:
    """Raises ``NotFused`` if not all of these layers can be computed by our operation."""
    obstacles = []
    for name in names:
        layer = module.get(name)
        read = read_embedding if type(layer) is nn.QuantizedEmbedding else read_linear
        try:
            read(module, active, name, layer)
        except NotFused as reason:
            obstacles.append(str(reason))
    if obstacles:
        raise NotFused(f"{obstacles[0]}{f', and {len(obstacles) - 1} more' * (len(obstacles) > 1)}")


def saves(layer: nn.Module) -> bool:
    """Whether our operation may be faster than the layer's own code."""
    if not _ext.on_gpu():
        return True
    # On a GPU it saves the launches of an adapter or of the bias of quantized weights, and nothing else.
    return is_lora(type(layer)) or (isinstance(layer, nn.QuantizedLinear) and "bias" in layer)
