"""Which kernels a call launches: asked of the library's own plans, so that no list of them can go stale."""

import re
from math import prod
from pathlib import Path

from mlx_fused._ext import _internals

DTYPES = ("float32", "float16", "bfloat16")
METAL = Path(__file__).parents[2] / "metal"


def instantiations():
    """The name of every kernel that metal/ instantiates for dense weights, or for none."""
    return _named("INSTANTIATE_DENSE", [""]) + _named("INSTANTIATE_FORMATS", ["_dense"])


def quantized_instantiations():
    formats = re.findall(r"INSTANTIATE_FORMAT\((\w+), __VA_ARGS__\)", (METAL / "weight.h").read_text())
    return _named("INSTANTIATE_FORMATS", [f"_{name}" for name in formats if name != "dense"])


def _named(macro, formats):
    text = "".join(path.read_text() for path in sorted(METAL.glob("*.metal")))
    names = re.findall(rf'^{macro}\("(\w+)"', text, re.M)
    return [f"{name}{form}_{dtype}" for name in names for form in formats for dtype in DTYPES]


def launched(
    operation, dtype, batch, seq, hidden, heads, form=None, ranks=None, cores=0, transposed=False
):  # fmt: skip
    """The kernels of one call, on weights of a form (mode, group_size, bits) or dense ones.

    ``heads`` is (num_heads, num_kv_heads, head_dim), ``ranks`` those of the segments' adapters. A device with
    ``cores`` splits the depth of few tiles.
    """
    num_heads, num_kv_heads, head_dim = heads
    counts = (num_heads, num_kv_heads, num_kv_heads)
    features = [hidden] if operation == "output" else [n * head_dim for n in counts]
    mode, group_size, bits = form or (None, 1, 32)
    x, results, inputs, adapters = _tensor(batch, seq, hidden), {}, {}, {}
    for i, n in enumerate(features):
        results[i] = _tensor(batch, seq, n)
        inputs["weight", i] = 0, [n, hidden * bits // 32], [1, n] if transposed else [hidden * bits // 32, 1]
        inputs["group_scales", i] = inputs["group_biases", i] = _tensor(n, hidden // group_size)
    ranks = ranks or [None] * len(features)
    for i, rank in enumerate(ranks):
        if rank is not None:
            adapters |= {("lora_a", i): _tensor(hidden, rank), ("lora_b", i): _tensor(rank, features[i])}
    scales = [None if rank is None else 1.0 for rank in ranks]
    about = {"adapter_scales": scales, "quantization": (mode, bits, group_size) if form else None}
    inputs |= {("input", 0): x} | adapters
    if operation == "output":
        inputs["residual", 0] = results[0]
    if operation == "qkv_norm":
        inputs["norm_weight", 0], about["norm_eps"] = _tensor(hidden), 1e-5
    if operation.endswith("grad"):
        inputs |= {("cotangent", i): result for i, result in results.items()}
        outputs = {("input", 0): x} | adapters
        if operation == "qkv_grad" and not form:
            outputs |= {slot: tensor for slot, tensor in inputs.items() if slot[0] == "weight"}
    else:
        outputs = {("output", i): result for i, result in results.items()}
    launches, _ = _internals.plan(dtype, inputs, outputs, cores=cores, **about)
    return sorted({launch["kernel"] for launch in launches})


def _tensor(*shape):
    return 0, list(shape), [prod(shape[i + 1 :]) for i in range(len(shape))]
