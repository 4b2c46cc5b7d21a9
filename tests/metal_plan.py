"""Runs the library's launch plans for Metal on the simulator."""

import re
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

import call as calls
import quantized
from mlx_fused._ext import _internals
from msl_sim import Library

KERNELS = Path(__file__).parent.parent / "metal"
NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


def enumerators(prefix):
    """Those of an enum of params.h: each is one more than that before, or three than the one it names."""
    values, value = {}, 0
    pattern = rf"^  {prefix}_(\w+)(?: = {prefix}_(\w+) \+ 3)?,"
    for name, base in re.findall(pattern, (KERNELS / "params.h").read_text(), re.M):
        values[name] = value = values[base] + 3 if base else value
        value += 1
    return values


BUFFERS, CONSTANTS = enumerators("buffer"), enumerators("constant")


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
        self.places: list[tuple[str, int]] = []  # of the plan's arrays: buffer, and bytes from its beginning
        self.outputs: list[str] = []
        self.results = []
        self.plan = []

    def input(self, array: mx.array | None, strides=None, offset=0, base=None):
        """A tensor of the plan: `array` row-major, or as it lies in `base`."""
        if array is None:
            return None
        data = to_numpy(array if base is None else base).reshape(-1)
        data.flags.writeable = False
        return self.tensor(array.shape, data, strides, offset)

    def output(self, shape, strides=None, dtype=None):
        """An output of this shape, filled with a bit pattern that no result has."""
        size, dtype = int(np.prod(shape)), dtype or self.dtype
        data = np.full(size, 0x7E57, np.uint16) if dtype != mx.float32 else np.full(size, np.nan, np.float32)
        if dtype == mx.float16:
            data = data.view(np.float16)
        tensor = self.tensor(shape, data, strides)
        self.outputs.append(self.places[tensor[0]][0])
        return tensor

    def tensor(self, shape, data, strides=None, offset=0):
        """(array, shape, strides) of what lies in a new buffer."""
        name = f"a{len(self.buffers)}"
        self.buffers[name] = data
        return self._place(name, offset * data.itemsize, shape, strides or row_major(shape))

    def split(self, tensor, features, axis=0):
        """The rows, or columns, of every segment in one packed array."""
        array, shape, strides = tensor
        name, offset = self.places[array]
        parts = []
        for size in features:
            part = [*shape[:axis], size, *shape[axis + 1 :]]
            parts.append(self._place(name, offset, part, strides))
            offset += size * strides[axis] * self.buffers[name].itemsize
        return parts

    def _place(self, name, offset, shape, strides):
        self.places.append((name, offset))
        return len(self.places) - 1, list(shape), list(strides)

    def run(self, inputs, outputs, about=None, library_of=None, cores=0, **options):
        """Runs the plan of a call whose tensors are given by (role, segment); the rest of it is ``about``.

        The plan is for so many cores; with none it splits no tile's depth.
        """
        inputs = {slot: tensor for slot, tensor in inputs.items() if tensor}
        about = {"adapter_scales": [None] * (1 + max(segment for _, segment in inputs))} | (about or {})
        launches, temporaries = _internals.plan(NAMES[self.dtype], inputs, outputs, cores=cores, **about)
        for i, size in enumerate(temporaries):  # of float32; NaN, so that what is not written shows
            self.buffers[f"temporary {i}"] = np.full(size // 4, np.nan, np.float32)
        for launch in launches:
            launch["buffers"] = [(i, *self._bound(array)) for i, array in launch["buffers"]]
            # An empty array has no buffer, and Metal's validation refuses to launch without one.
            assert all(self.buffers[name].size for _, name, _ in launch["buffers"])
            library = (library_of or libraries())[launch["kernel"]]
            self.plan.append(launch)
            self.results.append(library.run([launch], self.buffers, **options))

    def _bound(self, array):
        return self.places[array] if array >= 0 else (f"temporary {-1 - array}", 0)

    def value(self, tensor) -> mx.array:
        array, shape, strides = tensor
        name, offset = self.places[array]
        data = self.buffers[name]
        begin = data[offset // data.itemsize :]
        view = np.lib.stride_tricks.as_strided(begin, shape, [s * data.itemsize for s in strides])
        dtype = mx.float32 if data.dtype == np.float32 else self.dtype
        return from_numpy(np.ascontiguousarray(view), dtype)

    def assert_written_once(self):
        """Every byte of every output is written, once, and by one launch."""
        for name in self.outputs:
            size = self.buffers[name].nbytes
            written = [r.traffic[name] for r in self.results if name in r.traffic]
            assert sum(t.distinct_written for t in written) == size, name
            assert sum(t.total_written for t in written) == size, name


class Embedded(Call):
    """Its inputs lie in larger arrays, so that rows, heads and batches are apart."""

    def input(self, array):
        if array is None:
            return None
        base = mx.full([n + 3 for n in array.shape], 9, array.dtype)
        base[tuple(slice(2, 2 + n) for n in array.shape)] = array
        strides = row_major(base.shape)
        return super().input(array, strides, 2 * sum(strides), base)


class Transposed(Call):
    """The weights of an operation lie column by column."""

    def __init__(self, op, dtype):
        super().__init__(dtype)
        weight = op.arguments["weight"]
        self.weights = weight if isinstance(weight, tuple) else (weight,)

    def input(self, array):
        if not any(array is w for w in self.weights):
            return super().input(array)
        rows, columns = array.shape
        base = mx.full((columns, rows + 3), 9, array.dtype)
        base[:, 2 : 2 + rows] = array.T
        return super().input(array, [1, rows + 3], 2, base)


class InTiles(calls.Call):
    """A call as tiles have it, which round quantized weights to their dtype."""

    @property
    def exact_operands(self):
        return quantized.in_tiles(super().exact_operands, self.x.dtype)


def row_major(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def from_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


def parts_of(call, packed, features):
    """Tensors of every segment's part of one packed array or a tuple of them."""
    if isinstance(packed, tuple):
        return [call.input(part) for part in packed]
    return [] if packed is None else call.split(call.input(packed), features)


def adapters_of(call, op):
    """(A, B, scale) of every segment, or None."""
    a, b = (op.arguments.get(name) for name in ("lora_a", "lora_b"))
    scales = np.broadcast_to(op.arguments.get("lora_scale", 1.0), len(op.features)).tolist()
    if isinstance(a, tuple):
        adapters = zip(map(call.input, a), map(call.input, b), scales, strict=True)
        return [adapter if adapter[0] else None for adapter in adapters]
    if a is None:
        return [None] * len(scales)
    parts = call.split(call.input(b), op.features, axis=1)
    return list(zip([call.input(a)] * len(parts), parts, scales, strict=True))


def activation_of(op):
    """(name, whether gated, alpha, limit), or None."""
    if of := op.activation:
        return (of.name, of.gated, *((of.alpha, of.limit) if of.clipped else (1.0, np.inf)))
    return None


def activation(op, dtype, pre, cotangent=None, strides=None, library_of=None, **options):
    """What an activation, as `activation_of` has it, makes of ``pre``, or the gradients by them.

    ``strides`` are theirs, and how each is laid out for these.
    """
    call = Call(dtype)
    inputs = [call.input(a, strides and strides[0], 0, strides and strides[1](a)) for a in pre]
    g = None if cotangent is None else call.input(cotangent)
    outputs = [call.output(a.shape) for a in (pre if g else pre[:1])]
    launches, _ = _internals.plan_activation(NAMES[dtype], op, inputs, outputs, g)
    for launch in launches:
        launch["buffers"] = [(i, *call._bound(array)) for i, array in launch["buffers"]]
        library = (library_of or libraries())[launch["kernel"]]
        call.results.append(library.run([launch], call.buffers, **options))
    call.assert_written_once()
    return [call.value(out) for out in outputs]


# What plans call an argument of the operations that has another name there.
ROLES = {"x": "input", "scales": "group_scales", "biases": "group_biases"}


def operands_of(call, op):
    """The tensors of the operation's arguments, and what else the call is about."""
    tensors = {("input", 0): call.input(op.x), ("residual", 0): call.input(op.arguments.get("residual"))}
    for name in ("weight", "scales", "biases", "bias"):
        parts = parts_of(call, op.arguments.get(name), op.features)
        tensors |= {(ROLES.get(name, name), i): part for i, part in enumerate(parts)}
    scales = [None] * len(op.features)
    for i, adapter in enumerate(adapters_of(call, op)):
        if adapter:
            tensors["lora_a", i], tensors["lora_b", i], scales[i] = adapter
    group_size, bits, mode = op.quantization or (None,) * 3
    about = {"adapter_scales": scales, "alpha": op.alpha, "activation": activation_of(op)}
    if "norm" in op.arguments:
        weight, about["norm_eps"] = op.arguments["norm"]
        tensors["norm_weight", 0] = call.input(weight)
    return tensors, about | {"quantization": (mode, bits, group_size) if mode else None}


def forward(op, kind=Call, keeps=False, **options):
    """A call of projections.py on the simulator: the call, of a ``kind`` of Call, and its outputs.

    Those of an activation are that and, if it ``keeps`` them, those of what it is of.
    """
    call, (batch, seq, _) = kind(op.x.dtype), op.x.shape
    tensors, about = operands_of(call, op)
    if op.activation:
        outputs = [call.output((batch, seq, op.features[0])) for _ in range(1 + keeps * len(op.features))]
    elif op.segments:
        outputs = [call.output((batch, n, seq, dims)) for n, dims in op.segments]
    else:
        outputs = [call.output((batch, seq, *op.features))]
    by_slot = {("output", i): out for i, out in enumerate(outputs)}
    call.run(tensors, by_slot, about | {"exact": op.arguments.get("exact", False)}, **options)
    return call, tuple(map(call.value, outputs))


def backward(op, cotangents, keys, kind=Call, **options):
    """The gradients of its arrays ``keys``, but for its activation: the call and their values."""
    call = kind(op.x.dtype)
    tensors, about = operands_of(call, op)
    about["activation"] = None
    tensors |= {("cotangent", i): call.input(g) for i, g in enumerate(cotangents)}
    found = {key: call.output(op.leaves[key].shape, dtype=op.leaves[key].dtype) for key in keys}
    by_slot = {}
    for (name, place), tensor in found.items():
        packed = name in ("weight", "bias") and place is None
        parts = call.split(tensor, op.features) if packed else [tensor]
        by_slot |= {(ROLES.get(name, name), i): part for i, part in enumerate(parts, place or 0)}
    call.run(tensors, by_slot, about, **options)
    return call, tuple(call.value(found[key]) for key in keys)
