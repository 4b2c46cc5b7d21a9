"""The operations in NumPy float64, written from their formulas, and the error a kernel may make."""

from math import erfc, pi, sqrt

import mlx.core as mx
import numpy as np

import quantized

UNIT_ROUNDOFF = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24, mx.float64: 2.0**-53}
SMALLEST_NORMAL = {
    mx.float16: 2.0**-14,
    mx.bfloat16: 2.0**-126,
    mx.float32: 2.0**-126,
    mx.float64: 2.0**-1022,
}


def projection(x, weights, biases, lora_a, lora_b, scale):
    """y = x W^T + b + scale (x A) B for each segment; a bias, or an A and its B, may be None.

    A weight is a stack of the terms that it is the sum of, for a kernel may sum them apart.
    """
    segments = []
    for w, b, a, lb, s in zip(weights, biases, lora_a, lora_b, scale, strict=True):
        y = x @ w.sum(0).T + (0 if b is None else b)
        segments.append(y if a is None else y + s * ((x @ a) @ lb))
    return segments


def projection_bwd(grads, x, weights, lora_a, lora_b, scale):
    """The gradients of x, and of each segment's weight, bias, A and B."""
    count = x.shape[0] * x.shape[1]
    rows = x.reshape(count, x.shape[-1])
    d_x, others = 0, []
    for g, w, a, b, s in zip(grads, weights, lora_a, lora_b, scale, strict=True):
        d_x = d_x + g @ w.sum(0)
        flat = g.reshape(count, g.shape[-1])
        d_a = d_b = None
        if a is not None:
            d_x = d_x + s * ((g @ b.T) @ a.T)
            d_a, d_b = s * (rows.T @ (flat @ b.T)), s * ((rows @ a).T @ flat)
        others.append((flat.T @ rows, flat.sum(0), d_a, d_b))
    return d_x, *(list(part) for part in zip(*others, strict=True))


def sigmoid_parts(z, dz, ddz):
    """sigmoid(z) and its first two derivatives by x, where dz and ddz are those of z."""
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-z))
    slope = s * (1 - s)
    return s, slope * dz, slope * ((1 - 2 * s) * dz**2 + ddz)


def gelu_parts(x):
    density = np.exp(-(x**2) / 2) / sqrt(2 * pi)
    return np.vectorize(erfc, [float])(-x / sqrt(2)) / 2, density, -x * density


def gelu_approx_parts(x):
    c = sqrt(8 / pi)
    a = 0.044715
    return sigmoid_parts(c * (x + a * x**3), c * (1 + 3 * a * x**2), c * 6 * a * x)


# An activation is x s(x): s and its first two derivatives.
PARTS = {
    "silu": lambda x: sigmoid_parts(x, 1.0, 0.0),
    "gelu": gelu_parts,
    "gelu_approx": gelu_approx_parts,
    "relu": lambda x: (np.where(x > 0, 1.0, 0 * x), 0 * x, 0 * x),
    "relu2": lambda x: (np.maximum(x, 0), np.where(x > 0, 1.0, 0.0), 0 * x),
}
# Activations are computed in float32: MLX's float64 functions are no better. Of a formula's own roundings,
# an exponential, a quotient and some products, there are some.
FLOAT32, OWN_ROUNDINGS = UNIT_ROUNDOFF[mx.float32], 8


class Activation:
    """f(y), or gated f(gate) * up, in float64, and what errors in y, gate and up make of it."""

    def __init__(self, name, gated=False, alpha=1.702, limit=7.0):
        self.name, self.gated, self.clipped = name, gated, name == "clipped_swiglu"
        self.alpha, self.limit = (np.float64(np.float32(v)) for v in (alpha, limit))

    def __call__(self, pre):
        y = self.f(pre[0])
        return y * self._up(pre[1]) if self.gated else y

    def gradients(self, cotangent, pre):
        """By every one of ``pre``."""
        if not self.gated:
            return [cotangent * self.slope(pre[0])]
        d_gate = cotangent * self._up(pre[1]) * self.slope(pre[0])
        return [d_gate, cotangent * self.f(pre[0]) * self._passes(pre[1])]

    def errors(self, pre, errors):
        """Of the result in float32, where ``pre`` has these errors."""
        of_f = _error(self.f, pre[0], errors[0]) + FLOAT32 * self._roundings(pre[0])
        if not self.gated:
            return of_f
        f, up = np.abs(self.f(pre[0])), np.abs(self._up(pre[1]))
        of_up = errors[1] + FLOAT32 * up
        return of_f * (up + of_up) + f * of_up + FLOAT32 * f * up

    def gradient_errors(self, cotangent, pre, errors):
        cotangent = np.abs(cotangent)
        of_slope = _error(self.slope, pre[0], errors[0]) + FLOAT32 * self._slope_roundings(pre[0])
        slope = np.abs(self.slope(pre[0]))
        if not self.gated:
            return [cotangent * (of_slope + FLOAT32 * slope)]
        f, up = np.abs(self.f(pre[0])), np.abs(self._up(pre[1]))
        of_f = _error(self.f, pre[0], errors[0]) + FLOAT32 * self._roundings(pre[0])
        of_up = errors[1] + FLOAT32 * up
        of_passing = _error(self._passes, pre[1], errors[1])
        return [
            cotangent * (of_slope * (up + of_up) + slope * of_up + 2 * FLOAT32 * slope * up),
            cotangent * (of_f + (FLOAT32 + of_passing) * (f + of_f)),
        ]

    def rounded(self, pre, dtype):
        """The least and the largest where the activation, what it is multiplied with and both are rounded."""
        error = FLOAT32 * self._roundings(pre[0])
        least, largest = (rounded(self.f(pre[0]) + e, dtype) for e in (-error, error))
        if not self.gated:
            return least, largest
        ends = [rounded(end * rounded(self._up(pre[1]), dtype), dtype) for end in (least, largest)]
        return np.minimum(*ends), np.maximum(*ends)

    def f(self, x):
        g = np.minimum(x, self.limit) if self.clipped else x
        return g * self._parts(g)[0]

    def slope(self, x):
        s, ds, _ = self._parts(x)
        return (s + x * ds) * (x < self.limit if self.clipped else 1)

    def _parts(self, x):
        if self.clipped:
            return sigmoid_parts(self.alpha * np.minimum(x, self.limit), self.alpha, 0.0)
        return PARTS[self.name](x)

    def _up(self, up):
        return np.clip(up, -self.limit, self.limit) + 1 if self.clipped else up

    def _passes(self, up):
        """The slope of what the gate is multiplied with: of a clip 0 where it clips or just does not."""
        return (np.abs(up) < self.limit) * 1.0 if self.clipped else np.ones_like(up)

    # Some roundings of a result, some of what s is of; f and its slope are made of these sizes.

    def _roundings(self, x):
        s, ds, _ = self._sizes(x)
        return OWN_ROUNDINGS * np.abs(x) * (s + np.abs(x) * ds)

    def _slope_roundings(self, x):
        s, ds, dds = self._sizes(x)
        return OWN_ROUNDINGS * (s + np.abs(x) * (3 * ds + np.abs(x) * dds))

    def _sizes(self, x):
        """Below float32's smallest numbers s and its slope may be 0 as well, an error of 2^-126."""
        s, ds, dds = map(np.abs, self._parts(x))
        return np.maximum(s, 2.0**-102), np.maximum(ds, 2.0**-102), dds


def _error(function, x, error):
    """How far the function goes within the error of x: a step too."""
    at = function(x)
    return np.max([np.abs(function(x + t * error) - at) for t in (-1, 1)], 0)


def exact_projection(x, weights, biases, lora_a, lora_b, scale, dtype, is_quantized):
    """`projection` rounded to ``dtype`` after each module that mlx-lm makes it of."""
    segments = []
    for w, b, a, lb, s in zip(weights, biases, lora_a, lora_b, scale, strict=True):
        y = x @ w.sum(0).T
        if b is not None:
            y = (rounded(y, dtype) if is_quantized else y) + b
        y = rounded(y, dtype)
        segments.append(y if a is None else rounded(y + rounded(s * ((x @ a) @ lb), dtype), dtype))
    return segments


def rounded(values, dtype):
    """To the dtype and back; the values must fit float32, through which MLX goes."""
    return exact(mx.array(values, dtype=mx.float64).astype(dtype, stream=mx.cpu))


def terms_of(weight):
    """A dense weight as the one term that it is."""
    return exact(weight)[None]


def quantized_terms(weight, scales, biases, *quantization):
    """A quantized weight as two terms: codes times scales, and groups' biases."""
    scaled = quantized.dequantize(weight, scales, None if biases is None else 0 * biases, *quantization)
    shift = np.zeros_like(scaled) if biases is None else np.repeat(exact(biases), quantization[0], -1)
    return np.stack([scaled, shift])


def exact(tree):
    """The same values as float64 arrays of NumPy."""
    return _map(lambda a: np.array(a.astype(mx.float64, stream=mx.cpu)), tree, mx.array)


def assert_equal(actual, expected):
    """The same bits: for operands whose every sum is exact (see ``operands.integers``)."""
    for a, e in zip(leaves(actual), leaves(exact(expected)), strict=True):
        np.testing.assert_array_equal(exact(a), e)


def assert_close(actual, formula, *args, roundings=1, terms=None, errors=None):
    """``actual`` is ``formula(*args)`` computed with float32 sums, each rounded once to its dtype.

    A sum of n products has an error of at most n u sum|x||y|, and, the rounding errors being as good as
    independent, above 8 sqrt(n) u sum|x||y| with probability below 2 exp(-8^2/2) = 3e-14 (Higham and Mary,
    2019); u is float32's unit roundoff. The result's own rounding adds its dtype's unit roundoff times the
    result. The formulas being sums of products, formula(|args|) is sum|x||y| and formula(ones) is n; where
    products nest, as in (x A) B, ``terms`` is n: the most roundings from any product to the result. Where
    operands have errors of their own, ``errors`` are what the formula makes of these.
    """
    args = exact(args)
    expected = leaves(formula(*args))
    sizes = leaves(formula(*magnitudes(args)))
    counts = leaves(formula(*_map(np.ones_like, args, np.ndarray)))
    terms = counts if terms is None else [terms] * len(counts)
    errors = [0.0] * len(counts) if errors is None else leaves(errors)
    for a, e, size, n, error in zip(leaves(actual), expected, sizes, terms, errors, strict=True):
        assert_rounded(a, e, sum_error(size, n, a.dtype) + error, roundings)


def magnitudes(args):
    return _map(np.abs, args, np.ndarray)


def assert_near(actual, expected, magnitudes, terms):
    """The same of results whose sums of |x||y| are known: ``magnitudes``."""
    for a, e, magnitude in zip(actual, exact(expected), exact(magnitudes), strict=True):
        assert_rounded(a, e, sum_error(magnitude, terms, a.dtype))


def sum_unit(dtype):
    """The unit roundoff of sums for results of this dtype, and some of float64's."""
    return min(UNIT_ROUNDOFF[mx.float32], UNIT_ROUNDOFF[dtype]) + UNIT_ROUNDOFF[mx.float64]


def sum_error(magnitude, terms, dtype):
    with np.errstate(invalid="ignore"):
        return np.minimum(terms, 8 * np.sqrt(terms)) * sum_unit(dtype) * magnitude


def rounding_error(value, error, dtype, roundings=1):
    """Of a value that has an error already."""
    with np.errstate(invalid="ignore"):
        return roundings * UNIT_ROUNDOFF[dtype] * (np.maximum(np.abs(value), SMALLEST_NORMAL[dtype]) + error)


def assert_rounded(actual, expected, error, roundings=1):
    """``actual`` is ``expected``, with at most this error, rounded to its dtype."""
    with np.errstate(invalid="ignore"):
        bound = error + rounding_error(expected, error, actual.dtype, roundings)
        largest = mx.finfo(actual.dtype).max
        actual = exact(actual)
        overflows = np.isinf(actual) & (actual * expected > 0) & (np.abs(expected) + bound > largest)
        _assert_within(np.where(overflows, expected, actual), expected, bound)


def _assert_within(actual, expected, bound):
    assert actual.shape == expected.shape
    good = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    good |= np.abs(actual - expected) <= bound
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{(~good).sum()} of {good.size} elements are off, the first at {at}: "
            f"{actual[at]!r} for {expected[at]!r}, with an error of at most {bound[at]!r} allowed"
        )


def _map(function, tree, kind):
    if isinstance(tree, (tuple, list)):
        return tuple(_map(function, t, kind) for t in tree)
    return function(tree) if isinstance(tree, kind) else tree


def leaves(tree):
    if isinstance(tree, (tuple, list)):
        return [leaf for t in tree for leaf in leaves(t)]
    return [] if tree is None else [tree]
