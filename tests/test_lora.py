"""The operations with low-rank adapters against float64: y = x W^T + b + scale (x A) B."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
import projections
import quantized
from projections import check, cotangents
from test_autodiff import subsets
from test_backward import check_slopes
from test_forward import dtypes
from test_kinds import calls, named

HEADS = (4, 2, 8)
BASES = [None, ("affine", 64, 4), ("affine", 32, 8), *quantized.FLOATS]
bases = pytest.mark.parametrize("form", BASES, ids=named)
# None, or a rank, for q, k and v.
SUBSETS = [tuple(8 if i in some else None for i in range(3)) for some in subsets(3)]


def adapted(rng, form, dtype=mx.float32, batch=2, seq=5, **options):
    return calls(rng, form, True, batch, seq, 64, dtype=dtype, **options)


@dtypes
@bases
@pytest.mark.parametrize("ranks", SUBSETS, ids=str)
def test_any_subset_of_the_projections(rng, form, dtype, ranks):
    for packed, bias in product((False, True), repeat=2):
        for seq in (1, 9):
            check(rng, projections.qkv(rng, 2, seq, 64, HEADS, form, dtype, bias, packed, ranks))


@dtypes
@bases
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
def test_ranks(rng, form, dtype, rank):
    for seq in (1, 9):
        check(rng, projections.qkv(rng, 2, seq, 128, HEADS, form, dtype, ranks=(rank, 8, 2 * rank)))
        for bias in (False, True):
            check(rng, projections.output(rng, 2, seq, 128, 40, form, dtype, bias, rank))


@bases
@pytest.mark.parametrize("route", ["fused", "composed"])
def test_adapters_of_rank_0_add_nothing(rng, form, route):
    for ranks in ((0, None, None), (0, 4, None), (0, 0, 0)):
        check(rng, projections.qkv(rng, 2, 5, 64, HEADS, form, ranks=ranks), route=route)
    check(rng, projections.output(rng, 2, 5, 64, 40, form, rank=0), route=route)


@pytest.mark.slow
@dtypes
@bases
@pytest.mark.parametrize("ranks", [(1, 1, 1), (8, 8, 8), (16, None, 64), (None, 31, 33)], ids=str)
def test_every_base_at_every_row_boundary(rng, form, dtype, ranks):
    for seq in (1, 4, 5, 8, 9, 16, 17, 33, 65, 129):
        for hidden in (64, 192):
            check(rng, projections.qkv(rng, 1, seq, hidden, (6, 2, 19), form, dtype, ranks=ranks))


@dtypes
def test_sizes_of_one(rng, dtype):
    check(rng, projections.qkv(rng, 1, 1, 1, (1, 1, 1), None, dtype, ranks=(1, 1, 1)))
    check(rng, projections.output(rng, 1, 1, 1, 1, None, dtype, rank=1))


@dtypes
@pytest.mark.parametrize("scale", [20.0, -0.3, 0.0, (20.0, 0.5, -1.0)], ids=str)
def test_scales(rng, dtype, scale):
    for form in (None, ("affine", 64, 4)):
        check(rng, projections.qkv(rng, 2, 5, 64, HEADS, form, dtype, ranks=(8, 8, 8), scale=scale))
        if not isinstance(scale, tuple):
            check(rng, projections.output(rng, 2, 5, 64, 40, form, dtype, rank=8, scale=scale))


@dtypes
@pytest.mark.parametrize("adapter_dtype", operands.DTYPES, ids=str)
def test_adapters_of_any_dtype_are_computed_in_float32(rng, dtype, adapter_dtype):
    for call in adapted(rng, ("affine", 64, 4), dtype, adapter_dtype=adapter_dtype):
        check(rng, call)


def wide_integers(rng, shape, dtype=mx.float32):
    """Integers of one sign, for sums of more bits than 16-bit floats have and fewer than float32 has."""
    return mx.array(rng.integers(1, 16, shape), dtype=dtype)


# MLX's own 16-bit quantized_matmul does not sum in float32 on every CPU.
EXACT = [(form, dtype, None) for form in BASES for dtype in operands.DTYPES]
EXACT += [(form, dtype, "composed") for form, dtype, _ in EXACT if form is None or dtype == mx.float32]


@pytest.mark.parametrize("form,dtype,route", EXACT, ids=str)
def test_exact_mode_rounds_where_the_modules_of_mlx_lm_do(rng, form, dtype, route):
    for bias, alpha, seq in product((False, True), (1.0, 0.75), (1, 20)):
        options = {"bias": bias, "draw": wide_integers}
        qkv, output, *_ = adapted(rng, form, dtype, 1, seq, scale=1 / 64, **options)
        plain = projections.output(rng, 1, seq, 64, 40, form, dtype, alpha=alpha, **options)
        without = (
            projections.qkv(rng, 1, seq, 64, HEADS, form, dtype, packed=p, **options) for p in (False, True)
        )
        for call in (qkv, output.replace(alpha=alpha), plain, *without):
            oracle.assert_equal(call(exact=True, route=route), call.rounded_formula(dtype))


def with_activations(rng, *args, **options):
    """Of sums that are not large, and still exact."""
    for activation in projections.ACTIVATIONS:
        for call in adapted(rng, *args, activation=activation, **options)[2:]:
            if call.gated or activation != "clipped_swiglu":
                yield call.replace(x=call.x / 1024)


@dtypes
@bases
def test_exact_mode_rounds_activations_and_what_they_gate(rng, form, dtype):
    for bias, seq in product((False, True), (1, 20)):
        for call in with_activations(rng, form, dtype, 1, seq, scale=1 / 64, bias=bias, draw=wide_integers):
            (y,) = oracle.exact(call(exact=True))
            least, largest = call.rounded_activation(dtype)
            assert ((least <= y) & (y <= largest)).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_exact_mode_is_another_result(rng, dtype):
    """The operands of the tests above do tell the modes apart."""
    options = {"draw": wide_integers, "scale": 1 / 64}
    for call in with_activations(rng, None, dtype, 1, 20, **options):
        assert (call()[0] != call(exact=True)[0]).any()
        least, largest = call.rounded_activation(dtype)
        assert (least == largest).mean() > 0.95
    for call in adapted(rng, None, dtype, 1, 20, **options)[:2]:
        differ = [(a != b).any().item() for a, b in zip(call(), call(exact=True), strict=True)]
        assert all(differ) if call.segments is None else differ == [True, False, True]


@dtypes
@bases
def test_exact_mode_leaves_the_gradients_as_they_are(rng, form, dtype):
    for call in adapted(rng, form, dtype, activation=None)[:3]:
        given = cotangents(rng, call)
        grads = [projections.gradients(call, call.trainable, given, exact=e) for e in (False, True)]
        oracle.assert_equal(*grads)


@pytest.mark.parametrize("form", [None, ("affine", 64, 4)], ids=str)
def test_the_gradients_are_the_slopes_of_the_formula(rng, form):
    """The oracle's own backward against central differences, exact for what is linear in each operand."""
    for call in adapted(rng, form):
        call = call.replace(alpha=-0.5) if "residual" in call.arguments else call
        given = cotangents(rng, call)
        grads = call.gradient_formula(call.trainable)(oracle.exact(given), *call.exact_operands)
        check_slopes(rng, call, given, grads, [[key] for key in call.trainable])


@dtypes
@bases
def test_nan_in_an_adapter_reaches_its_segment_alone(rng, form, dtype):
    call = projections.qkv(rng, 1, 3, 64, HEADS, form, dtype, ranks=(8, 3, None))
    for name in ("lora_a", "lora_b"):
        q, k, v = call.arguments[name]
        k = mx.array(k)
        k[2, 1] = np.nan
        bad = [np.isnan(oracle.exact(y)) for y in call(**{name: (q, k, v)})]
        assert not bad[0].any() and not bad[2].any()
        assert bad[1].all() if name == "lora_a" else bad[1][..., 1].any() and bad[1].sum() == 3


@dtypes
@bases
def test_a_scale_of_nan_reaches_the_adapted_segments_alone(rng, form, dtype):
    call = projections.qkv(rng, 1, 3, 64, HEADS, form, dtype, ranks=(8, 3, None), scale=(1.0, np.nan, 1.0))
    q, k, v = (np.isnan(oracle.exact(y)) for y in call())
    assert k.all() and not q.any() and not v.any()


@dtypes
@bases
def test_nan_and_infinity_in_the_input_stay_in_their_row(rng, form, dtype):
    for value, call in product((np.nan, np.inf), adapted(rng, form, dtype, 1, 5)):
        x = mx.array(call.x)
        x[0, 2, 33] = value
        for y, clean in zip(call(**{call.input_name: x}), call(), strict=True):
            rows = -2
            y, clean = (np.moveaxis(oracle.exact(a), rows, 0) for a in (y, clean))
            assert not np.isfinite(y[2]).any()
            np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))
