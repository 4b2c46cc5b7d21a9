"""The object that stands in for a linear layer while its owner runs (``_ext.StandIn``).

Almost nothing but ``type`` can tell the two apart (docs/design/patching.md); ``isinstance`` sees the layer's
class.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_fused._ext import StandIn, layer_of


def _forward(name: str) -> Callable:
    def forward(self, *args):
        return getattr(layer_of(self), name)(*map(layer_of, args))

    return _named(forward, name)


def _named(method: Callable, name: str) -> Callable:
    """As if it were the class's own, which stubs take it for."""
    method.__name__, method.__qualname__, method.__module__ = name, f"StandIn.{name}", StandIn.__module__
    return method


# Special methods that Python looks up in the type, not in the object.
for _name in (
    *("__contains__", "__delattr__", "__delitem__", "__dir__", "__eq__", "__format__", "__getitem__"),
    *("__ior__", "__iter__", "__len__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__"),
    *("__setattr__", "__setitem__", "__sizeof__", "__str__"),
):
    setattr(StandIn, _name, _forward(_name))
StandIn.__hash__ = _named(lambda self: hash(layer_of(self)), "__hash__")


def unwrapped(value, seen: tuple = ()):
    """``value`` with stand-ins replaced by their layers, also inside containers."""
    if type(value) is StandIn:
        return layer_of(value)
    if isinstance(value, tuple):
        return type(value)(map(unwrapped, value)) if type(value) is tuple else value
    if not isinstance(value, (dict, list)) or any(value is other for other in seen):
        return value
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inside = unwrapped(item, (*seen, value))
        if inside is not item:
            value[key] = inside
    return value
