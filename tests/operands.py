"""Arrays drawn at random."""

import mlx.core as mx

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def normal(rng, shape, dtype=mx.float32):
    return mx.array(rng.standard_normal(shape), dtype=mx.float64).astype(dtype, stream=mx.cpu)


def integers(rng, shape, dtype=mx.float32):
    """Small integers: every sum of their products is exact, so that any order of it gives the same bits."""
    return mx.array(rng.integers(-2, 3, shape), dtype=dtype)


def large_integers(rng, shape, dtype):
    """Sums of their products are exact in float32, but not in 16 bits."""
    return mx.array(rng.integers(-9, 10, shape), dtype=dtype)


def few_integers(rng, shape, dtype=mx.float32):
    """Most of them 0: products of the sums of their products are exact as well."""
    few = rng.integers(0, max(shape[-1] // 2, 3), shape) == 0
    return mx.array(rng.integers(-2, 3, shape) * few, dtype=dtype)
