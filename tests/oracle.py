"""The operations in NumPy float64, written from their formulas, and the error a kernel may make."""

import mlx.core as mx
import numpy as np

import quantized
from operands import segments

UNIT_ROUNDOFF = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24, mx.float64: 2.0**-53}
SMALLEST_NORMAL = {
    mx.float16: 2.0**-14,
    mx.bfloat16: 2.0**-126,
    mx.float32: 2.0**-126,
    mx.float64: 2.0**-1022,
}


def fused_qkv_projection(x, weight, bias, *heads):
    batch, seq, _ = x.shape
    weights, biases = _parts(weight, heads), _parts(bias, heads)
    outputs = []
    for (n, d), w, b in zip(segments(heads), weights, biases, strict=True):
        y = np.einsum("bsi,oi->bso", x, w) + (0 if b is None else b)
        outputs.append(y.reshape(batch, seq, n, d).transpose(0, 2, 1, 3))
    return tuple(outputs)


def fused_qkv_projection_bwd(dq, dk, dv, x, weight, has_bias, *heads):
    batch, seq, _ = x.shape
    cotangents = zip((dq, dk, dv), segments(heads), strict=True)
    grads = [g.transpose(0, 2, 1, 3).reshape(batch, seq, n * d) for g, (n, d) in cotangents]
    weights = _parts(weight, heads)
    d_input = sum(np.einsum("bso,oi->bsi", g, w) for g, w in zip(grads, weights, strict=True))
    d_weight = tuple(np.einsum("bso,bsi->oi", g, x) for g in grads)
    d_bias = tuple(g.sum((0, 1)) for g in grads)
    if not isinstance(weight, tuple):
        d_weight, d_bias = np.concatenate(d_weight), np.concatenate(d_bias)
    return d_input, d_weight, d_bias if has_bias else None


def fused_output_projection_residual(attn_out, weight, bias, residual):
    return np.einsum("bsi,oi->bso", attn_out, weight) + (0 if bias is None else bias) + residual


def fused_output_projection_residual_bwd(d_output, attn_out, weight, has_bias):
    d_attn_out = np.einsum("bso,oi->bsi", d_output, weight)
    d_weight = np.einsum("bso,bsi->oi", d_output, attn_out)
    return d_attn_out, d_weight, d_output.sum((0, 1)) if has_bias else None, d_output


def product(a, b):
    """``a @ b`` by this thread alone: those of NumPy's BLAS slow down the other workers."""
    return np.einsum("...ij,jk->...ik", a, b)


def projection(x, weights, biases, lora_a, lora_b, scale):
    """y = x W^T + b + scale (x A) B for each segment; a bias, or an A and its B, may be None.

    A weight is a stack of the terms that it is the sum of, for a kernel may sum them apart.
    """
    segments = []
    for w, b, a, lb, s in zip(weights, biases, lora_a, lora_b, scale, strict=True):
        y = product(x, w.sum(0).T) + (0 if b is None else b)
        segments.append(y if a is None else y + s * ((x @ a) @ lb))
    return segments


def projection_bwd(grads, x, weights, lora_a, lora_b, scale):
    """The gradients of x, and of each segment's weight, bias, A and B."""
    count = x.shape[0] * x.shape[1]
    rows = x.reshape(count, x.shape[-1])
    d_x, others = 0, []
    for g, w, a, b, s in zip(grads, weights, lora_a, lora_b, scale, strict=True):
        d_x = d_x + product(g, w.sum(0))
        flat = g.reshape(count, g.shape[-1])
        d_a = d_b = None
        if a is not None:
            d_x = d_x + s * ((g @ b.T) @ a.T)
            d_a, d_b = s * (rows.T @ (flat @ b.T)), s * ((rows @ a).T @ flat)
        others.append((product(flat.T, rows), flat.sum(0), d_a, d_b))
    return d_x, *(list(part) for part in zip(*others, strict=True))


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


def _parts(packed, heads):
    if packed is None:
        return (None, None, None)
    if isinstance(packed, tuple):
        return packed
    return np.split(packed, np.cumsum([n * dims for n, dims in segments(heads)])[:2])


def exact(tree):
    """The same values as float64 arrays of NumPy."""
    return _map(lambda a: np.array(a.astype(mx.float64, stream=mx.cpu)), tree, mx.array)


def assert_equal(actual, expected):
    """The same bits: for operands whose every sum is exact (see ``operands.integers``)."""
    for a, e in zip(leaves(actual), leaves(exact(expected)), strict=True):
        np.testing.assert_array_equal(exact(a), e)


def assert_close(actual, formula, *args, roundings=1, terms=None):
    """``actual`` is ``formula(*args)`` computed with float32 sums, each rounded once to its dtype.

    A sum of n products has an error of at most n u sum|x||y|, and, the rounding errors being as good as
    independent, above 8 sqrt(n) u sum|x||y| with probability below 2 exp(-8^2/2) = 3e-14 (Higham and Mary,
    2019); u is float32's unit roundoff. The result's own rounding adds its dtype's unit roundoff times the
    result. The formulas being sums of products, formula(|args|) is sum|x||y| and formula(ones) is n; where
    products nest, as in (x A) B, ``terms`` is n: the most roundings from any product to the result.
    """
    args = exact(args)
    expected = leaves(formula(*args))
    magnitudes = leaves(formula(*_map(np.abs, args, np.ndarray)))
    counts = leaves(formula(*_map(np.ones_like, args, np.ndarray)))
    terms = counts if terms is None else [terms] * len(counts)
    for numbers in zip(leaves(actual), expected, magnitudes, terms, strict=True):
        _assert_near(*numbers, roundings)


def assert_near(actual, expected, magnitudes, terms):
    """The same of results whose sums of |x||y| are known: ``magnitudes``."""
    for a, e, magnitude in zip(actual, exact(expected), exact(magnitudes), strict=True):
        _assert_near(a, e, magnitude, terms, 1)


def _assert_near(actual, expected, magnitude, terms, roundings):
    unit, normal = UNIT_ROUNDOFF[actual.dtype], SMALLEST_NORMAL[actual.dtype]
    sum_unit = min(UNIT_ROUNDOFF[mx.float32], unit) + UNIT_ROUNDOFF[mx.float64]
    with np.errstate(invalid="ignore"):
        sum_error = np.minimum(terms, 8 * np.sqrt(terms)) * sum_unit * magnitude
        bound = sum_error + roundings * unit * (np.maximum(np.abs(expected), normal) + sum_error)
        _assert_within(exact(actual), expected, bound)


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
