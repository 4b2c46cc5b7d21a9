"""The two explicit backward operations against the oracle, and the oracle against finite differences."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands
import oracle
from test_forward import ROWS, biases, dtypes, packings


def qkv_args(rng, batch, seq, hidden, heads, dtype=mx.float32, bias=True, packed=False):
    """The arguments of fused_qkv_projection_bwd."""
    x, weight, _ = operands.qkv(rng, batch, seq, hidden, heads, dtype, packed=packed)
    return *operands.qkv_cotangents(rng, batch, seq, heads, dtype), x, weight, bias, *heads


def output_args(rng, batch, seq, hidden_in, hidden_out, dtype=mx.float32, bias=True):
    """The arguments of fused_output_projection_residual_bwd."""
    a, w, _, g = operands.output(rng, batch, seq, hidden_in, hidden_out, dtype)
    return g, a, w, bias


def check_qkv(args):
    x, weight, has_bias = args[3:6]
    d_input, d_weight, d_bias = grads = mlx_fused.fused_qkv_projection_bwd(*args)
    packed = not isinstance(weight, tuple)
    assert isinstance(d_weight, mx.array if packed else tuple)
    assert isinstance(d_bias, (mx.array if packed else tuple) if has_bias else type(None))
    assert d_input.dtype == x.dtype
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args)


def check_output(args):
    grads = mlx_fused.fused_output_projection_residual_bwd(*args)
    oracle.assert_close(grads, oracle.fused_output_projection_residual_bwd, *args)
    oracle.assert_equal(grads[3], args[0])


@dtypes
@biases
@packings
@pytest.mark.parametrize("heads", operands.HEADS, ids=str)
def test_qkv_heads(rng, dtype, bias, packed, heads):
    check_qkv(qkv_args(rng, 2, 5, 24, heads, dtype, bias, packed))


@dtypes
@pytest.mark.parametrize("ratio", range(1, 9))
def test_qkv_every_query_group_size(rng, dtype, ratio):
    check_qkv(qkv_args(rng, 2, 3, 20, (2 * ratio, 2, 6), dtype))


@dtypes
@packings
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 80, 96, 128, 256])
def test_qkv_head_dims(rng, dtype, packed, head_dim):
    for batch, seq in ((3, 1), (2, 9)):
        check_qkv(qkv_args(rng, batch, seq, 40, (4, 2, head_dim), dtype, packed=packed))


@dtypes
@pytest.mark.parametrize("batch,seq", ROWS)
def test_row_boundaries(rng, dtype, batch, seq):
    check_qkv(qkv_args(rng, batch, seq, 61, (4, 2, 16), dtype))
    check_output(output_args(rng, batch, seq, 61, 67, dtype))


@dtypes
@biases
@pytest.mark.parametrize("hidden_in", [0, 1, 2, 15, 16, 17, 31, 33, 60, 61, 100, 512])
@pytest.mark.parametrize("hidden_out", [0, 1, 7, 16, 33, 129])
def test_output_widths(rng, dtype, bias, hidden_in, hidden_out):
    for seq in (1, 3, 34):
        check_output(output_args(rng, 2, seq, hidden_in, hidden_out, dtype, bias))


@dtypes
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_block_boundaries(rng, dtype, extra):
    # The powers of two at which a kernel may go on to another block of rows, of columns or of the reduction.
    sizes = ((256, 64, 48), (512, 40, 96), (1024, 32, 40), (40, 512, 256), (6, 256, 1024))
    for seq, hidden_in, hidden_out in sizes:
        check_output(output_args(rng, 1, seq + extra, hidden_in + extra, hidden_out + extra, dtype))


@dtypes
def test_larger_than_a_tile(rng, dtype):
    check_qkv(qkv_args(rng, 2, 150, 700, (4, 2, 67), dtype))
    check_output(output_args(rng, 3, 100, 700, 600, dtype))


@dtypes
def test_accumulates_in_float32(dtype):
    # 4096 ones: a sum kept in bfloat16 stops growing at 256, one in float16 at 2048.
    n = 4096
    ones = mx.ones((1, n, 2), dtype)
    _, d_weight, d_bias, _ = mlx_fused.fused_output_projection_residual_bwd(
        ones, ones, mx.ones((2, 2), dtype), True
    )
    assert (d_weight == n).all() and (d_bias == n).all()
    for rows in (1, 40):
        d_attn_out, *_ = mlx_fused.fused_output_projection_residual_bwd(
            mx.ones((1, rows, n), dtype), mx.ones((1, rows, 2), dtype), mx.ones((n, 2), dtype), False
        )
        assert (d_attn_out == n).all()


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_propagate(rng, dtype, value):
    for seq in (1, 40):
        args = list(qkv_args(rng, 1, seq, 9, (2, 1, 5), dtype))
        for i in range(4):
            poisoned = np.array(args[i].astype(mx.float32))
            poisoned.flat[poisoned.size // 2] = value
            check_qkv([mx.array(poisoned).astype(dtype) if i == j else a for j, a in enumerate(args)])


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_zero_times_nan_is_nan(dtype, value):
    # One bad element per row, at every place along the reduction, against nothing but zeros.
    n = 37
    bad, zeros = mx.where(mx.eye(n) == 1, value, 0).astype(dtype), mx.zeros((n, n), dtype)
    for g, a, w in ((zeros[None], bad[None], bad), (bad[None], zeros[None], zeros)):
        d_attn_out, d_weight, *_ = mlx_fused.fused_output_projection_residual_bwd(g, a, w, False)
        assert mx.isnan(d_attn_out).all() and mx.isnan(d_weight).all()


@packings
def test_float64(rng, packed):
    args = qkv_args(rng, 2, 7, 30, (4, 2, 5), mx.float64, packed=packed)
    grads = mlx_fused.fused_qkv_projection_bwd(*args)
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args, roundings=3)
    args = output_args(rng, 2, 7, 30, 12, mx.float64)
    grads = mlx_fused.fused_output_projection_residual_bwd(*args)
    oracle.assert_close(grads, oracle.fused_output_projection_residual_bwd, *args, roundings=3)


def test_mixed_dtypes_give_each_argument_its_own_gradient_dtype(rng):
    heads = (2, 1, 8)
    dq, dk, dv = operands.qkv_cotangents(rng, 2, 3, heads)
    x, weight, _ = operands.qkv(rng, 2, 3, 16, heads)
    weight = (weight[0], weight[1].astype(mx.bfloat16), weight[2].astype(mx.float16))
    args = (dq, dk, dv, x.astype(mx.bfloat16), weight, True, *heads)
    d_input, d_weight, _ = grads = mlx_fused.fused_qkv_projection_bwd(*args)
    assert d_input.dtype == mx.bfloat16
    assert [g.dtype for g in d_weight] == [mx.float32, mx.bfloat16, mx.float16]
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args)


def directional_derivative(formula, cotangents, args, direction):
    """Of <formula(args), cotangents>: of degree two, so that a central difference of any step is exact."""

    def inner(step):
        moved = [a + step * d for a, d in zip(args, direction, strict=True)]
        return sum(np.vdot(c, y) for c, y in zip(cotangents, formula(*moved), strict=True))

    return (inner(1.0) - inner(-1.0)) / 2


@pytest.mark.parametrize("only", [None, 0, 1, 2])
def test_qkv_agrees_with_finite_differences(rng, only):
    heads = (4, 2, 6)
    x, weight, bias = oracle.exact(operands.qkv(rng, 2, 3, 10, heads, packed=True))
    cotangents = oracle.exact(operands.qkv_cotangents(rng, 2, 3, heads))
    direction = [rng.standard_normal(a.shape) * (only in (None, i)) for i, a in enumerate((x, weight, bias))]
    expected = directional_derivative(
        lambda *a: oracle.fused_qkv_projection(*a, *heads), cotangents, (x, weight, bias), direction
    )
    by_oracle = oracle.fused_qkv_projection_bwd(*cotangents, x, weight, True, *heads)
    by_op = mlx_fused.fused_qkv_projection_bwd(
        *(mx.array(a, dtype=mx.float64) for a in (*cotangents, x, weight)), True, *heads
    )
    for grads in (by_oracle, oracle.exact(by_op)):
        terms = [np.vdot(g, d) for g, d in zip(grads, direction, strict=True)]
        assert sum(terms) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("only", [None, 0, 1, 2, 3])
def test_output_agrees_with_finite_differences(rng, only):
    args = oracle.exact(operands.output(rng, 2, 3, 10, 7))
    cotangent = rng.standard_normal((2, 3, 7))
    direction = [rng.standard_normal(a.shape) * (only in (None, i)) for i, a in enumerate(args)]
    expected = directional_derivative(
        lambda *a: (oracle.fused_output_projection_residual(*a),), (cotangent,), args, direction
    )
    by_oracle = oracle.fused_output_projection_residual_bwd(cotangent, *args[:2], True)
    by_op = mlx_fused.fused_output_projection_residual_bwd(
        *(mx.array(a, dtype=mx.float64) for a in (cotangent, *args[:2])), True
    )
    for grads in (by_oracle, oracle.exact(by_op)):
        terms = [np.vdot(g, d) for g, d in zip(grads, direction, strict=True)]
        assert sum(terms) == pytest.approx(expected, rel=1e-11)
