"""Bounds on how far a result may be from float64, for each number and in the direction of each component."""

from __future__ import annotations

from math import inf, sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_fused.validate.formulas import CERTAIN, Arithmetic, DType, Expected

NOTICEABLE = 0.01  # a check that would not notice a relative error of this size is inconclusive
_FLOOR = 2.0**-126  # hardware may treat smaller numbers as zero


DTYPES = {
    mx.float16: DType(2.0**-11, -14, 65504.0),
    mx.bfloat16: DType(2.0**-8, -126, 2.0**128 - 2.0**120),
    mx.float32: DType(2.0**-24, -126, 2.0**128 - 2.0**104),
}


class Component(NamedTuple):
    """The error of a result in the direction of one of its components.

    Attributes:
        share: The error, as a share of what rounding explains; above 1 it is not a rounding error.
        noticeable: Whether the check would surely find this component to be off by 1 %.
    """

    share: float
    noticeable: bool


class Comparison(NamedTuple):
    """The largest error of a number before rounding, as a share of its bound; and the components' errors."""

    share: float
    components: dict[str, Component]


def compare(
    actual: np.ndarray,
    dtype: mx.Dtype,
    expected: Expected,
    arithmetic: Arithmetic,
    rows: np.ndarray | slice = slice(None),
) -> Comparison:
    """Compare ``actual`` with what it must be.

    Args:
        actual (numpy.ndarray): The result, converted to float64.
        dtype (mlx.core.Dtype): The dtype it was rounded to.
        expected (Expected): What it must be.
        arithmetic (Arithmetic): How it was computed.
        rows (numpy.ndarray, optional): The rows whose errors are independent. Default: all.
    """
    kind = DTYPES[dtype]
    value, size, steady = expected.value, expected.size, expected.steady
    spread = expected.spread(arithmetic)
    bound = CERTAIN * spread + steady + _FLOOR
    # Shared errors are random, so what is smaller than they are does not decide ties.
    swallowed = CERTAIN * expected.own_spread(arithmetic) + steady + _FLOOR
    largest_part, roundings = np.abs(value), 1
    if arithmetic.composed:
        largest_part, roundings = size, expected.roundings
        bound = bound + (roundings - 1) * kind.unit * (size + bound)
        swallowed = np.maximum(swallowed, kind.unit * size)

    finite = np.isfinite(actual) & np.isfinite(value)
    overflown = np.isinf(actual) & (actual * value > 0)
    overflown &= largest_part + bound + kind.step(largest_part) / 2 >= kind.largest
    # Where the exact value is NaN or infinite, the result may be either.
    explained = finite | overflown | ~(np.isfinite(actual) | np.isfinite(value))
    if not explained.all():
        return Comparison(inf, {})
    actual, value, spread, bound = (np.where(finite, a, 0.0) for a in (actual, value, spread, bound))
    share = np.max(kind.beyond_rounding(actual, value) / np.maximum(bound, _FLOOR), initial=0.0)

    # The rounding of the exact value is deterministic. Only a number within its bound of a rounding boundary
    # can be rounded differently, and in 16 bits few are.
    rounded = kind.round(value)
    reach = kind.round(value + bound) - kind.round(value - bound)
    noise = np.hypot(spread, 2 * sqrt(roundings) * kind.unit * np.where(finite, largest_part, 0.0))
    noise = np.minimum(reach, noise)
    found = {}
    for name, component in expected.components.items():
        kept = np.zeros_like(component)
        kept[rows] = np.where(finite, component, 0.0)[rows]
        if not kept.any():
            continue  # for example an adapter whose B is zero
        # A component too small to survive the sum decides how exact ties of the others are rounded, so there
        # rounding is not random either.
        tied = np.abs(kept) <= swallowed
        variance = np.sum((kept * noise) ** 2, where=~tied)
        # nansum skips rows that have a NaN or an infinity among their operands.
        variance += sum(np.nansum((s.adjoint(kept) * s.spread) ** 2) for s in expected.shared)
        certain = np.where(tied, reach, 0) + np.where(finite, steady, 0) + _FLOOR
        limit = CERTAIN * sqrt(variance) + np.sum(np.abs(kept) * certain)

        error = NOTICEABLE * kept
        # The error that remains even if rounding works against it.
        surely = value + np.sign(error) * np.maximum(np.abs(error) - bound, 0)
        noticeable = np.any(kind.beyond_rounding(kind.round(surely), value) > bound)
        noticeable |= np.sum((kind.round(value + error) - rounded) * kept) > 2 * limit
        share_of_limit = abs(np.sum((actual - rounded) * kept)) / limit
        found[name] = Component(float(share_of_limit), bool(noticeable))
    return Comparison(float(share), found)
