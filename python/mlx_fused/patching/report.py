"""Reports which layers of a model are fused, and counts their calls as the model runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from mlx_fused._ext import switched_off

# What may be fused, and how it is called: parts of modules, and the loss of the whole model.
TITLES = {
    "qkv": "the QKV projection",
    "attention": "attention itself",
    "mlp": "the first half of the MLP",
    "residual": "the output projection with its residual",
    "linear": "other linear layers",
    "norm": "the RMS norm",
    "rope": "rotary positions",
    "experts": "experts",
    "loss": "the loss",
}
_COLUMNS = {
    "qkv": "QKV",
    "attention": "attention",
    "mlp": "MLP",
    "residual": "output projection + residual",
    "linear": "other layers",
    "norm": "RMS norm",
    "rope": "rope",
    "experts": "experts",
}
PARTS = tuple(_COLUMNS)


@dataclass
class Calls:
    """How often a part of a layer was called, and how often it ran as one operation.

    Under ``mx.compile`` a call counts when it is traced, not when the compiled function runs. Prints as
    how many our kernels computed in one operation, and how many ran otherwise: ``2/0``.

    Attributes:
        total (int): All calls.
        fused (int): Those that ran as one operation.
        composed (int): Of these, how many routing gave to MLX's own operations.
        reason (str or None): Why the latest call that patching left to the model's own code was.
    """

    total: int = 0
    fused: int = 0
    composed: int = 0
    reason: str | None = None

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
        ours = self.fused - self.composed
        return f"{ours}/{self.total - ours}"


@dataclass(frozen=True)
class Part:
    """One part of a module, such as the QKV projection of an attention layer.

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
    """One module with linear layers, an RMS norm or rotary positions. Parts it does not have are ``None``.

    Attributes:
        name (str): Its name in the model, such as ``model.layers.0.self_attn``.
        qkv (Part or None): Of attention: the projection to queries, keys and values.
        attention (Part or None): Of attention: what is between its projections.
        mlp (Part or None): Of an MLP: the layers before the last one, with the activation.
        residual (Part or None): Of both: the last projection with the residual.
        linear (Part or None): Every other linear layer, each by itself.
        norm (Part or None): Of an RMS norm: itself.
        rope (Part or None): Of rotary positions: themselves.
        experts (Part or None): Of a mixture's experts: their layers, which are never fused.
    """

    name: str
    qkv: Part | None = None
    attention: Part | None = None
    mlp: Part | None = None
    residual: Part | None = None
    linear: Part | None = None
    norm: Part | None = None
    rope: Part | None = None
    experts: Part | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that it has, by name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}


@dataclass(frozen=True, repr=False)
class PatchReport:
    """What :func:`mlx_fused.patch` did, module by module; prints as a table,
    in which norms and rotary positions are left out if they are fused.

    What is fused, and why the rest is not, was determined when ``patch`` was called; calls are counted as
    they happen.

    Attributes:
        modules (tuple): A :class:`LayerReport` for each module with linear layers, RMS norm and rotary
            positions.
    """

    modules: tuple[LayerReport, ...]

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """The attention layers among the modules."""
        return tuple(module for module in self.modules if module.qkv is not None)

    @property
    def mlps(self) -> tuple[LayerReport, ...]:
        """The MLPs among the modules."""
        return tuple(module for module in self.modules if module.mlp is not None)

    @property
    def norms(self) -> tuple[LayerReport, ...]:
        """The RMS norms among the modules."""
        return tuple(module for module in self.modules if module.norm is not None)

    @property
    def parts(self) -> list[Part]:
        """All parts of all modules."""
        return [part for module in self.modules for part in module.parts.values()]

    @property
    def summary(self) -> str:
        """The report in one line."""
        if not self.modules:
            return "mlx-fused: nothing to patch, no linear layer in a module that calls it"
        off = f"; MLX_FUSED={os.environ['MLX_FUSED']} keeps all of it off" if switched_off() else ""
        counts = []
        for name, title in _COLUMNS.items():
            if parts := [module.parts[name] for module in self.modules if name in module.parts]:
                counts.append(f"{title} {sum(part.fused for part in parts)} of {len(parts)}")
        return f"mlx-fused: fused {', '.join(counts)}{off}"

    def __repr__(self) -> str:
        if not self.modules:
            return self.summary
        # These are many, and alike.
        shown = [m for m in self.modules if (part := m.norm or m.rope) is None or not part.fused]
        if not shown:
            return self.summary
        present = [name for name in PARTS if any(name in module.parts for module in shown)]
        rows = [("layer", *(text for name in present for text in (_COLUMNS[name], "calls*")))]
        for module in shown:
            cells = (_cells(name, module.parts.get(name)) for name in present)
            rows.append((module.name, *(text for pair in cells for text in pair)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(
            [self.summary, *(line.rstrip() for line in lines), "* in one operation of ours/otherwise"]
        )


def _cells(name: str, part: Part | None) -> tuple[str, str]:
    """What the table says of a part and of its calls; those of experts are not counted."""
    if part is None:
        return "", ""
    # Of a part that is not fused at all, its state gives the reason.
    otherwise = part.fused and part.calls.fallen_back > 0 and part.calls.reason
    state = f"{part}, but a call was not: {part.calls.reason}" if otherwise else str(part)
    return state, "" if name == "experts" else str(part.calls)
