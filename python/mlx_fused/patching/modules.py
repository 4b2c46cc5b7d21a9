"""Makes the class of a module a subclass whose linear layers are stand-ins while the module runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import mlx.nn as nn

from mlx_fused._ext import Slot, add_to, run_as, running
from mlx_fused.patching import attention, calls, mlp, norm
from mlx_fused.patching.calls import Call
from mlx_fused.patching.projections import KNOWN, NotFused
from mlx_fused.patching.registry import (
    Active,
    Obstacles,
    Options,
    Patch,
    Roles,
    State,
    active_of,
    lock,
    original_of,
    own_method,
    patch_of,
    roles_of,
    states,
)
from mlx_fused.patching.report import LayerReport, Part, switched_off
from mlx_fused.patching.stand_in import unwrapped

_EXPERTS = "experts are MLX's gathered products"


class FusedModule:
    """The first base of every patched class; the second is the module's own class."""

    def __init_subclass__(cls) -> None:
        """Hides the own class's ``__init_subclass__``, which may need keywords or register subclasses."""


def fuse(module: nn.Module, roles: Roles, options: Options, obstacles: Obstacles) -> Active:
    """Patch ``module``, or change the options of its patch.

    Raises:
        NotFused: If it cannot be patched.
    """
    if roles.kind == "experts" and not roles.names:
        raise NotFused(_EXPERTS)
    if roles.entry is None:
        raise NotFused(f"{type(module).__name__} has no __call__")
    patch = Patch(options, obstacles)
    if (before := patch_of(module)) is not None:
        # An earlier call may have seen the layer that adds the residual, where this one patches only a part
        # of the model.
        residual = before.obstacles.residual and obstacles.residual
        patch = Patch(options, obstacles._replace(residual=residual), before.calls)
    try:
        return set_patch(module, roles, patch)
    except Exception as error:  # the class or its metaclass may refuse subclasses with any error
        raise NotFused(f"{type(module).__name__} cannot be subclassed: {error}") from error


def set_patch(module: nn.Module, roles: Roles, patch: Patch) -> Active:
    """Patch ``module`` with ``patch``, or replace its patch."""
    with lock:
        if roles_of(module) != roles:
            _set_class(module, _fused_class(original_of(module), roles))
        state = states.get(id(module)) or State(module)
        state.active = active = Active(patch)
        states[id(module)] = state
    return active


def restore(module: nn.Module) -> None:
    """Restore the class of ``module`` as soon as no call of it is running."""
    with lock:
        if (state := states.get(id(module))) is not None:
            state.active = None
        _end_patching(module)


def _end_patching(module: nn.Module) -> None:
    state = states.get(id(module))
    if state is None or (state.active is None and state.running == 0):
        states.pop(id(module), None)
        if original := vars(type(module)).get("_mlx_fused_original"):
            _set_class(module, original)


def report(name: str, module: nn.Module, roles: Roles, active: Active) -> LayerReport:
    """Which parts of a patched module are fused in its present state."""
    parts = {}

    def add(part: str, read: Callable) -> None:
        obstacle = note = None
        try:
            note = read()
        except NotFused as reason:
            obstacle = str(reason)
        parts[part] = Part(obstacle, note, active.patch.calls[part])

    if roles.kind == "attention":
        add("qkv", lambda: calls.qkv_note(module, roles, active))
        add("attention", lambda: attention.read(active, own_method(original_of(module), roles.entry)))
    if roles.kind == "mlp":
        add("mlp", lambda: mlp.read_note(module, active, own_method(original_of(module), roles.entry)))
    if roles.kind == "norm":
        add("norm", lambda: norm.read(active, own_method(original_of(module), roles.entry)))
    if "residual" in roles.parts:
        add("residual", lambda: calls.read_output(module, active, roles.output))
    if roles.kind == "experts":
        parts["experts"] = Part(_EXPERTS)
    if roles.alone:
        add("linear", lambda: calls.read_linears(module, active, roles.alone))
    return LayerReport(name, **parts)


def _set_class(module: nn.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)  # bypasses the class's own __setattr__


def _slot(name: str, roles: Roles) -> Slot:
    run = Call._project if name in roles.inputs else Call._add if name == roles.output else None
    return Slot(name, run, KNOWN if run else frozenset())


def _only(method: Callable, args: tuple, kwargs: dict) -> object:
    """The argument of a call that gives ``method`` its first one by name and nothing else; else None."""
    code = getattr(method, "__code__", None)
    is_first = code is not None and not args and code.co_varnames[1:2] == tuple(kwargs)
    return next(iter(kwargs.values())) if is_first else None


# What runs in place of the code of a module of a kind.
_INSTEAD = {"mlp": mlp.run, "norm": norm.run}


def _entry(original: type, roles: Roles) -> Callable:
    name, instead = roles.entry, _INSTEAD.get(roles.kind)

    @wraps(getattr(original, name))
    def call(self, *args, **kwargs):
        method = original.__dict__.get(name) or own_method(original, name)
        is_on = not switched_off()
        if instead and is_on and (active := active_of(self)) is not None:
            x = args[0] if len(args) == 1 and not kwargs else _only(method, args, kwargs)
            y = instead(self, active, method, x)
            if y is not None:
                return y
        state, active = _begin(self) if is_on else (None, None)
        call = Call(self, roles, active) if active is not None else None
        if call is not None and roles.kind == "attention":
            method = attention.seeing_ours(active, method)
        try:
            return run_as(call, self, method.__get__(self, original), args, kwargs)
        finally:
            if call is not None:
                call.end()
                _end(self, state)

    return call


def _begin(module: nn.Module) -> tuple[State | None, Active | None]:
    """Registers a call, which keeps the present patch until it ends; None to run the model's own code."""
    state = states.get(id(module))
    if state is None:
        return None, None
    # Before the patch is read: from here on the class stays. No lock, which would cost more than the rest.
    add_to(state, "running", 1)
    if (active := state.active) is None:
        _end(module, state)
    return state, active


def _end(module: nn.Module, state: State) -> None:
    add_to(state, "running", -1)
    if state.active is None:
        with lock:
            _end_patching(module)


def _storing(original: type) -> Callable:
    def __setitem__(self, key, value):
        # The model's code may store a stand-in in a module. Stand-ins are only for this call.
        original.__setitem__(self, key, value if running() is None else unwrapped(value))

    return __setitem__


def _reducing(original: type, roles: Roles) -> Callable:
    def __reduce_ex__(self, protocol):
        # Pickle finds classes by module and name, where it would find the original class instead of this one.
        cls, patch = type(self), patch_of(self)
        value = original.__reduce_ex__(self, max(protocol, 2))
        if isinstance(value, str):
            return value
        make, args, *rest = (original if part is cls else part for part in value)
        args = tuple(original if arg is cls else arg for arg in args)
        return _copy, (roles, patch, make, args), *rest

    return __reduce_ex__


def _copy(roles: Roles, patch: Patch | None, make: Callable, args: tuple) -> nn.Module:
    module = make(*args)
    if patch is not None:
        set_patch(module, roles, patch)
    return module


@cache
def _fused_class(original: type, roles: Roles) -> type:
    # Cached, so that all layers share one class: mlx-lm's grad_checkpoint edits only the first layer's class.
    members = {name: _slot(name, roles) for name in roles.names}
    members |= {
        roles.entry: _entry(original, roles),
        "__setitem__": _storing(original),
        "__reduce_ex__": _reducing(original, roles),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_mlx_fused_original": original,
        "_mlx_fused_roles": roles,
    }
    return type(original.__name__, (FusedModule, original), members)
