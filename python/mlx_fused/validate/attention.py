"""Attention and its gradients in NumPy float64, with the rounding errors to expect.

The operation sums in float32 and rounds its results once, so bounds of the worst case are narrow enough: all
errors here are steady ones (see ``formulas``).
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_fused.validate.formulas import CERTAIN, FLOAT32, WHOLE, Expected

_STEP = 1e-3  # of the derivative by the scale
_EXPONENTIAL = 8  # units that a power may be off, with the rounding of its argument's last operations


class Operands(NamedTuple):
    """Those of a call, with the heads of keys and values repeated for the queries'."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    mask: np.ndarray  # what is added to the scores; minus infinity hides a key
    sinks: np.ndarray  # [1, heads, 1, 1], minus infinity where there are none
    group: int


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
    heads = np.full((1, q.shape[1], 1, 1), -np.inf) if sinks is None else exact(sinks).reshape(1, -1, 1, 1)
    k, v = (np.repeat(a, group, 1) for a in (k, v))
    return Operands(q, k, v, float(np.float32(arguments["scale"])), added, heads, group)


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
    return {name: _expected(*(each[name] for each in found)) for name in found[0]}


def _scales(of: Operands) -> tuple[float, float, float]:
    return of.scale, of.scale * (1 + _STEP), of.scale * (1 - _STEP)


class _Bounded(NamedTuple):
    """Numbers, and how far they may be off before they are rounded."""

    value: np.ndarray
    bound: np.ndarray


def _expected(here: _Bounded, above: _Bounded, below: _Bounded) -> Expected:
    """With a component for what is wrong in all scores alike: the derivative by their scale."""
    rows = (-1, here.value.shape[-1])
    value, bound = here.value.reshape(rows), here.bound.reshape(rows)
    by_scale = (above.value - below.value).reshape(rows) / (2 * _STEP)
    components = {WHOLE: value}
    if len(value) > 1:  # the sinks' are too few numbers to tell
        components["scores"] = by_scale
    return Expected(0, components, np.zeros_like(value), steady=bound, activated=value)


class _Softmax:
    """The softmax of a call's scores."""

    def __init__(self, of: Operands, scale: float):
        self.of, self.scale = of, scale
        keys, dim = of.k.shape[2:]
        dots, sizes = of.q @ of.k.swapaxes(2, 3), np.abs(of.q) @ np.abs(of.k).swapaxes(2, 3)
        scores = scale * dots + of.mask
        top = np.maximum(scores.max(-1, initial=-np.inf, keepdims=True), of.sinks)
        shown = np.where(np.isfinite(top), top, 0.0)
        powers, of_sink = np.exp(scores - shown), np.exp(of.sinks - shown)
        total = powers.sum(-1, keepdims=True) + of_sink
        self.p, self.of_sink = powers / total, of_sink / total
        # Of a power, relative to it: what its score may be off, and the exponential.
        of_scores = (lost(dim) + 2 * FLOAT32) * scale * sizes + FLOAT32 * np.abs(np.where(powers, scores, 0))
        off = np.where(powers, of_scores + FLOAT32 * (np.abs(shown) + _EXPONENTIAL), 0).max(-1, keepdims=True)
        self.relative = 2 * off + lost(keys)

    def output(self) -> _Bounded:
        keys = self.of.k.shape[2]
        return _Bounded(self.p @ self.of.v, (self.relative + lost(keys)) * (self.p @ np.abs(self.of.v)))

    def gradients(self, g: np.ndarray, rounding: np.ndarray) -> dict[str, _Bounded]:
        of, p = self.of, self.p
        queries, (keys, v_dim) = of.q.shape[2], of.v.shape[2:]
        parts = g * (self.output().value + rounding)
        delta, of_delta = parts.sum(-1, keepdims=True), lost(v_dim) * np.abs(parts).sum(-1, keepdims=True)
        slope = g @ of.v.swapaxes(2, 3) - delta
        of_slope = of_delta + lost(v_dim) * (np.abs(g) @ np.abs(of.v).swapaxes(2, 3))
        ds = p * slope
        of_ds = p * of_slope + (self.relative + 2 * FLOAT32) * np.abs(ds)
        count = of.group * queries

        def by_key(weights: np.ndarray, off: np.ndarray, factors: np.ndarray) -> _Bounded:
            value = weights.swapaxes(2, 3) @ factors
            bound = (off + lost(count) * np.abs(weights)).swapaxes(2, 3) @ np.abs(factors)
            shape = (value.shape[0], -1, of.group, *value.shape[2:])
            return _Bounded(value.reshape(shape).sum(2), bound.reshape(shape).sum(2))

        found = {
            "q": _Bounded(
                self.scale * ds @ of.k, self.scale * (of_ds + lost(keys) * np.abs(ds)) @ np.abs(of.k)
            ),
            "k": by_key(ds, of_ds, self.scale * of.q),
            "v": by_key(p, self.relative * p, g),
        }
        if np.isfinite(of.sinks).any():
            terms = self.of_sink * delta
            off = self.of_sink * of_delta + (self.relative + lost(g.shape[0] * queries)) * np.abs(terms)
            found["sinks"] = _Bounded(-terms.sum((0, 2, 3)), off.sum((0, 2, 3)))
        return found


def lost(terms: int) -> float:
    """What a sum of so many terms loses at most, relative to the sum of their sizes."""
    return min(terms, CERTAIN * sqrt(terms)) * FLOAT32
