"""A call of attention, its formula in float64, and the error that it may have."""

from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

import oracle
from mlx_fused import fused_attention
from operands import normal

MASKS = ["none", "causal", "window", "boolean", "added", "padding", "per head", "holes", "column"]
UNIT = oracle.UNIT_ROUNDOFF[mx.float32]
OWN_ROUNDINGS = 16  # of an exponential, a logarithm, a quotient and some products
LARGEST_POWER, SMALLEST = 88, 2.0**-125  # of e in float32; smaller ones may be 0


@dataclass(frozen=True)
class Attention:
    q: mx.array
    k: mx.array
    v: mx.array
    scale: float
    mask: mx.array | str | None = None
    window: int | None = None
    sinks: mx.array | None = None

    @property
    def primals(self):
        """The arrays that have a gradient of ours."""
        return [self.q, self.k, self.v] + ([] if self.sinks is None else [self.sinks])

    def with_primals(self, primals):
        return replace(self, **dict(zip(("q", "k", "v", "sinks"), primals, strict=False)))

    def of(self, q, k, v, sinks=None):
        return fused_attention(q, k, v, scale=self.scale, mask=self.mask, window=self.window, sinks=sinks)

    def __call__(self):
        return self.of(*self.primals)

    def gradients(self, cotangent):
        return mx.vjp(lambda *a: [self.of(*a)], self.primals, [cotangent])[1]

    def of_mlx(self, q, k, v, sinks=None):
        mask = self.mask
        if self.window:
            mask = mx.array(self._seen_by_place)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask, sinks=sinks)

    def formula(self, cotangent):
        """The result and, of a cotangent, the gradients of the primals."""
        return self._with_errors(cotangent, mx.float64)[0]

    def check(self, out, gradients, cotangent):
        expected, errors = self._with_errors(cotangent if gradients else None, out.dtype)
        for a, e, error in zip([out, *(gradients or [])], expected, errors, strict=True):
            oracle.assert_rounded(a, e, error)

    @property
    def _seen_by_place(self):
        """A key by its place from the last one, and so a query."""
        keys, queries = self.k.shape[2], self.q.shape[2]
        behind = np.arange(keys - queries, keys)[:, None] - np.arange(keys)
        return (behind >= 0) & (behind < (self.window or keys + queries))

    @cached_property
    def _operands(self):
        """q, k and v with as many heads, and what is added to the scores; which queries see nothing."""
        q, k, v = oracle.exact([self.q, self.k, self.v])
        k, v = (np.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
        scores = (*q.shape[:3], k.shape[2])
        added, unseen = np.zeros(scores), np.zeros((*scores[:3], 1), bool)
        if isinstance(self.mask, str):
            seen = self._seen_by_place
        elif self.mask is None or self.mask.dtype != mx.bool_:
            seen = None
            added = added if self.mask is None else added + oracle.exact(self.mask)
        else:
            seen = np.array(self.mask)
        if seen is not None:
            added = np.where(seen, added, -np.inf)
            unseen |= ~np.broadcast_to(seen, scores).any(-1, keepdims=True)
        return q, k, v, added, unseen

    def _with_errors(self, cotangent, dtype):
        """With the errors of float32, as in ``oracle``, from step to step. The result is rounded first."""
        q, k, v, added, unseen = self._operands
        dim, v_dim, keys = q.shape[-1], v.shape[-1], k.shape[2]
        scores, sizes = (self.scale * f(q) @ f(k).swapaxes(2, 3) for f in (lambda a: a, np.abs))
        sizes = np.abs(sizes)
        is_added = np.isfinite(added)
        of_scores = lost(dim) * sizes + 2 * UNIT * (sizes + np.abs(np.where(is_added, added, 0)))
        of_scores = np.where(is_added, of_scores, 0).max(-1, initial=0, keepdims=True)
        scores = np.where(unseen, 0.0 if self.sinks is None else -np.inf, scores + added)
        sinks = np.full((q.shape[1], 1, 1), -np.inf)
        if self.sinks is not None:
            sinks = oracle.exact(self.sinks)[:, None, None]
        top = np.maximum(scores.max(-1, initial=-np.inf, keepdims=True), sinks)
        top = np.where(np.isinf(top), 0, top)
        powers, of_sink = np.exp(scores - top), np.exp(sinks - top)
        total = powers.sum(-1, keepdims=True) + of_sink
        total = np.where(total == 0, 1, total)
        p, of_sink = powers / total, of_sink / total
        # Relative, of every p: the scores', and that of the powers' arguments and their sum.
        farthest = np.where(np.isfinite(scores), top - scores, 0).max(-1, initial=0, keepdims=True)
        relative = 2 * of_scores + lost(keys)
        relative += UNIT * (2 * np.minimum(farthest, LARGEST_POWER) + OWN_ROUNDINGS)

        of_p = relative * p + SMALLEST
        # What p and ds lose before they are multiplied: a CPU may multiply pairs of bfloat16.
        rounded = oracle.UNIT_ROUNDOFF[dtype] if dtype == mx.bfloat16 else 0
        out, error = p @ v, (of_p + (lost(keys) + rounded) * p) @ np.abs(v)
        if cotangent is None:
            return [out], [error]
        g = oracle.exact(cotangent)
        of_out = error + oracle.rounding_error(out, error, dtype)
        delta, of_delta = (g * out).sum(-1, keepdims=True), np.abs(g * out).sum(-1, keepdims=True)
        of_delta = lost(v_dim) * of_delta + (np.abs(g) * of_out).sum(-1, keepdims=True)
        slope = g @ v.swapaxes(2, 3) - delta
        of_slope = lost(v_dim) * (np.abs(g) @ np.abs(v).swapaxes(2, 3)) + of_delta
        ds = np.where(unseen, 0, p * slope)
        of_ds = np.where(unseen, 0, (p + of_p) * of_slope + 2 * of_p * np.abs(slope))
        of_ds = of_ds + (2 * UNIT + rounded) * (np.abs(ds) + of_ds)

        def summed(weights, of_weights, factors, terms):
            factors_size = np.abs(factors)
            error = of_weights @ factors_size + lost(terms) * (np.abs(weights) @ factors_size)
            return weights @ factors, error

        def by_key(weights, of_weights, factors):
            """Summed over queries, and over the heads that read one key head."""
            group = q.shape[1] // self.k.shape[1]
            terms = group * q.shape[2]
            sums = summed(weights.swapaxes(2, 3), of_weights.swapaxes(2, 3), factors, terms)
            shape = (*self.k.shape[:2], group, *sums[0].shape[2:])
            return [s.reshape(shape).sum(2) for s in sums]

        results = [
            (out, error),
            summed(ds, of_ds, self.scale * k, keys),
            by_key(ds, of_ds, self.scale * q),
            by_key(p, of_p + rounded * p, g),
        ]
        if self.sinks is not None:
            count = q.shape[0] * q.shape[2]
            of_sinks = (relative + lost(count)) * of_sink + SMALLEST
            of_sinks = (of_sink + of_sinks) * of_delta + of_sinks * np.abs(delta)
            results.append(((-of_sink * delta).sum((0, 2, 3)), of_sinks.sum((0, 2, 3))))
        values, errors = zip(*results, strict=True)
        return list(values), list(errors)


def lost(terms):
    """What a sum of so many terms loses, relative to the sum of their sizes."""
    return min(terms, 8 * np.sqrt(terms)) * UNIT


def make(rng, batch, heads, lengths, mask, dtype, has_sinks=False):
    """A call with random operands."""
    num_heads, num_kv_heads, dim, v_dim = heads
    queries, keys = lengths
    scores = (batch, num_heads, queries, keys)
    masks = {
        "none": lambda: None,
        "causal": lambda: "causal",
        "window": lambda: "causal",
        "boolean": lambda: mx.array(rng.random((queries, keys)) < 0.6),
        "added": lambda: mx.where(
            mx.array(rng.random(scores) < 0.6), normal(rng, scores, dtype), mx.array(-mx.inf, dtype)
        ),
        "padding": lambda: mx.array(rng.random((batch, 1, 1, 1)) * keys >= np.arange(keys)),
        "per head": lambda: normal(rng, (num_heads, 1, keys), dtype),
        "holes": lambda: mx.array(rng.random((batch, num_heads, queries, 1)) < 0.6),
        "column": lambda: mx.array(rng.random((keys, queries)) < 0.6).T,
    }
    return Attention(
        normal(rng, (batch, num_heads, queries, dim), dtype),
        normal(rng, (batch, num_kv_heads, keys, dim), dtype),
        normal(rng, (batch, num_kv_heads, keys, v_dim), dtype),
        scale=max(dim, 1) ** -0.5,
        mask=masks[mask](),
        window=int(rng.integers(1, 2 * keys)) if mask == "window" else None,
        sinks=normal(rng, (num_heads,), dtype) if has_sinks else None,
    )


def check(rng, call):
    out = call()
    cotangent = normal(rng, out.shape, out.dtype)
    call.check(out, call.gradients(cotangent), cotangent)
