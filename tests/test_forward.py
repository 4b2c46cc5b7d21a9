"""The two forward operations against the oracle, over every dtype, shape class and boundary."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands
import oracle
from mlx_fused import composed

dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
packings = pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])

# Around every tile height a kernel may have, as (batch, seq).
ROWS = [(1, m) for m in (0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)]
ROWS += [(0, 4), (0, 0), (5, 1), (33, 1), (2, 3), (3, 11), (4, 32)]


def check_qkv(args, heads, roundings=1):
    outputs = mlx_fused.fused_qkv_projection(*args, *heads)
    assert isinstance(outputs, tuple)
    assert all(y.dtype == args[0].dtype for y in outputs)
    oracle.assert_close(outputs, oracle.fused_qkv_projection, *args, *heads, roundings=roundings)


def check_output(args, roundings=1):
    out = mlx_fused.fused_output_projection_residual(*args)
    assert out.dtype == args[0].dtype
    oracle.assert_close(out, oracle.fused_output_projection_residual, *args, roundings=roundings)


@dtypes
@biases
@packings
@pytest.mark.parametrize("heads", operands.HEADS, ids=str)
def test_qkv_heads(rng, dtype, bias, packed, heads):
    check_qkv(operands.qkv(rng, 2, 5, 24, heads, dtype, bias, packed), heads)


@dtypes
@pytest.mark.parametrize("ratio", range(1, 9))
def test_qkv_every_query_group_size(rng, dtype, ratio):
    heads = (2 * ratio, 2, 6)
    check_qkv(operands.qkv(rng, 2, 3, 20, heads, dtype), heads)


@dtypes
@packings
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 80, 96, 128, 256])
def test_qkv_head_dims(rng, dtype, packed, head_dim):
    heads = (4, 2, head_dim)
    for batch, seq in ((3, 1), (2, 9)):
        check_qkv(operands.qkv(rng, batch, seq, 40, heads, dtype, packed=packed), heads)


@dtypes
@pytest.mark.parametrize("batch,seq", ROWS)
def test_row_boundaries(rng, dtype, batch, seq):
    heads = (4, 2, 16)
    check_qkv(operands.qkv(rng, batch, seq, 61, heads, dtype), heads)
    check_output(operands.output(rng, batch, seq, 61, 67, dtype))


@dtypes
@pytest.mark.parametrize("hidden", [0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 60, 61, 64, 100, 127, 129, 512, 1000])
def test_reduction_tails(rng, dtype, hidden):
    heads = (3, 1, 11)
    for seq in (1, 3, 34):
        check_qkv(operands.qkv(rng, 1, seq, hidden, heads, dtype), heads)
        check_output(operands.output(rng, 1, seq, hidden, 37, dtype))


@dtypes
@biases
@pytest.mark.parametrize("hidden_out", [0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 129])
def test_output_widths(rng, dtype, bias, hidden_out):
    for seq in (1, 4, 33):
        check_output(operands.output(rng, 2, seq, 48, hidden_out, dtype, bias))


@dtypes
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_block_boundaries(rng, dtype, extra):
    # The powers of two at which a kernel may go on to another block of rows, of columns or of the reduction.
    sizes = ((256, 64, 48), (512, 40, 96), (40, 512, 256), (40, 1024, 512), (7, 2048, 128))
    for seq, hidden, hidden_out in sizes:
        args = operands.output(rng, 1, seq + extra, hidden + extra, hidden_out + extra, dtype)
        check_output(args)


@dtypes
def test_larger_than_a_tile(rng, dtype):
    heads = (4, 2, 67)
    check_qkv(operands.qkv(rng, 2, 150, 700, heads, dtype), heads)
    check_output(operands.output(rng, 3, 100, 700, 600, dtype))


@dtypes
def test_decode_of_a_wide_layer(rng, dtype):
    heads = (16, 4, 64)
    check_qkv(operands.qkv(rng, 1, 1, 2048, heads, dtype), heads)
    check_output(operands.output(rng, 1, 1, 2048, 1500, dtype))


@dtypes
def test_accumulates_in_float32(dtype):
    # 4096 ones: a sum kept in bfloat16 stops growing at 256, one in float16 at 2048.
    for seq in (1, 40):
        x, w = mx.ones((1, seq, 4096), dtype), mx.ones((8, 4096), dtype)
        q, k, v = mlx_fused.fused_qkv_projection(x, (w, w, w), None, 1, 1, 8)
        out = mlx_fused.fused_output_projection_residual(x, w, None, mx.zeros((1, seq, 8), dtype))
        for y in (q, k, v, out):
            assert (y == 4096).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_bias_and_residual_are_added_before_rounding(dtype):
    # 1 + half a step rounds to 1, and so would adding the second half to that.
    step = 2 * oracle.UNIT_ROUNDOFF[dtype]
    one, half = mx.ones((1, 1, 1), dtype), mx.full((1, 1, 1), step / 2, dtype)
    out = mlx_fused.fused_output_projection_residual(one, one[0], half[0, 0], half)
    assert oracle.exact(out).item() == 1 + step


@dtypes
@pytest.mark.parametrize("seq", [1, 3, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_propagate(rng, dtype, seq, value):
    def poison(a):
        values = np.array(a.astype(mx.float32))
        values.flat[values.size // 2] = value
        return mx.array(values).astype(dtype)

    heads = (2, 1, 9)
    x, weight, bias = operands.qkv(rng, 1, seq, 33, heads, dtype)
    check_qkv((poison(x), weight, bias), heads)
    check_qkv((x, (weight[0], poison(weight[1]), weight[2]), bias), heads)
    check_qkv((x, weight, (bias[0], bias[1], poison(bias[2]))), heads)
    args = operands.output(rng, 1, seq, 33, 21, dtype)
    for i in range(4):
        check_output([poison(a) if i == j else a for j, a in enumerate(args)])


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_zero_times_nan_is_nan(dtype, value):
    # One bad element per row, at every place along the reduction, against nothing but zeros.
    n = 37
    diagonal, zeros = mx.where(mx.eye(n) == 1, value, 0).astype(dtype), mx.zeros((n, n), dtype)
    for rows in (1, 3, 4, n):
        for first in range(0, n - rows + 1, rows):
            some = slice(first, first + rows)
            for x, w in ((zeros[some], diagonal), (diagonal[some], zeros)):
                out = mlx_fused.fused_output_projection_residual(x[None], w, None, zeros[None, some])
                assert mx.isnan(out).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_results_beyond_the_dtype_overflow_to_infinity(dtype):
    x = mx.full((1, 2, 4), float(mx.finfo(dtype).max), dtype)
    q, _, _ = mlx_fused.fused_qkv_projection(x, mx.ones((3, 4), dtype), None, 1, 1, 1)
    assert (q == np.inf).all()


def test_float16_subnormals_are_kept():
    tiny = mx.full((1, 1, 2), 2.0**-24, mx.float16)
    for seq in (1, 33):
        x = mx.broadcast_to(tiny, (1, seq, 2))
        w = mx.ones((4, 2), mx.float16)
        out = mlx_fused.fused_output_projection_residual(x, w, None, mx.zeros((1, seq, 4), mx.float16))
        assert (oracle.exact(out) == 2.0**-23).all()


@pytest.mark.parametrize("x_dtype", operands.DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", operands.DTYPES, ids=str)
@pytest.mark.parametrize("b_dtype", [None, *operands.DTYPES], ids=str)
def test_mixed_dtypes_promote_as_in_mlx(rng, x_dtype, w_dtype, b_dtype):
    heads = (2, 1, 8)
    x, weight, bias = operands.qkv(rng, 2, 3, 16, heads, bias=b_dtype is not None, packed=True)
    x, weight, bias = x.astype(x_dtype), weight.astype(w_dtype), bias.astype(b_dtype) if b_dtype else None
    outputs = mlx_fused.fused_qkv_projection(x, weight, bias, *heads)
    expected = composed.fused_qkv_projection(x, weight, bias, *heads)
    assert [y.dtype for y in outputs] == [y.dtype for y in expected]
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *heads)


def test_each_segment_promotes_on_its_own(rng):
    heads = (2, 1, 8)
    x, (wq, wk, wv), _ = operands.qkv(rng, 2, 3, 16, heads, mx.bfloat16, bias=False)
    weight = (wq, wk.astype(mx.float32), wv.astype(mx.float16))
    outputs = mlx_fused.fused_qkv_projection(x, weight, None, *heads)
    assert [y.dtype for y in outputs] == [mx.bfloat16, mx.float32, mx.float32]
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, None, *heads)


@pytest.mark.parametrize("wide", range(4))
def test_output_promotes_over_every_operand(rng, wide):
    args = list(operands.output(rng, 2, 3, 16, 8, mx.float16))
    args[wide] = args[wide].astype(mx.float32)
    out = mlx_fused.fused_output_projection_residual(*args)
    assert out.dtype == composed.fused_output_projection_residual(*args).dtype == mx.float32


@packings
def test_float64(rng, packed):
    heads = (4, 2, 5)
    args = operands.qkv(rng, 2, 7, 30, heads, mx.float64, packed=packed)
    check_qkv(args, heads, roundings=3)
    check_output(operands.output(rng, 2, 7, 30, 12, mx.float64), roundings=3)


@packings
@biases
def test_the_composed_forms_mean_the_same(rng, packed, bias):
    heads = (6, 2, 7)
    args = operands.qkv(rng, 3, 5, 33, heads, bias=bias, packed=packed)
    outputs = composed.fused_qkv_projection(*args, *heads)
    oracle.assert_close(outputs, oracle.fused_qkv_projection, *args, *heads, roundings=3)
    args = operands.output(rng, 3, 5, 33, 21, bias=bias)
    out = composed.fused_output_projection_residual(*args)
    oracle.assert_close(out, oracle.fused_output_projection_residual, *args, roundings=3)


def test_arguments_by_name_and_a_stream(rng):
    heads = (2, 1, 4)
    x, weight, bias = operands.qkv(rng, 1, 3, 8, heads)
    for stream in (mx.cpu, mx.new_stream(mx.cpu)):
        outputs = mlx_fused.fused_qkv_projection(
            input=x, weight=weight, bias=bias, num_heads=2, num_kv_heads=1, head_dim=4, stream=stream
        )
        oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *heads)
        a, w, b, r = operands.output(rng, 1, 3, 8, 5)
        out = mlx_fused.fused_output_projection_residual(
            attn_out=a, weight=w, bias=b, residual=r, stream=stream
        )
        oracle.assert_close(out, oracle.fused_output_projection_residual, a, w, b, r)


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    # A weight of 2^31 + 2^15 elements (4.3 GB).
    hidden, hidden_out = 4096, 2**19 + 8
    x = mx.ones((1, 1, hidden), mx.bfloat16)
    tail = mx.full((8, hidden), 2, mx.bfloat16)
    w = mx.concatenate([mx.ones((2**19, hidden), mx.bfloat16), tail])
    out = mlx_fused.fused_output_projection_residual(x, w, None, mx.zeros((1, 1, hidden_out), mx.bfloat16))
    assert (out[..., :-8] == hidden).all() and (out[..., -8:] == 2 * hidden).all()


@pytest.mark.slow
@dtypes
def test_broadcast_operands_with_more_elements_than_32_bits_count(rng, dtype):
    # The view has 2^31 + 2^16 elements; its memory has 2^16.
    batch, hidden = 2**15 + 1, 2**16
    row = operands.integers(rng, (1, 1, hidden), dtype)
    w = operands.integers(rng, (2, hidden), dtype)
    x, residual = mx.broadcast_to(row, (batch, 1, hidden)), mx.zeros((batch, 1, 2), dtype)
    out = mlx_fused.fused_output_projection_residual(x, w, None, residual)
    oracle.assert_close(out[-1:], oracle.fused_output_projection_residual, row, w, None, residual[-1:])
