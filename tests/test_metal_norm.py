"""The norm of few rows' input on the Metal kernels, by the library's own plans on the simulator."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
import projections
from metal_plan import Embedded, forward

dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
FORMS = {"dense": None, "affine_4": ("affine", 64, 4), "nvfp4": ("nvfp4", 16, 4)}
# Each kernel compiles for half a second.
SOME = [("dense", dtype) for dtype in operands.DTYPES] + [("affine_4", mx.bfloat16), ("nvfp4", mx.float16)]
kinds = pytest.mark.parametrize(
    "form, dtype",
    [
        pytest.param(
            FORMS[name], dtype, id=f"{name}-{dtype}", marks=[pytest.mark.slow] * ((name, dtype) not in SOME)
        )
        for name, dtype in product(FORMS, operands.DTYPES)
    ],
)
weights = pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
HEAD = (4, 2, 20)


def calls(rng, batch, rows, hidden, form=None, dtype=mx.float32, draw=operands.normal):
    options = {"form": form, "dtype": dtype, "draw": draw}
    yield projections.qkv(rng, batch, rows, hidden, HEAD, **options)
    yield projections.linear(rng, batch, rows, hidden, 70, **options)
    yield projections.gated(rng, batch, rows, hidden, 70, **options)


def check_exactly(rng, op, weighted, **options):
    """On rows whose root mean square is a power of two, and small integers, so that the bits are known."""
    of_rows, before = projections.with_norm(rng, op, weighted)
    call, outputs = forward(of_rows, **options)
    assert [launch["kernel"].startswith("projection_rows_normed") for launch in call.plan] == [True]
    call.assert_written_once()
    oracle.assert_equal(outputs, forward(before)[1])


@kinds
@weights
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (1, 4), (1, 5), (2, 4)], ids=str)
def test_exactly(rng, shape, weighted, form, dtype):
    for op in calls(rng, *shape, 64, form, dtype, operands.integers):
        check_exactly(rng, op, weighted)


@dtypes
@weights
@pytest.mark.parametrize("hidden", [1, 3, 61, 127, 255, 256, 257, 600])
def test_depths(rng, hidden, weighted, dtype):
    for op in calls(rng, 1, 3, hidden, None, dtype, operands.integers):
        check_exactly(rng, op, weighted)


@pytest.mark.parametrize("features", [4, 5, 31, 32, 33, 65])
def test_features(rng, features):
    for make in (projections.linear, projections.gated):
        check_exactly(rng, make(rng, 1, 2, 20, features, draw=operands.integers), True)


def test_rows_apart(rng):
    for op in calls(rng, 2, 3, 64, FORMS["affine_4"], mx.bfloat16, operands.integers):
        check_exactly(rng, op, True, kind=Embedded)


@dtypes
@weights
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_it_is_the_root_mean_square(rng, eps, weighted, dtype):
    for op in calls(rng, 1, 3, 200, None, dtype):
        weight = operands.normal(rng, (200,), dtype) if weighted else None
        before = op.replace(**{op.input_name: mx.fast.rms_norm(op.x, weight, eps)})
        _, outputs = forward(op.replace(norm=(weight, eps)))
        # A value of the norm may be the next one of its dtype: one rounding more of every product.
        size = np.abs(oracle.exact(before.x))
        flips = 2.0 ** {mx.float32: -21, mx.float16: -10, mx.bfloat16: -7}[dtype]
        if op.activation:
            pre, errors = before.pre(dtype, 0)
            moved = oracle.projection(*oracle.magnitudes((flips * size, *before.exact_operands[1:6])))
            errors = [e + m for e, m in zip(errors, moved, strict=True)]
            y, error = op.activation(pre), op.activation.errors(pre, errors)
            oracle.assert_rounded(outputs[0], y, error)
            continue
        expected = before.formula(*before.exact_operands)
        x, terms, *_ = oracle.magnitudes(before.exact_operands)
        none = [None] * len(terms)
        sizes = oracle.projection(x, terms, none, none, none, np.ones(len(terms)))
        for y, e, s in zip(outputs, expected, before.laid_out(sizes), strict=True):
            error = flips * s + oracle.sum_error(s, before.forward_terms, dtype)
            oracle.assert_rounded(y, e, error)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_row(rng, value):
    op = projections.gated(rng, 1, 3, 64, 70, FORMS["affine_4"])
    op.x[0, 1, 63] = value
    (y,) = forward(op.replace(norm=(mx.ones(64), 1e-5)))[1]
    assert mx.all(mx.isnan(y[0, 1])).item()
    assert mx.all(mx.isfinite(y[0, ::2])).item()


@pytest.mark.parametrize("seed", range(1, 4))
def test_any_order_of_threads_gives_the_same(rng, seed):
    op = projections.gated(rng, 2, 3, 64, 70, FORMS["affine_4"]).replace(norm=(mx.ones(64), 1e-5))
    oracle.assert_equal(forward(op, seed=seed)[1], forward(op)[1])


def test_without_a_norm_there_is_no_memory_for_it(rng):
    for op in calls(rng, 1, 3, 64, FORMS["affine_4"]):
        for norm, least, most in ((None, 0, 256), ((mx.ones(64), 1e-5), 16384, 20480)):
            call, _ = forward(op.replace(norm=norm) if norm else op)
            assert least <= call.results[0].threadgroup_bytes <= most


@dtypes
def test_as_long_as_there_is_memory(rng, dtype):
    """16 KB of normed rows."""
    size = dtype.size
    op = projections.linear(rng, 1, 4, 4096 // size, 4, None, dtype, draw=operands.integers)
    check_exactly(rng, op, True)
