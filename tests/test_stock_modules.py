"""The operations against mlx-lm's own modules, and what quantized weights have gradients of.

On integers: every sum is exact.
"""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.lora import LoRALinear

import oracle
import projections
from mlx_fused import LinearOperands
from operands import integers
from projections import check_forward, cotangents, gradients
from test_autodiff import HEADS, OPERATIONS, WITH_BACKWARD, kinds, make, values
from test_forward import dtypes


def module(layer):
    """MLX's or mlx-lm's module with the operands of ``layer``."""
    base = nn.Linear(32, 8)
    if layer.scales is not None:
        base = nn.QuantizedLinear(32, 8, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
    for name in ("weight", "scales", "biases", "bias"):
        base.pop(name, None)
        if (value := getattr(layer, name)) is not None:
            base[name] = value
    if layer.lora_a is None:
        return base
    adapted = LoRALinear.from_base(nn.Linear(32, 8), scale=layer.lora_scale)
    adapted.linear, adapted.lora_a, adapted.lora_b = base, layer.lora_a, layer.lora_b
    return adapted


def layers(call):
    weight = call.keywords["weight"]
    return [weight] if isinstance(weight, LinearOperands) else weight


def stock(call):
    """mlx-lm's modules on the call's arrays, as a function of all that may be trained."""

    def function(*values):
        now = call.with_leaves(dict(zip(call.trainable, values, strict=True)))
        ys = [module(layer)(now.x) for layer in layers(now)]
        if call.segments is None:
            return (now.arguments["residual"] + now.arguments["alpha"] * ys[0],)
        split = (y.reshape(2, 3, *heads) for y, heads in zip(ys, call.segments, strict=True))
        return tuple(y.swapaxes(1, 2) for y in split)

    return function


@pytest.mark.parametrize("operation", OPERATIONS)
@kinds
def test_operands_of_a_layer_are_its_own(rng, operation, kind):
    for layer in layers(make(rng, operation, kind)):
        if layer.lora_a is None:
            layer = layer._replace(lora_scale=1.0)  # of no adapter
        for name, value in LinearOperands.of(module(layer))._asdict().items():
            expected = getattr(layer, name)
            assert value is expected if isinstance(expected, mx.array) else value == expected, name


@pytest.mark.parametrize("operation", ["qkv", "output"])
@kinds
def test_values_and_gradients_are_those_of_the_modules_of_mlx_lm(rng, operation, kind):
    call = make(rng, operation, kind)
    given = list(cotangents(rng, call, integers))
    expected = mx.vjp(stock(call), values(call), given)
    oracle.assert_equal(mx.vjp(call.function(call.trainable), values(call), given), expected)


@dtypes
@pytest.mark.parametrize("frozen", ["weight", "scales", "biases"])
def test_scales_and_biases_have_the_gradients_of_mlx_and_quantized_weights_have_none(rng, frozen, dtype):
    for operation in OPERATIONS:
        call = make(rng, operation, "affine-lora", dtype)
        given = cotangents(rng, call, integers)
        keys = [key for key in call.leaves if key[0] == frozen]
        if frozen == "weight":
            with pytest.raises(ValueError, match="quantized weights have no gradient"):
                mx.eval(gradients(call, keys, given))
            check_forward(call)  # the arrays are as good as before
        else:
            grads = gradients(call, keys, given)
            assert {g.dtype for g in grads} == {dtype}
            if dtype == mx.float32:
                if operation in WITH_BACKWARD:
                    expected = quantization_gradients(call, keys, given)
                else:
                    expected = gradients(call, keys, given, route="composed")
                oracle.assert_equal(grads, expected)


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
    call = projections.qkv(rng, 2, 3, 32, HEADS, form)
    with pytest.raises(ValueError, match="scales"):
        gradients(call, [("scales", 0)], cotangents(rng, call))
