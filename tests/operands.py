"""Operands for the operations, drawn at random."""

import mlx.core as mx

# (num_heads, num_kv_heads, head_dim): of multi-head, grouped-query and multi-query attention.
HEADS = [(1, 1, 1), (2, 2, 16), (3, 3, 5), (4, 2, 8), (6, 2, 7), (8, 2, 4), (8, 1, 16), (7, 1, 3)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def normal(rng, shape, dtype=mx.float32):
    return mx.array(rng.standard_normal(shape), dtype=mx.float64).astype(dtype, stream=mx.cpu)


def integers(rng, shape, dtype=mx.float32):
    """Small integers: every sum of their products is exact, so that any order of it gives the same bits."""
    return mx.array(rng.integers(-2, 3, shape), dtype=dtype)


def large_integers(rng, shape, dtype):
    """Sums of their products are exact in float32, but not in 16 bits."""
    return mx.array(rng.integers(-9, 10, shape), dtype=dtype)


def segments(heads):
    """q's, k's and v's heads and their size, of (num_heads, num_kv_heads, head_dim[, v_head_dim])."""
    num_heads, num_kv_heads, head_dim, *v_head_dim = heads
    return [(num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, *(v_head_dim or [head_dim]))]


def qkv(rng, batch, seq, hidden, heads, dtype=mx.float32, bias=True, packed=False, draw=normal):
    """(input, weight, bias) for fused_qkv_projection."""
    x = draw(rng, (batch, seq, hidden), dtype)
    rows = [n * dims for n, dims in segments(heads)]
    if packed:
        return x, draw(rng, (sum(rows), hidden), dtype), draw(rng, (sum(rows),), dtype) if bias else None
    weight = tuple(draw(rng, (n, hidden), dtype) for n in rows)
    return x, weight, tuple(draw(rng, (n,), dtype) for n in rows) if bias else None


def qkv_cotangents(rng, batch, seq, heads, dtype=mx.float32, draw=normal):
    """(dq, dk, dv)."""
    return tuple(draw(rng, (batch, n, seq, dims), dtype) for n, dims in segments(heads))


def output(rng, batch, seq, hidden_in, hidden_out, dtype=mx.float32, bias=True, draw=normal):
    """(attn_out, weight, bias, residual) for fused_output_projection_residual."""
    return (
        draw(rng, (batch, seq, hidden_in), dtype),
        draw(rng, (hidden_out, hidden_in), dtype),
        draw(rng, (hidden_out,), dtype) if bias else None,
        draw(rng, (batch, seq, hidden_out), dtype),
    )
