"""Runs the library's launch plans for Metal on the simulator."""

from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_fused._ext import _internals
from msl_sim import Library
from operands import segments

KERNELS = Path(__file__).parent.parent / "metal"
NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


@cache
def libraries() -> dict[str, Library]:
    """The library that holds each kernel."""
    found = [Library(path) for path in sorted(KERNELS.glob("*.metal"))]
    return {kernel: library for library in found for kernel in library.kernels}


class Call:
    """One call's arrays, as a device would hold them, and what became of its plan."""

    def __init__(self, dtype: mx.Dtype):
        self.dtype = dtype
        self.buffers: dict[str, np.ndarray] = {}
        self.outputs: list[str] = []
        self.results = []
        self.plan = []

    def input(self, array: mx.array | None, strides=None, offset=0, base=None):
        """A tensor of the plan: `array` row-major, or as it lies in `base`."""
        if array is None:
            return None
        data = to_numpy(array if base is None else base).reshape(-1)
        data.flags.writeable = False
        return self._tensor(array.shape, data, strides, offset)

    def output(self, shape, strides=None, size=None, dtype=None):
        """An output of this shape, filled with a bit pattern that no result has."""
        size = int(np.prod(shape)) if size is None else size
        dtype = dtype or self.dtype
        data = np.full(size, 0x7E57, np.uint16) if dtype != mx.float32 else np.full(size, np.nan, np.float32)
        if dtype == mx.float16:
            data = data.view(np.float16)
        tensor = self._tensor(shape, data, strides, 0)
        self.outputs.append(f"a{tensor[0]}")
        return tensor

    def run(self, plan, library_of=None, **options):
        launches, temporaries = plan
        self.plan += launches
        for i, size in enumerate(temporaries):  # of float32; NaN, so that what is not written shows
            self.buffers[f"a{-1 - i}"] = np.full(size // 4, np.nan, np.float32)
        for launch in launches:
            named = launch | {"buffers": [(i, f"a{a}", offset) for i, a, offset in launch["buffers"]]}
            # An empty array has no buffer, and Metal's validation refuses to launch without one.
            assert all(self.buffers[name].size for _, name, _ in named["buffers"])
            library = (library_of or libraries())[launch["kernel"]]
            self.results.append(library.run([named], self.buffers, **options))

    def value(self, tensor) -> mx.array:
        array, shape, strides, offset = tensor
        data = self.buffers[f"a{array}"]
        view = np.lib.stride_tricks.as_strided(data[offset:], shape, [s * data.itemsize for s in strides])
        dtype = mx.float32 if data.dtype == np.float32 else self.dtype
        return from_numpy(np.ascontiguousarray(view), dtype)

    def traffic(self, tensor):
        return [result.traffic[f"a{tensor[0]}"] for result in self.results]

    def assert_written_once(self):
        """Every byte of every output is written, once, and by one launch."""
        for name in self.outputs:
            size = self.buffers[name].nbytes
            written = [r.traffic[name] for r in self.results if name in r.traffic]
            assert sum(t.distinct_written for t in written) == size, name
            assert sum(t.total_written for t in written) == size, name

    def _tensor(self, shape, data, strides, offset):
        index = len(self.buffers)
        self.buffers[f"a{index}"] = data
        return index, list(shape), list(strides or row_major(shape)), offset


class Embedded(Call):
    """Its inputs lie in larger arrays, so that rows, heads and batches are apart."""

    def input(self, array):
        if array is None:
            return None
        base = mx.full([n + 3 for n in array.shape], 9, array.dtype)
        base[tuple(slice(2, 2 + n) for n in array.shape)] = array
        strides = row_major(base.shape)
        return super().input(array, strides, 2 * sum(strides), base)


def row_major(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def from_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


def segments_of(call, packed, heads):
    """Tensors of q's, k's and v's part of a weight, bias or gradient: one packed array or three."""
    return parts_of(call, packed, [n * dims for n, dims in segments(heads)])


def parts_of(call, packed, features):
    """Tensors of every segment's part of one packed array or a tuple of them."""
    if packed is None:
        return [None] * len(features)
    if isinstance(packed, tuple):
        return [call.input(part) for part in packed]
    return split(call.input(packed), features)


def split(tensor, features):
    index, shape, strides, offset = tensor
    parts, row = [], 0
    for size in features:
        parts.append((index, [size, *shape[1:]], strides, offset + row * strides[0]))
        row += size
    return parts


def qkv_projection(x, weight, bias, *heads, **options):
    """``fused_qkv_projection`` on the simulator: the call and its outputs."""
    call = Call(x.dtype)
    tx = call.input(x)
    weights, biases = segments_of(call, weight, heads), segments_of(call, bias, heads)
    batch, seq, _ = x.shape
    outputs = [call.output((batch, n, seq, dims)) for n, dims in segments(heads)]
    parts = list(zip(weights, biases, outputs, strict=True))
    call.run(_internals.plan_projection(NAMES[x.dtype], tx, parts), **options)
    return call, tuple(call.value(out) for out in outputs)


def output_projection(x, weight, bias, residual, gap=0, **options):
    """``fused_output_projection_residual`` on it; x and residual with `gap` rows between batches."""
    call = Call(x.dtype)
    tx, tw, tb, tr = apart(call, x, gap), call.input(weight), call.input(bias), apart(call, residual, gap)
    out = call.output(residual.shape)
    call.run(_internals.plan_projection(NAMES[x.dtype], tx, [(tw, tb, one_head(out))], tr), **options)
    return call, call.value(out)


def one_head(tensor):
    index, shape, strides, offset = tensor
    return index, [shape[0], 1, *shape[1:]], [strides[0], 0, *strides[1:]], offset


def apart(call, a, gap):
    batch, seq, features = a.shape
    base = mx.concatenate([a, mx.full((batch, gap, features), 9.0, a.dtype)], 1)
    return call.input(a, [(seq + gap) * features, features, 1], 0, base)


def qkv_projection_bwd(dq, dk, dv, x, weight, has_bias, *heads, **options):
    """``fused_qkv_projection_bwd`` on the simulator."""
    call = Call(x.dtype)
    grads = [call.input(g) for g in (dq, dk, dv)]
    tx, weights = call.input(x), segments_of(call, weight, heads)
    dx = call.output(x.shape)
    call.run(_internals.plan_gradients(NAMES[x.dtype], list(zip(grads, weights, strict=True)), dx), **options)
    packed = not isinstance(weight, tuple)
    rows = [n * dims for n, dims in segments(heads)]
    if packed:
        dw = [call.output(weight.shape)]
        db = [call.output((sum(rows),))] if has_bias else []
        dws, dbs = split(dw[0], rows), split(db[0], rows) if has_bias else [None] * 3
    else:
        dw = dws = [call.output((n, x.shape[2])) for n in rows]
        db = [call.output((n,)) for n in rows] if has_bias else []
        dbs = db or [None] * 3
    parts = list(zip(grads, dws, dbs, strict=True))
    call.run(_internals.plan_weight_grad(NAMES[x.dtype], tx, parts), **options)
    d_weight, d_bias = tuple(map(call.value, dw)), tuple(map(call.value, db))
    if packed:
        d_weight, d_bias = d_weight[0], d_bias[0] if has_bias else None
    return call, (call.value(dx), d_weight, d_bias if has_bias else None)


# The calls of projections.py, with adapters or quantized weights.


def weights_of(call, op):
    """The weights' tensors, and what else plans ask of quantized ones."""
    weight, scales, biases = (
        parts_of(call, op.arguments.get(name), op.features) for name in ("weight", "scales", "biases")
    )
    if not op.quantization:
        return weight, {}
    group_size, bits, mode = op.quantization
    quantized = list(zip(scales, biases, strict=True))
    return weight, {"quantized": quantized, "quantization": (mode, bits, group_size)}


def adapters_of(call, op):
    """(A, B, scale) of every segment, or None."""
    factors = [listed(op.arguments.get(name), len(op.features)) for name in ("lora_a", "lora_b")]
    scales = np.broadcast_to(op.arguments.get("lora_scale", 1.0), len(op.features)).tolist()
    return [
        None if a is None else (call.input(a), call.input(b), scale)
        for a, b, scale in zip(*factors, scales, strict=True)
    ]


def listed(value, count):
    return list(value) if isinstance(value, tuple) else [value] * count


def forward(op, kind=Call, **options):
    """The operation on the simulator: the call, of a ``kind`` of Call, and its outputs."""
    arguments, (batch, seq, _) = op.arguments, op.x.shape
    call = kind(op.x.dtype)
    x, residual = call.input(op.x), call.input(arguments.get("residual"))
    weights, quantized = weights_of(call, op)
    biases, adapters = parts_of(call, arguments.get("bias"), op.features), adapters_of(call, op)
    if op.segments:
        outputs = tensors = [call.output((batch, n, seq, dims)) for n, dims in op.segments]
    else:
        outputs = [call.output(arguments["residual"].shape)]
        tensors = [one_head(outputs[0])]
    plan = _internals.plan_projection(
        NAMES[op.x.dtype],
        x,
        list(zip(weights, biases, tensors, strict=True)),
        residual,
        arguments.get("alpha", 1.0),
        arguments.get("exact", False),
        adapters,
        **quantized,
    )
    call.run(plan, **options)
    return call, tuple(map(call.value, outputs))


def backward(op, cotangents, keys, kind=Call, **options):
    """Gradients of the operation's input and adapters, those of ``keys``: the call and their values."""
    call = kind(op.x.dtype)
    grads = [call.input(g) for g in cotangents]
    weights, quantized = weights_of(call, op)
    adapters = adapters_of(call, op)
    found = {key: call.output(op.leaves[key].shape, dtype=op.leaves[key].dtype) for key in keys}
    places = range(len(adapters)) if op.segments else [None]
    plan = _internals.plan_gradients(
        NAMES[op.x.dtype],
        list(zip(grads if op.segments else map(one_head, grads), weights, strict=True)),
        next((t for (name, _), t in found.items() if name in ("input", "attn_out")), None),
        call.input(op.x),
        adapters,
        [(found.get(("lora_a", i)), found.get(("lora_b", i))) for i in places],
        op.arguments.get("alpha", 1.0),
        **quantized,
    )
    call.run(plan, **options)
    return call, tuple(call.value(found[key]) for key in keys)
