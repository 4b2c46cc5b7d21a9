"""Lets the code of a module see ours under names of its globals.

No global is changed: while a patched module runs, its code is a copy that looks its globals up elsewhere.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from types import CodeType, FunctionType

from mlx_fused.patching.registry import Active


class _Globals(dict):
    """Those of a function as they are at any time, but for ours."""

    def __init__(self, of: dict, ours: dict[str, object]):
        # What Python looks up without __missing__, such as __package__.
        super().__init__({name: value for name, value in of.items() if name.startswith("__")} | ours)
        self._of = of

    def __missing__(self, name: str):
        return self._of[name]


def seeing(
    active: Active, method: Callable, ours: Callable[[Active, FunctionType], dict[str, object]]
) -> Callable:
    """A copy of ``method`` with ``ours`` among its globals; ``method`` itself if there are none."""
    if type(method) is not FunctionType:
        return method
    of, code, defaults, keywords, copy = active.copied
    is_same = of is method and code is method.__code__
    if not is_same or defaults is not method.__defaults__ or keywords is not method.__kwdefaults__:
        copy = _copy(method, ours(active, method))
        active.copied = method, method.__code__, method.__defaults__, method.__kwdefaults__, copy
    return copy


def _copy(method: FunctionType, ours: dict[str, object]) -> FunctionType:
    # A copy would assign globals elsewhere, and the body of a class would not find them.
    if not ours or _names(method, "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_BUILD_CLASS"):
        return method
    own = _Globals(method.__globals__, ours)
    copy = FunctionType(method.__code__, own, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


def read_globals(method: FunctionType) -> set[str]:
    """The names of the globals that the code reads."""
    return _names(method, "LOAD_GLOBAL")


def _names(method: FunctionType, *operations: str) -> set[str]:
    codes, names = [method.__code__], set()
    for code in codes:  # its own, and those of the functions in it
        names |= {i.argval for i in dis.get_instructions(code) if i.opname in operations}
        codes += (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return names
