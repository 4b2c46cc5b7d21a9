"""Runs the library's launch plans for Metal on the simulator."""

from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_fused._ext import _internals
from msl_sim import Library

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

    def output(self, shape, strides=None, size=None):
        """An output of this shape, filled with a bit pattern that no result has."""
        size = int(np.prod(shape)) if size is None else size
        data = (
            np.full(size, 0x7E57, np.uint16)
            if self.dtype != mx.float32
            else np.full(size, np.nan, np.float32)
        )
        if self.dtype == mx.float16:
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
        return from_numpy(np.ascontiguousarray(view), self.dtype)

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


def row_major(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def from_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


def qkv_shapes(batch, seq, heads):
    num_heads, num_kv_heads, head_dim = heads
    return [(batch, n, seq, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads)]


def segments_of(call, packed, heads):
    """Tensors of q's, k's and v's part of a weight, bias or gradient: one packed array or three."""
    if packed is None:
        return [None] * 3
    if isinstance(packed, tuple):
        return [call.input(part) for part in packed]
    return split(call.input(packed), heads)


def split(tensor, heads):
    num_heads, num_kv_heads, head_dim = heads
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    index, shape, strides, offset = tensor
    parts, row = [], 0
    for size in sizes:
        parts.append((index, [size, *shape[1:]], strides, offset + row * strides[0]))
        row += size
    return parts


def qkv_projection(x, weight, bias, num_heads, num_kv_heads, head_dim, **options):
    """``fused_qkv_projection`` on the simulator: the call and its outputs."""
    heads = (num_heads, num_kv_heads, head_dim)
    call = Call(x.dtype)
    tx = call.input(x)
    weights, biases = segments_of(call, weight, heads), segments_of(call, bias, heads)
    outputs = [call.output(shape) for shape in qkv_shapes(*x.shape[:2], heads)]
    segments = list(zip(weights, biases, outputs, strict=True))
    call.run(_internals.plan_projection(NAMES[x.dtype], tx, segments), **options)
    return call, tuple(call.value(out) for out in outputs)


def output_projection(x, weight, bias, residual, gap=0, **options):
    """``fused_output_projection_residual`` on it; x and residual with `gap` rows between batches."""
    call = Call(x.dtype)
    tx, tw, tb, tr = apart(call, x, gap), call.input(weight), call.input(bias), apart(call, residual, gap)
    out = call.output(residual.shape)
    one_head = (out[0], [out[1][0], 1, *out[1][1:]], [out[2][0], 0, *out[2][1:]], 0)
    call.run(_internals.plan_projection(NAMES[x.dtype], tx, [(tw, tb, one_head)], tr), **options)
    return call, call.value(out)


def apart(call, a, gap):
    batch, seq, features = a.shape
    base = mx.concatenate([a, mx.full((batch, gap, features), 9.0, a.dtype)], 1)
    return call.input(a, [(seq + gap) * features, features, 1], 0, base)


def qkv_projection_bwd(dq, dk, dv, x, weight, has_bias, num_heads, num_kv_heads, head_dim, **options):
    """``fused_qkv_projection_bwd`` on the simulator."""
    heads = (num_heads, num_kv_heads, head_dim)
    call = Call(x.dtype)
    grads = [call.input(g) for g in (dq, dk, dv)]
    tx, weights = call.input(x), segments_of(call, weight, heads)
    dx = call.output(x.shape)
    call.run(
        _internals.plan_gradients(NAMES[x.dtype], list(zip(grads, weights, strict=True)), dx), **options
    )
    packed = not isinstance(weight, tuple)
    rows = [n * head_dim for n in heads[:2]]
    rows = [rows[0], rows[1], rows[1]]
    if packed:
        dw = [call.output(weight.shape)]
        db = [call.output((sum(rows),))] if has_bias else []
        dws, dbs = split(dw[0], heads), split(db[0], heads) if has_bias else [None] * 3
    else:
        dw = dws = [call.output((n, x.shape[2])) for n in rows]
        db = [call.output((n,)) for n in rows] if has_bias else []
        dbs = db or [None] * 3
    segments = list(zip(grads, dws, dbs, strict=True))
    call.run(_internals.plan_weight_grad(NAMES[x.dtype], tx, segments), **options)
    d_weight, d_bias = tuple(map(call.value, dw)), tuple(map(call.value, db))
    if packed:
        d_weight, d_bias = d_weight[0], d_bias[0] if has_bias else None
    return call, (call.value(dx), d_weight, d_bias if has_bias else None)
