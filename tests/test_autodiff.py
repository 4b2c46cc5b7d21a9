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
from mlx_fused import composed
from stacks import Stack
from test_forward import dtypes

HEADS = (4, 2, 3)
MODULES = (mlx_fused, composed)
QKV_NAMES = ("x", "wq", "wk", "wv", "bq", "bk", "bv")
OUTPUT_NAMES = ("attn_out", "weight", "bias", "residual")


def subsets(n):
    return [c for size in range(1, n + 1) for c in combinations(range(n), size)]


def qkv_flat(rng, dtype=mx.float32, draw=operands.integers):
    """input, then the three weights and the three biases."""
    x, weight, bias = operands.qkv(rng, 2, 3, 5, HEADS, dtype, draw=draw)
    return x, *weight, *bias


def qkv_function(module):
    return lambda x, wq, wk, wv, bq, bk, bv: module.fused_qkv_projection(
        x, (wq, wk, wv), (bq, bk, bv), *HEADS
    )


def packed_function(module):
    return lambda x, weight, bias: module.fused_qkv_projection(x, weight, bias, *HEADS)


def weighted_sum(function, cotangents):
    """The scalar whose gradients are the function's vjp with these cotangents."""

    def loss(*args):
        outputs = function(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((c * y).sum() for c, y in zip(cotangents, outputs, strict=True))

    return loss


def cube_sum(function):
    """A scalar with second and third derivatives."""

    def loss(*args):
        outputs = function(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((y * y * y).sum() for y in outputs)

    return loss


@dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("seq", [1, 9])
def test_qkv_vjp_is_the_explicit_backward(rng, dtype, packed, seq):
    heads = (4, 2, 16)
    args = operands.qkv(rng, 2, seq, 40, heads, dtype, packed=packed)
    cotangents = operands.qkv_cotangents(rng, 2, seq, heads, dtype)
    loss = weighted_sum(lambda *a: mlx_fused.fused_qkv_projection(*a, *heads), cotangents)
    grads = mx.grad(loss, argnums=(0, 1, 2))(*args)
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *cotangents, *args[:2], True, *heads)


@dtypes
@pytest.mark.parametrize("seq", [1, 9])
def test_output_vjp_is_the_explicit_backward(rng, dtype, seq):
    args = operands.output(rng, 2, seq, 40, 24, dtype)
    (cotangent,) = (operands.normal(rng, (2, seq, 24), dtype),)
    loss = weighted_sum(mlx_fused.fused_output_projection_residual, (cotangent,))
    grads = mx.grad(loss, argnums=(0, 1, 2, 3))(*args)
    oracle.assert_close(grads, oracle.fused_output_projection_residual_bwd, cotangent, *args[:2], True)


def test_value_and_grad(rng):
    args = qkv_flat(rng)
    results = [mx.value_and_grad(cube_sum(qkv_function(m)), argnums=tuple(range(7)))(*args) for m in MODULES]
    oracle.assert_equal(*results)
    args = operands.output(rng, 2, 3, 5, 4, draw=operands.integers)
    results = [
        mx.value_and_grad(cube_sum(m.fused_output_projection_residual), argnums=(0, 1, 2, 3))(*args)
        for m in MODULES
    ]
    oracle.assert_equal(*results)


@pytest.mark.parametrize("argnums", subsets(7), ids=lambda s: "-".join(QKV_NAMES[i] for i in s))
def test_qkv_computes_only_the_gradients_asked_for(rng, argnums):
    args = qkv_flat(rng)
    cotangents = operands.qkv_cotangents(rng, 2, 3, HEADS, draw=operands.integers)
    losses = [weighted_sum(qkv_function(m), cotangents) for m in MODULES]
    grads, expected = (mx.grad(loss, argnums)(*args) for loss in losses)
    nodes = primitives(*grads)
    assert nodes["FusedQKVProjectionGrad"] == 1
    assert output_counts("FusedQKVProjectionGrad", *grads) == [len(argnums)]
    assert not nodes["Matmul"] and not nodes["AddMM"] and not nodes["Concatenate"]
    oracle.assert_equal(grads, expected)


@pytest.mark.parametrize("argnums", subsets(3), ids=str)
def test_packed_qkv_computes_only_the_gradients_asked_for(rng, argnums):
    args = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)
    cotangents = operands.qkv_cotangents(rng, 2, 3, HEADS, draw=operands.integers)
    losses = [weighted_sum(packed_function(m), cotangents) for m in MODULES]
    grads, expected = (mx.grad(loss, argnums)(*args) for loss in losses)
    packed_parts = 3 * len({1, 2} & set(argnums))  # whose gradients are packed again
    assert output_counts("FusedQKVProjectionGrad", *grads) == [packed_parts + (0 in argnums)]
    assert not primitives(*grads)["Matmul"]
    oracle.assert_equal(grads, expected)


@pytest.mark.parametrize("argnums", subsets(4), ids=lambda s: "-".join(OUTPUT_NAMES[i] for i in s))
def test_output_computes_only_the_gradients_asked_for(rng, argnums):
    args = operands.output(rng, 2, 3, 5, 4, draw=operands.integers)
    cotangents = (operands.integers(rng, (2, 3, 4)),)
    losses = [weighted_sum(m.fused_output_projection_residual, cotangents) for m in MODULES]
    grads, expected = (mx.grad(loss, argnums)(*args) for loss in losses)
    # The residual's gradient is the cotangent itself: no output of any node of ours.
    wanted = len(set(argnums) - {3})
    counts = output_counts("FusedOutputProjectionGrad", *grads)
    assert counts == ([wanted] if wanted else [])
    assert not primitives(*grads)["Matmul"] and not primitives(*grads)["AddMM"]
    oracle.assert_equal(grads, expected)


def test_one_forward_node_per_call(rng):
    separate = qkv_flat(rng)
    packed = operands.qkv(rng, 2, 3, 5, HEADS, packed=True)
    output = operands.output(rng, 2, 3, 5, 4)
    mx.eval(separate, packed, output)
    assert primitives(*qkv_function(mlx_fused)(*separate)) == {"FusedQKVProjection": 1}
    packed_nodes = primitives(*packed_function(mlx_fused)(*packed))
    assert packed_nodes == {"FusedQKVProjection": 1, "Unpack": 2}  # views of weight and bias
    out = mlx_fused.fused_output_projection_residual(*output)
    assert primitives(out) == {"FusedOutputProjection": 1}


@pytest.mark.parametrize("used", subsets(3), ids=lambda s: "".join("qkv"[i] for i in s))
def test_outputs_that_the_loss_does_not_use(rng, used):
    args = qkv_flat(rng)

    def loss(module):
        def f(*a):
            outputs = qkv_function(module)(*a)
            return sum((outputs[i] * outputs[i]).sum() for i in used)

        return mx.grad(f, argnums=tuple(range(7)))

    oracle.assert_equal(loss(mlx_fused)(*args), loss(composed)(*args))


def test_operands_used_more_than_once(rng):
    x = operands.integers(rng, (2, 3, 6))
    w = operands.integers(rng, (6, 6))
    b = operands.integers(rng, (6,))

    def loss(module):
        def f(x, w, b):
            q, k, v = module.fused_qkv_projection(x, (w, w, w), (b, b, b), 2, 2, 3)
            heads = (q + 2 * k - v).swapaxes(1, 2).flatten(2)
            out = module.fused_output_projection_residual(heads, w, b, x)
            again = module.fused_output_projection_residual(out, w, b, out)
            return (again * again).sum()

        return mx.grad(f, argnums=(0, 1, 2))

    oracle.assert_equal(loss(mlx_fused)(x, w, b), loss(composed)(x, w, b))


def jvp_of(function, args, argnums, tangents):
    """The jvp of ``function`` by the arguments in ``argnums``, the others held."""

    def f(*varied):
        full = list(args)
        for i, a in zip(argnums, varied, strict=True):
            full[i] = a
        return function(*full)

    return mx.jvp(f, [args[i] for i in argnums], tangents)


@pytest.mark.parametrize("argnums", subsets(7), ids=lambda s: "-".join(QKV_NAMES[i] for i in s))
def test_qkv_jvp(rng, argnums):
    args = qkv_flat(rng)
    tangents = [operands.integers(rng, args[i].shape) for i in argnums]

    def jvp(module):
        return jvp_of(qkv_function(module), args, argnums, tangents)

    oracle.assert_equal(jvp(mlx_fused), jvp(composed))


@pytest.mark.parametrize("argnums", subsets(3), ids=str)
def test_packed_qkv_jvp(rng, argnums):
    args = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)
    tangents = [operands.integers(rng, args[i].shape) for i in argnums]

    def jvp(module):
        return jvp_of(packed_function(module), args, argnums, tangents)

    oracle.assert_equal(jvp(mlx_fused), jvp(composed))


@pytest.mark.parametrize("argnums", subsets(4), ids=lambda s: "-".join(OUTPUT_NAMES[i] for i in s))
def test_output_jvp(rng, argnums):
    args = operands.output(rng, 2, 3, 5, 4, draw=operands.integers)
    tangents = [operands.integers(rng, args[i].shape) for i in argnums]

    def jvp(module):
        return jvp_of(module.fused_output_projection_residual, args, argnums, tangents)

    oracle.assert_equal(jvp(mlx_fused), jvp(composed))


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_jvp_without_a_bias(rng, bias):
    x, weight, b = operands.qkv(rng, 2, 3, 5, HEADS, bias=bias, draw=operands.integers)
    tangent = operands.integers(rng, x.shape)
    results = [
        mx.jvp(lambda x, m=m: m.fused_qkv_projection(x, weight, b, *HEADS), [x], [tangent]) for m in MODULES
    ]
    oracle.assert_equal(*results)


@pytest.mark.parametrize("first", range(7), ids=QKV_NAMES.__getitem__)
def test_qkv_gradients_of_gradients(rng, first):
    args = qkv_flat(rng)
    direction = operands.integers(rng, args[first].shape)

    def second(module):
        gradient = mx.grad(cube_sum(qkv_function(module)), argnums=first)
        return mx.grad(lambda *a: (gradient(*a) * direction).sum(), argnums=tuple(range(7)))

    oracle.assert_equal(second(mlx_fused)(*args), second(composed)(*args))


@pytest.mark.parametrize("first", range(4), ids=OUTPUT_NAMES.__getitem__)
def test_output_gradients_of_gradients(rng, first):
    args = operands.output(rng, 2, 3, 5, 4, draw=operands.integers)
    direction = operands.integers(rng, args[first].shape)

    def second(module):
        gradient = mx.grad(cube_sum(module.fused_output_projection_residual), argnums=first)
        return mx.grad(lambda *a: (gradient(*a) * direction).sum(), argnums=(0, 1, 2, 3))

    oracle.assert_equal(second(mlx_fused)(*args), second(composed)(*args))


def test_third_derivative(rng):
    args = operands.output(rng, 1, 2, 3, 2, draw=operands.integers)

    def third(module):
        f = cube_sum(module.fused_output_projection_residual)
        for argnum in (0, 1):
            f = (lambda g: lambda *a: (g(*a) * 2).sum())(mx.grad(f, argnums=argnum))
        return mx.grad(f, argnums=(0, 1, 2, 3))

    oracle.assert_equal(third(mlx_fused)(*args), third(composed)(*args))


def test_forward_over_reverse_and_reverse_over_forward(rng):
    args = qkv_flat(rng)
    tangents = [operands.integers(rng, a.shape) for a in args]

    def forward_over_reverse(module):
        gradient = mx.grad(cube_sum(qkv_function(module)), argnums=tuple(range(7)))
        return mx.jvp(gradient, list(args), tangents)

    def reverse_over_forward(module):
        def f(*a):
            return mx.jvp(cube_sum(qkv_function(module)), list(a), tangents)[1][0]

        return mx.grad(f, argnums=tuple(range(7)))(*args)

    for transform in (forward_over_reverse, reverse_over_forward):
        oracle.assert_equal(transform(mlx_fused), transform(composed))


def test_explicit_backwards_have_gradients_and_tangents_of_their_own(rng):
    x, weight, bias = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)
    cotangents = operands.qkv_cotangents(rng, 2, 3, HEADS, draw=operands.integers)

    def fused(dq, dk, dv, x, weight):
        return mlx_fused.fused_qkv_projection_bwd(dq, dk, dv, x, weight, True, *HEADS)

    def reference(dq, dk, dv, x, weight):
        return tuple(mx.vjp(packed_function(composed), [x, weight, bias], [dq, dk, dv])[1])

    args = (*cotangents, x, weight)
    check_higher_derivatives(rng, fused, reference, args)

    a, w, b, r = operands.output(rng, 2, 3, 5, 4, draw=operands.integers)

    def fused_output(g, a, w):
        return mlx_fused.fused_output_projection_residual_bwd(g, a, w, True)

    def reference_output(g, a, w):
        return tuple(mx.vjp(composed.fused_output_projection_residual, [a, w, b, r], [g])[1])

    check_higher_derivatives(rng, fused_output, reference_output, (r, a, w))


def check_higher_derivatives(rng, fused, reference, args):
    everything = tuple(range(len(args)))
    oracle.assert_equal(fused(*args), reference(*args))
    gradients = [mx.grad(cube_sum(f), argnums=everything)(*args) for f in (fused, reference)]
    oracle.assert_equal(*gradients)
    tangents = [operands.integers(rng, a.shape) for a in args]
    oracle.assert_equal(*(mx.jvp(f, list(args), tangents) for f in (fused, reference)))


@pytest.mark.parametrize("wide", range(7), ids=QKV_NAMES.__getitem__)
def test_mixed_dtypes_give_each_argument_a_gradient_of_its_own_dtype(rng, wide):
    args = list(qkv_flat(rng, mx.bfloat16, draw=operands.integers))
    args[wide] = args[wide].astype(mx.float32)
    loss = weighted_sum(qkv_function(mlx_fused), [1.0, 1.0, 1.0])
    grads = mx.grad(loss, argnums=tuple(range(7)))(*args)
    assert [g.dtype for g in grads] == [a.dtype for a in args]
    expected = mx.grad(weighted_sum(qkv_function(composed), [1.0, 1.0, 1.0]), argnums=tuple(range(7)))
    oracle.assert_equal(grads, expected(*args))


def test_float64_gradients(rng):
    args = qkv_flat(rng, mx.float64)
    results = [mx.grad(cube_sum(qkv_function(m)), argnums=tuple(range(7)))(*args) for m in MODULES]
    assert all(g.dtype == mx.float64 for g in results[0])
    oracle.assert_equal(*results)


@pytest.mark.parametrize("gradient", [mx.float32, mx.float16], ids=str)
def test_a_gradient_of_another_dtype_is_cast(rng, gradient):
    """As a custom function may give it; the gradients have their arguments' own dtype all the same."""

    @mx.custom_function
    def identity(y):
        return y

    @identity.vjp
    def identity_vjp(_, cotangent, __):
        return cotangent.astype(gradient)

    x, weight, _ = operands.qkv(rng, 1, 9, 8, HEADS, mx.bfloat16, draw=operands.integers)

    def qkv_loss(function):
        def loss(x, weight):
            q, k, v = function(x, weight, None, *HEADS)
            return identity(q).sum() + k.sum() + v.sum()

        return mx.grad(loss, argnums=(0, 1))(x, weight)

    dx, dw = qkv_loss(mlx_fused.fused_qkv_projection)
    assert {dx.dtype, *(w.dtype for w in dw)} == {mx.bfloat16}
    oracle.assert_equal((dx, dw), qkv_loss(composed.fused_qkv_projection))

    a, w, _, r = operands.output(rng, 1, 9, 8, 8, mx.bfloat16, draw=operands.integers)

    def output_loss(a, w, r):
        return identity(mlx_fused.fused_output_projection_residual(a, w, None, r)).sum()

    grads = mx.grad(output_loss, argnums=(0, 1, 2))(a, w, r)
    assert [g.dtype for g in grads] == [mx.bfloat16] * 3


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
        scales = {"lora_scale": (0.5, 1.0, -3.0)} if adapted else {}
        call = projections.qkv(
            rng, 2, 3, hidden, heads, form, bias=bias, packed=packed, ranks=ranks, **options
        )
        for split_heads in (False, True):
            yield call.replace(split_heads=split_heads, **scales)


def stack_of(names, call, rng):
    """Of derivatives by every array that may have one, tangents too."""
    keys = [key for key, a in call.leaves.items() if mx.issubdtype(a.dtype, mx.floating)]
    stack = Stack([call.leaves[key] for key in keys], rng)
    for name in names:
        getattr(stack, name)(stack.differentiable())
    return stack, keys


DERIVATIVES = [("jvp",), ("grad",), ("grad", "jvp"), ("jvp", "grad"), ("grad", "grad"), ("jvp", "jvp")]
derivatives = pytest.mark.parametrize("names", DERIVATIVES, ids="-".join)
AFFINE = ("affine", 32, 4)


@derivatives
@pytest.mark.parametrize("route", ["fused", "composed"])
def test_derivatives_with_every_option(rng, names, route, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    forms = [None, AFFINE, ("mxfp4", 32, 4), ("affine", 32, 1)]
    for call in (
        *calls_with_every_option(rng, mx.float32, forms),
        *calls_with_every_option(rng, mx.float64, [None]),
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
