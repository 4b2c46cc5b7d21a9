"""Patched attention with quantized weights, with adapters, and with sizes other than those of heads."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

import mlx_fused
from tiny_models import PROJECTIONS, Attention, assert_same, calls, integers, sample


def quantized(**format):
    return lambda linear: linear.to_quantized(**format)


KINDS = {
    "dense": lambda linear: linear,
    "affine4": quantized(group_size=32, bits=4),
    "affine3": quantized(group_size=64, bits=3),
    "mxfp4": quantized(mode="mxfp4"),
    "mxfp8": quantized(mode="mxfp8"),
    "nvfp4": quantized(mode="nvfp4"),
}


def adapted(linear, dropout=0.0, rank=4):
    layer = LoRALinear.from_base(linear, r=rank, dropout=dropout, scale=0.5)
    layer.lora_a, layer.lora_b = integers(layer.lora_a.shape), integers(layer.lora_b.shape)
    return layer


def projected(kind, bias, adapters, **lora):
    attention = Attention(bias=bias)
    for name in PROJECTIONS:
        attention[name] = KINDS[kind](attention[name])
        if name in adapters:
            attention[name] = adapted(attention[name], **lora)
    attention.freeze()
    for name in adapters:
        attention[name].unfreeze(keys=["lora_a", "lora_b"])
    return attention


def results(attention, x):
    """Outputs and gradients of the input and of the adapters."""

    def loss(parameters, x):
        attention.update(parameters)
        mx.random.seed(5)  # of dropout
        return sum((y * y).sum() for y in attention(x))

    trainable = attention.trainable_parameters()
    gradients = mx.grad(loss, argnums=(0, 1) if tree_flatten(trainable) else 1)(trainable, x)
    attention.update(trainable)
    mx.random.seed(5)
    return [*attention(x), *(g for _, g in tree_flatten(gradients))]


def assert_alike(actual, expected):
    """Up to the rounding of float32 sums of at most 128 products, one after another there and back."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert mx.abs(a - e).max() <= 4 * 8 * 128**0.5 * 2**-24 * mx.linalg.norm(e)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("adapters", [(), ("q_proj", "v_proj"), PROJECTIONS], ids=len)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_projection(kind, bias, adapters, exact):
    attention, x = projected(kind, bias, adapters), sample(2, 3, 64)
    expected = results(attention, x)
    (layer,) = mlx_fused.patch(attention, exact=exact).layers
    assert str(layer.qkv) == "fused"
    assert_alike(results(attention, x), expected)
    assert (layer.qkv.calls.fused, layer.qkv.calls.fallen_back) == (2, 0)


@pytest.mark.parametrize("kind", ["dense", "affine4"])
@pytest.mark.parametrize(
    "lora, options, note",
    [
        ({"dropout": 0.5}, {}, "q_proj has dropout"),
        ({}, {"lora": False}, "lora=False"),
        ({"dropout": 0.5}, {"lora": False}, "lora=False"),
    ],
)
def test_adapters_that_run_their_own_code(kind, lora, options, note):
    attention, x = projected(kind, False, ("q_proj", "v_proj"), **lora), sample(2, 3, 64)
    expected = results(attention, x)
    (layer,) = mlx_fused.patch(attention, **options).layers
    assert str(layer.qkv) == f"fused, adapters apart: {note}"
    assert_alike(results(attention, x), expected)
    assert layer.qkv.calls.fused == 2
    attention.eval()
    assert_alike(attention(x), (mlx_fused.unpatch(attention), attention(x))[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "dropout, note",
    [
        (nn.Identity(), None),
        (nn.Dropout2d(0.5), "q_proj has a dropout of type Dropout2d"),
        (abs, "q_proj has a dropout of type builtin_function_or_method"),
    ],
)
def test_whatever_stands_for_dropout(dropout, note, training):
    attention, x = projected("dense", False, ("q_proj", "v_proj")), sample(2, 3, 64)
    for name in ("q_proj", "v_proj"):
        attention[name].dropout = dropout
    attention.train(training)
    expected = results(attention, x)
    (layer,) = mlx_fused.patch(attention).layers
    assert str(layer.qkv) == (f"fused, adapters apart: {note}" if note else "fused")
    assert_alike(results(attention, x), expected)
    assert layer.qkv.calls.fused == 2


def test_adapters_that_cannot_be_rounded_exactly():
    attention, x = projected("dense", False, ("q_proj",)), sample(2, 3, 64).astype(mx.bfloat16)
    attention.apply(lambda p: (0.3 * p).astype(mx.bfloat16))
    expected = attention(x)
    (layer,) = mlx_fused.patch(attention, exact=True).layers
    assert str(layer.qkv).startswith("fused, adapters apart: q_proj has adapters of mlx.core.bfloat16")
    assert calls(attention(x))[0] == 1
    for a, e in zip(attention(x), expected, strict=True):
        assert a.dtype == e.dtype == mx.bfloat16
        assert mx.abs(a - e).max() <= 2 * 2**-8 * mx.abs(e).max()  # the base's float32 sums, rounded


def test_a_quantized_bias_is_added_after_rounding_or_before():
    attention, x = projected("affine4", True, ()), mx.random.normal((2, 3, 64)).astype(mx.bfloat16)
    attention.apply(lambda p: p if p.dtype == mx.uint32 else (0.7 * p).astype(mx.bfloat16))
    biases = [attention[name].pop("bias") for name in PROJECTIONS]
    with mlx_fused.patched(attention):
        products = attention(x)
    for name, bias in zip(PROJECTIONS, biases, strict=True):
        attention[name].bias = bias
    with mlx_fused.patched(attention, exact=True):
        assert_same(attention(x), [y + bias for y, bias in zip(products, biases, strict=True)])
    with mlx_fused.patched(attention):
        once = attention(x)
    assert not all(mx.array_equal(a, y + b) for a, y, b in zip(once, products, biases, strict=True))


def test_16_bit_activations_on_float32_adapters():
    attention, x = projected("dense", True, PROJECTIONS), sample(2, 3, 64).astype(mx.bfloat16)
    for name in PROJECTIONS:
        attention[name].linear.set_dtype(mx.bfloat16)
    attention.apply(lambda p: (p * 0.7).astype(p.dtype))
    expected = attention(x)
    with mlx_fused.patched(attention, exact=True):
        assert_same(attention(x), expected)
    with mlx_fused.patched(attention):
        once = attention(x)
    assert [y.dtype for y in once] == [mx.bfloat16] * 3
    assert not all(mx.array_equal(a, e) for a, e in zip(once, expected, strict=True))


@pytest.mark.parametrize("sizes", [(64, 32, 32), (64, 32, 16), (32, 32, 96), (64, 64, 64), (48, 16, 5)])
@pytest.mark.parametrize("adapters", [(), ("k_proj",)], ids=len)
def test_sizes_that_form_heads(sizes, adapters):
    attention, x = Attention(), sample(2, 3, 64)
    for name, size in zip(PROJECTIONS, sizes, strict=True):
        attention[name] = nn.Linear(64, size, bias=False)
        attention[name].weight = integers((size, 64))
        if name in adapters:
            attention[name] = adapted(attention[name])
    expected = attention(x)
    (layer,) = mlx_fused.patch(attention).layers
    assert_same(attention(x), expected)
    assert layer.qkv.calls.fused == 1


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("bits, mode", [(1, "affine"), (3, "of the future")])
def test_a_format_without_kernels_runs_the_layers_own_code(monkeypatch, bits, mode, adapted):
    attention, x = Attention(bias=True), sample(2, 3, 64)
    for name in PROJECTIONS:
        layer = attention[name].to_quantized(32, 1)
        attention[name] = LoRALinear.from_base(layer) if adapted else layer
        layer.bits, layer.mode = bits, mode
    matmul = mx.quantized_matmul

    def matmul_of_the_future(*args, bits, mode, **options):
        return matmul(*args, bits=1, mode="affine", **options)

    monkeypatch.setattr(mx, "quantized_matmul", matmul_of_the_future)
    expected = attention(x)
    (layer,) = mlx_fused.patch(attention).layers
    reason = f"q_proj is quantized in a format without kernels: {mode} {bits} bits by 32"
    assert layer.qkv.obstacle == reason
    assert_same(attention(x), expected)
    assert (layer.qkv.calls.fused, layer.qkv.calls.fallen_back) == (0, 1)
