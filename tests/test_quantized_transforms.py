"""Transforms of the operations on quantized and adapted weights, and how much is computed for them.

Values are compared with the composed form's, or with mlx-lm's own modules, on integers: every sum is exact.
"""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.lora import LoRALinear

import operands
import oracle
import projections
from graph import output_counts, primitives
from projections import check_forward, cotangents, gradients
from test_autodiff import subsets
from test_transforms import EXAMPLES, check_vmap

HEADS = (4, 2, 3)
AFFINE = ("affine", 32, 4)
# (form, adapters)
KINDS = [(AFFINE, False), (("mxfp4", 32, 4), False), (None, True), (AFFINE, True), (("nvfp4", 16, 4), True)]
OPERATIONS = ["qkv", "packed", "output"]
everything = pytest.mark.parametrize("operation", OPERATIONS)
kinds = pytest.mark.parametrize("form,adapted", KINDS, ids=str)


def make(rng, operation, form, adapted, dtype=mx.float32, draw=operands.integers):
    if operation == "output":
        rank, alpha = 2 if adapted else None, 0.5
        return projections.output(rng, 2, 3, 32, 5, form, dtype, rank=rank, alpha=alpha, draw=draw)
    ranks, packed = (2, None, 3) if adapted else None, operation == "packed"
    return projections.qkv(rng, 2, 3, 32, HEADS, form, dtype, packed=packed, ranks=ranks, draw=draw)


def square_sum(function):
    """A scalar whose gradients depend on the outputs, and stay exact."""
    return lambda *args: sum((y * y).sum() for y in function(*args))


def stock(call):
    """mlx-lm's modules on the call's arrays, as a function of all that may be trained."""
    a = call.arguments
    names = ("weight", "scales", "biases", "bias", "lora_a", "lora_b")
    count = len(call.features)

    def listed(name, leaves):
        value = leaves.get((name, None))
        return [value] if value is not None else [leaves.get((name, i)) for i in range(count)]

    def module(part):
        if call.quantization:
            group_size, bits, mode = call.quantization
            layer = nn.QuantizedLinear(32, 8, group_size=group_size, bits=bits, mode=mode)
        else:
            layer = nn.Linear(32, 8)
        for name in ("weight", "scales", "biases", "bias"):
            if part[name] is not None:
                layer[name] = part[name]
        if part["lora_a"] is None:
            return layer
        adapted = LoRALinear.from_base(nn.Linear(32, 8), scale=a["scale"])
        adapted.linear, adapted.lora_a, adapted.lora_b = layer, part["lora_a"], part["lora_b"]
        return adapted

    def function(*values):
        leaves = call.leaves | dict(zip(call.trainable, values, strict=True))
        x = leaves.get(("input", None), leaves.get(("attn_out", None)))
        columns = [listed(name, leaves) for name in names]
        modules = [module(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
        ys = [m(x) for m in modules]
        if call.segments is None:
            return (leaves["residual", None] + a["alpha"] * ys[0],)
        split = (y.reshape(2, 3, *heads) for y, heads in zip(ys, call.segments, strict=True))
        return tuple(y.swapaxes(1, 2) for y in split)

    return function


@pytest.mark.parametrize("operation", ["qkv", "output"])
@kinds
def test_values_and_gradients_are_those_of_the_modules_of_mlx_lm(rng, operation, form, adapted):
    call = make(rng, operation, form, adapted)
    primals = [call.leaves[key] for key in call.trainable]
    given = cotangents(rng, call, operands.integers)
    expected = mx.vjp(stock(call), primals, list(given))
    oracle.assert_equal(mx.vjp(call.function(call.trainable), primals, list(given)), expected)


@everything
@kinds
def test_one_node_each_way_and_only_the_gradients_asked_for(rng, operation, form, adapted):
    call = make(rng, operation, form, adapted)
    given = cotangents(rng, call, operands.integers)
    mx.eval(list(call.leaves.values()), given)
    forward = "FusedOutputProjection" if operation == "output" else "FusedQKVProjection"
    nodes = primitives(*call())
    assert nodes.pop("Unpack", 0) == (len(call.packed) if operation == "packed" else 0)
    assert nodes == {forward: 1}
    for some in subsets(len(call.trainable)):
        keys = [call.trainable[i] for i in some]
        if len(keys) not in (1, 2, len(call.trainable)):
            continue
        grads = gradients(call, keys, given)
        # The residual's gradient is the cotangent itself: no output of any node of ours.
        parts = 3 if operation == "packed" else 1
        wanted = sum(parts if key in call.packed else key[0] != "residual" for key in keys)
        assert output_counts(f"{forward}Grad", *grads) == [wanted] * bool(wanted)
        assert not {"Matmul", "AddMM", "QuantizedMatmul"} & set(primitives(*grads))
        oracle.assert_equal(grads, gradients(call, keys, given, route="composed"))


@pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
@pytest.mark.parametrize("frozen", ["weight", "scales", "biases"])
def test_scales_and_biases_have_the_gradients_of_mlx_and_quantized_weights_have_none(rng, frozen, dtype):
    for operation in OPERATIONS:
        call = make(rng, operation, AFFINE, True, dtype)
        given = cotangents(rng, call, operands.integers)
        keys = [key for key in call.leaves if key[0] == frozen]
        if frozen == "weight":
            with pytest.raises(ValueError, match="quantized weights have no gradient"):
                mx.eval(gradients(call, keys, given))
            check_forward(call)  # the arrays are as good as before
        else:
            grads = gradients(call, keys, given)
            assert {g.dtype for g in grads} == {dtype}
            if dtype == mx.float32:
                oracle.assert_equal(grads, quantization_gradients(call, keys, given))


def quantization_gradients(call, keys, given):
    """By mx.quantized_matmul's own vjp of each part."""
    grads = [g.swapaxes(1, 2).flatten(2) for g in given] if call.segments else [0.5 * given[0]]
    packed = keys[0][1] is None
    if packed:
        grads = [mx.concatenate(grads, -1)]
    group_size, bits, mode = call.quantization
    found = []
    for name, place in keys:
        weight, *others = (call.leaves[n, place] for n in ("weight", "scales", "biases"))
        product = lambda s, b, w=weight: mx.quantized_matmul(call.x, w, s, b, True, group_size, bits, mode)  # noqa: E731
        both = mx.vjp(product, others, [grads[place or 0]])[1]
        found.append(both[("scales", "biases").index(name)])
    return found


@pytest.mark.parametrize("form", [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)], ids=str)
def test_scales_that_are_not_floating_have_no_gradient(rng, form):
    call = make(rng, "qkv", form, False)
    with pytest.raises(ValueError, match="scales"):
        gradients(call, [("scales", 0)], cotangents(rng, call))


@everything
@kinds
def test_second_derivatives(rng, operation, form, adapted):
    call = make(rng, operation, form, adapted)
    keys = call.trainable
    # Powers of two and zeros, for products of many factors to be exact as well.
    primals = [mx.sign(call.leaves[key]) for key in keys]
    argnums = tuple(range(len(keys)))

    def second(**route):
        gradient = mx.grad(square_sum(call.function(keys, **route)), argnums=argnums)
        return mx.grad(lambda *a: sum(g.sum() for g in gradient(*a)), argnums=argnums)

    oracle.assert_equal(second()(*primals), second(route="composed")(*primals))


@everything
@kinds
def test_jvp(rng, operation, form, adapted):
    call = make(rng, operation, form, adapted)
    for some in [[key] for key in call.trainable] + [call.trainable]:
        primals = [call.leaves[key] for key in some]
        tangents = [operands.integers(rng, a.shape) for a in primals]
        results = [mx.jvp(call.function(some, **r), primals, tangents) for r in ({}, {"route": "composed"})]
        oracle.assert_equal(*results)


@everything
@kinds
def test_vmap_of_any_argument(rng, operation, form, adapted):
    call = make(rng, operation, form, adapted)
    others = [make(rng, operation, form, adapted) for _ in range(EXAMPLES)]
    keys = list(call.leaves)
    for some in [[key] for key in keys] + [keys, keys[:1] + keys[-1:]]:
        ranks = [call.leaves[key].ndim for key in keys]
        drawn = [int(axis) for axis in rng.integers(0, [r + 1 for r in ranks])]
        axes = tuple(a if key in some else None for key, a in zip(keys, drawn, strict=True))
        values = [
            call.leaves[key] if axis is None else mx.stack([o.leaves[key] for o in others], axis)
            for key, axis in zip(keys, axes, strict=True)
        ]
        check_vmap(call.function(keys), call.function(keys), values, axes)


@everything
@kinds
def test_vmap_of_gradients(rng, operation, form, adapted):
    call = make(rng, operation, form, adapted)
    keys = call.trainable
    gradient = mx.grad(square_sum(call.function(keys)), argnums=tuple(range(len(keys))))
    xs = operands.integers(rng, (EXAMPLES, *call.x.shape))
    rest = [call.leaves[key] for key in keys[1:]]
    mapped = mx.vmap(gradient, in_axes=(0, *[None] * len(rest)))(xs, *rest)
    expected = [gradient(x, *rest) for x in xs]
    oracle.assert_equal(mapped, [mx.stack(g) for g in zip(*expected, strict=True)])


@everything
@kinds
def test_vmap_of_vmap_runs_our_kernels(rng, operation, form, adapted):
    call = make(rng, operation, form, adapted)
    keys = call.trainable
    xs = operands.integers(rng, (EXAMPLES, 2, *call.x.shape))
    rest = [mx.stack([a, 2 * a]) for a in (call.leaves[key] for key in keys[1:])]

    def gradient(*values):
        loss = square_sum(call.function(keys))
        return mx.grad(loss, argnums=tuple(range(len(keys))))(*values)

    for function in (call.function(keys), gradient):
        mapped = mx.vmap(mx.vmap(function), in_axes=(0, *[None] * len(rest)))(xs, *rest)
        if form:
            assert not {"Matmul", "AddMM", "QuantizedMatmul"} & set(primitives(*mapped))
        for i, j in ((0, 0), (EXAMPLES - 1, 1)):
            oracle.assert_equal([y[i, j] for y in mapped], function(xs[i, j], *(a[j] for a in rest)))


@everything
@kinds
@pytest.mark.parametrize("shapeless", [False, True], ids=["shaped", "shapeless"])
def test_compile_and_checkpoint(rng, operation, form, adapted, shapeless):
    call = make(rng, operation, form, adapted)
    keys = call.trainable
    argnums = tuple(range(len(keys)))
    loss = square_sum(call.function(keys))
    expected = mx.grad(square_sum(call.function(keys, route="composed")), argnums)
    compiled = mx.compile(mx.grad(loss, argnums), shapeless=shapeless)
    checkpointed = mx.grad(square_sum(mx.checkpoint(call.function(keys))), argnums)
    rest = {key: call.leaves[key] for key in keys[1:]}
    for batch, seq in ((2, 3), (1, 1), (3, 4)):
        x = operands.integers(rng, (batch, seq, 32))
        values = [x, *rest.values()]
        if operation == "output":
            values[keys.index(("residual", None))] = operands.integers(rng, (batch, seq, 5))
        for function in (compiled, checkpointed):
            oracle.assert_equal(function(*values), expected(*values))


def test_equal_calls_merge_and_different_ones_do_not(rng):
    call = make(rng, "qkv", AFFINE, True)
    other_form = make(rng, "qkv", ("affine", 32, 8), False)

    def count(*variants):
        def both(x):
            return sum(mx.exp(y).sum() for v in variants for y in v.replace(input=x)())

        return primitives(mx.compile(both)(call.x))["FusedQKVProjection"]

    assert count(call, call) == 1
    assert count(call, call.replace(scale=3.0)) == count(call, call.replace(scale=(2.0, 2.0, 1.0))) == 2
    assert count(call, call.replace(exact=True)) == 2
    assert count(make(rng, "qkv", AFFINE, False), other_form) == 2
    out = make(rng, "output", AFFINE, True)

    def outputs(*variants):
        def both(x):
            return sum(mx.exp(y).sum() for v in variants for y in v.replace(attn_out=x)())

        return primitives(mx.compile(both)(out.x))["FusedOutputProjection"]

    assert outputs(out, out) == 1 and outputs(out, out.replace(alpha=0.25)) == 2
