"""The QKV operations with their outputs token by token: the same numbers, in another place."""

import mlx.core as mx
import pytest

import operands
import oracle
import projections
from projections import cotangents, gradients

HEADS = (4, 2, 8)
KINDS = {
    "dense": {},
    "packed": {"packed": True},
    "quantized": {"form": ("affine", 64, 4), "bias": False},
    "lora": {"ranks": (4, None, 2), "bias": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)
routes = pytest.mark.parametrize("route", ["fused", "composed"])


def tokens(outputs):
    return [y.transpose(0, 2, 1, 3).flatten(2) for y in outputs]


@routes
@pytest.mark.parametrize("dtype", operands.DTYPES)
@kinds
def test_same_bits(rng, kind, dtype, route):
    call = projections.qkv(rng, 2, 3, 64, HEADS, dtype=dtype, **KINDS[kind])
    oracle.assert_equal(tokens(call(route=route)), call(route=route, split_heads=False))


@routes
@kinds
def test_same_gradients(rng, kind, route):
    call = projections.qkv(rng, 2, 3, 64, HEADS, **KINDS[kind])
    given, keys = cotangents(rng, call), call.trainable
    by_token = gradients(call, keys, tokens(given), route=route, split_heads=False)
    oracle.assert_equal(gradients(call, keys, given, route=route), by_token)


def test_vmap(rng):
    call = projections.qkv(rng, 2, 3, 64, HEADS)
    project = call.function([("input", None)], split_heads=False)
    expected = [mx.stack(pair) for pair in zip(project(call.x), project(2 * call.x), strict=True)]
    oracle.assert_equal(mx.vmap(project)(mx.stack([call.x, 2 * call.x])), expected)
