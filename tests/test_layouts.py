"""Operands that are views: transposed, sliced, offset, reversed, broadcast, overlapping."""

import mlx.core as mx
import pytest

import mlx_fused
import operands
import oracle
from test_forward import dtypes

HEADS = (4, 2, 6)


def transposed(a):
    """The same values, stored with the axes in reverse order."""
    return mx.contiguous(a.T).T


def rotated(a):
    """The same values, stored with the first axis last."""
    return mx.moveaxis(mx.contiguous(mx.moveaxis(a, 0, -1)), -1, 0)


def sliced(a):
    """A window, at an offset, of an array two larger on every axis, NaN around it."""
    padded = mx.pad(a, 1, constant_values=mx.array(float("nan"), a.dtype))
    return padded[tuple(slice(1, -1) for _ in a.shape)]


def strided(a):
    """Every second element of every axis, NaN in between."""
    spread = mx.full([2 * n for n in a.shape], mx.array(float("nan"), a.dtype))
    index = tuple(slice(None, None, 2) for _ in a.shape)
    spread[index] = a
    return spread[index]


def reversed_(a):
    """Stored backwards on every axis, so that every stride is negative."""
    backwards = (slice(None, None, -1),) * a.ndim
    return mx.contiguous(a[backwards])[backwards]


def broadcast(a):
    """The first element of the first axis, repeated with a stride of zero."""
    return mx.broadcast_to(a[:1], a.shape)


def broadcast_last(a):
    return mx.broadcast_to(a[..., :1], a.shape)


def scalar(a):
    return mx.broadcast_to(a.reshape(-1)[:1].reshape([1] * a.ndim), a.shape)


def overlapping(a):
    """Neighbours along the first axis share all but one element."""
    strides = [1] * a.ndim
    return mx.as_strided(a, a.shape, strides)


VIEWS = [transposed, rotated, sliced, strided, reversed_, broadcast, broadcast_last, scalar, overlapping]
views = pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)


def each_and_all(args, view):
    """The operands with each of them in turn replaced by a view of it, then with all of them replaced."""
    for i in range(len(args)):
        yield [view(a) if i == j else a for j, a in enumerate(args)]
    yield [view(a) for a in args]


def check_qkv(x, wq, wk, wv, bq, bk, bv):
    args = (x, (wq, wk, wv), (bq, bk, bv), *HEADS)
    oracle.assert_close(mlx_fused.fused_qkv_projection(*args), oracle.fused_qkv_projection, *args)


def check_qkv_bwd(dq, dk, dv, x, wq, wk, wv):
    args = (dq, dk, dv, x, (wq, wk, wv), True, *HEADS)
    grads = mlx_fused.fused_qkv_projection_bwd(*args)
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args)


@views
@dtypes
@pytest.mark.parametrize("batch,seq", [(1, 1), (3, 1), (1, 7), (2, 5), (3, 40)])
def test_views(rng, view, dtype, batch, seq):
    x, weight, bias = operands.qkv(rng, batch, seq, 21, HEADS, dtype)
    for args in each_and_all((x, *weight, *bias), view):
        check_qkv(*args)
    cotangents = operands.qkv_cotangents(rng, batch, seq, HEADS, dtype)
    for args in each_and_all((*cotangents, x, *weight), view):
        check_qkv_bwd(*args)
    a, w, b, r = operands.output(rng, batch, seq, 21, 19, dtype)
    for args in each_and_all((a, w, b, r), view):
        out = mlx_fused.fused_output_projection_residual(*args)
        oracle.assert_close(out, oracle.fused_output_projection_residual, *args)
    for args in each_and_all((r, a, w), view):
        grads = mlx_fused.fused_output_projection_residual_bwd(*args, True)
        oracle.assert_close(grads, oracle.fused_output_projection_residual_bwd, *args, True)


@views
@dtypes
def test_packed_views(rng, view, dtype):
    x, weight, bias = operands.qkv(rng, 2, 5, 21, HEADS, dtype, packed=True)
    for args in each_and_all((x, weight, bias), view):
        outputs = mlx_fused.fused_qkv_projection(*args, *HEADS)
        oracle.assert_close(outputs, oracle.fused_qkv_projection, *args, *HEADS)
    cotangents = operands.qkv_cotangents(rng, 2, 5, HEADS, dtype)
    for args in each_and_all((*cotangents, x, weight), view):
        grads = mlx_fused.fused_qkv_projection_bwd(*args, True, *HEADS)
        oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args, True, *HEADS)


@dtypes
@pytest.mark.parametrize("batch,seq", [(1, 1), (3, 1), (2, 5)])
def test_attention_layouts(rng, dtype, batch, seq):
    """What attention hands on: heads merged by a transposition, cotangents in [B, S, heads, D] order."""
    num_heads, _, head_dim = HEADS
    width = num_heads * head_dim
    heads = operands.normal(rng, (batch, num_heads, seq, head_dim), dtype)
    merged = heads.swapaxes(1, 2).reshape(batch, seq, width)
    _, w, b, r = operands.output(rng, batch, seq, width, 19, dtype)
    out = mlx_fused.fused_output_projection_residual(merged, w, b, r)
    oracle.assert_close(out, oracle.fused_output_projection_residual, merged, w, b, r)

    x, weight, _ = operands.qkv(rng, batch, seq, 21, HEADS, dtype)
    cotangents = [
        mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2)
        for g in operands.qkv_cotangents(rng, batch, seq, HEADS, dtype)
    ]
    check_qkv_bwd(*cotangents, x, *weight)


@dtypes
def test_views_of_one_packed_array_as_separate_weights(rng, dtype):
    x, packed, bias = operands.qkv(rng, 2, 5, 21, HEADS, dtype, packed=True)
    cuts = [HEADS[0] * HEADS[2], (HEADS[0] + HEADS[1]) * HEADS[2]]
    outputs = mlx_fused.fused_qkv_projection(
        x, tuple(mx.split(packed, cuts)), tuple(mx.split(bias, cuts)), *HEADS
    )
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, packed, bias, *HEADS)


@dtypes
def test_operands_are_left_as_they_were(rng, dtype):
    args = operands.output(rng, 2, 5, 21, 19, dtype)
    before = oracle.exact(args)
    out = mlx_fused.fused_output_projection_residual(*args)
    mx.eval(out)
    del out
    grads = mlx_fused.fused_output_projection_residual_bwd(args[3], args[0], args[1], True)
    mx.eval(grads)
    for a, b in zip(oracle.exact(args), before, strict=True):
        assert (a == b).all()


@dtypes
def test_results_feed_other_operations(rng, dtype):
    """The outputs' own strides are what MLX believes them to be."""
    args = operands.qkv(rng, 2, 5, 21, HEADS, dtype)
    outputs = mlx_fused.fused_qkv_projection(*args, *HEADS)
    for change in (lambda y: y.swapaxes(1, 2).flatten(2), lambda y: y[:, ::-1, 1:], mx.contiguous):
        changed = oracle.exact(tuple(change(y) for y in outputs))
        expected = [change(mx.array(y, dtype=mx.float32)) for y in oracle.exact(outputs)]
        for a, b in zip(changed, oracle.exact(expected), strict=True):
            assert (a == b).all()
