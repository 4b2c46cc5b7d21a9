"""Patches an attention module: makes its class a subclass that replaces projections by stand-ins.

The stand-ins replace the projections only while the module's ``__call__`` runs. The first of the three for
queries, keys and values that is called with an input projects it for all three. The stand-in of the output
projection returns an array that can add itself to the residual (see ``residual``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from threading import RLock, get_ident
from types import SimpleNamespace
from typing import Literal, NamedTuple
from weakref import ref

import mlx.core as mx
import mlx.nn as nn

from mlx_fused._ext import alias, is_same
from mlx_fused.linear import type_name
from mlx_fused.patching import projections
from mlx_fused.patching.projections import NotFused
from mlx_fused.patching.report import Calls, LayerReport, Part, switched_off
from mlx_fused.patching.residual import Projected
from mlx_fused.patching.stand_in import StandIn, module_of, unwrapped


class Names(NamedTuple):
    """The names of an attention module's projections."""

    inputs: tuple[str, ...]  # of queries, keys and values; empty if the module does not have all three
    output: str | None
    entry: str | None  # the method that calls the projections


class Obstacles(NamedTuple):
    """Why the model's code prevents a part from being fused; None if it does not."""

    qkv: str | None
    residual: str | None


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`patch`."""

    qkv: bool
    o_residual: Literal["auto"] | bool
    lora: bool
    exact: bool


@dataclass(frozen=True)
class Patch:
    """How a module is patched."""

    options: Options
    obstacles: Obstacles
    qkv_calls: Calls = field(default_factory=Calls)
    residual_calls: Calls = field(default_factory=Calls)


class _State:
    """How a module is patched now, and how many of its calls are running."""

    def __init__(self, attention: nn.Module):
        key = id(attention)
        self.patch: Patch | None = None
        self.running = 0
        self.owner = ref(attention, lambda _: _states.pop(key, None))


# By the module's id, and not in the module itself, which another thread may be copying meanwhile.
_states: dict[int, _State] = {}
# Guards the states and the modules' classes. Reentrant, because garbage collection while it is held may run
# code that unpatches.
_lock = RLock()


class FusedAttention:
    """The first base of every patched class; the second is the attention module's own class."""

    def __init_subclass__(cls) -> None:
        """Hides the own class's ``__init_subclass__``, which may need keywords or register subclasses."""


def fuse(attention: nn.Module, names: Names, options: Options, obstacles: Obstacles) -> Patch:
    """Patch ``attention``, or change the options of its patch.

    Raises:
        NotFused: If it cannot be patched.
    """
    if names.entry is None:
        raise NotFused(f"{type(attention).__name__} has no __call__")
    calls = ()
    if (patch := patch_of(attention)) is not None:
        # An earlier call may have seen the layer that adds the residual, where this one patches only a part
        # of the model.
        residual = patch.obstacles.residual and obstacles.residual
        obstacles = obstacles._replace(residual=residual)
        calls = patch.qkv_calls, patch.residual_calls
    patch = Patch(options, obstacles, *calls)
    try:
        set_patch(attention, names, patch)
    except Exception as error:  # the class or its metaclass may refuse subclasses with any error
        raise NotFused(f"{type(attention).__name__} cannot be subclassed: {error}") from error
    return patch


def set_patch(attention: nn.Module, names: Names, patch: Patch) -> None:
    """Patch ``attention`` with ``patch``, or replace its patch."""
    with _lock:
        if not isinstance(attention, FusedAttention):
            _set_class(attention, _fused_class(type(attention), names))
        state = _states.get(id(attention)) or _State(attention)
        state.patch = patch
        _states[id(attention)] = state


def restore(attention: nn.Module) -> None:
    """Restore the class of ``attention`` as soon as no call of it is running."""
    with _lock:
        if (state := _states.get(id(attention))) is not None:
            state.patch = None
        _end_patching(attention)


def _end_patching(attention: nn.Module) -> None:
    state = _states.get(id(attention))
    if state is None or (state.patch is None and state.running == 0):
        _states.pop(id(attention), None)
        if original := vars(type(attention)).get("_mlx_fused_original"):
            _set_class(attention, original)


def _set_class(attention: nn.Module, cls: type) -> None:
    object.__setattr__(attention, "__class__", cls)  # bypasses the class's own __setattr__


def patch_of(attention: nn.Module) -> Patch | None:
    state = _states.get(id(attention))
    return state.patch if state else None


def names_of(attention: nn.Module) -> Names | None:
    """The names that ``attention`` was patched with; None if it is not patched."""
    names = getattr(type(attention), "_mlx_fused_names", None)
    return names if isinstance(names, Names) else None


def report(name: str, attention: nn.Module, names: Names, patch: Patch) -> LayerReport:
    """Which parts of ``attention`` are fused in its present state."""
    qkv_obstacle = note = output_obstacle = None
    try:
        qkv = _qkv(attention, names, patch)
        note = qkv.adapters_apart and f"adapters apart: {qkv.adapters_apart}"
    except NotFused as reason:
        qkv_obstacle = str(reason)
    try:
        _output(attention, names, patch)
    except NotFused as reason:
        output_obstacle = str(reason)
    return LayerReport(
        name,
        Part(qkv_obstacle, note, patch.qkv_calls),
        Part(output_obstacle, None, patch.residual_calls),
    )


def _qkv(attention: nn.Module, names: Names, patch: Patch) -> projections.QKV:
    """The projections of queries, keys and values as one operation."""
    if not patch.options.qkv:
        raise NotFused("qkv=False")
    if patch.obstacles.qkv:
        raise NotFused(patch.obstacles.qkv)
    if vars(attention).get("is_kv_shared_layer"):
        raise NotFused("it takes keys and values from another layer")
    return projections.read_qkv(attention, names.inputs, patch.options.lora, patch.options.exact)


def _output(attention: nn.Module, names: Names, patch: Patch) -> Callable:
    """The output projection with residual as a function."""
    options = patch.options
    if options.o_residual is False:
        raise NotFused("o_residual=False")
    if patch.obstacles.residual:
        raise NotFused(patch.obstacles.residual)
    operation = projections.read_output(attention, names.output, options.lora, options.exact)
    return partial(operation, route="fused") if options.o_residual is True else operation


class _Call:
    """One running call of an attention module, with the projections of its latest input."""

    def __init__(self, attention: nn.Module, names: Names, patch: Patch):
        self.attention, self.names, self.patch = attention, names, patch
        self.thread, self.has_ended = get_ident(), False
        self.stand_ins: dict[str, StandIn] = {}
        self.counted: set[str] = set()  # "qkv", "residual"
        self.unknown: dict[str, str] = {}  # parts with a projection of a type that the operations do not know
        self.input = None
        self.outputs: dict[str, mx.array] = {}
        self.operands: dict[str, projections.Operands] = {}  # that the outputs were computed with
        self.adapters_apart = False

    def run(self, name: str, module: nn.Module, x: mx.array) -> mx.array:
        """The call of a stand-in."""
        if _running_call() is not self or not isinstance(x, mx.array):
            return module(x)
        if name in self.names.inputs:
            return self._project(name, module, x)
        return self._add(module, x)

    def _project(self, name: str, module: nn.Module, x: mx.array) -> mx.array:
        """The call of the projection of queries, keys or values."""
        if self.input is None or not is_same(x, self.input):
            self._project_all(x, name)
        y = self.outputs.pop(name, None)
        if y is None or (name in self.operands and not projections.is_unchanged(module, self.operands[name])):
            return module(x)
        if not (self.adapters_apart and "lora_a" in module):
            return y
        # Runs the adapter's own code on a copy of the layer whose base layer returns the known product.
        layer = SimpleNamespace(**vars(module), **{**module, "linear": lambda _: y})
        return type(module).__call__(layer, x)

    def _project_all(self, x: mx.array, first: str) -> None:
        self.input, self.outputs = alias(x), {}  # an alias, since `x += 1` changes x in place
        attention = self.attention
        try:
            if x.dtype not in projections.DTYPES:
                raise NotFused(f"its input is {x.dtype}")
            qkv = _qkv(attention, self.names, self.patch)
        except NotFused as reason:
            self._count("qkv", reason=str(reason))
            return
        self._count("qkv", fused=1)
        self.adapters_apart = qkv.adapters_apart is not None
        self.outputs = projections.project(attention, qkv, x, self.patch.options.exact)
        self.patch.qkv_calls.add_route()
        # The model's code may change a layer before it calls it, which then makes its output invalid.
        self.operands = {name: projections.kept(attention[name]) for name in qkv.names if name != first}

    def _add(self, module: nn.Module, x: mx.array) -> mx.array:
        """The call of the output projection."""
        self._count("residual")
        y = module(x)
        if x.ndim != 3 or x.dtype not in projections.DTYPES:
            return y
        try:
            add = _output(self.attention, self.names, self.patch)
        except NotFused as reason:
            self.patch.residual_calls.add(reason=str(reason))
            return y
        return Projected.of(y, partial(add, x=alias(x)), self.patch.residual_calls)

    def _count(self, part: str, fused: int = 0, reason: str | None = None) -> None:
        self.counted.add(part)
        (self.patch.qkv_calls if part == "qkv" else self.patch.residual_calls).add(1, fused, reason)

    def count_unknown(self) -> None:
        for part in self.unknown.keys() - self.counted:
            self._count(part, reason=self.unknown[part])


# Per thread. A call inside another call restores the outer one when it ends.
_running: ContextVar[_Call | None] = ContextVar("mlx_fused_running_call", default=None)


def _running_call() -> _Call | None:
    call = _running.get()
    # A copy of this context may be run by another thread, or after the call has ended.
    return call if call and not call.has_ended and call.thread == get_ident() else None


class _Slot:
    """The attribute of a projection in a patched class: a stand-in during calls, else the projection."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, attention, owner=None):
        name = self._name
        if (module := attention.get(name)) is None:
            if name in vars(attention):
                return vars(attention)[name]
            raise AttributeError(f"{type(attention).__name__} has no {name}")
        call = _running_call()
        if call is None or call.attention is not attention:
            return module  # asked by code outside of the call, or by another module that is called inside it
        if not projections.is_known(module):
            part = "qkv" if name in call.names.inputs else "residual"
            call.unknown.setdefault(part, f"{name} is {type_name(module)}")
            return module
        stand_in = call.stand_ins.get(name)
        if stand_in is None or module_of(stand_in) is not module:
            stand_in = call.stand_ins[name] = StandIn(module, partial(call.run, name, module))
        return stand_in

    # MLX stores modules as dictionary items; anything else goes to the instance's __dict__ as usual.
    def __set__(self, attention, value):
        vars(attention)[self._name] = value

    def __delete__(self, attention):
        try:
            del vars(attention)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None


def _entry(original: type, names: Names) -> Callable:
    name = names.entry

    @wraps(getattr(original, name))
    def call(self, *args, **kwargs):
        running = _begin(self, names)
        token = _running.set(running)
        try:
            method = next(vars(cls)[name] for cls in original.__mro__ if name in vars(cls))
            return method.__get__(self, original)(*args, **kwargs)
        finally:
            _running.reset(token)
            if running is not None:
                _end(running)

    return call


def _begin(attention: nn.Module, names: Names) -> _Call | None:
    """Registers a call, which keeps the present patch until it ends; None to run the model's own code."""
    if switched_off():
        return None
    with _lock:
        if (patch := patch_of(attention)) is None:
            return None
        _states[id(attention)].running += 1
    return _Call(attention, names, patch)


def _end(call: _Call) -> None:
    call.count_unknown()
    call.has_ended = True
    call.stand_ins.clear()  # they lead back to the call, whose arrays would wait for the garbage collector
    with _lock:
        _states[id(call.attention)].running -= 1
        _end_patching(call.attention)


def _storing(original: type) -> Callable:
    def __setitem__(self, key, value):
        # The model's code may store a stand-in in a module. Stand-ins are only for this call.
        original.__setitem__(self, key, value if _running_call() is None else unwrapped(value))

    return __setitem__


def _reducing(original: type, names: Names) -> Callable:
    def __reduce_ex__(self, protocol):
        # Pickle finds classes by module and name, where it would find the original class instead of this one.
        cls, patch = type(self), patch_of(self)
        value = original.__reduce_ex__(self, max(protocol, 2))
        if isinstance(value, str):
            return value
        make, args, *rest = (original if part is cls else part for part in value)
        args = tuple(original if arg is cls else arg for arg in args)
        return _copy, (names, patch, make, args), *rest

    return __reduce_ex__


def _copy(names: Names, patch: Patch | None, make: Callable, args: tuple) -> nn.Module:
    attention = make(*args)
    if patch is not None:
        set_patch(attention, names, patch)
    return attention


@cache
def _fused_class(original: type, names: Names) -> type:
    # Cached, so that all layers share one class: mlx-lm's grad_checkpoint edits only the first layer's class.
    members = {name: _Slot(name) for name in (*names.inputs, names.output) if name}
    members |= {
        names.entry: _entry(original, names),
        "__setitem__": _storing(original),
        "__reduce_ex__": _reducing(original, names),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_mlx_fused_original": original,
        "_mlx_fused_names": names,
    }
    return type(original.__name__, (FusedAttention, original), members)
