"""The two explicit backward operations against the oracle, and the oracle against finite differences."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import oracle
from projections import (
    ACTIVATIONS,
    PACKINGS,
    backward,
    check_backward,
    cotangents,
    gated,
    gradients,
    linear,
    output,
    qkv,
)
from test_forward import HEADS, ROWS, biases, dtypes, packings


def check(rng, call, **options):
    check_backward(call, cotangents(rng, call), **options)


@dtypes
@biases
@packings
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_qkv_heads(rng, dtype, bias, packed, heads):
    check(rng, qkv(rng, 2, 5, 24, heads, dtype=dtype, bias=bias, packed=packed))


@dtypes
@pytest.mark.parametrize("ratio", range(1, 9))
def test_qkv_every_query_group_size(rng, dtype, ratio):
    check(rng, qkv(rng, 2, 3, 20, (2 * ratio, 2, 6), dtype=dtype))


@dtypes
@packings
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 80, 96, 128, 256])
def test_qkv_head_dims(rng, dtype, packed, head_dim):
    for batch, seq in ((3, 1), (2, 9)):
        check(rng, qkv(rng, batch, seq, 40, (4, 2, head_dim), dtype=dtype, packed=packed))


@dtypes
@pytest.mark.parametrize("batch,seq", ROWS)
def test_row_boundaries(rng, dtype, batch, seq):
    check(rng, qkv(rng, batch, seq, 61, (4, 2, 16), dtype=dtype))
    check(rng, output(rng, batch, seq, 61, 67, dtype=dtype))


@dtypes
@biases
@pytest.mark.parametrize("hidden_in", [0, 1, 2, 15, 16, 17, 31, 33, 60, 61, 100, 512])
@pytest.mark.parametrize("hidden_out", [0, 1, 7, 16, 33, 129])
def test_output_widths(rng, dtype, bias, hidden_in, hidden_out):
    for seq in (1, 3, 34):
        check(rng, output(rng, 2, seq, hidden_in, hidden_out, dtype=dtype, bias=bias))


@dtypes
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_block_boundaries(rng, dtype, extra):
    # The powers of two at which a kernel may go on to another block of rows, of columns or of the reduction.
    sizes = ((256, 64, 48), (512, 40, 96), (1024, 32, 40), (40, 512, 256), (6, 256, 1024))
    for seq, hidden_in, hidden_out in sizes:
        check(rng, output(rng, 1, seq + extra, hidden_in + extra, hidden_out + extra, dtype=dtype))


@dtypes
def test_larger_than_a_tile(rng, dtype):
    check(rng, qkv(rng, 2, 150, 700, (4, 2, 67), dtype=dtype))
    check(rng, output(rng, 3, 100, 700, 600, dtype=dtype))


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
        d_x, *_ = mlx_fused.fused_output_projection_residual_bwd(
            mx.ones((1, rows, n), dtype), mx.ones((1, rows, 2), dtype), mx.ones((n, 2), dtype), False
        )
        assert (d_x == n).all()


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_propagate(rng, dtype, value):
    def poison(a):
        values = np.array(a.astype(mx.float32))
        values.flat[values.size // 2] = value
        return mx.array(values).astype(dtype)

    for seq in (1, 40):
        call = qkv(rng, 1, seq, 9, (2, 1, 5), dtype=dtype)
        given = cotangents(rng, call)
        for i in range(3):
            check_backward(call, [poison(g) if i == j else g for j, g in enumerate(given)])
        check_backward(call.replace(input=poison(call.x)), given)


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_zero_times_nan_is_nan(dtype, value):
    # One bad element per row, at every place along the reduction, against nothing but zeros.
    n = 37
    bad, zeros = mx.where(mx.eye(n) == 1, value, 0).astype(dtype), mx.zeros((n, n), dtype)
    for g, a, w in ((zeros[None], bad[None], bad), (bad[None], zeros[None], zeros)):
        d_x, d_weight, *_ = mlx_fused.fused_output_projection_residual_bwd(g, a, w, False)
        assert mx.isnan(d_x).all() and mx.isnan(d_weight).all()


@packings
def test_float64(rng, packed):
    check(rng, qkv(rng, 2, 7, 30, (4, 2, 5), dtype=mx.float64, packed=packed), roundings=3)
    check(rng, output(rng, 2, 7, 30, 12, dtype=mx.float64), roundings=3)


def test_mixed_dtypes_give_each_argument_its_own_gradient_dtype(rng):
    call = qkv(rng, 2, 3, 16, (2, 1, 8), dtype=mx.float32)
    given, types = cotangents(rng, call), {None: mx.bfloat16, 0: mx.float32, 1: mx.bfloat16, 2: mx.float16}
    call = call.with_leaves({(name, i): a.astype(types[i]) for (name, i), a in call.leaves.items()})
    check_backward(call, given)


def check_slopes(rng, call, given, grads, groups):
    """The gradients of the trainable arrays are the slopes of <formula, given> along groups of them.

    By central differences, exact for what is of degree two at most, and of small steps for the rest.
    """
    step, precision = (1e-6, 1e-7) if call.activation else (1.0, 1e-11)
    given, grads = oracle.exact(given), dict(zip(call.trainable, oracle.exact(grads), strict=True))

    def outputs(steps):
        moved = {k: call.leaves[k].astype(mx.float64) + mx.array(s, mx.float64) for k, s in steps.items()}
        return call.formula(*call.with_leaves(moved).exact_operands)

    for keys in groups:
        steps = {key: step * rng.standard_normal(grads[key].shape) for key in keys}
        ahead, behind = outputs(steps), outputs({key: -step for key, step in steps.items()})
        slope = sum(np.vdot(g, a - b) / 2 for g, a, b in zip(given, ahead, behind, strict=True))
        along = sum(np.vdot(grads[key], step) for key, step in steps.items())
        size = sum(np.abs(grads[key] * step).sum() for key, step in steps.items())
        assert along == pytest.approx(slope, rel=0, abs=precision * size)


@pytest.mark.parametrize("operation", ["separate", "packed", "output"])
def test_agrees_with_finite_differences(rng, operation):
    call = output(rng, 2, 3, 10, 7, dtype=mx.float64)
    if operation != "output":
        call = qkv(rng, 2, 3, 10, (4, 2, 6), dtype=mx.float64, packed=operation == "packed")
    given, keys = cotangents(rng, call), call.trainable
    by_oracle = call.gradient_formula(keys)(oracle.exact(given), *call.exact_operands)
    for grads in (by_oracle, oracle.leaves(backward(call, given))):
        check_slopes(rng, call, given, grads, [[key] for key in keys] + [keys])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_agree_with_finite_differences(rng, activation):
    """The oracle's, and those of MLX's own operations in float64."""
    options = {"dtype": mx.float64, "activation": activation, "adapter_dtype": mx.float64}
    calls = [gated(rng, 2, 3, 10, 7, packing=p, ranks=(3, 3), **options) for p in (None, *PACKINGS)]
    if activation != "clipped_swiglu":
        calls.append(linear(rng, 2, 3, 10, 7, rank=3, **options))
    for call in calls:
        given, keys = cotangents(rng, call), call.trainable
        by_oracle = call.gradient_formula(keys)(oracle.exact(given), *call.exact_operands)
        for grads in (by_oracle, gradients(call, keys, given)):
            check_slopes(rng, call, given, grads, [[key] for key in keys] + [keys])
