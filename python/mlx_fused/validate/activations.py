"""Activations in NumPy float64: what becomes of the sums before them, and of their errors.

Every activation is ``x s(x)``. Where its slope jumps or bends within the errors of the sums, what it makes of
these is evaluated at their ends.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import erfc, inf, pi, sqrt
from typing import NamedTuple

import numpy as np

from mlx_fused.validate.formulas import CERTAIN, FLOAT32, Arithmetic, Expected, Known, Operand

_OWN = 8 * FLOAT32  # of an exponential, a quotient and some products in float32
# Of s and its slope: errors of 2^-126 where a sigmoid is 0, times the slope of what it is of.
_SMALLEST = 2.0**-97

# Of the rows of a layer that packs gate and up.
_COLUMNS = {
    "gate_up": lambda n: (slice(0, n), slice(n, 2 * n)),
    "up_gate": lambda n: (slice(n, 2 * n), slice(0, n)),
    "interleaved": lambda n: (slice(0, None, 2), slice(1, None, 2)),
}


class Activation(NamedTuple):
    """An activation of a sum, or of a gate that is then multiplied with another sum.

    Attributes:
        name (str): As the operations have it.
        gated (bool): Whether there is an up.
        packing (str, optional): How one layer packs gate and up, if one does.
        alpha (float): Of ``"clipped_swiglu"``.
        limit (float): Of ``"clipped_swiglu"``.
    """

    name: str
    gated: bool = False
    packing: str | None = None
    alpha: float = 1.0
    limit: float = inf

    @property
    def title(self) -> str:
        return "gate * up" if self.gated else "y"

    def output(self, sums: list[Expected], arithmetic: Arithmetic) -> Expected:
        """The result, of what the segments' sums are expected to be."""
        parts = self._parts(sums)
        pre = [part.value for part in parts]
        value = self._value(*pre)
        found = Expected(max(part.terms for part in parts), activated=value)
        errors, linear = [], 0.0
        for name, part, slope in zip(("gate", "up"), parts, self._slopes(*pre), strict=False):
            size = np.abs(slope)
            errors.append(_known(part, arithmetic).bound)
            linear = linear + size * errors[-1]
            of_sum = part.through(lambda c, s=slope: s * c, lambda m, s=size: s * m, lambda d, s=slope: s * d)
            for component, change in of_sum.components.items():
                found.components[f"{component} of {name}" if self.gated else component] = change
            found.magnitude = found.magnitude + of_sum.magnitude
            found.shared += of_sum.shared
            found.steady = found.steady + of_sum.steady
            if arithmetic.composed:
                rounding = size * sqrt(part.roundings) * arithmetic.unit * part.size
                found.add_errors(Operand(value, np.abs(value), rounding))
        beyond = _farthest(self._value, pre, errors) - linear
        found.steady = found.steady + np.maximum(beyond, 0) + self._own(*pre, composed=arithmetic.composed)
        return found

    def gradients(self, cotangent: np.ndarray, sums: list[Expected], arithmetic: Arithmetic) -> list[Operand]:
        """The gradients of the segments' sums. They are kept in the results' dtype, and so are the sums."""
        kept = [arithmetic.kept(_known(part, arithmetic)) for part in self._parts(sums)]
        pre, bounds, spreads = (list(of) for of in zip(*kept, strict=True))
        found = []
        for place, slope in enumerate(self._slopes(*pre)):

            def gradient(*pre: np.ndarray, place: int = place) -> np.ndarray:
                return cotangent * self._slopes(*pre)[place]

            own = _farthest(gradient, pre, [_OWN * np.abs(p) for p in pre])
            own = own + np.abs(cotangent) * self._own_of_slopes(*pre, composed=arithmetic.composed)[place]
            bound = _farthest(gradient, pre, bounds)
            # Where the slope jumps within the bound, and not within the spread.
            spread = np.maximum(_farthest(gradient, pre, spreads), bound / CERTAIN)
            value, _, spread = arithmetic.kept(Known(cotangent * slope, bound + own, spread))
            # Errors of gate and up are in the gradients of both, so these are not independent.
            found.append(Operand(value, np.abs(value), sqrt(2) * spread, own))
        return [self._joined(found)] if self.packing else found

    def _value(self, pre: np.ndarray, up: np.ndarray | None = None) -> np.ndarray:
        return self._of(pre) if up is None else self._of(pre) * self._factor(up)

    def _slopes(self, pre: np.ndarray, up: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Of the result by each of what it is made of."""
        s, slope = _PARTS[self.name](self._cut(pre), self.alpha)
        of = (s + pre * slope) * (pre < self.limit)
        if up is None:
            return (of,)
        return of * self._factor(up), self._of(pre) * (np.abs(up) < self.limit)

    def _of(self, pre: np.ndarray) -> np.ndarray:
        cut = self._cut(pre)
        return cut * _PARTS[self.name](cut, self.alpha)[0]

    def _cut(self, pre: np.ndarray) -> np.ndarray:
        return np.minimum(pre, self.limit)

    def _factor(self, up: np.ndarray) -> np.ndarray:
        return np.clip(up, -self.limit, self.limit) + 1 if self.name == "clipped_swiglu" else up

    def _own(self, pre: np.ndarray, up: np.ndarray | None = None, composed: bool = False) -> np.ndarray:
        """The errors of the activation's own steps."""
        s, slope = self._sizes(pre, composed)
        cut = np.abs(self._cut(pre))
        own = _OWN * cut * (s + cut * slope)
        return own if up is None else own * np.abs(self._factor(up))

    def _own_of_slopes(
        self, pre: np.ndarray, up: np.ndarray | None = None, composed: bool = False
    ) -> tuple[np.ndarray, ...]:
        s, slope = self._sizes(pre, composed)
        own = _OWN * (s + np.abs(self._cut(pre)) * slope)
        return (own,) if up is None else (own * np.abs(self._factor(up)), self._own(pre, composed=composed))

    def _sizes(self, pre: np.ndarray, composed: bool) -> tuple[np.ndarray, np.ndarray]:
        s, slope = _PARTS[self.name](self._cut(pre), self.alpha)
        # MLX's own operations add 1 to an error function that is almost -1.
        return np.maximum(np.abs(s), 1.0 if composed else _SMALLEST), np.maximum(np.abs(slope), _SMALLEST)

    def _parts(self, sums: list[Expected]) -> list[Expected]:
        """What is expected of gate and up, or of the sum."""
        if self.packing is None:
            return sums
        (both,) = sums
        width = both.value.shape[-1]

        def part(columns: slice) -> Expected:
            def widened(d: np.ndarray) -> np.ndarray:
                wide = np.zeros((*d.shape[:-1], width))
                wide[..., columns] = d
                return wide

            return both.through(lambda c: c[..., columns], lambda m: m[..., columns], widened)

        return [part(columns) for columns in _COLUMNS[self.packing](width // 2)]

    def _joined(self, parts: list[Operand]) -> Operand:
        width = parts[0].value.shape[-1]

        def joined(*arrays: np.ndarray) -> np.ndarray:
            wide = np.zeros((*arrays[0].shape[:-1], 2 * width))
            for columns, array in zip(_COLUMNS[self.packing](width), arrays, strict=True):
                wide[..., columns] = array
            return wide

        return Operand(*(joined(*arrays) for arrays in zip(*parts, strict=True)))


def _known(part: Expected, arithmetic: Arithmetic) -> Known:
    spread = part.spread(arithmetic)
    bound = CERTAIN * spread + part.steady
    if not arithmetic.composed:
        return Known(part.value, bound, spread)
    rounding = arithmetic.unit * (part.size + bound)
    return Known(
        part.value, bound + part.roundings * rounding, np.hypot(spread, sqrt(part.roundings) * rounding)
    )


def _ends(values: list[np.ndarray], errors: list[np.ndarray]) -> list[list[np.ndarray]]:
    """All combinations of the ends of what the values may be."""
    signs = product((-1, 1), repeat=len(values))
    return [[v + t * e for v, e, t in zip(values, errors, of, strict=True)] for of in signs]


def _farthest(function: Callable, values: list[np.ndarray], errors: list[np.ndarray]) -> np.ndarray:
    """How far a function goes within the errors of its arguments."""
    at = function(*values)
    return np.max([np.abs(function(*end) - at) for end in _ends(values, errors)], 0)


def _sigmoid(z: np.ndarray, slope: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-z))
    return s, s * (1 - s) * slope


def _gelu(x: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    return np.vectorize(erfc, [float])(-x / sqrt(2)) / 2, np.exp(-(x**2) / 2) / sqrt(2 * pi)


def _gelu_approx(x: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    c, d = sqrt(8 / pi), 0.044715
    return _sigmoid(c * (x + d * x**3), c * (1 + 3 * d * x**2))


# s and its slope.
_PARTS = {
    "silu": lambda x, _: _sigmoid(x, 1.0),
    "gelu": _gelu,
    "gelu_approx": _gelu_approx,
    "relu": lambda x, _: ((x > 0) * 1.0, 0 * x),
    "relu2": lambda x, _: (np.maximum(x, 0), (x > 0) * 1.0),
    "clipped_swiglu": lambda x, alpha: _sigmoid(alpha * x, alpha),
}
