"""Which kernels a call launches: asked of the library's own plans, so that no list of them can go stale."""

import re
from math import prod
from pathlib import Path

from mlx_fused._ext import _internals

DTYPES = ("float32", "float16", "bfloat16")
METAL = Path(__file__).parents[2] / "metal"


def instantiations():
    """The name of every kernel that metal/ instantiates for dense weights."""
    return _named("INSTANTIATE_TYPES", DTYPES)


def quantized_instantiations():
    formats = re.findall(r"INSTANTIATE_FORMAT\((\w+), __VA_ARGS__\)", (METAL / "quantized.h").read_text())
    return _named("INSTANTIATE_FORMATS", [f"{name}_{dtype}" for name in formats for dtype in DTYPES])


def _named(macro, endings):
    text = "".join(path.read_text() for path in sorted(METAL.glob("*.metal")))
    names = re.findall(rf'^{macro}\("(\w+)"', text, re.M)
    return [f"{name}_{ending}" for name in names for ending in endings]


def launched_on_quantized(operation, dtype, seq, hidden, heads, form):
    """The kernels of a call on weights of a form (mode, group_size, bits), of one sequence."""
    mode, group_size, bits = form
    num_heads, num_kv_heads, head_dim = heads
    counts = (num_heads, num_kv_heads, num_kv_heads)
    x, by_head = _tensor(1, seq, hidden), [_tensor(1, n, seq, head_dim) for n in counts]
    groups = [_tensor(n * head_dim, hidden // group_size) for n in counts]
    weights = [_tensor(n * head_dim, hidden * bits // 32) for n in counts]
    keywords = {"quantized": list(zip(groups, groups, strict=True)), "quantization": (mode, bits, group_size)}
    if operation == "qkv_grad":
        pairs = list(zip(by_head, weights, strict=True))
        return _names(_internals.plan_gradients(dtype, pairs, x, **keywords))
    segments = [(w, None, out) for w, out in zip(weights, by_head, strict=True)]
    return _names(_internals.plan_projection(dtype, x, segments, **keywords))


def launched(operation, dtype, batch, seq, hidden, heads):
    """The kernels of one call; ``heads`` is (num_heads, num_kv_heads, head_dim)."""
    num_heads, num_kv_heads, head_dim = heads
    x = _tensor(batch, seq, hidden)
    if operation == "output":
        out = _tensor(batch, 1, seq, hidden)
        plan = _internals.plan_projection(dtype, x, [(_tensor(hidden, hidden), None, out)], x)
        return _names(plan)
    counts = (num_heads, num_kv_heads, num_kv_heads)
    weights = [_tensor(n * head_dim, hidden) for n in counts]
    by_head = [_tensor(batch, n, seq, head_dim) for n in counts]
    nothing = [None] * 3
    forward = list(zip(weights, nothing, by_head, strict=True))
    adapters = [(_tensor(hidden, 8), _tensor(8, n * head_dim), 1.0) for n in counts]
    if operation == "qkv":
        return _names(_internals.plan_projection(dtype, x, forward))
    if operation == "qkv_lora":
        return _names(_internals.plan_projection(dtype, x, forward, adapters=adapters))
    if operation == "qkv_lora_grad":
        grads = [(a, b) for a, b, _ in adapters]
        backward = list(zip(by_head, weights, strict=True))
        return _names(_internals.plan_gradients(dtype, backward, x, x, adapters, grads))
    dx = _internals.plan_gradients(dtype, list(zip(by_head, weights, strict=True)), x)
    dw = _internals.plan_weight_grad(dtype, x, list(zip(by_head, weights, nothing, strict=True)))
    return _names(dx) + _names(dw)


def _names(plan):
    launches, _ = plan
    return sorted({launch["kernel"] for launch in launches})


def _tensor(*shape):
    return 0, list(shape), [prod(shape[i + 1 :]) for i in range(len(shape))], 0
