"""Operands that are views: transposed, sliced, offset, reversed, broadcast, overlapping."""

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
from projections import backward, check_backward, check_forward, check_gradients, cotangents, output, qkv
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


def each_and_all(arrays, view):
    """The arrays, by key, with each of them in turn replaced by a view of it, then with all of them."""
    everything = {key: view(a) for key, a in arrays.items()}
    return *(arrays | {key: a} for key, a in everything.items()), everything


def check_views(rng, call, view):
    """Forward of each and of all, and the gradients of all."""
    for leaves in each_and_all(call.leaves, view):
        laid_out = call.with_leaves(leaves)
        check_forward(laid_out)
    check_gradients(laid_out, tuple(map(view, cotangents(rng, call))))


def check_backward_of_views(rng, call, view):
    given = dict(enumerate(cotangents(rng, call)))
    read = {key: a for key, a in call.leaves.items() if key[0] not in ("bias", "residual")}
    for arrays in each_and_all(given | read, view):
        laid_out = call.with_leaves({key: arrays[key] for key in read})
        check_backward(laid_out, [arrays[i] for i in given])


@views
@dtypes
@pytest.mark.parametrize("batch,seq", [(1, 1), (3, 1), (1, 7), (2, 5), (3, 40)])
def test_views(rng, view, dtype, batch, seq):
    calls = [qkv(rng, batch, seq, 21, HEADS, dtype=dtype), output(rng, batch, seq, 21, 19, dtype=dtype)]
    if (batch, seq) == (2, 5):
        calls.append(qkv(rng, batch, seq, 21, HEADS, dtype=dtype, packed=True))
    for call in calls:
        check_views(rng, call, view)
        check_backward_of_views(rng, call, view)


@dtypes
@pytest.mark.parametrize("batch,seq", [(1, 1), (3, 1), (2, 5)])
def test_attention_layouts(rng, dtype, batch, seq):
    """What attention hands on: heads merged by a transposition, cotangents in [B, S, heads, D] order."""
    num_heads, _, head_dim = HEADS
    heads = operands.normal(rng, (batch, num_heads, seq, head_dim), dtype)
    merged = heads.swapaxes(1, 2).flatten(2)
    check_forward(output(rng, batch, seq, num_heads * head_dim, 19, dtype=dtype).replace(x=merged))
    call = qkv(rng, batch, seq, 21, HEADS, dtype=dtype)
    check_backward(call, [mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2) for g in cotangents(rng, call)])


@dtypes
def test_views_of_one_packed_array_as_separate_weights(rng, dtype):
    packed = qkv(rng, 2, 5, 21, HEADS, dtype=dtype, packed=True)
    check_forward(apart(packed))


def apart(call):
    """The call with views of its packed arrays in their place, one for each segment."""
    cuts = [int(n) for n in np.cumsum(call.features)[:-1]]
    return call.replace(**{name: tuple(mx.split(call.leaves[name, None], cuts)) for name, _ in call.packed})


@dtypes
def test_operands_are_left_as_they_were(rng, dtype):
    call = output(rng, 2, 5, 21, 19, dtype=dtype)
    given = (call.arguments["residual"],)
    before = oracle.exact(tuple(call.leaves.values()))
    mx.eval(call())
    mx.eval(backward(call, given))
    oracle.assert_equal(tuple(call.leaves.values()), before)


@dtypes
def test_results_feed_other_operations(rng, dtype):
    """The outputs' own strides are what MLX believes them to be."""
    outputs = qkv(rng, 2, 5, 21, HEADS, dtype=dtype)()
    for change in (lambda y: y.swapaxes(1, 2).flatten(2), lambda y: y[:, ::-1, 1:], mx.contiguous):
        expected = [change(mx.array(y, dtype=mx.float32)) for y in oracle.exact(outputs)]
        oracle.assert_equal([change(y) for y in outputs], expected)
