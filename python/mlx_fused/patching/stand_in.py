"""The object that stands in for a linear layer while its owner runs."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


class StandIn:
    """Replaces a layer of a running module: calls go to ``call``, those of ``as_linear`` to what is given for
    it, and all else to the layer.

    Almost nothing but ``type`` can tell the two apart (docs/design/patching.md); ``isinstance`` sees the
    module's class.
    """

    __slots__ = ("__weakref__", "_as_linear", "_call", "_module")

    def __init__(self, module: nn.Module, call: Callable, as_linear: Callable | None = None):
        set_own = object.__setattr__
        set_own(self, "_module", module)
        set_own(self, "_call", call)
        set_own(self, "_as_linear", as_linear)

    def __call__(self, x: mx.array) -> mx.array:
        return _call_of(self)(x)

    def __getattribute__(self, name: str):  # also __class__, which isinstance reads
        if name == "as_linear" and (own := _as_linear_of(self)) is not None:
            return own
        return getattr(module_of(self), name)


_call_of, module_of = StandIn._call.__get__, StandIn._module.__get__
_as_linear_of = StandIn._as_linear.__get__


def _forward(name: str) -> Callable:
    return lambda self, *args: getattr(module_of(self), name)(*map(_itself, args))


def _itself(value):
    return module_of(value) if type(value) is StandIn else value


# Special methods that Python looks up in the type, not through __getattribute__.
for _name in (
    *("__contains__", "__delattr__", "__delitem__", "__dir__", "__eq__", "__format__", "__getitem__"),
    *("__ior__", "__iter__", "__len__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__"),
    *("__setattr__", "__setitem__", "__sizeof__", "__str__"),
):
    setattr(StandIn, _name, _forward(_name))
StandIn.__hash__ = lambda self: hash(module_of(self))


def unwrapped(value, seen: tuple = ()):
    """``value`` with stand-ins replaced by their modules, also inside containers."""
    if type(value) is StandIn:
        return module_of(value)
    if isinstance(value, tuple):
        return type(value)(map(unwrapped, value)) if type(value) is tuple else value
    if not isinstance(value, (dict, list)) or any(value is other for other in seen):
        return value
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inside = unwrapped(item, (*seen, value))
        if inside is not item:
            value[key] = inside
    return value
