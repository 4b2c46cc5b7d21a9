"""vmap, compile, checkpoint, async_eval and export against loops and the composed form, on integers."""

from itertools import permutations, product

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands
import oracle
import projections
from graph import primitives
from mlx_fused import composed
from stacks import Stack
from test_autodiff import cube_sum, packed_function, qkv_flat, qkv_function, subsets

HEADS = (4, 2, 3)
EXAMPLES = 3


def output_function(module):
    return module.fused_output_projection_residual


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def mapped(rng, args, axes):
    """Operands with EXAMPLES different values along the given axes, None for a shared one."""
    return [
        a if axis is None else operands.integers(rng, [*a.shape[:axis], EXAMPLES, *a.shape[axis:]])
        for a, axis in zip(args, axes, strict=True)
    ]


def check_vmap(function, reference, args, axes):
    """vmap of ``function`` is the stack of the calls of ``reference``, for every axis of the outputs."""

    def example(i):
        return (a if axis is None else mx.take(a, i, axis) for a, axis in zip(args, axes, strict=True))

    expected = [as_tuple(reference(*example(i))) for i in range(EXAMPLES)]
    ranks = [y.ndim for y in expected[0]]
    for out_axis in range(min(ranks) + 1):
        outputs = as_tuple(mx.vmap(function, in_axes=axes, out_axes=out_axis)(*args))
        stacked = [mx.stack(examples, out_axis) for examples in zip(*expected, strict=True)]
        oracle.assert_equal(outputs, stacked)


def every_axis(args):
    """Every choice of a mapped axis, or of none, for every operand, except none for all."""
    choices = product(*([None, *range(a.ndim + 1)] for a in args))
    return [axes for axes in choices if any(axis is not None for axis in axes)]


def test_vmap_of_packed_qkv_over_every_axis(rng):
    args = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)
    for axes in every_axis(args):
        check_vmap(packed_function(mlx_fused), packed_function(composed), mapped(rng, args, axes), axes)


@pytest.mark.parametrize("operands_mapped", subsets(7), ids=str)
def test_vmap_of_separate_qkv_over_every_subset(rng, operands_mapped):
    args = qkv_flat(rng)
    axes = tuple(int(rng.integers(a.ndim + 1)) if i in operands_mapped else None for i, a in enumerate(args))
    check_vmap(qkv_function(mlx_fused), qkv_function(composed), mapped(rng, args, axes), axes)


def test_vmap_of_output_over_every_axis(rng):
    args = operands.output(rng, 2, 3, 4, 5, draw=operands.integers)
    for axes in every_axis(args):
        check_vmap(output_function(mlx_fused), output_function(composed), mapped(rng, args, axes), axes)


def test_vmap_without_a_bias(rng):
    x, weight, _ = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)
    for axes in every_axis((x, weight)):
        check_vmap(
            lambda x, w: mlx_fused.fused_qkv_projection(x, w, None, *HEADS),
            lambda x, w: composed.fused_qkv_projection(x, w, None, *HEADS),
            mapped(rng, (x, weight), axes),
            axes,
        )


@pytest.mark.parametrize("operands_mapped", subsets(5), ids=str)
def test_vmap_of_the_qkv_backward(rng, operands_mapped):
    x, weight, _ = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)
    args = (*operands.qkv_cotangents(rng, 2, 3, HEADS, draw=operands.integers), x, weight)
    axes = tuple(int(rng.integers(a.ndim + 1)) if i in operands_mapped else None for i, a in enumerate(args))

    def reference(*args):
        exact = [np.asarray(a, np.float64) for a in args]
        return tuple(map(mx.array, oracle.fused_qkv_projection_bwd(*exact, True, *HEADS)))

    def function(*args):
        return mlx_fused.fused_qkv_projection_bwd(*args, True, *HEADS)

    check_vmap(function, reference, mapped(rng, args, axes), axes)


def test_vmap_of_the_output_backward(rng):
    a, w, _, g = operands.output(rng, 2, 3, 4, 5, draw=operands.integers)

    def reference(*args):
        exact = [np.asarray(a, np.float64) for a in args]
        return tuple(map(mx.array, oracle.fused_output_projection_residual_bwd(*exact, True)))

    def function(*args):
        return mlx_fused.fused_output_projection_residual_bwd(*args, True)

    for axes in every_axis((g, a, w)):
        check_vmap(function, reference, mapped(rng, (g, a, w), axes), axes)


def test_vmap_of_vmap(rng):
    x = operands.integers(rng, (4, 2, 2, 3, 5))
    _, weight, bias = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)

    def twice(module):
        f = packed_function(module)
        return mx.vmap(mx.vmap(f, in_axes=(0, None, None)), in_axes=(1, None, None))(x, weight, bias)

    oracle.assert_equal(twice(mlx_fused), twice(composed))


@pytest.mark.parametrize("route", ["fused", "composed"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_vmap_of_vmap_over_every_pair_of_subsets(rng, bias, dtype, route, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", route)
    for call in (
        projections.output(rng, 2, 3, 4, 5, None, dtype, bias, alpha=-0.5),
        projections.qkv(rng, 2, 3, 4, HEADS, None, dtype, bias, packed=True),
    ):
        keys = list(call.leaves)
        some = [None, *subsets(len(keys))]
        for pair in product(some, repeat=2):
            stack = Stack(call.leaves.values(), rng)
            for mapped in filter(None, pair):
                axes = [int(rng.integers(a.ndim + 1)) for a in stack.args]
                stack.vmap([axis if i in mapped else None for i, axis in enumerate(axes)])
            stack.check(call, keys)


def test_three_vmaps(rng):
    call = projections.output(rng, 2, 3, 4, 5, None, mx.float64, alpha=-0.5)
    for order in permutations(range(4), 3):
        stack = Stack(call.leaves.values(), rng)
        for mapped in order:
            stack.vmap([0 if i == mapped else None for i in range(4)])
        stack.check(call, list(call.leaves))


@pytest.mark.parametrize("axis", range(4))
def test_vmap_over_the_input_alone_stays_fused(rng, axis):
    args = qkv_flat(rng)
    axes = (axis, *[None] * 6)
    outputs = mx.vmap(qkv_function(mlx_fused), in_axes=axes)(*mapped(rng, args, axes))
    nodes = primitives(*outputs)
    assert nodes["FusedQKVProjection"] == 1
    assert not nodes["Matmul"] and not nodes["AddMM"]


@pytest.mark.parametrize("axes", list(product(range(4), repeat=2)), ids=str)
def test_vmap_over_the_activations_alone_stays_fused(rng, axes):
    args = operands.output(rng, 2, 3, 4, 5, draw=operands.integers)
    axes = (axes[0], None, None, axes[1])
    out = mx.vmap(output_function(mlx_fused), in_axes=axes)(*mapped(rng, args, axes))
    nodes = primitives(out)
    assert nodes["FusedOutputProjection"] == 1
    assert not nodes["Matmul"] and not nodes["AddMM"]


@pytest.mark.parametrize("argnum", range(7))
def test_vmap_of_grad_gives_each_examples_gradients(rng, argnum):
    args = qkv_flat(rng)
    axes = (0, *[None] * 6)
    functions = [mx.grad(cube_sum(qkv_function(m)), argnums=argnum) for m in (mlx_fused, composed)]
    check_vmap(*functions, mapped(rng, args, axes), axes)


@pytest.mark.parametrize("axes", [(0, None, None, 0), (1, None, None, None), (None, 0, 0, None)], ids=str)
@pytest.mark.parametrize("argnum", range(4))
def test_vmap_of_output_grad(rng, axes, argnum):
    args = operands.output(rng, 2, 3, 4, 5, draw=operands.integers)
    functions = [mx.grad(cube_sum(output_function(m)), argnums=argnum) for m in (mlx_fused, composed)]
    check_vmap(*functions, mapped(rng, args, axes), axes)


def test_grad_of_vmap(rng):
    args = mapped(rng, qkv_flat(rng), (0, *[None] * 6))

    def gradients(module):
        f = mx.vmap(qkv_function(module), in_axes=(0, *[None] * 6))
        return mx.grad(cube_sum(f), argnums=tuple(range(7)))(*args)

    oracle.assert_equal(gradients(mlx_fused), gradients(composed))


def test_jvp_of_vmap_and_vmap_of_jvp(rng):
    args = mapped(rng, qkv_flat(rng), (0, *[None] * 6))
    tangents = [operands.integers(rng, a.shape) for a in args]
    axes = (0, *[None] * 6)

    def jvp_of_vmap(module):
        return mx.jvp(mx.vmap(qkv_function(module), in_axes=axes), args, tangents)

    def vmap_of_jvp(module):
        def f(*primals_and_tangents):
            primals, tangents = primals_and_tangents[:7], primals_and_tangents[7:]
            return mx.jvp(qkv_function(module), list(primals), list(tangents))[1]

        return mx.vmap(f, in_axes=(*axes, *axes))(*args, *tangents)

    for transform in (jvp_of_vmap, vmap_of_jvp):
        oracle.assert_equal(transform(mlx_fused), transform(composed))


@pytest.mark.parametrize("shapeless", [False, True], ids=["shaped", "shapeless"])
def test_compile(rng, shapeless):
    qkv = mx.compile(packed_function(mlx_fused), shapeless=shapeless)
    output = mx.compile(output_function(mlx_fused), shapeless=shapeless)
    _, weight, bias = operands.qkv(rng, 1, 1, 5, HEADS, packed=True, draw=operands.integers)
    _, w, b, _ = operands.output(rng, 1, 1, 4, 5, draw=operands.integers)
    for batch, seq in ((2, 3), (1, 1), (4, 7), (2, 3)):
        x = operands.integers(rng, (batch, seq, 5))
        outputs = qkv(x, weight, bias)
        oracle.assert_equal(outputs, packed_function(composed)(x, weight, bias))
        assert [y.shape for y in outputs] == [(batch, n, seq, 3) for n in (4, 2, 2)]
        a, r = operands.integers(rng, (batch, seq, 4)), operands.integers(rng, (batch, seq, 5))
        oracle.assert_equal(output(a, w, b, r), output_function(composed)(a, w, b, r))


@pytest.mark.parametrize("shapeless", [False, True], ids=["shaped", "shapeless"])
def test_compile_of_the_backwards(rng, shapeless):
    def qkv_bwd(*args):
        return mlx_fused.fused_qkv_projection_bwd(*args, True, *HEADS)

    def output_bwd(*args):
        return mlx_fused.fused_output_projection_residual_bwd(*args, True)

    compiled = [mx.compile(f, shapeless=shapeless) for f in (qkv_bwd, output_bwd)]
    for batch, seq in ((2, 3), (4, 7)):
        x, weight, _ = operands.qkv(rng, batch, seq, 5, HEADS, packed=True, draw=operands.integers)
        cotangents = operands.qkv_cotangents(rng, batch, seq, HEADS, draw=operands.integers)
        args = (*cotangents, x, weight)
        expected = oracle.fused_qkv_projection_bwd(*oracle.exact(args), True, *HEADS)
        oracle.assert_equal(compiled[0](*args), expected)
        a, w, _, g = operands.output(rng, batch, seq, 4, 5, draw=operands.integers)
        expected = oracle.fused_output_projection_residual_bwd(*oracle.exact((g, a, w)), True)
        oracle.assert_equal(compiled[1](g, a, w), expected)


def test_shapeless_compile_of_vjp(rng):
    def vjp(x, weight, bias, *cotangents):
        return mx.vjp(packed_function(mlx_fused), [x, weight, bias], list(cotangents))[1]

    compiled = mx.compile(vjp, shapeless=True)
    for batch, seq in ((2, 3), (1, 1), (4, 7)):
        args = operands.qkv(rng, batch, seq, 5, HEADS, packed=True, draw=operands.integers)
        cotangents = operands.qkv_cotangents(rng, batch, seq, HEADS, draw=operands.integers)
        expected = mx.vjp(packed_function(composed), list(args), list(cotangents))[1]
        oracle.assert_equal(compiled(*args, *cotangents), expected)


def test_compile_of_grad_and_grad_of_compile(rng):
    args = qkv_flat(rng)
    loss, argnums = cube_sum(qkv_function(mlx_fused)), tuple(range(7))
    expected = mx.grad(cube_sum(qkv_function(composed)), argnums)(*args)
    oracle.assert_equal(mx.compile(mx.grad(loss, argnums))(*args), expected)
    oracle.assert_equal(mx.grad(mx.compile(loss), argnums)(*args), expected)


def test_compiled_step_with_captured_state(rng):
    x, weight, bias = operands.qkv(rng, 2, 3, 5, HEADS, packed=True, draw=operands.integers)

    def two_steps(transform):
        state = {"weight": weight}

        def loss(w):
            return sum((y * y).sum() for y in mlx_fused.fused_qkv_projection(x, w, bias, *HEADS))

        def step():
            # A power of two, so that two steps of it are exact as well.
            state["weight"] = state["weight"] - mx.grad(loss)(state["weight"]) / 1024
            return state["weight"]

        run = transform(step, state)
        return run(), run()

    compiled = two_steps(lambda step, state: mx.compile(step, inputs=state, outputs=state))
    oracle.assert_equal(compiled, two_steps(lambda step, state: step))


def count_after_compile(function, *args):
    return primitives(*as_tuple(mx.compile(function)(*args)))


def test_equal_calls_merge(rng):
    x, weight, bias = operands.qkv(rng, 2, 3, 6, (2, 2, 3), packed=True)
    w = operands.normal(rng, (6, 6))

    def same(x, weight, bias):
        outputs = [mlx_fused.fused_qkv_projection(x, weight, bias, 2, 2, 3) for _ in range(2)]
        return sum(mx.exp(y).sum() for output in outputs for y in output)

    def other_heads(x, weight, bias):
        # The same shapes of the operands, and the same number of rows, cut otherwise.
        first = mlx_fused.fused_qkv_projection(x, weight, bias, 2, 2, 3)
        second = mlx_fused.fused_qkv_projection(x, weight, bias, 6, 6, 1)
        return sum(mx.exp(y).sum() for output in (first, second) for y in output)

    def other_bias(x, weight, bias):
        first = mlx_fused.fused_qkv_projection(x, weight, bias, 2, 2, 3)
        second = mlx_fused.fused_qkv_projection(x, weight, None, 2, 2, 3)
        return sum(mx.exp(y).sum() for output in (first, second) for y in output)

    def same_output(x, w):
        outputs = [mlx_fused.fused_output_projection_residual(x, w, None, x) for _ in range(2)]
        return sum(mx.exp(y).sum() for y in outputs)

    def other_output(x, w):
        first = mlx_fused.fused_output_projection_residual(x, w, None, x)
        second = mlx_fused.fused_output_projection_residual(x, w, w[0], x)
        return mx.exp(first).sum() + mx.exp(second).sum()

    for function, nodes in ((same, 1), (other_heads, 2), (other_bias, 2)):
        assert count_after_compile(function, x, weight, bias)["FusedQKVProjection"] == nodes
    for function, nodes in ((same_output, 1), (other_output, 2)):
        assert count_after_compile(function, x, w)["FusedOutputProjection"] == nodes


def test_equal_gradients_merge_and_different_ones_do_not(rng):
    x, (wq, wk, wv), bias = operands.qkv(rng, 2, 3, 6, (2, 2, 3))

    def grad(argnum):
        def loss(wk, wv):
            return sum(y.sum() for y in mlx_fused.fused_qkv_projection(x, (wq, wk, wv), bias, 2, 2, 3))

        return mx.grad(loss, argnum)

    # The gradients of wk and wv have the same inputs and shapes.
    for argnums, nodes in (((0, 0), 1), ((0, 1), 2)):

        def both(wk, wv, argnums=argnums):
            return sum(mx.exp(grad(i)(wk, wv)).sum() for i in argnums)

        compiled = count_after_compile(both, wk, wv)
        assert compiled["FusedQKVProjectionGrad"] == nodes


def test_equal_output_gradients_merge_and_different_ones_do_not(rng):
    a, w, b, r = operands.output(rng, 2, 3, 6, 5)

    def grad(argnums):
        def loss(w, b):
            return mlx_fused.fused_output_projection_residual(a, w, b, r).sum()

        return mx.grad(loss, argnums)

    # The bias's gradient needs no input that the weight's does not have.
    for pair, nodes in ((((0, 1), (0, 1)), 1), (((0,), (0, 1)), 2)):

        def both(w, b, pair=pair):
            return sum(mx.exp(g).sum() for argnums in pair for g in grad(argnums)(w, b))

        compiled = count_after_compile(both, w, b)
        assert compiled["FusedOutputProjectionGrad"] == nodes


def test_merged_calls_give_the_same_values(rng):
    x, weight, bias = operands.qkv(rng, 2, 3, 6, (2, 2, 3), packed=True, draw=operands.integers)

    def twice(x):
        first, second = (mlx_fused.fused_qkv_projection(x, weight, bias, 2, 2, 3) for _ in range(2))
        return tuple(2 * a - b for a, b in zip(first, second, strict=True))

    oracle.assert_equal(mx.compile(twice)(x), composed.fused_qkv_projection(x, weight, bias, 2, 2, 3))


def test_checkpoint(rng):
    args = qkv_flat(rng)

    def loss(module, transform):
        return mx.grad(cube_sum(transform(qkv_function(module))), argnums=tuple(range(7)))

    grads = loss(mlx_fused, mx.checkpoint)(*args)
    oracle.assert_equal(grads, loss(composed, lambda f: f)(*args))
    args = operands.output(rng, 2, 3, 4, 5, draw=operands.integers)
    results = [
        mx.grad(cube_sum(f), argnums=(0, 1, 2, 3))(*args)
        for f in (mx.checkpoint(output_function(mlx_fused)), output_function(composed))
    ]
    oracle.assert_equal(*results)


def test_async_eval(rng):
    steps = []
    for _ in range(20):
        args = qkv_flat(rng)
        grads = mx.grad(cube_sum(qkv_function(mlx_fused)), argnums=tuple(range(7)))(*args)
        mx.async_eval(grads)
        steps.append((args, grads))
    for args, grads in steps:
        expected = mx.grad(cube_sum(qkv_function(composed)), argnums=tuple(range(7)))(*args)
        oracle.assert_equal(grads, expected)


def test_a_chain_over_two_streams(rng):
    x, weight, bias = operands.qkv(rng, 2, 3, 6, (2, 2, 3), packed=True, draw=operands.integers)
    w, other = operands.integers(rng, (6, 6)), mx.new_stream(mx.cpu)

    def chain(module, **where):
        q, _, _ = module.fused_qkv_projection(x, weight, bias, 2, 2, 3)
        heads = q.swapaxes(1, 2).flatten(2)
        return module.fused_output_projection_residual(heads, w, None, x, **where)

    oracle.assert_equal(chain(mlx_fused, stream=other), chain(composed))


@pytest.mark.parametrize("form", [None, ("affine", 32, 4), ("nvfp4", 16, 4)], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_what_is_asked_to_be_composed_can_be_exported(rng, tmp_path, form, adapted):
    ranks, rank = ((2, None, 3), 2) if adapted else (None, None)
    for call in (
        projections.qkv(rng, 2, 3, 32, HEADS, form, ranks=ranks),
        projections.output(rng, 2, 3, 32, 5, form, rank=rank, alpha=0.5),
    ):
        keys, path = list(call.leaves), str(tmp_path / "call.mlxfn")
        mx.export_function(path, call.function(keys, route="composed"), *call.leaves.values())
        oracle.assert_equal(mx.import_function(path)(*call.leaves.values()), call(route="composed"))


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_the_composed_forms_can_be_exported(rng, tmp_path, packed):
    x, weight, bias = operands.qkv(rng, 2, 3, 5, HEADS, packed=packed)
    parts = (weight, bias) if packed else (*weight, *bias)

    def qkv(x, *parts):
        half = len(parts) // 2
        weight, bias = parts if packed else (parts[:half], parts[half:])
        return composed.fused_qkv_projection(x, weight, bias, *HEADS)

    def output(*args):
        return composed.fused_output_projection_residual(*args)

    for function, args in ((qkv, (x, *parts)), (output, operands.output(rng, 2, 3, 4, 5))):
        path = str(tmp_path / f"{function.__name__}.mlxfn")
        mx.export_function(path, function, *args)
        oracle.assert_equal(mx.import_function(path)(*args), as_tuple(function(*args)))
