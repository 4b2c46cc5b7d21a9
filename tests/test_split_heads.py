"""The QKV operations with their outputs token by token: the same numbers, in another place."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands

HEADS = (4, 2, 8)


def dense(rng, dtype):
    x, weight, bias = operands.qkv(rng, 2, 3, 64, HEADS, dtype)
    return partial(mlx_fused.fused_qkv_projection, x, weight, bias, *HEADS), x, weight


def packed(rng, dtype):
    x, weight, bias = operands.qkv(rng, 2, 3, 64, HEADS, dtype, packed=True)
    return partial(mlx_fused.fused_qkv_projection, x, weight, bias, *HEADS), x, weight


def quantized(rng, dtype):
    x, weight, _ = operands.qkv(rng, 2, 3, 64, HEADS, dtype)
    codes, scales, biases = zip(*(mx.quantize(w) for w in weight), strict=True)
    return partial(mlx_fused.fused_quantized_qkv_projection, x, codes, scales, biases, None, *HEADS), x, codes


def lora(rng, dtype):
    x, weight, _ = operands.qkv(rng, 2, 3, 64, HEADS, dtype)
    a = (operands.normal(rng, (64, 4)), None, operands.normal(rng, (64, 2)))
    b = (operands.normal(rng, (4, 32)), None, operands.normal(rng, (2, 16)))
    return partial(mlx_fused.fused_lora_qkv_projection, x, weight, None, a, b, 2.0, *HEADS), x, weight


def tokens(y):
    batch, heads, seq, head_dim = y.shape
    return y.transpose(0, 2, 1, 3).reshape(batch, seq, heads * head_dim)


@pytest.mark.parametrize("route", ["fused", "composed"])
@pytest.mark.parametrize("dtype", operands.DTYPES)
@pytest.mark.parametrize("make", [dense, packed, quantized, lora])
def test_same_bits(rng, make, dtype, route):
    op, *_ = make(rng, dtype)
    by_head, by_token = op(route=route), op(route=route, split_heads=False)
    for y, z in zip(by_head, by_token, strict=True):
        np.testing.assert_array_equal(tokens(y.astype(mx.float32)), z.astype(mx.float32))


@pytest.mark.parametrize("route", ["fused", "composed"])
@pytest.mark.parametrize("make", [dense, packed, quantized, lora])
def test_same_gradients(rng, make, route):
    op, x, _ = make(rng, mx.float32)
    cotangents = operands.qkv_cotangents(rng, 2, 3, HEADS)

    def gradients(split_heads, cotangents):
        def project(x):
            return op.func(x, *op.args[1:], route=route, split_heads=split_heads)

        return mx.vjp(project, [x], cotangents)[1]

    (by_head,) = gradients(True, cotangents)
    (by_token,) = gradients(False, [tokens(c) for c in cotangents])
    np.testing.assert_array_equal(by_head, by_token)


def test_weight_gradients_and_vmap(rng):
    op, x, weight = dense(rng, mx.float32)
    cotangents = operands.qkv_cotangents(rng, 2, 3, HEADS)

    def gradients(split_heads, cotangents):
        def project(*weight):
            return op.func(x, weight, *op.args[2:], split_heads=split_heads)

        return mx.vjp(project, list(weight), cotangents)[1]

    by_token = gradients(False, [tokens(c) for c in cotangents])
    for a, b in zip(gradients(True, cotangents), by_token, strict=True):
        np.testing.assert_array_equal(a, b)

    def project(x):
        return op.func(x, *op.args[1:], split_heads=False)

    mapped = mx.vmap(project)(mx.stack([x, 2 * x]))
    for y, a, b in zip(mapped, project(x), project(2 * x), strict=True):
        np.testing.assert_array_equal(y, mx.stack([a, b]))


def test_composed(rng):
    x, weight, bias = operands.qkv(rng, 2, 3, 64, HEADS)
    op = partial(mlx_fused.composed.fused_qkv_projection, x, weight, bias, *HEADS)
    for y, z in zip(op(), op(split_heads=False), strict=True):
        np.testing.assert_array_equal(tokens(y), z)
