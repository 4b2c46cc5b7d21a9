"""Hypothesis draws the shapes, dtypes and layouts; the oracle says what must come out."""

import mlx.core as mx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import mlx_fused
import operands
import oracle
from test_layouts import VIEWS

sizes = st.integers(0, 5) | st.integers(0, 70)
widths = st.integers(1, 9) | st.integers(1, 140)
dtypes = st.sampled_from(operands.DTYPES)
layouts = st.sampled_from([lambda a: a, *VIEWS])


@st.composite
def heads(draw):
    kv_heads = draw(st.integers(1, 3))
    return kv_heads * draw(st.integers(1, 8)), kv_heads, draw(st.integers(1, 20)), draw(st.integers(1, 20))


def project(x, weight, bias, heads):
    *heads, v_head_dim = heads
    return mlx_fused.fused_qkv_projection(x, weight, bias, *heads, v_head_dim=v_head_dim)


@st.composite
def qkv_problems(draw):
    """The operands, laid out at random, and the cotangents of one call."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, seq, hidden = draw(st.integers(0, 3)), draw(sizes), draw(widths)
    dtype, shape = draw(dtypes), draw(heads())
    has_bias, packed = draw(st.booleans()), draw(st.booleans())
    x, weight, bias = operands.qkv(rng, batch, seq, hidden, shape, dtype, has_bias, packed)
    cotangents = operands.qkv_cotangents(rng, batch, seq, shape, dtype)

    def lay_out(tree):
        if tree is None:
            return None
        if isinstance(tree, tuple):
            return tuple(map(lay_out, tree))
        return draw(layouts)(tree) if tree.size else tree

    return lay_out(x), lay_out(weight), lay_out(bias), lay_out(cotangents), shape


@given(qkv_problems())
def test_qkv(problem):
    x, weight, bias, cotangents, shape = problem
    outputs = project(x, weight, bias, shape)
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *shape)
    args = (*cotangents, x, weight, bias is not None)
    *heads, v_head_dim = shape
    grads = mlx_fused.fused_qkv_projection_bwd(*args, *heads, v_head_dim=v_head_dim)
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args, *shape)


@given(st.data(), st.integers(0, 3), sizes, widths, widths, dtypes, st.booleans())
def test_output(data, batch, seq, hidden_in, hidden_out, dtype, bias):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    args = [
        data.draw(layouts)(a) if a is not None and a.size else a
        for a in operands.output(rng, batch, seq, hidden_in, hidden_out, dtype, bias)
    ]
    out = mlx_fused.fused_output_projection_residual(*args)
    oracle.assert_close(out, oracle.fused_output_projection_residual, *args)
    args = (args[3], *args[:2], bias)
    grads = mlx_fused.fused_output_projection_residual_bwd(*args)
    oracle.assert_close(grads, oracle.fused_output_projection_residual_bwd, *args)


@given(st.integers(0, 2**32 - 1), sizes, widths, heads())
def test_packed_and_separate_weights_mean_the_same(seed, seq, hidden, shape):
    rng = np.random.default_rng(seed)
    x, weight, bias = operands.qkv(rng, 1, seq, hidden, shape, draw=operands.integers)
    separate = project(x, weight, bias, shape)
    packed = project(x, mx.concatenate(weight), mx.concatenate(bias), shape)
    oracle.assert_equal(separate, packed)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), widths, heads())
def test_each_row_depends_on_its_own_input_alone(seed, batch, seq, hidden, shape):
    rng = np.random.default_rng(seed)
    x, weight, bias = operands.qkv(rng, batch, seq, hidden, shape, draw=operands.integers)
    together = project(x, weight, bias, shape)
    b, s = int(rng.integers(batch)), int(rng.integers(seq))
    alone = project(x[b : b + 1, s : s + 1], weight, bias, shape)
    oracle.assert_equal([y[b : b + 1, :, s : s + 1] for y in together], alone)
