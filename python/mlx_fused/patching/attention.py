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
from threading import Lock
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
    """How a module is patched."""

    options: Options
    obstacles: Obstacles
    qkv_calls: Calls = field(default_factory=Calls)
    residual_calls: Calls = field(default_factory=Calls)


@dataclass
class State:
    """What a patched module carries. Read and written under the lock: other threads may be calling it."""

    patch: Patch | None  # None if it was unpatched during a call; the last running call ends the patching
    running: int = 0  # calls


_STATE = "_mlx_fused_state"  # the attribute; no model has one of this name
_lock = Lock()


class FusedAttention:
    """Put before the class of an attention module."""

    def __init_subclass__(cls) -> None:
        """Keeps that of the attention module's class, which may want keywords or count its subclasses."""

    def __reduce_ex__(self, protocol):
        # Pickle finds classes by name, and this one, made on demand, has a name but no place.
        _, (cls, *_), attributes, *rest = super().__reduce_ex__(max(protocol, 2))
        attributes = {**attributes, _STATE: State(patch_of(self))}  # no call of the copy is running
        return _new, (cls._mlx_fused_original, cls._mlx_fused_names), attributes, *rest


def fuse(attention: nn.Module, names: Names, options: Options, obstacles: Obstacles) -> Patch | str:
    """Patch ``attention``, or change the options of its patch; text if it cannot be patched."""
    if names.entry is None:
        return f"{type(attention).__name__} has no __call__"
    calls = ()
    if (patch := patch_of(attention)) is not None:
        # A part of a model that is patched by itself does not show the layer around it.
        residual = patch.obstacles.residual and obstacles.residual
        obstacles = obstacles._replace(residual=residual)
        calls = patch.qkv_calls, patch.residual_calls
    patch = Patch(options, obstacles, *calls)
    try:
        set_patch(attention, names, patch)
    except Exception as error:  # whatever the class or its metaclass has against it
        return f"{type(attention).__name__} cannot be subclassed: {error}"
    return patch


def set_patch(attention: nn.Module, names: Names, patch: Patch) -> None:
    """Make ``attention`` one that is patched as ``patch`` says."""
    with _lock:
        if isinstance(attention, FusedAttention):
            vars(attention)[_STATE].patch = patch
        else:
            attention.__class__ = _fused_class(type(attention), names)
            vars(attention)[_STATE] = State(patch)


def restore(attention: nn.Module) -> None:
    """Give ``attention`` its own class back, as soon as no call of it is running."""
    with _lock:
        if isinstance(attention, FusedAttention):
            vars(attention)[_STATE].patch = None
            _end_patching(attention)


def _end_patching(attention: FusedAttention) -> None:
    state = vars(attention)[_STATE]
    if state.patch is None and state.running == 0:
        attention.__class__ = type(attention)._mlx_fused_original
        del vars(attention)[_STATE]


def patch_of(attention: nn.Module) -> Patch | None:
    # The state itself may be taken away by another thread.
    state = vars(attention).get(_STATE)
    return state.patch if state else None


def names_of(attention: nn.Module) -> Names | None:
    """Those that ``attention`` was patched with, None if it is not patched."""
    return getattr(type(attention), "_mlx_fused_names", None)


def report(name: str, attention: nn.Module, names: Names, patch: Patch | str) -> LayerReport:
    """How ``attention`` is fused as it is now; ``patch`` is what :func:`fuse` gave."""
    if isinstance(patch, str):
        return LayerReport(name, Part(patch), Part(patch))
    qkv, output = _qkv(attention, names, patch), _output(attention, names, patch)
    note = None
    if isinstance(qkv, projections.QKV) and isinstance(qkv.adapters, str):
        note = f"adapters apart: {qkv.adapters}"
    return LayerReport(
        name,
        Part(qkv if isinstance(qkv, str) else None, note, patch.qkv_calls),
        Part(output if isinstance(output, str) else None, None, patch.residual_calls),
    )


def _qkv(attention: nn.Module, names: Names, patch: Patch) -> projections.QKV | str:
    """The projections of queries, keys and values; text if they cannot be one operation."""
    if not patch.options.qkv:
        return "qkv=False"
    if patch.obstacles.qkv:
        return patch.obstacles.qkv
    if vars(attention).get("is_kv_shared_layer"):
        return "it takes keys and values from another layer"
    return projections.read_qkv(attention, names.inputs, patch.options.lora, patch.options.exact)


def _output(attention: nn.Module, names: Names, patch: Patch) -> Callable | str:
    """The output projection with residual as a function; text if it cannot be one."""
    options = patch.options
    if options.o_residual is False:
        return "o_residual=False"
    if patch.obstacles.residual:
        return patch.obstacles.residual
    operation = projections.read_output(attention, names.output, options.lora, options.exact)
    if options.o_residual is True and not isinstance(operation, str):
        operation = partial(operation, route="fused")
    return operation


class _Call:
    """One running call of an attention module, and the projections of its latest input."""

    def __init__(self, attention: nn.Module, names: Names, patch: Patch):
        self.attention, self.names, self.patch = attention, names, patch
        self.stand_ins: dict[str, _StandIn] = {}
        self.counted: set[str] = set()  # "qkv", "residual"
        self.unknown: set[str] = set()  # parts with a projection of a type that the operations do not know
        self.input = None
        self.outputs: dict[str, mx.array] = {}
        self.operands: dict[str, projections.Operands] = {}  # of the layers that gave the outputs
        self.adapters_apart = False

    def run(self, name: str, module: nn.Module, x: mx.array) -> mx.array:
        """What a stand-in does when it is called."""
        if _running.get() is not self or not isinstance(x, mx.array):
            return module(x)  # kept beyond its call, or given to another thread
        if name in self.names.inputs:
            return self._project(name, module, x)
        return self._add(module, x)

    def _project(self, name: str, module: nn.Module, x: mx.array) -> mx.array:
        """One of queries, keys and values."""
        if self.input is None or not is_same(x, self.input):
            self._project_all(x, name)
        y = self.outputs.pop(name, None)
        if y is None or (name in self.operands and not projections.is_unchanged(module, self.operands[name])):
            return module(x)
        if not (self.adapters_apart and "lora_a" in module):
            return y
        # The adapter's own code, on a layer that differs only in having its base product already.
        layer = SimpleNamespace(**vars(module), **{**module, "linear": lambda _: y})
        return type(module).__call__(layer, x)

    def _project_all(self, x: mx.array, first: str) -> None:
        self.input, self.outputs = alias(x), {}  # `x += 1` changes x
        attention = self.attention
        if x.dtype not in projections.DTYPES or isinstance(
            qkv := _qkv(attention, self.names, self.patch), str
        ):
            self._count("qkv")
            return
        self._count("qkv", fused=1)
        self.adapters_apart = isinstance(qkv.adapters, str)
        self.outputs = projections.project(attention, qkv, x, self.patch.options.exact)
        # Between two projections the model's code may change the layer of the second.
        self.operands = {name: projections.kept(attention[name]) for name in qkv.names if name != first}

    def _add(self, module: nn.Module, x: mx.array) -> mx.array:
        """The output projection."""
        self._count("residual")
        y = module(x)
        if x.ndim != 3 or x.dtype not in projections.DTYPES:
            return y
        add = _output(self.attention, self.names, self.patch)
        if isinstance(add, str):
            return y
        return Projected.of(y, partial(add, attn_out=alias(x)), self.patch.residual_calls)

    def _count(self, part: str, fused: int = 0) -> None:
        self.counted.add(part)
        (self.patch.qkv_calls if part == "qkv" else self.patch.residual_calls).add(1, fused)

    def count_unknown(self) -> None:
        for part in self.unknown - self.counted:
            self._count(part)


# Per thread; a call inside a call puts the outer one back when it ends.
_running: ContextVar[_Call | None] = ContextVar("mlx_fused_running_call", default=None)


class _StandIn:
    """A projection of a running attention module: the module itself in everything but its call.

    ``type`` alone can tell them apart. Whatever else is asked of it goes on to the module.
    """

    __slots__ = ("_call", "_module")

    def __init__(self, module: nn.Module, call: Callable):
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_call", call)

    def __call__(self, x: mx.array) -> mx.array:
        return _call_of(self)(x)

    def __getattribute__(self, name: str):  # __class__ too, by which isinstance goes
        return getattr(_module_of(self), name)


_call_of, _module_of = _StandIn._call.__get__, _StandIn._module.__get__


def _forward(name: str) -> Callable:
    return lambda self, *args: getattr(_module_of(self), name)(*args)


# Those that Python looks up in the type.
for _name in (
    *("__contains__", "__delattr__", "__delitem__", "__dir__", "__eq__", "__format__", "__getitem__"),
    *("__ior__", "__iter__", "__len__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__"),
    *("__setattr__", "__setitem__", "__sizeof__", "__str__"),
):
    setattr(_StandIn, _name, _forward(_name))
_StandIn.__hash__ = lambda self: hash(_module_of(self))


class _Slot:
    """A projection of a patched module: a stand-in during its calls, or else the projection itself."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, attention, owner=None):
        name = self._name
        if (module := attention.get(name)) is None:
            if name in vars(attention):
                return vars(attention)[name]
            raise AttributeError(f"{type(attention).__name__} has no {name}")
        call = _running.get()
        if call is None or call.attention is not attention:
            return module  # to code outside the call, or of a module called inside it
        if not projections.is_known(module):
            call.unknown.add("qkv" if name in call.names.inputs else "residual")
            return module
        stand_in = call.stand_ins.get(name)
        if stand_in is None or _module_of(stand_in) is not module:
            stand_in = call.stand_ins[name] = _StandIn(module, partial(call.run, name, module))
        return stand_in

    # What is not a module is kept where it would be without a slot.
    def __set__(self, attention, value):
        vars(attention)[self._name] = value

    def __delete__(self, attention):
        try:
            del vars(attention)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None


def _entry(original: type, names: Names) -> Callable:
    def call(self, *args, **kwargs):
        running = _begin(self, names)
        token = _running.set(running)
        try:
            return getattr(original, names.entry)(self, *args, **kwargs)
        finally:
            _running.reset(token)
            if running is not None:
                _end(running)

    return call


def _begin(attention: nn.Module, names: Names) -> _Call | None:
    """A call that is to end as it begins, None if it is to run the model's own code."""
    if switched_off():
        return None
    with _lock:
        if (patch := patch_of(attention)) is None:
            return None
        vars(attention)[_STATE].running += 1
    return _Call(attention, names, patch)


def _end(call: _Call) -> None:
    call.count_unknown()
    with _lock:
        vars(call.attention)[_STATE].running -= 1
        _end_patching(call.attention)


@cache
def _fused_class(original: type, names: Names) -> type:
    # One class for all layers: mlx-lm's grad_checkpoint edits the class of the first, to reach all.
    members = {name: _Slot(name) for name in (*names.inputs, names.output) if name}
    members[names.entry] = _entry(original, names)
    members |= {"_mlx_fused_original": original, "_mlx_fused_names": names}
    return type(original.__name__, (FusedAttention, original), members)


def _new(original: type, names: Names) -> nn.Module:
    cls = _fused_class(original, names)
    return cls.__new__(cls)
