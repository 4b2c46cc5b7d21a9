"""Reports which layers of a model are fused, and counts their calls as the model runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from threading import Lock

from mlx_fused._ext import last_decision

_lock = Lock()

_OFF = dict.fromkeys(("0", "false", "off", "no"), True) | dict.fromkeys(("1", "true", "on", "yes", ""), False)


def switched_off() -> bool:
    """Whether ``MLX_FUSED`` makes patched models run their own code."""
    value = os.environ.get("MLX_FUSED", "")
    try:
        return _OFF[value.lower()]
    except KeyError:
        allowed = ", ".join(repr(word) for word in _OFF if word)
        raise ValueError(f"MLX_FUSED must be unset or one of {allowed} but got {value!r}.") from None


@dataclass
class Calls:
    """How often a part of a layer was called, and how often it ran as one operation.

    Under ``mx.compile`` a call counts when it is traced, not when the compiled function runs. Prints as
    ``fused/fallen back``.

    Attributes:
        total (int): All calls.
        fused (int): Those that ran as one operation.
        composed (int): Of these, how many routing gave to MLX's own operations.
    """

    total: int = 0
    fused: int = 0
    composed: int = 0
    reason: str | None = None  # of the latest call that patching left to the model's own code

    def add(self, total: int = 0, fused: int = 0, reason: str | None = None) -> None:
        with _lock:  # several threads may call the model
            self.total += total
            self.fused += fused
            self.reason = reason or self.reason

    def add_route(self) -> None:
        """Count where routing sent this thread's latest operation."""
        if last_decision()[0] == "composed":
            with _lock:
                self.composed += 1

    @property
    def share(self) -> str:
        """How many of the calls ran fused, in words."""
        by_mlx = f", {self.composed} of these by MLX's own operations" if self.composed else ""
        return f"{self.fused} of {self.total} calls{by_mlx}"

    @property
    def fallen_back(self) -> int:
        """How many calls ran the model's own code."""
        return self.total - self.fused

    def __str__(self) -> str:
        return f"{self.fused}/{self.fallen_back}"


@dataclass(frozen=True)
class Part:
    """One part of an attention layer: the QKV projection, or the output projection with its residual.

    Attributes:
        obstacle (str or None): Why it is not fused; ``None`` if it is.
        note (str or None): What else there is to know, such as adapters that mlx-lm's own code adds.
        calls (Calls): The counter of its calls, which goes on.
    """

    obstacle: str | None = None
    note: str | None = None
    calls: Calls = field(default_factory=Calls)

    @property
    def fused(self) -> bool:
        """Whether nothing hinders its fusion."""
        return self.obstacle is None

    def __str__(self) -> str:
        state = "fused" if self.fused else f"not fused: {self.obstacle}"
        return f"{state}, {self.note}" if self.note else state


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name (str): Its name in the model, such as ``model.layers.0.self_attn``.
        qkv (Part): The projection to queries, keys and values.
        residual (Part): The output projection with its residual.
    """

    name: str
    qkv: Part
    residual: Part


@dataclass(frozen=True, repr=False)
class PatchReport:
    """What :func:`mlx_fused.patch` did, layer by layer; prints as a table.

    What is fused, and why the rest is not, was determined when ``patch`` was called; calls are counted as
    they happen.

    Attributes:
        layers (tuple): A :class:`LayerReport` for each attention layer.
    """

    layers: tuple[LayerReport, ...]

    @property
    def summary(self) -> str:
        """The report in one line."""
        if not self.layers:
            kind = "no attention layer of a kind it knows (q_proj, k_proj, v_proj, ...)"
            return f"mlx-fused: nothing to patch, {kind}"
        qkv, residual = (sum(getattr(x, part).fused for x in self.layers) for part in ("qkv", "residual"))
        off = f"; MLX_FUSED={os.environ['MLX_FUSED']} keeps all of it off" if switched_off() else ""
        return (
            f"mlx-fused: of {len(self.layers)} attention layer{'s' * (len(self.layers) > 1)}, "
            f"the QKV projection is fused in {qkv}, the output projection with its residual in {residual}"
            f"{off}"
        )

    def __repr__(self) -> str:
        if not self.layers:
            return self.summary
        rows = [("layer", "QKV", "calls*", "output projection + residual", "calls*")]
        for layer in self.layers:
            parts = (layer.qkv, layer.residual)
            rows.append((layer.name, *(str(text) for part in parts for text in (part, part.calls))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self.summary, *(line.rstrip() for line in lines), "* fused/fallen back"])
