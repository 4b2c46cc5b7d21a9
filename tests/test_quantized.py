"""The operations on quantized weights against float64, over every format."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
import projections
import quantized
from mlx_fused import _ext
from projections import check, check_forward
from test_forward import dtypes
from test_kinds import FORMS, HEADS, named
from test_layouts import apart

formats = pytest.mark.parametrize("form", quantized.FORMATS, ids=named)
kinds = pytest.mark.parametrize("form", FORMS, ids=named)


@dtypes
@formats
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_every_format(rng, form, dtype, bias):
    for packed in (False, True):
        for seq in (1, 9):
            check(rng, projections.qkv(rng, 2, seq, 256, HEADS, form, dtype, bias, packed))
    check(rng, projections.output(rng, 2, 5, 256, 40, form, dtype, bias))


@pytest.mark.parametrize("mode,of_scales", quantized.TABLES)
def test_the_formats_are_those_of_mlx(mode, of_scales):
    weight, scales, group_size, bits = quantized.every_byte(mode, of_scales)
    for dtype in operands.DTYPES:
        values = mx.dequantize(weight, scales, None, group_size, bits, mode, dtype=dtype)
        expected = quantized.dequantize(weight, scales, None, group_size, bits, mode)
        oracle.assert_equal(values, mx.array(expected, mx.float64).astype(dtype))


EVERY_BYTE = """
import mlx.core as mx, operands, oracle, projections, quantized
mx.set_default_device(mx.cpu)
for table in quantized.TABLES:
    for dtype in operands.DTYPES:
        for rows in (1, 3, 5, 40):
            call = projections.every_byte(*table, rows, dtype)
            (expected,) = call.formula(*call.exact_operands)
            oracle.assert_equal(call(), (mx.array(expected, mx.float64).astype(dtype),))
            call = projections.every_byte(*table, rows, dtype, as_columns=True)
            key, given = ("x", None), (mx.full((1, rows, 1), 0.5, dtype),)
            (expected,) = call.gradient_formula([key])(oracle.exact(given), *call.exact_operands)
            grads = projections.gradients(call, [key], given)
            oracle.assert_equal(grads, (mx.array(expected, mx.float64).astype(dtype),))
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
def test_every_byte_of_every_format(isa):
    """NaN, infinities and the smallest numbers too."""
    environment = os.environ | {"MLX_FUSED_MAX_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", EVERY_BYTE], env=environment, check=True)


@pytest.mark.parametrize("form", quantized.FOREIGN, ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_formats_that_only_mlx_knows(rng, form, adapted):
    for packed, bias in product((False, True), repeat=2):
        ranks, rank = ((8, None, 3), 8) if adapted else (None, None)
        check(
            rng,
            projections.qkv(rng, 2, 5, 256, HEADS, form, bias=bias, packed=packed, ranks=ranks),
            roundings=6,
        )
        check(rng, projections.output(rng, 2, 5, 256, 40, form, bias=bias, rank=rank, alpha=0.5), roundings=6)
    with pytest.raises(ValueError, match=r"route must be 'composed' or None .* but got 'fused'\."):
        projections.qkv(rng, 2, 5, 256, HEADS, form)(route="fused")


def test_the_formats_that_our_kernels_know():
    forms = product(("affine", "mxfp4", "mxfp8", "nvfp4", "mxfp3", ""), range(-1, 257), range(-1, 33))
    known = {(m, g, b) for m, g, b in forms if _ext.has_quantized_kernels(g, b, m)}
    assert known == set(quantized.FORMATS)
    for mode, group_size, bits in quantized.FORMATS + quantized.FOREIGN:
        for device in ("cpu", "metal"):
            format = (mode, bits, group_size)
            routed = _ext._internals.route(
                "qkv", [mx.float32], 1, quantization=format, device=device, route="fused"
            )
            assert (routed == "fused") == (mode != "affine" or bits > 1)


def test_the_defaults_are_those_of_quantized_matmul(rng):
    for form in (("affine", 64, 4), *quantized.FLOATS):
        for call in (
            projections.qkv(rng, 1, 3, 128, HEADS, form),
            projections.output(rng, 1, 3, 128, 40, form),
        ):
            oracle.assert_equal(call(group_size=None, bits=None), call())
    call = projections.qkv(rng, 1, 3, 128, HEADS, ("affine", 64, 4))
    arguments = {k: v for k, v in call.arguments.items() if k not in ("group_size", "bits", "mode")}
    oracle.assert_equal(projections.Call(call.operation, arguments)(), call())


@pytest.mark.slow
@dtypes
@formats
def test_every_format_at_every_row_boundary(rng, form, dtype):
    for seq in (1, 4, 5, 8, 9, 16, 17, 33, 65, 129):
        for groups in (1, 3):
            call = projections.qkv(rng, 1, seq, 128 * groups, (6, 2, 19), form, dtype, packed=seq % 2 == 0)
            check(rng, call)


@kinds
def test_empty_calls_of_the_composed_form(rng, form):
    """MLX's own quantized_matmul ends the process."""
    for call in (
        projections.qkv(rng, 1, 0, 128, (3, 1, 5), form),
        projections.output(rng, 0, 3, 128, 33, form),
        projections.output(rng, 2, 3, 128, 0, form),
    ):
        check(rng, call, route="composed")


@dtypes
@kinds
def test_reduction_lengths(rng, form, dtype):
    """One group, and numbers of groups around every power of two."""
    _, group_size, _ = form
    for groups in (1, 2, 3, 5, 9, 17):
        for seq in (1, 6, 33):
            check(rng, projections.qkv(rng, 1, seq, groups * group_size, (2, 1, 6), form, dtype))


@dtypes
@pytest.mark.parametrize("hidden_out", [0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 129])
def test_output_widths(rng, dtype, hidden_out):
    for form in (("affine", 64, 4), ("mxfp4", 32, 4)):
        for seq in (1, 4, 33):
            check(rng, projections.output(rng, 2, seq, 64, hidden_out, form, dtype))


@dtypes
def test_views_of_one_packed_weight_as_three(rng, dtype):
    check(rng, apart(projections.qkv(rng, 2, 5, 64, HEADS, ("affine", 64, 4), dtype, packed=True)))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_accumulates_in_float32(rng, dtype, rows):
    # 4096 ones: a sum kept in bfloat16 stops growing at 256, one in float16 at 2048.
    form = ("affine", 64, 4)
    ones = {"weight": 0x11111111, "biases": 0, "residual": 0}
    for call in (
        projections.qkv(rng, 1, rows, 4096, (1, 1, 8), form, dtype, bias=False),
        projections.output(rng, 1, rows, 4096, 8, form, dtype, bias=False),
    ):
        leaves = {key: mx.full(a.shape, ones.get(key[0], 1), a.dtype) for key, a in call.leaves.items()}
        for y in call.with_leaves(leaves)():
            assert (y == 4096).all()


@dtypes
@kinds
@pytest.mark.parametrize("seq", [1, 3, 40])
def test_nan_stays_in_its_row_and_infinity_never_becomes_finite(rng, form, dtype, seq):
    call = projections.qkv(rng, 1, seq, 128, HEADS, form, dtype)
    row = seq // 2
    for value in (np.nan, np.inf, -np.inf):
        x = mx.array(call.x)
        x[0, row, 77] = value
        for y, clean in zip(call(input=x), call(), strict=True):
            bad = np.array(mx.isfinite(y.astype(mx.float32)))
            assert not bad[:, :, row].any() and (not np.isnan(value) or mx.isnan(y[:, :, row]).all())
            others = np.arange(seq) != row
            np.testing.assert_array_equal(oracle.exact(y)[:, :, others], oracle.exact(clean)[:, :, others])


@dtypes
def test_nan_in_scales_and_biases_reaches_their_rows_alone(rng, dtype):
    call = projections.qkv(rng, 1, 3, 128, (2, 1, 16), ("affine", 64, 4), dtype)
    for name in ("scales", "biases", "bias"):
        q, k, v = call.arguments[name]
        k = mx.array(k)
        k[(5,) + (1,) * (k.ndim - 1)] = np.nan
        bad = [np.isnan(oracle.exact(y)) for y in call(**{name: (q, k, v)})]
        assert not bad[0].any() and not bad[2].any()
        assert bad[1][..., 5].all() and bad[1].sum() == 3


def test_float16_results_beyond_the_dtype_overflow(rng):
    call = projections.qkv(rng, 1, 2, 64, (1, 1, 4), ("affine", 64, 4), mx.float16, draw=operands.integers)
    q, k, v = call.replace(
        input=mx.full((1, 2, 64), 65504, mx.float16), biases=(mx.ones((4, 1), mx.float16),) * 3
    )()
    assert all((y == np.inf).all() for y in (q, k, v))


@pytest.mark.parametrize("x_dtype", operands.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
def test_mixed_dtypes_promote_as_in_mlx(rng, x_dtype, dtype):
    promoted = (mx.zeros((), x_dtype) + mx.zeros((), dtype)).dtype
    for form in (("affine", 64, 4), ("mxfp4", 32, 4)):
        call = projections.qkv(rng, 2, 3, 64, HEADS, form, dtype, bias=False)
        call = call.replace(input=call.x.astype(x_dtype))
        outputs = check_forward(call)
        expected = promoted if form[0] == "affine" else x_dtype
        assert {y.dtype for y in outputs} == {expected}
