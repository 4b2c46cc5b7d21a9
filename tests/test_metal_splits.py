"""Tiles that split their depth, and weights that lie column by column, by the library's own plans."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
import projections
import quantized
from metal_plan import Call, Embedded, Transposed, backward, forward

dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
FORMS = [None, ("affine", 64, 4), ("affine", 32, 3), ("nvfp4", 16, 4)]
forms = pytest.mark.parametrize("form", FORMS, ids=str)
HEAD = (4, 2, 20)
CORES = 40  # more than any of these shapes fills


def names(call):
    return [launch["kernel"].rpartition("_")[0] for launch in call.plan]


def check_plan(call, splits, kernel, batches):
    """After low-rank products there is a launch of tiles, and one that adds up their splits, if any."""
    first = names(call)[0].startswith("low_rank_product")
    assert names(call)[first + 1 :] == [kernel] * (splits > 1)
    assert call.plan[first]["grid"][2] == splits * batches


def as_in_tiles(op):
    exact = op.x.dtype == mx.float32 or not op.quantization
    return op.exact_operands if exact else quantized.in_tiles(op.exact_operands, op.x.dtype)


def check_forward(op, splits, kind=Call, cores=CORES):
    call, outputs = forward(op, kind, cores=cores)
    oracle.assert_close(outputs, op.formula, *as_in_tiles(op), terms=op.forward_terms)
    call.assert_written_once()
    check_plan(call, splits, "projection_splits", len(op.x))


def check_backward(rng, op, splits, kind=Call, cores=CORES):
    keys = [key for key in op.leaves if key[0] in ("input", "x")]
    given = projections.cotangents(rng, op)
    call, grads = backward(op, given, keys, kind, cores=cores)
    oracle.assert_close(grads, op.gradient_formula(keys), given, *as_in_tiles(op), terms=op.gradient_terms)
    call.assert_written_once()
    check_plan(call, splits, "input_grad_splits", len(op.x))


# Whole blocks and not, even shares and not; up to 32 rows a split is at least 128 deep, from there 4 rows.
DEPTHS = [(255, 1), (256, 2), (261, 2), (500, 3), (640, 5)]


@dtypes
@pytest.mark.parametrize("hidden, splits", DEPTHS)
def test_dense_projection(rng, hidden, splits, dtype):
    for rows, bias in ((9, True), (31, False)):
        check_forward(projections.qkv(rng, 1, rows, hidden, HEAD, None, dtype, bias), splits)
    check_forward(projections.output(rng, 1, 17, hidden, 90, None, dtype, alpha=0.75), splits)


@dtypes
@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_quantized_projection(rng, form, dtype):
    for rows, bias in ((9, True), (31, False)):
        check_forward(projections.qkv(rng, 1, rows, 448, HEAD, form, dtype, bias), 3)
    check_forward(projections.output(rng, 1, 70, 832, 90, form, dtype, alpha=0.75), 2)


@pytest.mark.parametrize("rows, splits", [(33, 4), (64, 2), (65, 2), (75, 2), (76, 1)])
def test_more_rows_make_deeper_splits(rng, rows, splits):
    check_forward(projections.output(rng, 1, rows, 607, 70), splits)


@pytest.mark.parametrize("cores, splits", [(0, 1), (1, 2), (2, 4), (3, 5), (80, 5)])
def test_no_more_splits_than_the_cores_need(rng, cores, splits):
    """8 threadgroups per core; there are 4 tiles."""
    check_forward(projections.qkv(rng, 1, 20, 640, HEAD), splits, cores=cores)


@dtypes
@forms
@pytest.mark.parametrize("heads, splits", [(HEAD, 2), ((2, 1, 96), 3), ((6, 2, 40, 7), 4), ((1, 1, 300), 6)])
def test_input_gradient(rng, heads, splits, form, dtype):
    """Splits end between heads and within them."""
    for rows in (9, 31):
        check_backward(rng, projections.qkv(rng, 1, rows, 128, heads, form, dtype), splits)


@dtypes
@forms
def test_adapters_and_batches_apart(rng, form, dtype):
    options = {"ranks": (33, None, 3), "scale": (2.0, 1.0, 3.0)}
    op = projections.qkv(rng, 3, 9, 320, (4, 2, 32), form, dtype, **options)
    check_forward(op, 2, Embedded)
    check_backward(rng, op, 2, Embedded)


@dtypes
@forms
def test_exact_rounds_where_modules_do(rng, form, dtype):
    """The same bits, on integers."""
    draw = operands.large_integers if form is None else operands.integers
    for op in (
        projections.qkv(rng, 1, 20, 320, HEAD, form, dtype, ranks=(8, None, 3), draw=draw),
        projections.output(rng, 1, 20, 320, 70, form, dtype, rank=9, alpha=0.75, draw=draw),
    ):
        call, outputs = forward(op.replace(exact=True), cores=CORES)
        assert names(call)[2:] == ["projection_splits"]
        for y, e in zip(outputs, op.rounded_formula(dtype), strict=True):
            np.testing.assert_array_equal(oracle.exact(y), e)


@dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("rows", [1, 8, 31, 33, 64, 65])
def test_transposed_weights(rng, rows, packed, dtype):
    for hidden, heads in ((37, HEAD), (64, (2, 1, 64)), (80, (2, 1, 33))):
        op = projections.qkv(rng, 1, rows, hidden, heads, None, dtype, packed, packed)
        kind = partial(Transposed, op)
        check_forward(op, 1, kind, 0)
        check_backward(rng, op, 1, kind, 0)


@dtypes
def test_transposed_weights_with_all_there_is(rng, dtype):
    op = projections.output(rng, 1, 40, 340, 140, None, dtype, rank=5, alpha=0.75)
    for splits, cores in ((1, 0), (2, CORES)):
        check_forward(op, splits, partial(Transposed, op), cores)
    for heads, splits in (((4, 2, 40), 3), ((2, 1, 150), 4)):
        op = projections.qkv(rng, 2, 20, 70, heads, None, dtype, ranks=(8, None, 3))
        check_backward(rng, op, 1, partial(Transposed, op), cores=0)
        check_backward(rng, op, splits, partial(Transposed, op))
