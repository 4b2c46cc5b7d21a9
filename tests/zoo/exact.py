"""Linear layers and norms that compute in float64 and round once: models of them are the reference."""

from contextlib import ExitStack
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


_EXACT = {
    (nn.Linear, "__call__"): _linear,
    (nn.QuantizedLinear, "__call__"): _linear,
    (nn.Embedding, "as_linear"): _linear,
    (nn.QuantizedEmbedding, "as_linear"): _linear,
    (LoRALinear, "__call__"): _lora,
    (nn.RMSNorm, "__call__"): _norm,
}
