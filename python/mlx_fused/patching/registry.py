"""How each patched module is patched, and what was read of its layers.

This is kept by the module's id, and not in the module, whose attributes stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import RLock
from typing import Literal, NamedTuple
from weakref import ref

import mlx.nn as nn

from mlx_fused._ext import Kind
from mlx_fused.patching.projections import NotFused
from mlx_fused.patching.report import TITLES, Calls


class Roles(NamedTuple):
    """What a module's layers are for, by their names."""

    entry: str | None  # the method that calls them
    kind: Literal["attention", "mlp", "norm", "rope", "experts"] | None
    inputs: tuple[str, ...]  # of queries, keys and values; empty if the module does not have all three
    output: str | None  # what the module returns the output of
    others: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (*self.inputs, self.output, *self.others)))

    def part(self, name: str) -> str:
        """The part that a layer belongs to."""
        return "qkv" if name in self.inputs else "residual" if name == self.output else "linear"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that such a module has."""
        return _PARTS[self.kind] + ("linear",) * bool(self.alone)

    @property
    def alone(self) -> tuple[str, ...]:
        """The layers that run by themselves whenever the module is fused."""
        return () if self.kind == "mlp" else self.others


_PARTS = {
    "attention": ("qkv", "attention", "residual"),
    "mlp": ("mlp", "residual"),
    "norm": ("norm",),
    "rope": ("rope",),
    "experts": ("experts",),
    None: (),
}


class Obstacles(NamedTuple):
    """Why the model's code prevents a part from being fused; None if it does not."""

    qkv: str | None = None
    residual: str | None = None


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`patch`."""

    qkv: bool
    o_residual: Literal["auto"] | bool
    mlp: bool
    linear: bool
    norm: bool
    rope: bool
    attention: Literal["auto"] | bool
    lora: bool
    exact: bool


@dataclass(frozen=True)
class Patch:
    """How a module is patched."""

    options: Options
    obstacles: Obstacles
    calls: dict[str, Calls] = field(default_factory=lambda: {part: Calls() for part in TITLES})


class Active:
    """A patch of a module, and what was read of the module's layers for it."""

    __slots__ = ("_readings", "copied", "patch")

    def __init__(self, patch: Patch):
        self.patch = patch
        self.copied: tuple = (None,) * 5  # the module's method, what it was made of, and its copy
        self._readings: dict[object, tuple[Kind, object, str | None]] = {}

    def reading(self, key: object, modules: Iterable, read: Callable, *args):
        """What ``read(*args)`` returns for ``modules``, not done again for modules of the same kind.

        Raises:
            NotFused: If ``read`` did.
        """
        before, result, reason = self._readings.get(key, (None, None, None))
        if before is None or not before.is_of(*modules):
            present = Kind(*modules)
            try:
                result, reason = read(*args), None
            except NotFused as error:
                result, reason = None, str(error)
            self._readings[key] = present, result, reason
        if reason is not None:
            raise NotFused(reason)
        return result


class State:
    """How a module is patched now, and how many of its calls are running."""

    def __init__(self, module: nn.Module):
        key = id(module)
        self.active: Active | None = None
        self.running = 0
        self.owner = ref(module, lambda _: states.pop(key, None))


# By the module's id, and not in the module itself, which another thread may be copying meanwhile.
states: dict[int, State] = {}
# Guards the states and the modules' classes. Reentrant, because garbage collection while it is held may run
# code that unpatches.
lock = RLock()


def active_of(module: nn.Module) -> Active | None:
    state = states.get(id(module))
    return state.active if state else None


def patch_of(module: nn.Module) -> Patch | None:
    active = active_of(module)
    return active.patch if active else None


def roles_of(module: nn.Module) -> Roles | None:
    """The roles that ``module`` was patched with; None if it is not patched."""
    roles = getattr(type(module), "_mlx_fused_roles", None)
    return roles if isinstance(roles, Roles) else None


def original_of(module: nn.Module) -> type:
    """The class that ``module`` had before it was patched."""
    return vars(type(module)).get("_mlx_fused_original", type(module))
