"""The fused operations and their gradients in NumPy float64, with the rounding errors to expect.

A result is a sum of components (the projection, a bias, an adapter's product, the residual), each of them a
product of operands. Rounding errors are assumed to be independent with mean zero. The root of the sum of
their squared sizes, called spread here, then bounds their sum: it exceeds 8 spreads with a probability below
3e-14 (Hoeffding; Higham and Mary, 2019, for sums of products). Errors that may all have one sign, such as
those of an approximated exponential, are called steady.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mlx_fused.validate.activations import Activation

CERTAIN = 8  # an error exceeds this many spreads with a probability below 3e-14
FLOAT32 = 2.0**-24
WHOLE = ""  # the name of the only component of a result


class Known(NamedTuple):
    """Numbers, how far they may be off, and the spread of their errors."""

    value: np.ndarray
    bound: np.ndarray
    spread: np.ndarray


class DType(NamedTuple):
    """How a dtype rounds."""

    unit: float  # the unit roundoff
    smallest_exponent: int
    largest: float

    def step(self, values: np.ndarray) -> np.ndarray:
        """The distance between neighbouring numbers at ``values``."""
        exponents = np.where(values == 0, self.smallest_exponent, np.frexp(values)[1] - 1)
        return np.ldexp(2 * self.unit, np.maximum(exponents, self.smallest_exponent))

    def round(self, values: np.ndarray) -> np.ndarray:
        step = self.step(values)
        return np.rint(values / step) * step

    def kept(self, known: Known) -> Known:
        """What numbers are after they are rounded: mostly certain, if this rounds more than they err."""
        rounded, low, high = (self.round(known.value + t * known.bound) for t in (0, -1, 1))
        rounded = np.where(np.abs(rounded) > self.largest, np.copysign(inf, rounded), rounded)
        reach = high - low
        noise = np.minimum(reach, np.hypot(known.spread, 2 * self.unit * np.abs(known.value)))
        return Known(rounded, reach, noise)

    def beyond_rounding(self, actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """A lower bound of the error that the number had before it was rounded to ``actual``."""
        # The neighbour below a power of two is nearer; the mean of both values lies on the relevant side.
        return np.maximum(np.abs(actual - exact) - self.step((actual + exact) / 2) / 2, 0)


class Arithmetic(NamedTuple):
    """How a call was computed. Units are unit roundoffs; 0 means not rounded."""

    sum_unit: float = FLOAT32  # of the dtype that sums are accumulated in
    weight_unit: float = 0.0  # of the dtype that weights are rounded to before they are multiplied
    low_rank_unit: float = 0.0  # of the dtype that x A and dy B^T are rounded to
    composed: bool = False  # whether several operations computed it, each of which rounds
    dtype: DType | None = None  # of the results, and of what is kept on the way

    def kept(self, known: Known) -> Known:
        return known if self.dtype is None else self.dtype.kept(known)

    @property
    def unit(self) -> float:
        return 0.0 if self.dtype is None else self.dtype.unit


class Segment(NamedTuple):
    """One projection of a call: ``alpha * (x W^T + bias + scale * (x A) B)``."""

    name: str
    weight: np.ndarray
    magnitude: np.ndarray  # |weight|, or |scale * code| + |bias| if that is how a quantized one is summed
    bias: np.ndarray | None
    a: np.ndarray | None
    b: np.ndarray | None
    scale: float

    @property
    def whole(self) -> np.ndarray:
        """The weight with the adapter in it."""
        return self.weight if self.a is None else self.weight + self.scale * (self.a @ self.b).T


class Norm(NamedTuple):
    """The RMS norm of a call's input."""

    weight: np.ndarray | None
    eps: float


@dataclass(frozen=True)
class Call:
    """The operands of a call; ``x`` is a matrix of rows."""

    x: np.ndarray
    segments: tuple[Segment, ...]
    residual: np.ndarray | None = None
    alpha: float = 1.0
    norm: Norm | None = None
    activation: Activation | None = None


class Operand(NamedTuple):
    """A matrix, and the errors of its numbers where they were computed themselves."""

    value: np.ndarray
    magnitude: np.ndarray
    spread: np.ndarray | None = None
    steady: np.ndarray | float = 0.0


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
    steady: np.ndarray | float = 0.0
    activated: np.ndarray | None = None  # the value where it is not the components' sum but a function of it

    @property
    def value(self) -> np.ndarray:
        return sum(self.components.values()) if self.activated is None else self.activated

    @property
    def size(self) -> np.ndarray:
        return sum(map(np.abs, self.components.values()))

    @property
    def roundings(self) -> int:
        """How often a form of several operations rounds, at most."""
        return 2 * len(self.components)

    def add(self, component: str, value: np.ndarray, magnitude: np.ndarray) -> None:
        self.components[component] = value
        self.magnitude = self.magnitude + magnitude

    def add_errors(
        self,
        of: Operand,
        left: np.ndarray | None = None,
        right: np.ndarray | None = None,
        transposed: bool = False,
    ) -> None:
        """Add what becomes of the errors of an operand, or of its transpose, between two matrices."""
        if of.spread is None:
            return

        def turned(a: np.ndarray) -> np.ndarray:
            return a.T if transposed else a

        def product(left: np.ndarray | None, a: np.ndarray, right: np.ndarray | None) -> np.ndarray:
            a = a if left is None else left @ a
            return a if right is None else a @ right

        def powers(power: int) -> tuple[np.ndarray | None, np.ndarray | None]:
            return tuple(None if a is None else np.abs(a) ** power for a in (left, right))

        back = tuple(None if a is None else a.T for a in (left, right))
        (left_squares, right_squares), (left_sizes, right_sizes) = powers(2), powers(1)
        effect = np.sqrt(product(left_squares, turned(of.spread**2), right_squares))
        self.shared.append(Shared(of.spread, lambda d: turned(product(back[0], d, back[1])), effect))
        steady = np.broadcast_to(of.steady, of.spread.shape)
        self.steady = self.steady + product(left_sizes, turned(steady), right_sizes)

    def spread(self, arithmetic: Arithmetic) -> np.ndarray:
        """Of each number."""
        spread = self.own_spread(arithmetic)
        for shared in self.shared:
            spread = np.hypot(spread, shared.effect)
        return spread

    def own_spread(self, arithmetic: Arithmetic) -> np.ndarray:
        """Of the errors that no other number has."""
        return sqrt(self.terms) * arithmetic.sum_unit * self.magnitude

    def through(
        self,
        of: Callable[[np.ndarray], np.ndarray],
        of_sizes: Callable[[np.ndarray], np.ndarray],
        adjoint: Callable[[np.ndarray], np.ndarray],
    ) -> Expected:
        """What a linear map makes of it."""
        shared = [
            Shared(s.spread, lambda d, s=s: s.adjoint(adjoint(d)), of_sizes(s.effect)) for s in self.shared
        ]
        components = {name: of(component) for name, component in self.components.items()}
        steady = of_sizes(np.broadcast_to(self.steady, self.magnitude.shape))
        return Expected(self.terms, components, of_sizes(self.magnitude), shared, steady)


def outputs(call: Call, arithmetic: Arithmetic) -> dict[str, Expected]:
    """The outputs by name: of each segment, or of the activation."""
    sums = _sums(call, arithmetic)
    of = call.activation
    return sums if of is None else {of.title: of.output(list(sums.values()), arithmetic)}


def _sums(call: Call, arithmetic: Arithmetic) -> dict[str, Expected]:
    """The output of each segment, by name, before an activation."""
    x, alpha = _input(call, arithmetic), call.alpha
    found = {}
    for s in call.segments:
        found[s.name] = y = Expected(_terms(s, x.value.shape[1]))
        y.add("projection", alpha * (x.value @ s.weight.T), abs(alpha) * (x.magnitude @ s.magnitude.T))
        y.add_errors(x, right=alpha * s.whole.T)
        y.add_errors(_decoded(s, arithmetic), left=alpha * x.value, transposed=True)
        if s.bias is not None:
            bias = np.broadcast_to(alpha * s.bias, y.components["projection"].shape)
            y.add("bias", bias, np.abs(bias))
        if s.a is not None:
            low, b = _low_rank(x, s.a, arithmetic), alpha * s.scale * s.b
            y.add("adapter", low.value @ b, low.magnitude @ np.abs(b))
            y.add_errors(low, right=b)
        if call.residual is not None:
            y.add("residual", call.residual, np.abs(call.residual))
    return found


def segment_gradients(call: Call, cotangents: list[np.ndarray], arithmetic: Arithmetic) -> list[Operand]:
    """The gradients of the segments' products, from those of the outputs; the arithmetic is the forward's."""
    if call.activation is None:
        return [Operand(call.alpha * g, np.abs(call.alpha * g)) for g in cotangents]
    return call.activation.gradients(cotangents[0], list(_sums(call, arithmetic).values()), arithmetic)


def gradients(
    call: Call, grads: list[Operand], arithmetic: Arithmetic
) -> Iterator[tuple[tuple[str, str], Expected]]:
    """The gradients of all operands except the residual, each with the names of the operand and the segment.

    Args:
        call (Call): The operands.
        grads (list): For each segment, the gradient of its product.
        arithmetic (Arithmetic): How they were computed.
    """
    x, rows = _input(call, arithmetic), len(call.x)
    dx = Expected(sum(_terms(s, len(s.weight)) for s in call.segments))
    for s, g in zip(call.segments, grads, strict=True):
        dx.add(f"projection of {s.name}", g.value @ s.weight, g.magnitude @ s.magnitude)
        dx.add_errors(g, right=s.whole)
        dx.add_errors(_decoded(s, arithmetic), left=g.value)
        dw = _single(rows, g.value.T @ x.value, g.magnitude.T @ x.magnitude)
        dw.add_errors(g, right=x.value, transposed=True)
        dw.add_errors(x, left=g.value.T)
        yield ("weight", s.name), dw
        if s.bias is not None:
            ones = np.ones((1, rows))
            d_bias = _single(rows, ones @ g.value, ones @ g.magnitude)
            d_bias.add_errors(g, left=ones)
            yield ("bias", s.name), d_bias
        if s.a is None:
            continue
        a, b = s.scale * s.a, s.scale * s.b.T
        h, z = _low_rank(g, b, arithmetic), _low_rank(x, a, arithmetic)
        dx.add(f"adapter of {s.name}", h.value @ s.a.T, h.magnitude @ np.abs(s.a).T)
        dx.add_errors(h, right=s.a.T)
        da = _single(rows + len(b) + 5, x.value.T @ h.value, x.magnitude.T @ h.magnitude)
        da.add_errors(h, left=x.value.T)
        da.add_errors(g, left=x.value.T, right=b)
        da.add_errors(x, right=h.value, transposed=True)
        yield ("lora_a", s.name), da
        db = _single(rows + len(a) + 5, z.value.T @ g.value, z.magnitude.T @ g.magnitude)
        db.add_errors(z, right=g.value, transposed=True)
        db.add_errors(g, left=z.value.T)
        db.add_errors(x, left=a.T, right=g.value, transposed=True)
        yield ("lora_b", s.name), db
    if call.norm is None:
        yield ("input", ""), dx
    else:
        yield from _norm_gradients(call, dx, arithmetic)


def copied(values: np.ndarray) -> Expected:
    """The gradient of an operand that is only added, which is the gradient of the sum."""
    return _single(1, values, np.abs(values))


def _single(terms: int, value: np.ndarray, magnitude: np.ndarray) -> Expected:
    expected = Expected(terms)
    expected.add(WHOLE, value, magnitude)
    return expected


def _input(call: Call, arithmetic: Arithmetic) -> Operand:
    """What the segments multiply: ``x``, or its norm."""
    if call.norm is None:
        return Operand(call.x, np.abs(call.x))
    value, share = _factor(call) * call.x, _of_mean(call)
    known = arithmetic.kept(Known(value, share * np.abs(value), np.zeros_like(value)))
    if call.norm.weight is not None:
        weight, size = call.norm.weight, np.abs(call.norm.weight)
        known = arithmetic.kept(Known(weight * known.value, size * known.bound, size * known.spread))
    return Operand(known.value, np.abs(known.value), known.spread, share * np.abs(known.value))


def _factor(call: Call) -> np.ndarray:
    """What the norm multiplies a row by, but for its weight."""
    return 1 / np.sqrt((call.x**2).mean(-1, keepdims=True) + call.norm.eps)


def _of_mean(call: Call) -> float:
    """The relative error of a mean of squares, which all numbers of a row share, and of its root."""
    return CERTAIN * (sqrt(call.x.shape[1]) + 4) * FLOAT32


def _norm_gradients(
    call: Call, dx: Expected, arithmetic: Arithmetic
) -> Iterator[tuple[tuple[str, str], Expected]]:
    """The gradients of the norm's input and weight, from that of its result."""
    factor, weight = _factor(call), 1.0 if call.norm.weight is None else call.norm.weight
    normed = factor * call.x
    size = np.abs(normed)

    def mean(a: np.ndarray) -> np.ndarray:
        return a.mean(-1, keepdims=True)

    def of_sizes(d: np.ndarray) -> np.ndarray:
        return factor * (np.abs(weight) * d + size * mean(size * np.abs(weight) * d))

    # It is rounded itself, and again when it is multiplied by the weight.
    dx.add_errors(Operand(dx.value, dx.magnitude, 2 * arithmetic.unit * dx.size))
    d_weight = dx.through(
        lambda d: (d * normed).sum(0, keepdims=True),
        lambda d: (d * size).sum(0, keepdims=True),
        lambda d: d * normed,
    )
    d_weight.terms += len(normed)
    d_weight.steady = d_weight.steady + _of_mean(call) * (np.abs(dx.value) * size).sum(0)
    yield ("norm", ""), d_weight
    d_input = dx.through(
        lambda d: factor * (weight * d - normed * mean(normed * weight * d)),
        of_sizes,
        lambda d: factor * weight * (d - normed * mean(normed * d)),
    )
    d_input.steady = d_input.steady + _of_mean(call) * of_sizes(np.abs(dx.value))
    yield ("input", ""), d_input


def _decoded(segment: Segment, arithmetic: Arithmetic) -> Operand:
    """The weight, as it is multiplied."""
    spread = arithmetic.weight_unit * np.abs(segment.weight) if arithmetic.weight_unit else None
    return Operand(segment.weight, segment.magnitude, spread)


def _low_rank(x: Operand, a: np.ndarray, arithmetic: Arithmetic) -> Operand:
    """``x A`` or ``dy B^T``, with the errors that are its own; all numbers of a row share them."""
    value, magnitude = x.value @ a, x.magnitude @ np.abs(a)
    of_sums = sqrt(len(a) + 1) * arithmetic.sum_unit * magnitude
    spread = np.hypot(of_sums, sqrt(2) * arithmetic.low_rank_unit * np.abs(value))
    return Operand(value, magnitude, spread)


def _terms(segment: Segment, length: int) -> int:
    # Decoding a quantized weight rounds, and it may be summed as two terms. The last 5 are for bias, scale,
    # alpha and residual.
    return 4 * length + (0 if segment.a is None else segment.a.shape[1]) + 5
