"""How far a result may be from float64, number by number and in the direction of each of its components."""

from __future__ import annotations

from math import inf, sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_fused.validate.formulas import Arithmetic, Expected

NOTICEABLE = 0.01  # the relative error that a check must notice, or else it says nothing
_CERTAIN = 8  # spreads, which errors pass with a chance below 3e-14
_FLOOR = 2.0**-126  # hardware may take smaller numbers for zero


class _DType(NamedTuple):
    """What rounding to a dtype does."""

    unit: float  # roundoff
    smallest_exponent: int
    largest: float

    def step(self, values: np.ndarray) -> np.ndarray:
        """The distance between neighbours."""
        exponents = np.where(values == 0, self.smallest_exponent, np.frexp(values)[1] - 1)
        return np.ldexp(2 * self.unit, np.maximum(exponents, self.smallest_exponent))

    def round(self, values: np.ndarray) -> np.ndarray:
        step = self.step(values)
        return np.rint(values / step) * step

    def beyond_rounding(self, actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """How far at least the number was off that was rounded to ``actual``."""
        # A power of two has a nearer neighbour below; the mean is on the side that counts.
        return np.maximum(np.abs(actual - exact) - self.step((actual + exact) / 2) / 2, 0)


_DTYPES = {
    mx.float16: _DType(2.0**-11, -14, 65504.0),
    mx.bfloat16: _DType(2.0**-8, -126, 2.0**128 - 2.0**120),
    mx.float32: _DType(2.0**-24, -126, 2.0**128 - 2.0**104),
}


def unit_roundoff(dtype: mx.Dtype) -> float:
    return _DTYPES[dtype].unit


class Component(NamedTuple):
    """The error of a result in the direction of one of its components.

    Attributes:
        share: Of what rounding may come to; above 1 it is no rounding error.
        noticeable: Whether this component 1 % off would surely be found.
    """

    share: float
    noticeable: bool


class Comparison(NamedTuple):
    """The largest error of a number as a share of its bound, beyond rounding it; and each component's."""

    share: float
    components: dict[str, Component]


def compare(
    actual: np.ndarray,
    dtype: mx.Dtype,
    expected: Expected,
    arithmetic: Arithmetic,
    rows: np.ndarray | slice = slice(None),
) -> Comparison:
    """Hold ``actual`` against what it must be.

    Args:
        actual (numpy.ndarray): The result, in float64.
        dtype (mlx.core.Dtype): What it was rounded to.
        expected (Expected): What it must be.
        arithmetic (Arithmetic): How it was computed.
        rows (numpy.ndarray, optional): The rows whose errors are independent. Default: all.
    """
    kind = _DTYPES[dtype]
    components = list(expected.components.values())
    value, size = sum(components), sum(map(np.abs, components))
    spread = sqrt(expected.terms) * arithmetic.sum_unit * expected.magnitude
    for shared in expected.shared:
        spread = np.hypot(spread, shared.effect)
    bound = _CERTAIN * spread + _FLOOR
    largest_part, roundings, swallowed = np.abs(value), 1, bound
    if arithmetic.composed:
        largest_part, roundings = size, 2 * len(components)
        bound = bound + (roundings - 1) * kind.unit * (size + bound)
        swallowed = np.maximum(swallowed, kind.unit * size)

    finite = np.isfinite(actual) & np.isfinite(value)
    overflown = np.isinf(actual) & (actual * value > 0)
    overflown &= largest_part + bound + kind.step(largest_part) / 2 >= kind.largest
    # A NaN or an infinity among the operands may become either in the result.
    explained = finite | overflown | ~(np.isfinite(actual) | np.isfinite(value))
    if not explained.all():
        return Comparison(inf, {})
    actual, value, spread, bound = (np.where(finite, a, 0.0) for a in (actual, value, spread, bound))
    share = np.max(kind.beyond_rounding(actual, value) / np.maximum(bound, _FLOOR), initial=0.0)

    # How the exact value is rounded is no chance. A number rounded otherwise lies within its bound of where
    # that changes, and few do in 16 bits.
    rounded = kind.round(value)
    reach = kind.round(value + bound) - kind.round(value - bound)
    noise = np.hypot(spread, 2 * sqrt(roundings) * kind.unit * np.where(finite, largest_part, 0.0))
    noise = np.minimum(reach, noise)
    found = {}
    for name, component in expected.components.items():
        kept = np.zeros_like(component)
        kept[rows] = np.where(finite, component, 0.0)[rows]
        if not kept.any():
            continue  # an adapter whose B is zero
        # A component that sums swallow decides how exact ties of the others are rounded: no chance either.
        tied = np.abs(kept) <= swallowed
        variance = np.sum((kept * noise) ** 2, where=~tied)
        # Rows with a NaN or an infinity among their operands do not count.
        variance += sum(np.nansum((s.adjoint(kept) * s.spread) ** 2) for s in expected.shared)
        limit = _CERTAIN * sqrt(variance) + np.sum(np.abs(kept) * (np.where(tied, reach, 0) + _FLOOR))

        error = NOTICEABLE * kept
        # Even if rounding errors work against it
        surely = value + np.sign(error) * np.maximum(np.abs(error) - bound, 0)
        noticeable = np.any(kind.beyond_rounding(kind.round(surely), value) > bound)
        noticeable |= np.sum((kind.round(value + error) - rounded) * kept) > 2 * limit
        share_of_limit = abs(np.sum((actual - rounded) * kept)) / limit
        found[name] = Component(float(share_of_limit), bool(noticeable))
    return Comparison(float(share), found)
