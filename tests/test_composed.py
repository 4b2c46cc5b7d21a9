"""Calls that routing composes of MLX's own operations: their adapters and their backward are written by hand.

Values are held against float64. Transforms are held, on integers, against MLX's differentiation of the same
operations one by one, which is what ``route="composed"`` has.
"""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands
import oracle
import projections
import quantized
from graph import primitives
from operands import integers
from projections import check, check_forward, check_gradients, cotangents, gradients
from test_autodiff import (
    check_as_composed,
    chosen,
    every,
    kinds,
    like,
    make,
    operations,
    square_sum,
    values,
)
from test_kinds import calls, named
from test_lora import SUBSETS
from test_split_heads import tokens
from test_transforms import check_vmap_as_composed, mapped, of_the_first

HEADS = (4, 2, 8)
bases = pytest.mark.parametrize("form", [None, ("affine", 64, 4), quantized.FLOATS[0]], ids=named)


@pytest.fixture(autouse=True)
def _composed(monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", "composed")


@bases
@pytest.mark.parametrize("ranks", SUBSETS, ids=str)
def test_any_subset_of_the_projections(rng, form, ranks):
    for packed, bias, seq in product((False, True), (False, True), (1, 9)):
        call = projections.qkv(rng, 2, seq, 64, HEADS, form, bias=bias, packed=packed, ranks=ranks)
        assert primitives(*call())["Projection"] == 1
        check(rng, call)


@bases
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_ranks_that_differ(rng, form, rank):
    check(rng, projections.qkv(rng, 2, 5, 128, HEADS, form, ranks=(rank, 8, 2 * rank)))
    check(rng, projections.output(rng, 2, 5, 128, 40, form, rank=rank))


@bases
@pytest.mark.parametrize("scale", [0.0, -0.3, (20.0, 0.5, 0.0)], ids=str)
def test_scales(rng, form, scale):
    check(rng, projections.qkv(rng, 2, 5, 64, HEADS, form, ranks=(8, 3, 8), scale=scale))
    if not isinstance(scale, tuple):
        for alpha, bias in product((1.0, -0.5), (False, True)):
            call = projections.output(rng, 2, 5, 64, 40, form, bias=bias, rank=8, scale=scale, alpha=alpha)
            check(rng, call)


def positive(rng, shape, dtype=mx.float32):
    """Operands whose partial sums are no larger than the sum, so that each rounding is one of the result."""
    return mx.array(rng.uniform(0.5, 1.5, shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", operands.DTYPES, ids=str)
def test_adapters_are_computed_in_float32(rng, dtype, adapter_dtype):
    """Forward rounds the adapter's part and the sum; dX that of all adapters and after each segment."""
    options = {"dtype": dtype, "adapter_dtype": adapter_dtype, "draw": positive, "scale": 0.5}
    both = calls(rng, None, True, ranks=(8, 3, 4), **options)[:2]
    for call, of_input in zip(both, (4, 2), strict=True):
        given = cotangents(rng, call, positive)
        check_forward(call, roundings=2)
        check_gradients(call, given, call.trainable[:1], roundings=of_input)
        check_gradients(call, given, call.trainable[1:])


@pytest.mark.parametrize("exact", [False, True])
def test_the_input_is_widened_once(rng, exact):
    call = projections.qkv(rng, 1, 5, 64, HEADS, dtype=mx.bfloat16, bias=False, ranks=(8, 8, 8))
    mx.eval(list(call.leaves.values()))
    assert primitives(*call(exact=exact))["AsType"] == 1 + 3  # and each adapter's part narrowed


@bases
@pytest.mark.parametrize("heads", [HEADS, (4, 2, 8, 3)], ids=["alike", "unlike"])
def test_outputs_by_token_have_the_same_gradients(rng, form, heads):
    call = projections.qkv(rng, 2, 3, 64, heads, form, ranks=(4, 3, 2))
    given, keys = cotangents(rng, call), call.trainable
    check_gradients(call, given)
    by_token = gradients(call, keys, tokens(given), split_heads=False)
    oracle.assert_equal(gradients(call, keys, given), by_token)


@operations
@kinds
def test_only_what_is_wanted_is_computed(rng, operation, kind):
    """No weight's gradient for frozen weights, and no product for dX where nobody asks for it."""
    call = make(rng, operation, kind)
    given = cotangents(rng, call, integers)
    has_adapters, segments = any(name == "lora_a" for name, _ in call.leaves), len(call.features)
    for keys in chosen(call.trainable, kind):
        grads, names = gradients(call, keys, given), [name for name, _ in keys]
        nodes = primitives(*grads)
        if call.activation:  # of what is kept
            nodes -= primitives(*call())
        d_x = names[0] in projections.INPUTS
        d_w, d_a, d_b = (names.count(name) for name in ("weight", "lora_a", "lora_b"))
        # One product for all adapters: of B and the cotangents, of that and A, of that and x; of x and A, of
        # that and the cotangents.
        of_adapters = [(has_adapters and d_x) or d_a, has_adapters and d_x, d_a, d_b, d_b]
        of_weights = (segments if call.packed else 1) * d_w
        of_input = d_x * segments
        assert nodes["QuantizedMatmul"] == (of_input if call.quantization else 0)
        dense = sum(map(bool, of_adapters)) + of_weights + (0 if call.quantization else of_input)
        assert nodes["Matmul"] + nodes["AddMM"] == dense
        oracle.assert_equal(grads, gradients(call, keys, given, route="composed"))


@operations
@kinds
def test_derivatives(rng, operation, kind):
    call = make(rng, operation, kind)
    tangents = like(rng, values(call))
    argnums = every(call.trainable)

    def forward_over_reverse(function, args):
        return mx.jvp(mx.grad(square_sum(function), argnums), args, tangents)

    def reverse_over_forward(function, args):
        slope = lambda *a: mx.jvp(square_sum(function), list(a), tangents)[1][0]  # noqa: E731
        return mx.grad(slope, argnums)(*args)

    check_as_composed(call, lambda f, args: mx.value_and_grad(square_sum(f), argnums)(*args))
    check_as_composed(call, lambda f, args: mx.jvp(f, args, tangents))
    check_as_composed(call, forward_over_reverse)
    check_as_composed(call, reverse_over_forward)


@operations
@kinds
def test_vmap(rng, operation, kind):
    call = make(rng, operation, kind)
    of_gradient = lambda f: mx.grad(square_sum(f), every(call.trainable))  # noqa: E731
    for axes in (of_the_first(call.trainable), tuple(0 for _ in call.trainable)):
        check_vmap_as_composed(rng, call, axes)
        check_vmap_as_composed(rng, call, axes, of_gradient)


@operations
@kinds
def test_grad_of_vmap(rng, operation, kind):
    """Of the activations alone it is a gradient by hand still."""
    call = make(rng, operation, kind)
    last = 0 if operation == "output" else None
    axes = (0, *[None] * (len(call.trainable) - 2), last)
    args = mapped(rng, values(call), axes)
    function = mx.vmap(call.function(call.trainable), in_axes=axes)
    assert primitives(*function(*args))["Projection"] == 1
    loss = square_sum(function)
    examples = range(args[0].shape[0])

    def one_by_one(*args):
        each = ([a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)] for i in examples)
        one = call.function(call.trainable, route="composed")
        return sum(square_sum(one)(*e) for e in each)

    expected = mx.grad(one_by_one, every(args))(*args)
    oracle.assert_equal(mx.grad(loss, every(args))(*args), expected)


@operations
@kinds
def test_compile_and_checkpoint(rng, operation, kind):
    call = make(rng, operation, kind)
    args, argnums = values(call), every(call.trainable)
    function, reference = (call.function(call.trainable, route=route) for route in (None, "composed"))
    expected = mx.grad(square_sum(reference), argnums)(*args)
    oracle.assert_equal(mx.compile(function)(*args), reference(*args))
    for gradient in (
        mx.compile(mx.grad(square_sum(function), argnums)),
        mx.grad(mx.compile(square_sum(function)), argnums),
        mx.grad(square_sum(mx.checkpoint(function)), argnums),
    ):
        oracle.assert_equal(gradient(*args), expected)


def test_equal_calls_merge_and_different_ones_do_not(rng):
    call = make(rng, "output", "lora")
    for other, left in ((call, 1), (call.replace(lora_scale=3.0), 2)):
        compiled = mx.compile(lambda x, other=other: sum(y.sum() for c in (call, other) for y in c(x=x)))
        assert primitives(compiled(call.x))["Projection"] == left


@bases
def test_nan_in_an_adapter_reaches_its_segment_alone(rng, form):
    call = projections.qkv(rng, 1, 3, 64, HEADS, form, ranks=(8, 3, None))
    for name in ("lora_a", "lora_b"):
        q, k, v = call.arguments[name]
        bad = call(**{name: (q, mx.full(k.shape, np.nan), v)})
        assert [np.isnan(oracle.exact(y)).any() for y in bad] == [False, True, False]


def test_a_float16_sum_may_have_terms_that_are_too_large_together():
    """x W is -20000, the adapter adds 10000 and the residual 60000: float16 holds 50000, and not 70000."""
    x, residual = mx.full((1, 9, 32), 10, mx.float16), mx.full((1, 9, 32), 60000, mx.float16)
    weight = mlx_fused.LinearOperands(mx.full((32, 32), -62.5, mx.float16))
    lora = {"lora_a": mx.full((32, 1), 1.0), "lora_b": mx.full((1, 32), 31.25), "lora_scale": 1.0}
    y = mlx_fused.fused_output_projection_residual(x, weight._replace(**lora), residual=residual)
    assert mx.all(y == mx.array(50000, mx.float16)).item()
