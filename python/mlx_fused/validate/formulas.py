"""The fused operations and their gradients in NumPy float64, with the rounding errors to expect.

A result is a sum of components (the projection, a bias, an adapter's product, the residual), each of them a
product of operands. Rounding errors are assumed to be independent with mean zero. The root of the sum of
their squared sizes, called spread here, then bounds their sum: it exceeds 8 spreads with a probability below
3e-14 (Hoeffding; Higham and Mary, 2019, for sums of products).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import numpy as np

WHOLE = ""  # the name of the only component of a result


class Arithmetic(NamedTuple):
    """How a call was computed. Units are unit roundoffs; 0 means not rounded."""

    sum_unit: float = 2.0**-24  # of the dtype that sums are accumulated in
    weight_unit: float = 0.0  # of the dtype that weights are rounded to before they are multiplied
    low_rank_unit: float = 0.0  # of the dtype that x A and dy B^T are rounded to
    composed: bool = False  # whether several operations computed it, each of which rounds


class Segment(NamedTuple):
    """One projection of a call: ``alpha * (x W^T + bias + scale * (x A) B)``."""

    name: str
    weight: np.ndarray
    magnitude: np.ndarray  # |weight|, or |scale * code| + |bias| if that is how a quantized one is summed
    bias: np.ndarray | None
    a: np.ndarray | None
    b: np.ndarray | None
    scale: float


@dataclass(frozen=True)
class Call:
    """The operands of a call; ``x`` is a matrix of rows."""

    x: np.ndarray
    segments: tuple[Segment, ...]
    residual: np.ndarray | None = None
    alpha: float = 1.0


class Shared(NamedTuple):
    """Rounding errors of an intermediate result, each of which affects many numbers of the result."""

    spread: np.ndarray
    adjoint: Callable[[np.ndarray], np.ndarray]  # of the linear map from these errors to the result
    effect: np.ndarray  # the spread that they cause in each number of the result


@dataclass
class Expected:
    """An exact result, and the sources of its rounding errors."""

    terms: int  # how many additions round a number on its way from an operand to the result, at most
    components: dict[str, np.ndarray] = field(default_factory=dict)
    magnitude: np.ndarray | float = 0.0  # the sum of |products| behind each number
    shared: list[Shared] = field(default_factory=list)

    def add(self, component: str, value: np.ndarray, magnitude: np.ndarray) -> None:
        self.components[component] = value
        self.magnitude = self.magnitude + magnitude


def outputs(call: Call, arithmetic: Arithmetic) -> dict[str, Expected]:
    """The output of each segment, by name."""
    x, x_size, alpha = call.x, np.abs(call.x), call.alpha
    found = {}
    for s in call.segments:
        found[s.name] = y = Expected(_terms(s, x.shape[1]))
        y.add("projection", alpha * (x @ s.weight.T), abs(alpha) * (x_size @ s.magnitude.T))
        if arithmetic.weight_unit:
            spread = abs(alpha) * arithmetic.weight_unit * np.abs(s.weight)
            y.shared.append(Shared(spread, lambda d: d.T @ x, np.sqrt(x**2 @ (spread**2).T)))
        if s.bias is not None:
            bias = np.broadcast_to(alpha * s.bias, y.components["projection"].shape)
            y.add("bias", bias, np.abs(bias))
        if s.a is not None:
            low, b = _low_rank(x, s.a, arithmetic), alpha * s.scale * s.b
            y.add("adapter", low.value @ b, low.magnitude @ np.abs(b))
            effect = np.sqrt(low.spread**2 @ b**2)
            y.shared.append(Shared(low.spread, lambda d, b=b: d @ b.T, effect))
        if call.residual is not None:
            y.add("residual", call.residual, np.abs(call.residual))
    return found


def gradients(
    call: Call, grads: list[np.ndarray], arithmetic: Arithmetic
) -> Iterator[tuple[tuple[str, str], Expected]]:
    """The gradients of all operands except the residual, each with the names of the operand and the segment.

    Args:
        call (Call): The operands.
        grads (list): For each segment, ``alpha`` times the gradient of its output.
        arithmetic (Arithmetic): How they were computed.
    """
    x, x_size, rows = call.x, np.abs(call.x), len(call.x)
    dx = Expected(sum(_terms(s, len(s.weight)) for s in call.segments))
    for s, g in zip(call.segments, grads, strict=True):
        g_size = np.abs(g)
        dx.add(f"projection of {s.name}", g @ s.weight, g_size @ s.magnitude)
        if arithmetic.weight_unit:
            spread = arithmetic.weight_unit * np.abs(s.weight)
            dx.shared.append(Shared(spread, lambda d, g=g: g.T @ d, np.sqrt(g**2 @ spread**2)))
        yield ("weight", s.name), _single(rows, g.T @ x, g_size.T @ x_size)
        if s.bias is not None:
            yield ("bias", s.name), _single(rows, g.sum(0), g_size.sum(0))
        if s.a is None:
            continue
        h, z = _low_rank(g, s.scale * s.b.T, arithmetic), _low_rank(x, s.scale * s.a, arithmetic)
        dx.add(f"adapter of {s.name}", h.value @ s.a.T, h.magnitude @ np.abs(s.a).T)
        effect = np.sqrt(h.spread**2 @ (s.a**2).T)
        dx.shared.append(Shared(h.spread, lambda d, a=s.a: d @ a, effect))
        da = _single(rows + g.shape[1] + 5, x.T @ h.value, x_size.T @ h.magnitude)
        da.shared.append(Shared(h.spread, lambda d: x @ d, np.sqrt((x**2).T @ h.spread**2)))
        yield ("lora_a", s.name), da
        db = _single(rows + x.shape[1] + 5, z.value.T @ g, z.magnitude.T @ g_size)
        db.shared.append(Shared(z.spread, lambda d, g=g: g @ d.T, np.sqrt((z.spread**2).T @ g**2)))
        yield ("lora_b", s.name), db
    yield ("input", ""), dx


def copied(values: np.ndarray) -> Expected:
    """The gradient of an operand that is only added, which is the gradient of the sum."""
    return _single(1, values, np.abs(values))


def _single(terms: int, value: np.ndarray, magnitude: np.ndarray) -> Expected:
    expected = Expected(terms)
    expected.add(WHOLE, value, magnitude)
    return expected


class _LowRank(NamedTuple):
    value: np.ndarray
    magnitude: np.ndarray
    spread: np.ndarray


def _low_rank(x: np.ndarray, a: np.ndarray, arithmetic: Arithmetic) -> _LowRank:
    """``x A`` or ``dy B^T``, whose errors all numbers of a row share."""
    value, magnitude = x @ a, np.abs(x) @ np.abs(a)
    of_sums = sqrt(len(a) + 1) * arithmetic.sum_unit * magnitude
    return _LowRank(value, magnitude, np.hypot(of_sums, sqrt(2) * arithmetic.low_rank_unit * np.abs(value)))


def _terms(segment: Segment, length: int) -> int:
    # Decoding a quantized weight rounds, and it may be summed as two terms. The last 5 are for bias, scale,
    # alpha and residual.
    return 4 * length + (0 if segment.a is None else segment.a.shape[1]) + 5
