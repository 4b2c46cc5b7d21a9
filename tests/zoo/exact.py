"""Layers that compute in float64 and round once: models of them are the reference."""

from contextlib import ExitStack
from math import factorial
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

import quantized


def layers():
    """A context in which all models have them. The rest of a model runs as it is, in float32."""
    stack = ExitStack()
    for (cls, name), function in _EXACT.items():
        stack.enter_context(patch.object(cls, name, function))
    return stack


def _weight(layer):
    if "scales" not in layer:
        return layer.weight.astype(mx.float64)
    arrays = layer.weight, layer.scales, layer.get("biases")
    return mx.array(quantized.dequantize(*arrays, layer.group_size, layer.bits, layer.mode), mx.float64)


def _sums(layer, x):
    y = x.astype(mx.float64) @ _weight(layer).T
    return y + layer.bias if "bias" in layer else y


def _linear(layer, x):
    return _sums(layer, x).astype(x.dtype)


def _lora(layer, x):
    a, b = layer.lora_a.astype(mx.float64), layer.lora_b.astype(mx.float64)
    update = x.astype(mx.float64) @ a @ b
    return (_sums(layer.linear, x) + layer.scale * update).astype(x.dtype)


def _norm(layer, x):
    z = x.astype(mx.float64)
    scale = mx.rsqrt((z * z).mean(-1, keepdims=True) + layer.eps)
    return (z * scale * layer.weight).astype(x.dtype)


def _attention(q, k, v, *, scale, mask=None, sinks=None):
    dtype, groups = mx.result_type(q, k, v), q.shape[1] // k.shape[1]
    q, k, v = (a.astype(mx.float64) for a in (q, mx.repeat(k, groups, 1), mx.repeat(v, groups, 1)))
    scores = scale * q @ k.swapaxes(2, 3)
    if isinstance(mask, str):
        mask = mx.tri(*scores.shape[2:], scores.shape[3] - scores.shape[2], mx.bool_)
    if mask is not None:
        low = mx.array(-1e30, mx.float64)  # no row is all of it, so that its exponential is 0
        is_boolean = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, low) if is_boolean else scores + mx.maximum(mask, low)
    if sinks is not None:
        given = mx.broadcast_to(sinks.astype(mx.float64)[:, None, None], (*scores.shape[:3], 1))
        scores, v = mx.concatenate([scores, given], 3), mx.pad(v, [(0, 0), (0, 0), (0, 1), (0, 0)])
    powers = _exp(scores - mx.stop_gradient(scores.max(3, keepdims=True)))
    return (powers / powers.sum(3, keepdims=True) @ v).astype(dtype)


def _exp(x):
    """Of numbers up to 0, in float64, which MLX's is not: that of a small part of x, squared 16 times."""
    part = mx.maximum(x, mx.array(-700.0, mx.float64)) / 2**16
    power = sum((part**n / factorial(n) for n in range(1, 8)), mx.ones_like(part))
    for _ in range(16):
        power = power * power
    return power


_EXACT = {
    (nn.Linear, "__call__"): _linear,
    (nn.QuantizedLinear, "__call__"): _linear,
    (nn.Embedding, "as_linear"): _linear,
    (nn.QuantizedEmbedding, "as_linear"): _linear,
    (LoRALinear, "__call__"): _lora,
    (nn.RMSNorm, "__call__"): _norm,
    (mx.fast, "scaled_dot_product_attention"): _attention,
}
