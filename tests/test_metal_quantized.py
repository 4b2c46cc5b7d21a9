"""Quantized weights on the Metal kernels, by the library's own plans on the simulator."""

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
import projections
import quantized
from metal_plan import NAMES, Call, Embedded, backward, forward, libraries
from msl_sim import sparse

# Each kernel compiles for a second or two: of the formats' 189 the sweeps take 14, and the slow tests all.
dtypes = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
packings = pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])

FORMATS = ["affine_2", "affine_3", "affine_4", "affine_5", "affine_6", "affine_8", "mxfp4", "mxfp8", "nvfp4"]
# On both sides of what each kernel takes: 1 to 8 rows, tiles of 32 and of 64.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129]
# Of one group and of several; half a tile's block (nvfp4 alone), and more than the lanes read together (512).
DEPTHS = [("affine", 64, 4, k) for k in (64, 128, 192, 512, 576)]
DEPTHS += [("affine", 32, 3, 32), ("affine", 128, 5, 128), ("affine", 32, 6, 544), ("mxfp8", 32, 8, 96)]
DEPTHS += [("nvfp4", 16, 4, k) for k in (16, 32, 48, 80, 496, 528)]
HEADS = [(2, 2, 32), (2, 1, 64), (3, 1, 80), (4, 1, 96), (5, 1, 33), (6, 1, 7), (7, 1, 1), (1, 1, 256)]
HEADS += [(4, 2, 20, 7), (2, 1, 40, 64)]  # values of another size
HEAD = (4, 2, 20)
FORM = ("affine", 64, 4)
INPUT = [("input", None)]


def one_type(form):
    """A dtype for a form where one has to do."""
    return operands.DTYPES[quantized.FORMATS.index(form) // 3 % 3]


def as_decoded(op, call):
    """The operands as the call's kernel has them."""
    exact = op.x.dtype == mx.float32 or "projection_rows" in call.plan[-1]["kernel"]
    return op.exact_operands if exact else quantized.in_tiles(op.exact_operands, op.x.dtype)


def check_forward(op, **options):
    call, outputs = forward(op, **options)
    assert len(call.plan) == 1
    oracle.assert_close(outputs, op.formula, *as_decoded(op, call), terms=op.forward_terms)
    call.assert_written_once()


def check_backward(rng, op, **options):
    given = projections.cotangents(rng, op)
    keys = [(name, None) for name in ("input", "x") if name in op.arguments]
    call, grads = backward(op, given, keys, **options)
    assert len(call.plan) == 1
    formula, exact = op.gradient_formula(keys), as_decoded(op, call)
    oracle.assert_close(grads, formula, given, *exact, terms=op.gradient_terms)
    call.assert_written_once()


def check(rng, op, **options):
    check_forward(op, **options)
    check_backward(rng, op, **options)


def test_every_instantiation_is_here():
    kernels = ["projection_32", "projection_64", "input_grad_64"]
    kernels += [f"projection_rows_{n}{rows}" for n in ("", "normed_") for rows in range(1, 5)]
    names = {f"{k}_{f}_{dtype}" for k in kernels for f in FORMATS for dtype in NAMES.values()}
    assert {name for name in libraries() if any(f"_{f}_" in name for f in FORMATS)} == names


@pytest.mark.parametrize("form", quantized.FORMATS, ids=str)
def test_every_format(rng, form):
    for rows in (2, 40):
        op = projections.qkv(rng, 1, rows, 128, HEAD, form, one_type(form), packed=True)
        check_forward(op)
    check_backward(rng, op)


@dtypes
@pytest.mark.parametrize("mode,of_scales", quantized.TABLES)
def test_every_byte_of_every_format(mode, of_scales, dtype):
    for rows in (2, 9):
        op = projections.every_byte(mode, of_scales, rows, dtype)
        (expected,) = op.formula(*op.exact_operands)
        oracle.assert_equal(forward(op)[1], (mx.array(expected, mx.float64).astype(dtype),))
    op = projections.every_byte(mode, of_scales, 9, dtype, as_columns=True)
    key, given = ("x", None), (mx.full((1, 9, 1), 0.5, dtype),)
    (expected,) = op.gradient_formula([key])(oracle.exact(given), *op.exact_operands)
    oracle.assert_equal(backward(op, given, [key])[1], (mx.array(expected, mx.float64).astype(dtype),))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
@pytest.mark.parametrize("form", quantized.FORMATS, ids=str)
def test_every_format_at_every_number_of_rows(rng, form, dtype):
    for rows in ROWS:
        check(rng, projections.qkv(rng, 1, rows, 128, HEAD, form, dtype))
        check(rng, projections.output(rng, 1, rows, 256, 90, form, dtype, alpha=0.75))


@dtypes
@packings
@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows(rng, rows, dtype, packed):
    check(rng, projections.qkv(rng, 1, rows, 64, HEAD, FORM, dtype, bias=packed, packed=packed))


@dtypes
@biases
@pytest.mark.parametrize("rows", ROWS)
def test_output_projection_at_every_number_of_rows(rng, rows, dtype, bias):
    check(rng, projections.output(rng, 1, rows, 64, 91, FORM, dtype, bias, alpha=0.75))


@pytest.mark.parametrize("depth", DEPTHS, ids=str)
@pytest.mark.parametrize("rows", [2, 40])
def test_depths(rng, depth, rows):
    *form, hidden = depth
    check(rng, projections.qkv(rng, 1, rows, hidden, HEAD, form, one_type(tuple(form))))


@packings
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("rows", [2, 19, 65])
def test_heads(rng, heads, rows, packed):
    check(rng, projections.qkv(rng, 1, rows, 64, heads, FORM, mx.bfloat16, packed=packed))


@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (2, 5), (33, 1), (2, 17), (2, 65)])
def test_batches(rng, shape):
    check(rng, projections.qkv(rng, *shape, 64, HEAD, FORM))
    check(rng, projections.output(rng, *shape, 64, 70, FORM))


@pytest.mark.parametrize("features", [1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_output_features(rng, features, rows):
    check(rng, projections.output(rng, 1, rows, 64, features, FORM))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_write_is_nothing_to_launch(rng, shape):
    call, _ = forward(projections.qkv(rng, *shape, 64, HEAD, FORM))
    assert call.plan == []


@dtypes
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [3, 20])
def test_exact_sums_are_rounded_where_they_should(rng, rows, exact, dtype):
    """Every sum of small integers is exact, so that the bits are known."""
    draw = operands.integers
    for op in (
        projections.qkv(rng, 2, rows, 64, HEAD, FORM, dtype, draw=draw),
        projections.output(rng, 2, rows, 64, 70, FORM, dtype, alpha=0.5, draw=draw),
    ):
        _, outputs = forward(op.replace(exact=exact))
        expected = op.formula(*op.exact_operands)
        expected = op.rounded_formula(dtype) if exact else [oracle.rounded(e, dtype) for e in expected]
        for y, e in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(oracle.exact(y), e)


@dtypes
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_with_adapters(rng, rows, dtype):
    qkv = projections.qkv(rng, 1, rows, 64, HEAD, FORM, dtype, ranks=(8, None, 3), scale=(2.0, 1.0, -0.5))
    for op in (qkv, projections.output(rng, 1, rows, 64, 70, FORM, dtype, rank=4, alpha=0.75)):
        call, outputs = forward(op)
        oracle.assert_close(outputs, op.formula, *as_decoded(op, call), terms=op.forward_terms)
        given = projections.cotangents(rng, op)
        keys = [key for key in op.leaves if key[0] in ("input", "x", "lora_a", "lora_b")]
        call, grads = backward(op, given, keys)
        formula, exact = op.gradient_formula(keys), as_decoded(op, call)
        oracle.assert_close(grads, formula, given, *exact, terms=op.gradient_terms)


@pytest.mark.parametrize("seed", range(1, 4))
def test_any_order_of_threads_gives_the_same(rng, seed):
    for rows in (5, 70):
        op = projections.qkv(rng, 2, rows, 64, HEAD, FORM)
        oracle.assert_equal(forward(op, seed=seed)[1], forward(op)[1])
        given = projections.cotangents(rng, op)
        oracle.assert_equal(backward(op, given, INPUT, seed=seed)[1], backward(op, given, INPUT)[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_nan_and_inf_stay_in_their_row(rng, rows, value):
    op = projections.qkv(rng, 1, rows, 64, HEAD, FORM)
    op.x[0, rows - 1, 63] = value
    for y in forward(op)[1]:
        assert not mx.any(mx.isfinite(y[0, :, rows - 1])).item()
        assert mx.all(mx.isfinite(y[0, :, : rows - 1])).item()


# A bit pattern is a weight: every one of them.


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("mode, group_size, bits", quantized.FLOATS)
def test_every_code_and_scale(mode, group_size, bits, rows):
    """Of rows of the identity every product is one weight and zeros: the bits are known."""
    codes = np.arange(256).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # a NaN of 8 bits would spoil the zeros too
    scales = np.arange(256).astype(np.uint8)
    if mode == "nvfp4":
        scales[0x7F] = scales[0xFF] = 0
    else:
        scales = np.minimum(scales, 240)  # so that no weight is beyond float32
    features = scales.size * group_size // 32
    weight = mx.array(np.resize(codes, features * 4 * bits).view(np.uint32).reshape(features, -1))
    scale = mx.array(scales.reshape(features, -1))
    exact = quantized.dequantize(weight, scale, None, group_size, bits, mode)
    for first in range(0, 32, rows):
        call = Call(mx.float32)
        inputs = {("input", 0): call.input(mx.eye(32)[None, first : first + rows])}
        inputs |= {("weight", 0): call.input(weight), ("group_scales", 0): call.input(scale)}
        out = call.output((1, 1, rows, features))
        call.run(inputs, {("output", 0): out}, {"quantization": (mode, bits, group_size)})
        np.testing.assert_array_equal(oracle.exact(call.value(out))[0, 0], exact.T[first : first + rows])


# Operands that lie in memory otherwise than row by row.


@dtypes
@pytest.mark.parametrize("seq", [1, 3, 20, 70])
def test_rows_apart(rng, seq, dtype):
    check(rng, projections.qkv(rng, 2, seq, 64, HEAD, FORM, dtype), kind=Embedded)
    check(rng, projections.output(rng, 2, seq, 64, 70, FORM, dtype), kind=Embedded)


class FarWeight(Call):
    """Rows of its weight are so far apart that 32-bit arithmetic would land elsewhere."""

    def input(self, array):
        if array is None or array.dtype != mx.uint32:
            return super().input(array)
        (rows, words), row = array.shape, 2**26
        data = sparse(((rows - 1) * row + words,), np.uint32)
        for n in range(rows):
            data[n * row : n * row + words] = np.array(array[n])
        return self.tensor(array.shape, data, [row, 1])


@pytest.mark.parametrize("rows", [2, 40])
def test_offsets_past_two_to_the_31(rng, rows):
    check(rng, projections.output(rng, 1, rows, 64, 67, FORM), kind=FarWeight)
