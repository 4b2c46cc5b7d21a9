"""Which kernels a call launches: asked of the library's own plans, so that no list of them can go stale."""

import re
from math import prod
from pathlib import Path

from mlx_fused._ext import _internals

DTYPES = ("float32", "float16", "bfloat16")


def instantiations():
    """The name of every kernel that metal/ instantiates."""
    folder = Path(__file__).parents[2] / "metal"
    text = "".join(path.read_text() for path in sorted(folder.glob("*.metal")))
    return [
        f"{name}_{dtype}"
        for name in re.findall(r'^INSTANTIATE_TYPES\("(\w+)"', text, re.M)
        for dtype in DTYPES
    ]


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
