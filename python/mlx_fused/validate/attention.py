"""Attention and its gradients in NumPy float64, with the rounding errors to expect.

The operation sums in float32 and rounds its results once, so bounds of the worst case are narrow enough: most
errors here are steady ones (see ``formulas``). But a CPU that multiplies pairs of bfloat16 rounds what it
multiplies with keys, values and their like.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_fused.validate.bounds import DTYPES
from mlx_fused.validate.formulas import CERTAIN, FLOAT32, WHOLE, Expected, Shared

_FEW = 8  # queries, whose result is not computed in pairs unless for a gradient
_STEP = 1e-3  # of the derivative by the scale
_LARGEST_POWER = 104  # e to minus that is 0; and so are units that a power may be off


class Operands(NamedTuple):
    """Those of a call, with the heads of keys and values repeated for the queries'."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    mask: np.ndarray  # what is added to the scores; minus infinity hides a key
    unseeing: np.ndarray  # which queries see no key by a boolean mask or by place: all scores are the same
    sinks: np.ndarray  # [1, heads, 1, 1], minus infinity where there are none
    group: int
    factor_unit: float  # the unit roundoff of what is multiplied with keys, values, ..., if it is rounded


def read(arguments: dict) -> Operands:
    """The operands of a call, from the operation's keyword arguments."""
    q, k, v = (exact(arguments[name]) for name in ("q", "k", "v"))
    group, mask, sinks = q.shape[1] // k.shape[1], arguments["mask"], arguments["sinks"]
    queries, keys = q.shape[2], k.shape[2]
    if mask is None:
        added = np.zeros((1, 1))
    elif isinstance(mask, str):
        added = np.where(np.tri(queries, keys, keys - queries), 0.0, -np.inf)
    elif mask.dtype == mx.bool_:
        added = np.where(np.array(mask), 0.0, -np.inf)
    else:
        added = exact(mask)
    by_bytes = isinstance(mask, str) or (mask is not None and mask.dtype == mx.bool_)
    unseeing = by_bytes & np.isinf(added).all(-1, keepdims=True)
    heads = np.full((1, q.shape[1], 1, 1), -np.inf) if sinks is None else exact(sinks).reshape(1, -1, 1, 1)
    k, v = (np.repeat(a, group, 1) for a in (k, v))
    dtype = mx.result_type(*(arguments[name] for name in ("q", "k", "v")))
    unit = DTYPES[dtype].unit if dtype == mx.bfloat16 else 0.0
    return Operands(q, k, v, float(np.float32(arguments["scale"])), added, unseeing, heads, group, unit)


def exact(array: mx.array) -> np.ndarray:
    """``array`` in float64."""
    return np.array(array.astype(mx.float64, stream=mx.cpu))


def output(of: Operands) -> Expected:
    """The result."""
    return _expected(*([_Softmax(of, s).output() for s in _scales(of)]))


def gradients(of: Operands, cotangent: np.ndarray, result: np.ndarray) -> dict[str, Expected]:
    """Those of q, k, v and the sinks, by name, from the result as it was rounded: it is what is kept."""
    rounding = result - _Softmax(of, of.scale).output().value
    found = [_Softmax(of, s).gradients(cotangent, rounding) for s in _scales(of)]
    # The others' depend on scores by little.
    return {name: _expected(*(each[name] for each in found), name in ("q", "k")) for name in found[0]}


def _scales(of: Operands) -> tuple[float, float, float]:
    return of.scale, of.scale * (1 + _STEP), of.scale * (1 - _STEP)


class _Sum(NamedTuple):
    """Sums of products."""

    value: np.ndarray
    bound: np.ndarray  # how far they may be off, but for what rounding one factor does
    rounded: Shared


def _expected(here: _Sum, above: _Sum, below: _Sum, tells_scores: bool = True) -> Expected:
    """With a component for what is wrong in all scores alike: the derivative by their scale."""
    rows = (-1, here.value.shape[-1])
    value, bound = here.value.reshape(rows), here.bound.reshape(rows)
    by_scale = (above.value - below.value).reshape(rows) / (2 * _STEP)
    components = {WHOLE: value}
    if tells_scores:
        components["scores"] = by_scale
    spread, adjoint, effect = here.rounded
    shared = Shared(spread, lambda d: adjoint(d.reshape(here.value.shape)), effect.reshape(rows))
    return Expected(0, components, np.zeros_like(value), [shared], bound, activated=value)


class _Softmax:
    """The softmax of a call's scores."""

    def __init__(self, of: Operands, scale: float):
        self.of, self.scale = of, scale
        keys, dim = of.k.shape[2:]
        dots, sizes = of.q @ of.k.swapaxes(2, 3), np.abs(of.q) @ np.abs(of.k).swapaxes(2, 3)
        # With sinks a query that sees no key sees them alone, else all keys alike.
        alike = -np.inf if np.isfinite(of.sinks).any() else 0.0
        scores = np.where(of.unseeing, alike, scale * dots + of.mask)
        top = np.maximum(scores.max(-1, initial=-np.inf, keepdims=True), of.sinks)
        shown = np.where(np.isfinite(top), top, 0.0)
        powers, of_sink = np.exp(scores - shown), np.exp(of.sinks - shown)
        total = powers.sum(-1, keepdims=True) + of_sink
        total = np.where(total == 0, 1, total)  # of scores of minus infinity alone, whose result is 0
        self.p, self.of_sink = powers / total, of_sink / total
        # Of a power, relative to it: what its score may be off, and the exponential.
        sizes = abs(scale) * sizes
        of_scores = (lost(dim) + 2 * FLOAT32) * sizes
        # Adding a mask loses no more than what is added to it.
        of_scores = of_scores + np.minimum(FLOAT32 * np.abs(np.where(powers, scores, 0)), sizes)
        off = np.where(powers, of_scores + FLOAT32 * _LARGEST_POWER, 0).max(-1, initial=0, keepdims=True)
        self.relative = 2 * off + lost(keys)

    def output(self) -> _Sum:
        unit = self.of.factor_unit if self.of.q.shape[2] > _FEW else 0.0
        return self._by_query(self.p, self.relative * self.p, self.of.v, unit)

    def _by_query(self, weights: np.ndarray, off: np.ndarray, factors: np.ndarray, unit: float) -> _Sum:
        """The products of weights, which may be off, with a row of each key."""
        bound = (off + lost(factors.shape[2]) * np.abs(weights)) @ np.abs(factors)
        spread = unit * np.abs(weights)
        rounded = Shared(spread, lambda d: d @ factors.swapaxes(2, 3), np.sqrt(spread**2 @ factors**2))
        return _Sum(weights @ factors, bound, rounded)

    def _by_key(self, weights: np.ndarray, off: np.ndarray, factors: np.ndarray) -> _Sum:
        """The same with a row of each query, summed over the heads that share a key."""

        def added(values: np.ndarray) -> np.ndarray:
            return values.reshape(values.shape[0], -1, self.of.group, *values.shape[2:]).sum(2)

        def adjoint(d: np.ndarray) -> np.ndarray:
            return factors @ np.repeat(d, self.of.group, 1).swapaxes(2, 3)

        turned, count = weights.swapaxes(2, 3), self.of.group * factors.shape[2]
        bound = (off.swapaxes(2, 3) + lost(count) * np.abs(turned)) @ np.abs(factors)
        spread = self.of.factor_unit * np.abs(weights)
        effect = np.sqrt(added(spread.swapaxes(2, 3) ** 2 @ factors**2))
        return _Sum(added(turned @ factors), added(bound), Shared(spread, adjoint, effect))

    def gradients(self, g: np.ndarray, rounding: np.ndarray) -> dict[str, _Sum]:
        of, p = self.of, self.p
        v_dim = of.v.shape[3]
        parts = g * (self.output().value + rounding)
        delta, of_delta = parts.sum(-1, keepdims=True), lost(v_dim) * np.abs(parts).sum(-1, keepdims=True)
        slope = g @ of.v.swapaxes(2, 3) - delta
        of_slope = of_delta + lost(v_dim) * (np.abs(g) @ np.abs(of.v).swapaxes(2, 3))
        ds = np.where(of.unseeing, 0, p * slope)
        of_ds = np.where(of.unseeing, 0, p * of_slope) + (self.relative + 2 * FLOAT32) * np.abs(ds)
        found = {
            "q": self._by_query(ds, of_ds, self.scale * of.k, of.factor_unit),
            "k": self._by_key(ds, of_ds, self.scale * of.q),
            "v": self._by_key(p, self.relative * p, g),
        }
        if np.isfinite(of.sinks).any():
            terms, count = self.of_sink * delta, g.shape[0] * g.shape[2]
            off = self.of_sink * of_delta + (self.relative + lost(count)) * np.abs(terms)
            value, none = -terms.sum((0, 2, 3)), np.zeros(of.sinks.shape[1])
            found["sinks"] = _Sum(value, off.sum((0, 2, 3)), Shared(none, lambda d: 0 * d, none))
        return found


def lost(terms: int) -> float:
    """What a sum of so many terms loses at most, relative to the sum of their sizes."""
    return min(terms, CERTAIN * sqrt(terms)) * FLOAT32
