"""Gradients through MLX's transforms: their values, and how much is computed for them.

Values are compared with the composed form's on integers, where every sum is exact and the bits must agree.
"""

from itertools import combinations, product

import mlx.core as mx
import pytest

import mlx_fused
import operands
import oracle
import projections
from graph import output_counts, primitives
from operands import few_integers, integers
from projections import ACTIVATIONS, PACKINGS, backward, check_gradients, cotangents, gradients
from stacks import Stack
from test_forward import dtypes

HEADS = (4, 2, 3)
AFFINE = ("affine", 32, 4)
# (form, whether there are adapters)
KINDS = {"dense": (None, False), "affine": (AFFINE, False), "mxfp4": (("mxfp4", 32, 4), False)}
KINDS |= {"lora": (None, True), "affine-lora": (AFFINE, True), "nvfp4-lora": (("nvfp4", 16, 4), True)}
# Each one's node.
OPERATIONS = {"qkv": "FusedQKVProjection", "packed": "FusedQKVProjection", "output": "FusedOutputProjection"}
WITH_BACKWARD = list(OPERATIONS)
OPERATIONS |= {"linear": "FusedLinear"}
OPERATIONS |= dict.fromkeys(("gated", "gate_up", "interleaved"), "FusedGatedProjection")
kinds = pytest.mark.parametrize("kind", KINDS)
operations = pytest.mark.parametrize("operation", OPERATIONS)
with_backward = pytest.mark.parametrize("operation", WITH_BACKWARD)


def make(rng, operation, kind="dense", dtype=mx.float32, **options):
    """A small call on integers, with activations that are exact."""
    form, adapted = KINDS[kind]
    draw = integers if operation in WITH_BACKWARD else few_integers
    options = {"form": form, "dtype": dtype, "draw": draw} | options
    hidden = 32 if form else 5
    if operation == "linear":
        return projections.linear(
            rng, 2, 3, hidden, 4, rank=2 if adapted else None, activation="relu2", **options
        )
    if operation not in WITH_BACKWARD:
        ranks, packing = (2, 3) if adapted else None, None if operation == "gated" else operation
        return projections.gated(
            rng, 2, 3, hidden, 4, packing=packing, ranks=ranks, activation="relu", **options
        )
    if operation == "output":
        alpha, rank = 1.0 if kind == "dense" else 0.5, 2 if adapted else None
        return projections.output(rng, 2, 3, hidden, 4, alpha=alpha, rank=rank, **options)
    ranks, packed = (2, None, 3) if adapted else None, operation == "packed"
    return projections.qkv(rng, 2, 3, hidden, HEADS, packed=packed, ranks=ranks, **options)


def subsets(n):
    return [c for size in range(1, n + 1) for c in combinations(range(n), size)]


def chosen(keys, kind):
    """Subsets of the keys: every one for dense weights, and of the others the smallest and the whole."""
    some = [[keys[i] for i in subset] for subset in subsets(len(keys))]
    return [s for s in some if kind == "dense" or len(s) in (1, 2, len(keys))]


def values(call, keys=None):
    return [call.leaves[key] for key in keys or call.trainable]


def like(rng, arrays):
    return [integers(rng, a.shape) for a in arrays]


def every(args):
    return tuple(range(len(args)))


def square_sum(function):
    return lambda *args: sum((y * y).sum() for y in function(*args))


def cube_sum(function):
    """A scalar with second and third derivatives."""
    return lambda *args: sum((y * y * y).sum() for y in function(*args))


def check_as_composed(call, transform, keys=None):
    """``transform(function, values)`` gives of the call what it gives of the composed form."""
    keys = keys or call.trainable
    routes = ({}, {"route": "composed"})
    oracle.assert_equal(*(transform(call.function(keys, **r), values(call, keys)) for r in routes))


def backward_function(call, by=lambda call, given: oracle.leaves(backward(call, given))):
    """The backward operation as a function of the cotangents and of the arrays that it reads."""
    keys, count = read_by_backward(call), len(call.features)

    def function(*args):
        return tuple(by(call.with_leaves(dict(zip(keys, args[count:], strict=True))), args[:count]))

    return function


def read_by_backward(call):
    return [key for key in call.leaves if key[0] not in ("bias", "residual")]


@dtypes
@operations
@pytest.mark.parametrize("seq", [1, 9])
def test_vjp(rng, seq, operation, dtype):
    if operation == "output":
        call = projections.output(rng, 2, seq, 40, 24, dtype=dtype)
    elif operation == "linear":
        call = projections.linear(rng, 2, seq, 40, 24, dtype=dtype, activation="gelu")
    elif operation in WITH_BACKWARD:
        call = projections.qkv(rng, 2, seq, 40, (4, 2, 16), dtype=dtype, packed=operation == "packed")
    else:
        packing = None if operation == "gated" else operation
        call = projections.gated(rng, 2, seq, 40, 24, dtype=dtype, packing=packing)
    check_gradients(call, cotangents(rng, call))


@operations
def test_value_and_grad(rng, operation):
    call = make(rng, operation)
    check_as_composed(call, lambda f, args: mx.value_and_grad(cube_sum(f), every(args))(*args))


@operations
@kinds
def test_one_node_each_way_and_only_the_gradients_asked_for(rng, operation, kind):
    call = make(rng, operation, kind)
    given = cotangents(rng, call, integers)
    mx.eval(list(call.leaves.values()), given)
    forward, count = OPERATIONS[operation], len(call.features)
    nodes = primitives(*call())
    assert nodes.pop("Unpack", 0) == len(call.packed)  # into views
    turns = len(call.packed) if operation == "interleaved" else 0
    assert (nodes.pop("Unflatten", 0), nodes.pop("Squeeze", 0)) == (turns, count * turns)
    assert nodes.pop("Transpose", 0) == turns + (1 + count) * (("lora_b", None) in call.packed)
    assert nodes == {forward: 1}
    for keys in chosen(call.trainable, kind):
        grads, expected = (gradients(call, keys, given, route=route) for route in (None, "composed"))
        # The residual's gradient is the cotangent itself: no output of any node of ours.
        of_segments = [*call.packed, ("lora_a", None)] if call.packed else []
        wanted = sum(count if key in of_segments else key[0] != "residual" for key in keys)
        assert output_counts(f"{forward}Grad", *grads) == [wanted] * bool(wanted)
        nodes = primitives(*grads)
        assert not {"Matmul", "AddMM", "QuantizedMatmul"} & set(nodes)
        assert nodes[forward] == nodes["FusedActivationGrad"] == bool(call.activation)
        assert bool(nodes["Concatenate"]) == any(key in call.packed for key in keys)
        assert not output_counts(f"{forward}Grad", *expected)
        oracle.assert_equal(grads, expected)


@pytest.mark.parametrize("used", subsets(3), ids=lambda s: "".join("qkv"[i] for i in s))
def test_outputs_that_the_loss_does_not_use(rng, used):
    def gradient(function, args):
        loss = square_sum(lambda *a: [function(*a)[i] for i in used])
        return mx.grad(loss, every(args))(*args)

    check_as_composed(make(rng, "qkv"), gradient)


def test_operands_used_more_than_once(rng):
    x, w, b = like(rng, [mx.zeros((2, 3, 6)), mx.zeros((6, 6)), mx.zeros(6)])

    def gradients(route):
        def f(x, w, b):
            q, k, v = mlx_fused.fused_qkv_projection(x, (w, w, w), (b, b, b), 2, 2, 3, route=route)
            heads = (q + 2 * k - v).swapaxes(1, 2).flatten(2)
            out = mlx_fused.fused_output_projection_residual(heads, w, b, x, route=route)
            again = mlx_fused.fused_output_projection_residual(out, w, b, out, route=route)
            return (again * again).sum()

        return mx.grad(f, argnums=(0, 1, 2))(x, w, b)

    oracle.assert_equal(gradients(None), gradients("composed"))


@operations
@kinds
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_jvp(rng, bias, operation, kind):
    call = make(rng, operation, kind, bias=bias)
    for keys in chosen(call.trainable, kind):
        tangents = like(rng, values(call, keys))
        check_as_composed(call, lambda f, args, tangents=tangents: mx.jvp(f, args, tangents), keys)


@operations
def test_gradients_of_gradients(rng, operation):
    call = make(rng, operation)
    for first, key in enumerate(call.trainable):
        direction = integers(rng, call.leaves[key].shape)

        def second(function, args, first=first, direction=direction):
            gradient = mx.grad(cube_sum(function), argnums=first)
            return mx.grad(lambda *a: (gradient(*a) * direction).sum(), every(args))(*args)

        check_as_composed(call, second)


@operations
@kinds
def test_gradients_of_all_gradients(rng, operation, kind):
    call = make(rng, operation, kind)
    # Powers of two and zeros, for products of many factors to be exact as well.
    call = call.with_leaves({key: mx.sign(call.leaves[key]) for key in call.trainable})

    def second(function, args):
        gradient = mx.grad(square_sum(function), every(args))
        return mx.grad(lambda *a: sum(g.sum() for g in gradient(*a)), every(args))(*args)

    check_as_composed(call, second)


def test_third_derivative(rng):
    def third(function, args):
        f = cube_sum(function)
        for argnum in (0, 1):
            f = (lambda g: lambda *a: (g(*a) * 2).sum())(mx.grad(f, argnums=argnum))
        return mx.grad(f, every(args))(*args)

    check_as_composed(projections.output(rng, 1, 2, 3, 2, draw=integers), third)


def test_forward_over_reverse_and_reverse_over_forward(rng):
    call = make(rng, "qkv")
    tangents = like(rng, values(call))

    def forward_over_reverse(function, args):
        return mx.jvp(mx.grad(cube_sum(function), every(args)), args, tangents)

    def reverse_over_forward(function, args):
        slope = lambda *a: mx.jvp(cube_sum(function), list(a), tangents)[1][0]  # noqa: E731
        return mx.grad(slope, every(args))(*args)

    check_as_composed(call, forward_over_reverse)
    check_as_composed(call, reverse_over_forward)


@with_backward
def test_explicit_backwards_have_gradients_and_tangents_of_their_own(rng, operation):
    call = make(rng, operation)
    args = [*cotangents(rng, call, integers), *values(call, read_by_backward(call))]
    tangents = like(rng, args)

    def by_composed(call, given):
        return gradients(call, call.trainable, given, route="composed")

    functions = (backward_function(call), backward_function(call, by_composed))
    oracle.assert_equal(*(f(*args) for f in functions))
    oracle.assert_equal(*(mx.grad(cube_sum(f), every(args))(*args) for f in functions))
    oracle.assert_equal(*(mx.jvp(f, args, tangents) for f in functions))


@operations
def test_mixed_dtypes_give_each_argument_a_gradient_of_its_own_dtype(rng, operation):
    call = make(rng, operation, dtype=mx.bfloat16)
    for key in call.trainable:
        mixed = call.with_leaves({key: call.leaves[key].astype(mx.float32)})

        def gradient(function, args):
            grads = mx.grad(lambda *a: sum(y.sum() for y in function(*a)), every(args))(*args)
            assert [g.dtype for g in grads] == [a.dtype for a in args]
            return grads

        check_as_composed(mixed, gradient)


def test_float64_gradients(rng):
    def gradient(function, args):
        grads = mx.grad(cube_sum(function), every(args))(*args)
        assert all(g.dtype == mx.float64 for g in grads)
        return grads

    check_as_composed(make(rng, "qkv", dtype=mx.float64), gradient)


@pytest.mark.parametrize("gradient", [mx.float32, mx.float16], ids=str)
@operations
def test_a_gradient_of_another_dtype_is_cast(rng, operation, gradient):
    """As a custom function may give it; the gradients have their arguments' own dtype all the same."""

    @mx.custom_function
    def identity(y):
        return y

    @identity.vjp
    def identity_vjp(_, cotangent, __):
        return cotangent.astype(gradient)

    call = make(rng, operation, dtype=mx.bfloat16, bias=False)
    keys = call.trainable

    def grads(function, route=None):
        def loss(*args):
            first, *others = call.function(keys, route=route)(*args)
            return function(first).sum() + sum(y.sum() for y in others)

        return mx.grad(loss, every(keys))(*values(call))

    assert {g.dtype for g in grads(identity)} == {mx.bfloat16}
    oracle.assert_equal(grads(identity), grads(lambda y: y, "composed"))


def calls_with_every_option(rng, dtype, forms):
    options = {"dtype": dtype, "adapter_dtype": dtype}
    for form, bias, adapted, packed in product(forms, *[(False, True)] * 3):
        hidden = 32 if form else 5
        for alpha, exact in product((1.0, -1.5), (False, True)):
            rank = 2 if adapted else None
            call = projections.output(
                rng, 2, 3, hidden, 4, form, bias=bias, rank=rank, alpha=alpha, **options
            )
            if not packed:  # there is but one weight
                yield call.replace(exact=exact)
        heads, ranks = (4, 2, 3, 2), (2, None, 3) if adapted else None
        scales = {"lora_scale": -3.0 if packed else (0.5, 1.0, -3.0)} if adapted else {}
        call = projections.qkv(
            rng, 2, 3, hidden, heads, form, bias=bias, packed=packed, ranks=ranks, **options
        )
        for split_heads in (False, True):
            yield call.replace(split_heads=split_heads, **scales)


def calls_with_activations(rng):
    for form, bias, adapted, activation in product([None, AFFINE], *[(False, True)] * 2, ACTIVATIONS):
        sizes, options = (2, 3, 32 if form else 5, 4, form), {"bias": bias, "activation": activation}
        for packing in (None, *PACKINGS):
            yield projections.gated(
                rng, *sizes, packing=packing, ranks=(2, 3) if adapted else None, **options
            )
        if activation != "clipped_swiglu":
            yield projections.linear(rng, *sizes, rank=2 if adapted else None, **options)


def stack_of(names, call, rng):
    """Of derivatives by every array that may have one, tangents too."""
    keys = [key for key, a in call.leaves.items() if mx.issubdtype(a.dtype, mx.floating)]
    stack = Stack([call.leaves[key] for key in keys], rng)
    for name in names:
        getattr(stack, name)(stack.differentiable())
    return stack, keys


DERIVATIVES = [("jvp",), ("grad",), ("grad", "jvp"), ("jvp", "grad"), ("grad", "grad"), ("jvp", "jvp")]
derivatives = pytest.mark.parametrize("names", DERIVATIVES, ids="-".join)


@derivatives
@pytest.mark.parametrize("route", ["fused", "composed"])
def test_derivatives_with_every_option(rng, names, route, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    forms = [None, AFFINE, ("mxfp4", 32, 4), ("affine", 32, 1)]
    for call in (
        *calls_with_every_option(rng, mx.float32, forms),
        *calls_with_every_option(rng, mx.float64, [None]),
        *calls_with_activations(rng),
    ):
        stack, keys = stack_of(names, call, rng)
        stack.check(call, keys)


@pytest.mark.parametrize("names", [(), ("grad",)], ids=["forward", "grad"])
def test_tangents_are_central_differences(rng, names):
    """Along a line all is a polynomial of degree 5 at most, whose slope these six points give exactly."""
    weights = {-3: -1 / 60, -2: 9 / 60, -1: -45 / 60, 1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
    for call in calls_with_every_option(rng, mx.float64, [None]):
        stack, keys = stack_of(names, call, rng)
        function, args = stack.of(call.function(keys)), stack.args
        step = [operands.normal(rng, a.shape, mx.float64) for a in args]

        def differences(f, weights, args=args, step=step):
            points = [
                [w * y for y in f(*(a + t * d for a, d in zip(args, step, strict=True)))]
                for t, w in weights.items()
            ]
            return [sum(ys) for ys in zip(*points, strict=True)]

        sizes = [mx.abs(a) + 3 * mx.abs(d) for a, d in zip(args, step, strict=True)]
        magnitudes = stack.magnitudes(call, keys, sizes)
        tangents = mx.jvp(lambda *a, f=function: f(*a), args, step)[1]
        oracle.assert_near(tangents, differences(function, weights), magnitudes, 8 * stack.terms(call))


def test_the_tangent_of_a_scaled_projection():
    """jvp of residual + alpha x w^T: alpha multiplies it."""
    x, w, r = mx.array([[[2.0, 3.0]]]), mx.array([[5.0, 7.0]]), mx.array([[[11.0]]])
    for dtype in (mx.float32, mx.float64):
        args = [a.astype(dtype) for a in (x, w, r)]

        def f(x, w, r):
            return mlx_fused.fused_output_projection_residual(x, w, None, r, alpha=0.5)

        (tangent,) = mx.jvp(f, args, [mx.ones_like(a) for a in args])[1]
        assert tangent.item() == 0.5 * (12.0 + 5.0) + 1.0
