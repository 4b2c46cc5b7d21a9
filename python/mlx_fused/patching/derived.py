"""Arrays that know what they were made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import mlx.core as mx


class Derived(mx.array):
    """A normal array that keeps what it was made from, until it is changed in place."""

    _origin: ClassVar[object] = None


def _changing(name: str) -> Callable:
    def change(self, *args):
        self._origin = None
        return getattr(mx.array, name)(self, *args)

    return change


for _name in dir(mx.array):
    if _name == "__setitem__" or (_name.startswith("__i") and f"__{_name[3:]}" in dir(mx.array)):  # __iadd__
        setattr(Derived, _name, _changing(_name))
