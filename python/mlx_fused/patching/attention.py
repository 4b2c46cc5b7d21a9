"""What an attention module becomes: a subclass of its class, with stand-ins for its projections.

While the module's ``__call__`` runs, its projections are stand-ins. The first of the queries', keys' and
values' to meet an input projects it for all three; the output projection's gives an array that adds itself
to the residual (see ``residual``). Outside of the call they are the modules themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_fused._ext import alias, is_same
from mlx_fused.patching import projections
from mlx_fused.patching.report import Calls, LayerReport, Part, switched_off
from mlx_fused.patching.residual import Projected


class Names(NamedTuple):
    """What an attention module calls its projections."""

    inputs: tuple[str, ...]  # of queries, keys and values; none if they are not three
    output: str | None
    entry: str | None  # the method that runs them


class Obstacles(NamedTuple):
    """Why the code of a model keeps a part from being fused, None if it does not."""

    qkv: str | None
    residual: str | None


@dataclass(frozen=True)
class Options:
    """What :func:`patch` was asked for."""

    qkv: bool
    o_residual: Literal["auto"] | bool
    lora: bool
    exact: bool


@dataclass(frozen=True)
class Patch:
    """What a patched module knows of its patching."""

    options: Options
    obstacles: Obstacles
    qkv_calls: Calls = field(default_factory=Calls)
    residual_calls: Calls = field(default_factory=Calls)


class FusedAttention:
    """Put before the class of an attention module."""

    def __reduce_ex__(self, protocol):
        # Pickle finds classes by name, and this one, made on demand, has a name but no place.
        _, (cls, *_), *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (cls._original, cls._names), *state


def fuse(attention: nn.Module, names: Names, options: Options, obstacles: Obstacles) -> None:
    """Patch ``attention``, or change the options of its patch."""
    calls = ()
    if (patch := patch_of(attention)) is not None:
        # A part of a model that is patched by itself does not show the layer around it.
        residual = patch.obstacles.residual and obstacles.residual
        obstacles = obstacles._replace(residual=residual)
        calls = patch.qkv_calls, patch.residual_calls
    set_patch(attention, names, Patch(options, obstacles, *calls))


def set_patch(attention: nn.Module, names: Names, patch: Patch) -> None:
    """Make ``attention`` one that is patched as ``patch`` says."""
    if not isinstance(attention, FusedAttention):
        attention.__class__ = _fused_class(type(attention), names)
    attention._patch = patch


def restore(attention: nn.Module) -> None:
    """Give ``attention`` its own class back."""
    if isinstance(attention, FusedAttention):
        attention.__class__ = attention._original
        del attention._patch


def patch_of(attention: nn.Module) -> Patch | None:
    return attention._patch if isinstance(attention, FusedAttention) else None


def report(name: str, attention: nn.Module) -> LayerReport:
    """How ``attention`` is fused as it is now."""
    if (patch := patch_of(attention)) is None:
        part = Part(f"{type(attention).__name__} has no __call__")
        return LayerReport(name, part, part)
    qkv, output = _qkv(attention), _output(attention)
    note = None
    if isinstance(qkv, projections.QKV) and isinstance(qkv.adapters, str):
        note = f"adapters apart: {qkv.adapters}"
    return LayerReport(
        name,
        Part(qkv if isinstance(qkv, str) else None, note, patch.qkv_calls),
        Part(output if isinstance(output, str) else None, None, patch.residual_calls),
    )


def _qkv(attention: nn.Module) -> projections.QKV | str:
    """The projections of queries, keys and values; text if they cannot be one operation."""
    patch, names = attention._patch, attention._names.inputs
    options = patch.options
    if not options.qkv:
        return "qkv=False"
    if patch.obstacles.qkv:
        return patch.obstacles.qkv
    if vars(attention).get("is_kv_shared_layer"):
        return "it takes keys and values from another layer"
    return projections.read_qkv(names, attention, options.lora, options.exact)


def _output(attention: nn.Module) -> Callable | str:
    """The output projection with residual as a function; text if it cannot be one."""
    patch, name = attention._patch, attention._names.output
    if patch.options.o_residual is False:
        return "o_residual=False"
    if patch.obstacles.residual:
        return patch.obstacles.residual
    operation = projections.read_output(name, attention, patch.options.lora, patch.options.exact)
    if patch.options.o_residual is True and not isinstance(operation, str):
        operation = partial(operation, route="fused")
    return operation


class _Call:
    """One running call of an attention module, and the projections of its latest input."""

    def __init__(self, attention: nn.Module):
        self.attention = attention
        self.input = None
        self.outputs: dict[str, mx.array] = {}
        self.adapters_apart = False

    def project(self, name: str, module: nn.Module, x: mx.array) -> mx.array:
        """The stand-in for one of queries, keys and values."""
        if self.input is None or not is_same(x, self.input):
            self._project(x)
        y = self.outputs.pop(name, None)
        if y is None:
            return module(x)
        if not (self.adapters_apart and "lora_a" in module):
            return y
        # The adapter's own code, on a layer that differs only in having its base product already.
        layer = SimpleNamespace(**vars(module), **{**module, "linear": lambda _: y})
        return type(module).__call__(layer, x)

    def _project(self, x: mx.array) -> None:
        self.input, self.outputs = alias(x), {}  # `x += 1` changes x
        patch = self.attention._patch
        patch.qkv_calls.total += 1
        if x.dtype not in projections.DTYPES or isinstance(qkv := _qkv(self.attention), str):
            return
        patch.qkv_calls.fused += 1
        self.adapters_apart = isinstance(qkv.adapters, str)
        self.outputs = projections.project(self.attention, qkv, x, patch.options.exact)

    def add(self, name: str, module: nn.Module, x: mx.array) -> mx.array:
        """The stand-in for the output projection."""
        calls = self.attention._patch.residual_calls
        calls.total += 1
        y = module(x)
        if x.ndim != 3 or x.dtype not in projections.DTYPES:
            return y
        add = _output(self.attention)
        return y if isinstance(add, str) else Projected.of(y, partial(add, attn_out=alias(x)), calls)


# Per thread; a call inside a call puts the outer one back when it ends.
_running: ContextVar[_Call | None] = ContextVar("mlx_fused_running_call", default=None)


class _StandIn:
    """Takes the place of a projection module while its attention module runs."""

    def __init__(self, run: Callable, call: _Call, name: str, module: nn.Module):
        self._run, self._call, self._name, self._module = run, call, name, module

    def __call__(self, x: mx.array) -> mx.array:
        return self._run(self._call, self._name, self._module, x)

    def __getattr__(self, attribute: str):
        return getattr(self._module, attribute)


class _Slot:
    """A projection of a patched module: a stand-in during its calls, or else the projection itself."""

    def __init__(self, name: str, run: Callable):
        self._name, self._run = name, run

    def __get__(self, attention, owner=None):
        name = self._name
        if (module := attention.get(name)) is None:
            if name in vars(attention):
                return vars(attention)[name]
            raise AttributeError(f"{type(attention).__name__} has no {name}")
        call = _running.get()
        if call is None or call.attention is not attention:
            return module  # to code outside the call, or of a module called inside it
        return _StandIn(self._run, call, name, module)

    # What is no module lies where it does without a slot.
    def __set__(self, attention, value):
        vars(attention)[self._name] = value

    def __delete__(self, attention):
        try:
            del vars(attention)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None


def _entry(name: str) -> Callable:
    def call(self, *args, **kwargs):
        run = getattr(self._original, name)
        if switched_off():
            return run(self, *args, **kwargs)
        token = _running.set(_Call(self))
        try:
            return run(self, *args, **kwargs)
        finally:
            _running.reset(token)

    return call


@cache
def _fused_class(original: type, names: Names) -> type:
    # One class for all layers: mlx-lm's grad_checkpoint edits the class of the first, to reach all.
    members = {name: _Slot(name, _Call.project) for name in names.inputs}
    if names.output:
        members[names.output] = _Slot(names.output, _Call.add)
    members |= {names.entry: _entry(names.entry), "_original": original, "_names": names}
    return type(original.__name__, (FusedAttention, original), members)


def _new(original: type, names: Names) -> nn.Module:
    cls = _fused_class(original, names)
    return cls.__new__(cls)
