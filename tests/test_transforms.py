"""vmap, compile, checkpoint, async_eval and export against loops and the composed form, on integers."""

from itertools import permutations, product

import mlx.core as mx
import pytest

import mlx_fused
import oracle
import projections
from graph import primitives
from operands import few_integers, integers
from projections import cotangents
from stacks import Stack
from test_autodiff import (
    HEADS,
    OPERATIONS,
    backward_function,
    check_as_composed,
    cube_sum,
    every,
    kinds,
    like,
    make,
    operations,
    read_by_backward,
    square_sum,
    subsets,
    values,
    with_backward,
)

EXAMPLES = 3
INPUT = [("input", None)]


def mapped(rng, args, axes, draw=integers):
    """Operands with EXAMPLES different values along the given axes, None for a shared one."""
    return [
        a if axis is None else draw(rng, [*a.shape[:axis], EXAMPLES, *a.shape[axis:]])
        for a, axis in zip(args, axes, strict=True)
    ]


def as_tuple(results):
    """mx.grad has no tuple of one."""
    return (results,) if isinstance(results, mx.array) else results


def check_vmap(function, reference, args, axes):
    """vmap of ``function`` is the stack of the calls of ``reference``, for every axis of the outputs."""

    def example(i):
        return (a if axis is None else mx.take(a, i, axis) for a, axis in zip(args, axes, strict=True))

    expected = [as_tuple(reference(*example(i))) for i in range(EXAMPLES)]
    ranks = [y.ndim for y in expected[0]]
    for out_axis in range(min(ranks) + 1):
        outputs = as_tuple(mx.vmap(function, in_axes=axes, out_axes=out_axis)(*args))
        oracle.assert_equal(outputs, [mx.stack(ys, out_axis) for ys in zip(*expected, strict=True)])


def check_vmap_as_composed(rng, call, axes, transform=lambda f: f):
    """vmap of a transform of the call, over its trainable arrays, against the composed form's."""
    keys = call.trainable
    functions = [transform(call.function(keys, route=route)) for route in (None, "composed")]
    draw = few_integers if call.activation else integers
    check_vmap(*functions, mapped(rng, values(call), axes, draw), axes)


def every_axis(args):
    """Every choice of a mapped axis, or of none, for every operand, except none for all."""
    choices = product(*([None, *range(a.ndim + 1)] for a in args))
    return [axes for axes in choices if any(axis is not None for axis in axes)]


def any_axis(rng, args, some):
    """An axis for some of the operands."""
    return tuple(int(rng.integers(a.ndim + 1)) if i in some else None for i, a in enumerate(args))


def of_the_first(args, axis=0):
    return axis, *[None] * (len(args) - 1)


@pytest.mark.parametrize("operation,bias", [("packed", True), ("packed", False), ("output", True)])
def test_vmap_over_every_axis(rng, operation, bias):
    call = make(rng, operation, bias=bias)
    for axes in every_axis(values(call)):
        check_vmap_as_composed(rng, call, axes)


def test_vmap_of_separate_qkv_over_every_subset(rng):
    call = make(rng, "qkv")
    for some in subsets(7):
        check_vmap_as_composed(rng, call, any_axis(rng, values(call), some))


@operations
@kinds
def test_vmap_of_any_argument(rng, operation, kind):
    """Codes and scales too."""
    call = make(rng, operation, kind)
    others = [make(rng, operation, kind) for _ in range(EXAMPLES)]
    keys = list(call.leaves)
    for some in [[key] for key in keys] + [keys, keys[:1] + keys[-1:]]:
        axes = any_axis(rng, values(call, keys), [keys.index(key) for key in some])
        args = [
            call.leaves[key] if axis is None else mx.stack([o.leaves[key] for o in others], axis)
            for key, axis in zip(keys, axes, strict=True)
        ]
        check_vmap(call.function(keys), call.function(keys), args, axes)


@with_backward
def test_vmap_of_the_backwards(rng, operation):
    call = make(rng, operation)
    args = [*cotangents(rng, call, integers), *values(call, read_by_backward(call))]
    choices = [any_axis(rng, args, some) for some in subsets(len(args))]
    choices = every_axis(args) if operation == "output" else choices

    def formula(call, given):
        grads = call.gradient_formula(call.trainable)(oracle.exact(given), *call.exact_operands)
        return map(mx.array, grads)

    for axes in choices:
        check_vmap(backward_function(call), backward_function(call, formula), mapped(rng, args, axes), axes)


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
                stack.vmap(any_axis(rng, stack.args, mapped))
            stack.check(call, keys)


def test_three_vmaps(rng):
    call = projections.output(rng, 2, 3, 4, 5, None, mx.float64, alpha=-0.5)
    for order in permutations(range(4), 3):
        stack = Stack(call.leaves.values(), rng)
        for mapped in order:
            stack.vmap([0 if i == mapped else None for i in range(4)])
        stack.check(call, list(call.leaves))


@operations
@kinds
def test_vmap_of_vmap_runs_our_kernels(rng, operation, kind):
    call = make(rng, operation, kind)
    keys = call.trainable
    xs = integers(rng, (EXAMPLES, 2, *call.x.shape))
    rest = [mx.stack([a, 2 * a]) for a in values(call)[1:]]
    gradient = mx.grad(square_sum(call.function(keys)), every(keys))
    for function in (call.function(keys), gradient):
        outputs = mx.vmap(mx.vmap(function), in_axes=of_the_first(keys))(xs, *rest)
        if call.quantization:
            assert not {"Matmul", "AddMM", "QuantizedMatmul"} & set(primitives(*outputs))
        for i, j in ((0, 0), (EXAMPLES - 1, 1)):
            oracle.assert_equal([y[i, j] for y in outputs], function(xs[i, j], *(a[j] for a in rest)))


@operations
def test_vmap_over_the_activations_alone_stays_fused(rng, operation):
    call = make(rng, operation)
    last = call.trainable[-1][0] == "residual"
    for axis, other in product(range(4), range(4) if last else [None]):
        axes = (axis, *[None] * (len(call.trainable) - 2), other)
        outputs = mx.vmap(call.function(call.trainable), in_axes=axes)(*mapped(rng, values(call), axes))
        nodes = primitives(*outputs)
        assert nodes[OPERATIONS[operation]] == 1
        assert not nodes["Matmul"] and not nodes["AddMM"]


@operations
@kinds
def test_vmap_of_gradients(rng, operation, kind):
    call = make(rng, operation, kind)
    args = values(call)
    choices = [of_the_first(args)]
    if (operation, kind) == ("output", "dense"):
        choices += [(0, None, None, 0), (1, None, None, None), (None, 0, 0, None)]
    for axes, argnums in product(choices, [(i,) for i in every(args)] + [every(args)]):
        check_vmap_as_composed(rng, call, axes, lambda f, argnums=argnums: mx.grad(square_sum(f), argnums))


def test_grad_of_vmap(rng):
    call = make(rng, "qkv")
    axes = of_the_first(call.trainable)
    stacked = call.replace(input=integers(rng, (EXAMPLES, *call.x.shape)))
    check_as_composed(
        stacked, lambda f, args: mx.grad(cube_sum(mx.vmap(f, in_axes=axes)), every(args))(*args)
    )


def test_jvp_of_vmap_and_vmap_of_jvp(rng):
    call = make(rng, "qkv")
    axes = of_the_first(call.trainable)
    stacked = call.replace(input=integers(rng, (EXAMPLES, *call.x.shape)))
    tangents = like(rng, values(stacked))

    def jvp_of_vmap(function, args):
        return mx.jvp(mx.vmap(function, in_axes=axes), args, tangents)

    def vmap_of_jvp(function, args):
        count = len(args)
        jvp = lambda *both: mx.jvp(function, list(both[:count]), list(both[count:]))[1]  # noqa: E731
        return mx.vmap(jvp, in_axes=(*axes, *axes))(*args, *tangents)

    check_as_composed(stacked, jvp_of_vmap)
    check_as_composed(stacked, vmap_of_jvp)


def resized(rng, call, batch, seq):
    """Values of another number of rows for the trainable arrays."""
    of_rows = ("input", "x", "residual")
    return [
        integers(rng, (batch, seq, a.shape[-1])) if name in of_rows else a
        for (name, _), a in ((key, call.leaves[key]) for key in call.trainable)
    ]


@operations
@kinds
@pytest.mark.parametrize("shapeless", [False, True], ids=["shaped", "shapeless"])
def test_compile_and_checkpoint(rng, operation, kind, shapeless):
    call = make(rng, operation, kind)
    argnums = every(call.trainable)
    function, composed = (call.function(call.trainable, route=route) for route in (None, "composed"))
    grad = mx.grad(square_sum(function), argnums)
    compiled = mx.compile(function, shapeless=shapeless)
    of_grad = mx.compile(grad, shapeless=shapeless)
    of_compiled = mx.grad(mx.compile(square_sum(function)), argnums)
    of_checkpoint = mx.grad(square_sum(mx.checkpoint(function)), argnums)
    expected = mx.grad(square_sum(composed), argnums)
    for batch, seq in ((2, 3), (1, 1), (4, 7), (2, 3)):
        args = resized(rng, call, batch, seq)
        oracle.assert_equal(compiled(*args), composed(*args))
        for gradient in (of_grad, of_compiled, of_checkpoint):
            oracle.assert_equal(gradient(*args), expected(*args))


@with_backward
@pytest.mark.parametrize("shapeless", [False, True], ids=["shaped", "shapeless"])
def test_compile_of_the_backwards(rng, operation, shapeless):
    compiled = None
    for batch, seq in ((2, 3), (4, 7)):
        call = make(rng, operation)
        call = call.with_leaves(dict(zip(call.trainable, resized(rng, call, batch, seq), strict=True)))
        compiled = compiled or mx.compile(backward_function(call), shapeless=shapeless)
        given = cotangents(rng, call, integers)
        expected = call.gradient_formula(call.trainable)(oracle.exact(given), *call.exact_operands)
        oracle.assert_equal(compiled(*given, *values(call, read_by_backward(call))), expected)


def test_compiled_step_with_captured_state(rng):
    call = make(rng, "packed")

    def two_steps(transform):
        state = {"weight": call.arguments["weight"]}

        def step():
            gradient = mx.grad(square_sum(call.function([("weight", None)])))
            # A power of two, so that two steps of it are exact as well.
            state["weight"] = state["weight"] - gradient(state["weight"]) / 1024
            return state["weight"]

        run = transform(step, state)
        return run(), run()

    compiled = two_steps(lambda step, state: mx.compile(step, inputs=state, outputs=state))
    oracle.assert_equal(compiled, two_steps(lambda step, state: step))


def merged(*calls):
    """How many nodes of ours are left of calls on one input, compiled together."""
    key = next(iter(calls[0].leaves))
    compiled = mx.compile(lambda x: sum(mx.exp(y).sum() for c in calls for y in c.with_leaves({key: x})()))
    return sum(n for name, n in primitives(compiled(calls[0].x)).items() if name.startswith("Fused"))


def test_equal_calls_merge_and_different_ones_do_not(rng):
    dense = projections.qkv(rng, 2, 3, 32, (2, 2, 3), packed=True)
    affine, adapted = make(rng, "qkv", "affine"), make(rng, "qkv", "affine-lora")
    output, adapted_output = make(rng, "output"), make(rng, "output", "affine-lora")
    for call in (output, adapted_output):
        assert merged(call, call) == 1
    for call in (dense, affine, adapted):  # mx.compile would lose some of several outputs
        assert merged(call, call) == 2
    for call, other in (
        # The same shapes of the operands, and the same number of rows, cut otherwise.
        (dense, dense.replace(num_heads=6, num_kv_heads=6, head_dim=1)),
        (dense, dense.replace(bias=None)),
        (affine, projections.qkv(rng, 2, 3, 32, HEADS, ("affine", 32, 8))),
        (adapted, adapted.replace(lora_scale=3.0)),
        (adapted, adapted.replace(lora_scale=(2.0, 2.0, 1.0))),
        (adapted, adapted.replace(exact=True)),
        (output, output.replace(bias=None)),
        (adapted_output, adapted_output.replace(alpha=0.25)),
    ):
        assert merged(call, other) == 2


def merged_gradients(call, *choices):
    """How many gradient nodes are left of the gradients of several choices of arrays, compiled together."""

    def together(*args):
        loss = lambda *a: sum(y.sum() for y in call.function(call.trainable)(*a))  # noqa: E731
        return sum(mx.exp(g).sum() for argnums in choices for g in as_tuple(mx.grad(loss, argnums)(*args)))

    nodes = primitives(mx.compile(together)(*values(call)))
    return sum(n for name, n in nodes.items() if name.endswith("ProjectionGrad"))


def test_equal_gradients_merge_and_different_ones_do_not(rng):
    call = projections.qkv(rng, 2, 3, 6, (2, 2, 3))
    k, v = (call.trainable.index(("weight", i)) for i in (1, 2))
    assert merged_gradients(call, (k,), (k,)) == 1
    assert merged_gradients(call, (k, v), (k, v)) == 2
    # They have the same inputs and shapes.
    assert merged_gradients(call, (k,), (v,)) == 2


def test_equal_output_gradients_merge_and_different_ones_do_not(rng):
    call = projections.output(rng, 2, 3, 6, 5)
    weight, bias = (call.trainable.index((name, None)) for name in ("weight", "bias"))
    assert merged_gradients(call, (weight,), (weight,)) == 1
    # The bias's gradient needs no input that the weight's does not have.
    assert merged_gradients(call, (weight,), (weight, bias)) == 2


@pytest.mark.parametrize("used", [(0, 0), (1, 1), (2, 2), (0, 1), (2, 0)])
@pytest.mark.parametrize("kind", ["packed", "affine-lora"])
def test_equal_calls_of_which_not_all_is_used(rng, kind, used):
    call = make(rng, "qkv", kind) if kind != "packed" else make(rng, kind)

    def some(x):
        return [call.function(INPUT)(x)[i] for i in used]

    oracle.assert_equal(mx.compile(some)(call.x), some(call.x))


def test_merged_calls_give_the_same_values(rng):
    call = make(rng, "packed")

    def twice(x):
        first, second = (call.function(INPUT)(x) for _ in range(2))
        return tuple(2 * a - b for a, b in zip(first, second, strict=True))

    oracle.assert_equal(mx.compile(twice)(call.x), call(route="composed"))


def test_async_eval(rng):
    def gradient(call, **route):
        return mx.grad(cube_sum(call.function(call.trainable, **route)), every(call.trainable))(*values(call))

    steps = []
    for _ in range(20):
        call = make(rng, "qkv")
        grads = gradient(call)
        mx.async_eval(grads)
        steps.append((call, grads))
    for call, grads in steps:
        oracle.assert_equal(grads, gradient(call, route="composed"))


def test_a_chain_over_two_streams(rng):
    first = projections.qkv(rng, 2, 3, 6, (2, 2, 3), packed=True, draw=integers)
    second = projections.output(rng, 2, 3, 6, 6, draw=integers).replace(residual=first.x)

    def chain(stream=None, route=None):
        q, _, _ = first(route=route)
        return second(x=q.swapaxes(1, 2).flatten(2), stream=stream, route=route)

    oracle.assert_equal(chain(stream=mx.new_stream(mx.cpu)), chain(route="composed"))


@operations
@kinds
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_asked_to_be_composed_can_be_exported(rng, tmp_path, operation, kind, exact):
    call, path = make(rng, operation, kind).replace(exact=exact), str(tmp_path / "call.mlxfn")
    mx.export_function(path, call.function(list(call.leaves), route="composed"), *call.leaves.values())
    oracle.assert_equal(mx.import_function(path)(*call.leaves.values()), call(route="composed"))


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (1, 2, 3, 8)])
def test_any_rank_compiles_without_shapes(shape):
    gate, up = (mx.random.normal((5, 8), key=mx.random.key(i)) for i in range(2))
    mx.eval(gate, up)

    def gradient(x):
        return mx.grad(lambda x: mlx_fused.fused_gated_projection(x, (gate, up)).sum())(x)

    for function in (lambda x: mlx_fused.fused_linear(x, gate, activation="silu"), gradient):
        compiled = mx.compile(function, shapeless=True)
        for rows in (3, 7):
            x = mx.random.normal((*shape[:-2], rows, 8))
            mx.eval(x)
            assert mx.allclose(compiled(x), function(x), atol=1e-6)
