"""The two forward operations against the oracle, over every dtype, shape class and boundary."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_fused
import operands
import oracle
from call import Call
from projections import (
    ACTIVATIONS,
    PACKINGS,
    check_forward,
    check_gradients,
    check_outputs,
    cotangents,
    gated,
    gradients,
    linear,
    output,
    qkv,
)

# (num_heads, num_kv_heads, head_dim): of multi-head, grouped-query and multi-query attention.
HEADS = [(1, 1, 1), (2, 2, 16), (3, 3, 5), (4, 2, 8), (6, 2, 7), (8, 2, 4), (8, 1, 16), (7, 1, 3)]

dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
packings = pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])

# Around every tile height a kernel may have, as (batch, seq).
ROWS = [(1, m) for m in (0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)]
ROWS += [(0, 4), (0, 0), (5, 1), (33, 1), (2, 3), (3, 11), (4, 32)]


def check(call, **options):
    outputs = check_forward(call, **options)
    assert all(y.dtype == call.x.dtype for y in outputs)


@dtypes
@biases
@packings
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_qkv_heads(rng, dtype, bias, packed, heads):
    check(qkv(rng, 2, 5, 24, heads, dtype=dtype, bias=bias, packed=packed))


@dtypes
@pytest.mark.parametrize("ratio", range(1, 9))
def test_qkv_every_query_group_size(rng, dtype, ratio):
    check(qkv(rng, 2, 3, 20, (2 * ratio, 2, 6), dtype=dtype))


@dtypes
@packings
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 80, 96, 128, 256])
def test_qkv_head_dims(rng, dtype, packed, head_dim):
    for batch, seq in ((3, 1), (2, 9)):
        check(qkv(rng, batch, seq, 40, (4, 2, head_dim), dtype=dtype, packed=packed))


@dtypes
@pytest.mark.parametrize("batch,seq", ROWS)
def test_row_boundaries(rng, dtype, batch, seq):
    check(qkv(rng, batch, seq, 61, (4, 2, 16), dtype=dtype))
    check(output(rng, batch, seq, 61, 67, dtype=dtype))


@dtypes
@pytest.mark.parametrize("hidden", [0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 60, 61, 64, 100, 127, 129, 512, 1000])
def test_reduction_tails(rng, dtype, hidden):
    for seq in (1, 3, 34):
        check(qkv(rng, 1, seq, hidden, (3, 1, 11), dtype=dtype))
        check(output(rng, 1, seq, hidden, 37, dtype=dtype))


@dtypes
@biases
@pytest.mark.parametrize("hidden_out", [0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 129])
def test_output_widths(rng, dtype, bias, hidden_out):
    for seq in (1, 4, 33):
        check(output(rng, 2, seq, 48, hidden_out, dtype=dtype, bias=bias))


@dtypes
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_block_boundaries(rng, dtype, extra):
    # The powers of two at which a kernel may go on to another block of rows, of columns or of the reduction.
    sizes = ((256, 64, 48), (512, 40, 96), (40, 512, 256), (40, 1024, 512), (7, 2048, 128))
    for seq, hidden, hidden_out in sizes:
        check(output(rng, 1, seq + extra, hidden + extra, hidden_out + extra, dtype=dtype))


@dtypes
@pytest.mark.parametrize("batch,seq", ROWS)
def test_activations_at_row_boundaries(rng, dtype, batch, seq):
    for packing in (None, *PACKINGS):
        check(gated(rng, batch, seq, 61, 67, dtype=dtype, packing=packing))
    check(linear(rng, batch, seq, 61, 67, dtype=dtype, activation="gelu_approx"))


@dtypes
@biases
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 129, 600])
def test_activations_of_every_width(rng, dtype, bias, activation, width):
    for seq in (1, 4, 33):
        for hidden in (0, 1, 48):
            options = {"dtype": dtype, "bias": bias, "activation": activation}
            if width:
                check(gated(rng, 2, seq, hidden, width, packing="interleaved", **options))
            if activation != "clipped_swiglu":
                check(linear(rng, 2, seq, hidden, width, **options))


@dtypes
def test_decode_of_a_wide_mlp(rng, dtype):
    check(gated(rng, 1, 1, 2048, 1500, dtype=dtype))
    check(linear(rng, 1, 1, 2048, 1500, dtype=dtype))


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_any_axes_before_the_features(rng, leading):
    x, residual = (operands.normal(rng, (*leading, n)) for n in (24, 7))
    for call in (
        gated(rng, 1, 1, 24, 7),
        linear(rng, 1, 1, 24, 7, activation="gelu"),
        output(rng, 1, 1, 24, 7).replace(residual=residual),
    ):
        call = call.replace(x=x)
        (y,) = check_forward(call)
        assert y.shape == (*leading, 7)
        check_gradients(call, cotangents(rng, call))


def test_float16_gates_that_overflow_are_kept_as_infinity():
    """As separate layers have them: a loss scale must see that a gradient is not finite."""
    x, gate, up = mx.full((1, 1, 2), 200.0, mx.float16), mx.full((3, 2), 200.0), mx.full((3, 2), 1e-3)
    weights = gate.astype(mx.float16), up.astype(mx.float16)

    def fused(x, **options):
        return mlx_fused.fused_gated_projection(x, weights, **options)

    def stock(x):
        return nn.silu(x @ weights[0].T) * (x @ weights[1].T)

    assert abs(fused(x, route="fused") - 80000 * 0.4).max() < 100
    for f in (
        stock,
        partial(fused, route="fused"),
        partial(fused, route="composed"),
        partial(fused, exact=True),
    ):
        (grad,) = mx.vjp(f, [x], [mx.ones((1, 1, 3), mx.float16)])[1]
        assert not mx.isfinite(grad).any()


@pytest.mark.parametrize("alpha,limit", [(1.0, 0.5), (1.702, 1e30), (0.0, 2.0), (3.0, 0.0)])
def test_alpha_and_limit(rng, alpha, limit):
    call = gated(rng, 2, 9, 24, 33, activation="clipped_swiglu").replace(alpha=alpha, limit=limit)
    check(call)
    check_gradients(call, cotangents(rng, call))


@pytest.mark.parametrize("route", ["fused", "composed"])
def test_at_the_limit_clips_have_no_slope_as_those_of_mlx(route):
    x, weight = mx.array([[6.0], [7.0], [8.0], [-7.0], [-8.0]]), mx.ones((1, 1))

    def gradient(layers, bias):
        def f(x):
            return mlx_fused.fused_gated_projection(x, layers, bias, activation="clipped_swiglu", route=route)

        return (mx.vjp(f, [x], [mx.ones((5, 1))])[1][0] != 0).flatten().tolist()

    of_gate, of_up = (weight, 0 * weight), (0 * weight, weight)
    assert gradient(of_gate, (mx.zeros(1), mx.ones(1))) == [True, False, False, True, True]
    assert gradient(of_up, (mx.ones(1), mx.zeros(1))) == [True, False, False, False, False]


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_nan_infinity_and_what_lies_far_out(dtype, activation):
    """x is what the activation is of, and up is 1."""
    largest = mx.finfo(dtype).max
    values = [np.nan, np.inf, largest, 1e4, 100.0, 20.0, 0.0, -0.0, -20.0, -100.0, -1e4, -largest]
    x = mx.array(values).astype(dtype)[None, :, None]
    one, zero = mx.ones((1, 1), dtype), mx.zeros(1, dtype)
    call = Call("fused_gated_projection", {"x": x, "weight": (one, 0 * one), "bias": (zero, 1 + zero)})
    call = call.replace(activation=activation)
    check(call)
    (d_x,) = gradients(call, [("x", None)], [mx.ones_like(x)])
    of_nan, _, *others = oracle.exact(d_x).flatten()
    assert np.isnan(of_nan) or "relu" in activation
    assert activation == "relu2" or np.all(np.abs(others) < 2.5)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_slopes_from_minus_100_to_100(dtype, activation):
    """x is what the activation is of, and up is 1."""
    x = mx.array(np.linspace(-100, 100, 20001)).astype(dtype)[None, :, None]
    one, zero = mx.ones((1, 1), dtype), mx.zeros(1, dtype)
    call = Call("fused_gated_projection", {"x": x, "weight": (one, 0 * one), "bias": (zero, 1 + zero)})
    call = call.replace(activation=activation)
    ones = np.ones(x.shape)
    of, pre, none = oracle.Activation(activation, gated=True), [oracle.exact(x), ones], (0, 0)
    oracle.assert_rounded(call()[0], of(pre), of.errors(pre, none))
    (d_x,) = gradients(call, [("x", None)], [mx.ones_like(x)])
    oracle.assert_rounded(d_x, of.gradients(ones, pre)[0], of.gradient_errors(ones, pre, none)[0])


@dtypes
def test_larger_than_a_tile(rng, dtype):
    check(qkv(rng, 2, 150, 700, (4, 2, 67), dtype=dtype))
    check(output(rng, 3, 100, 700, 600, dtype=dtype))
    check(gated(rng, 3, 100, 700, 600, dtype=dtype))


@dtypes
def test_decode_of_a_wide_layer(rng, dtype):
    check(qkv(rng, 1, 1, 2048, (16, 4, 64), dtype=dtype))
    check(output(rng, 1, 1, 2048, 1500, dtype=dtype))


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

    call = qkv(rng, 1, seq, 33, (2, 1, 9), dtype=dtype)
    for key in (("input", None), ("weight", 1), ("bias", 2)):
        check(call.with_leaves({key: poison(call.leaves[key])}))
    for call in (
        output(rng, 1, seq, 33, 21, dtype=dtype),
        gated(rng, 1, seq, 33, 21, dtype=dtype, activation="gelu_approx"),
        linear(rng, 1, seq, 33, 21, dtype=dtype, activation="gelu"),
    ):
        for key, a in call.leaves.items():
            check(call.with_leaves({key: poison(a)}))


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
    call = qkv(rng, 2, 3, 16, (2, 1, 8), bias=b_dtype is not None, packed=True)
    types = {"input": x_dtype, "weight": w_dtype, "bias": b_dtype}
    call = call.with_leaves({key: a.astype(types[key[0]]) for key, a in call.leaves.items()})
    outputs = check_forward(call)
    assert [y.dtype for y in outputs] == [y.dtype for y in call(route="composed")]


@pytest.mark.parametrize("x_dtype", operands.DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", [(a, b) for a in operands.DTYPES for b in operands.DTYPES], ids=str)
def test_gate_and_up_promote_together(rng, x_dtype, dtypes):
    call = gated(rng, 2, 3, 16, 7, bias=False)
    call = call.replace(
        weight=tuple(w.astype(t) for w, t in zip(call.arguments["weight"], dtypes, strict=True))
    )
    call = call.replace(x=call.x.astype(x_dtype))
    (y,) = call()
    assert y.dtype == mx.result_type(call.x, *call.arguments["weight"])
    grads = gradients(call, call.trainable, [mx.ones_like(y)])
    assert [g.dtype for g in grads] == [call.leaves[key].dtype for key in call.trainable]
    expected = call.formula(*call.exact_operands)[0]
    unit = max(oracle.UNIT_ROUNDOFF[t] for t in (x_dtype, *dtypes))
    np.testing.assert_allclose(oracle.exact(y), expected, rtol=0, atol=32 * unit * np.abs(expected).max())


def test_each_segment_promotes_on_its_own(rng):
    call = qkv(rng, 2, 3, 16, (2, 1, 8), dtype=mx.bfloat16, bias=False)
    types = {("weight", 1): mx.float32, ("weight", 2): mx.float16}
    outputs = check_forward(call.with_leaves({key: call.leaves[key].astype(t) for key, t in types.items()}))
    assert [y.dtype for y in outputs] == [mx.bfloat16, mx.float32, mx.float32]


@pytest.mark.parametrize("wide", range(4))
def test_output_promotes_over_every_operand(rng, wide):
    call = output(rng, 2, 3, 16, 8, dtype=mx.float16)
    key = list(call.leaves)[wide]
    call = call.with_leaves({key: call.leaves[key].astype(mx.float32)})
    assert call()[0].dtype == call(route="composed")[0].dtype == mx.float32


@packings
def test_float64(rng, packed):
    check(qkv(rng, 2, 7, 30, (4, 2, 5), dtype=mx.float64, packed=packed), roundings=3)
    check(output(rng, 2, 7, 30, 12, dtype=mx.float64), roundings=3)


@packings
@biases
def test_the_composed_forms_mean_the_same(rng, packed, bias):
    check(qkv(rng, 3, 5, 33, (6, 2, 7), bias=bias, packed=packed), roundings=3, route="composed")
    check(output(rng, 3, 5, 33, 21, bias=bias), roundings=3, route="composed")


def test_arguments_by_name_and_a_stream(rng):
    for stream in (mx.cpu, mx.new_stream(mx.cpu)):
        call = qkv(rng, 1, 3, 8, (2, 1, 4))
        a = call.arguments
        outputs = mlx_fused.fused_qkv_projection(
            input=a["input"],
            weight=a["weight"],
            bias=a["bias"],
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            stream=stream,
        )
        assert isinstance(outputs, tuple)
        check_outputs(call, outputs)
        call = output(rng, 1, 3, 8, 5)
        a = call.arguments
        out = mlx_fused.fused_output_projection_residual(
            x=a["x"], weight=a["weight"], bias=a["bias"], residual=a["residual"], stream=stream
        )
        check_outputs(call, out)


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
    few = output(rng, 1, 1, hidden, 2, dtype=dtype, bias=False, draw=operands.integers)
    few = few.replace(residual=mx.zeros((1, 1, 2), dtype))
    x, residual = (mx.broadcast_to(a, (batch, 1, a.shape[-1])) for a in (few.x, few.arguments["residual"]))
    (out,) = few.replace(x=x, residual=residual)()
    check_outputs(few, out[-1:])
