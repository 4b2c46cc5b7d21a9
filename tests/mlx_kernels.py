"""The kernels that MLX's own Metal backend launches for a graph, and the bytes that they read and write."""

from collections import namedtuple
from math import ceil

import mlx.core as mx
import numpy as np

# Distinct counts a buffer's bytes once however often they are read or written, total every time.
Cost = namedtuple("Cost", "launches distinct_read distinct_written total_read total_written")
FORM = ("affine", 64, 4)  # of quantized weights


class Kernels:
    """The kernels that MLX's Metal backend launches for a graph, and what they read and write.

    Arrays are NumPy's: what is a view of what is the same for both. The rules are those of MLX 0.32, mostly
    of mlx/backend/metal/matmul.cpp, on the GPU of a plain M3 or M4.
    """

    def __init__(self, nodes):
        self.arrays = {}
        self.names, self.read, self.written = [], [], []
        for node in nodes:
            if node["type"] == "inputs":
                self.arrays |= {name: new(shape, dtype) for name, shape, dtype in node["inputs"]}
            elif node["type"] == "constants":
                self.arrays |= {name: new(a.shape, a.dtype) for name, a in node["constants"]}
            elif node["type"] == "primitive":
                inputs = [self.arrays[name] for name, *_ in node["inputs"]]
                outputs = self.evaluate(node["name"], node["arguments"], inputs, node["outputs"])
                self.arrays |= {name: out for (name, *_), out in zip(node["outputs"], outputs, strict=True)}

    def cost(self) -> Cost:
        total_read = sum(times * a.nbytes for a, times in self.read)
        total_written = sum(a.nbytes for a in self.written)
        return Cost(
            len(self.names),
            distinct(a for a, _ in self.read),
            distinct(self.written),
            total_read,
            total_written,
        )

    def launch(self, name, out, *reads):
        """One kernel that writes out once and reads each (array, times)."""
        self.names.append(name)
        self.read += reads
        self.written.append(out)
        return out

    def copy(self, source, out):
        return self.launch("copy", out, (source, 1))

    def evaluate(self, name, arguments, inputs, outputs):
        _, shape, dtype = outputs[0]
        if name in ("Reshape", "Flatten", "Unflatten", "Squeeze"):
            view = inputs[0].reshape(shape)
            if not np.shares_memory(view, inputs[0]):
                self.copy(inputs[0], view := new(shape, dtype))
            return [view]
        if name == "Transpose":
            return [inputs[0].transpose(arguments[0])]
        if name == "Broadcast":
            return [np.broadcast_to(inputs[0], shape)]
        if name == "Split":
            return np.split(inputs[0], *arguments)
        if name == "SliceUpdate":  # in place, of what nobody else reads
            start, stop = arguments[1:3]
            self.copy(inputs[1], inputs[0][tuple(map(slice, start, stop))])
            return inputs[:1]
        out = new(shape, dtype)
        if name == "Concatenate":  # a kernel for each part
            ends = np.cumsum([a.shape[arguments[0]] for a in inputs])[:-1]
            for source, part in zip(inputs, np.split(out, ends, arguments[0]), strict=True):
                self.copy(source, part)
        elif name in ("AsType", "Full"):
            self.copy(inputs[0], out)
        elif name in ("Add", "Multiply"):
            self.launch("add", out, *((a, 1) for a in inputs if a.base is None or a.base.size > 1))
        elif name == "Reduce":
            self.sum_rows(*inputs, out)
        elif name in ("Matmul", "AddMM"):
            self.matmul(*inputs, out=out)
        elif name == "QuantizedMatmul":
            self.quantized_matmul(*inputs, is_transposed=arguments[-1], out=out)
        else:
            raise NotImplementedError(f"no rule for MLX's {name}")
        return [out]

    def quantized_matmul(self, a, *weight, is_transposed, out):
        """Of a weight with scales and biases, or its transpose; a scale is read for 16 values at a time."""
        (m, n), k = out.reshape(-1, out.shape[-1]).shape, a.shape[-1]
        if not (a := a.reshape(m, k)).flags.c_contiguous:
            a = self.copy(a, np.empty(a.shape, a.dtype))
        row_tiles, column_tiles = ceil(m / 32), ceil(n / 32)
        per_group = FORM[1] // 16

        def reads(times, per_group=per_group):
            words, *others = weight
            return [(words, times), *((o, times * per_group) for o in others)]

        if is_transposed and m == 1:
            # qmv: as gemv.
            self.launch("qmv", out, (a, ceil(n / 4)), *reads(1))
        elif is_transposed and m < 13:
            # qmv_wide: as gemv_wide, a lane taking a group.
            self.launch("qmv_wide", out, (a, n), *reads(ceil(m / 5), 1))
        else:
            # qmm, with K split where tiles are few.
            split = min(max(1, 512 // (row_tiles * column_tiles)), k // FORM[1]) if is_transposed else 1
            while k % (split * FORM[1]):
                split -= 1
            partial = out if split == 1 else np.empty((split, m, n), out.dtype)
            self.launch("qmm", partial, (a, column_tiles), *reads(row_tiles))
            if split > 1:
                self.launch("split-K sum", out, (partial, 1))

    def sum_rows(self, a, out):
        """Of more than 256 rows in two passes, with 32 partial sums between."""
        if a.size // out.size > 256 and out.size < 32 * 1024:
            a = self.launch("sum, 1st pass", np.empty((32, *out.shape), out.dtype), (a, 1))
        self.launch("sum", out, (a, 1))

    def matmul(self, a, b, c=None, *, out):
        if b.ndim == 3:  # MLX takes a batch that shares its weight as more rows
            a, b = a.reshape(-1, a.shape[-1]), b[0]
        (m, k), n = a.shape, b.shape[1]
        added = [] if c is None else [(c, 1)]
        b_transposed = b.strides[1] != b.itemsize
        a_transposed = a.strides[1] != a.itemsize
        passes = ceil(m / 5)
        is_16_bit = a.dtype == np.uint16
        if min(m, n) == 1:
            # gemv: a simdgroup, or of x W a column of threads, takes 4 elements of the output.
            vector, matrix = (a, b) if m == 1 else (b, a)
            self.launch("gemv", out, (vector, ceil(max(m, n) / 4)), (matrix, 1), *added)
        elif passes <= 3 and k % 4 == 0 and b_transposed and not a_transposed and is_16_bit:
            # gemv_wide: weights once for at most 5 rows, and the rows for every column.
            self.launch("gemv_wide", out, (a, n), (b, passes), *added)
        elif ceil(m / 16) * ceil(n / 16) <= 1024 and k // 16 >= 8 and k >= max(m, n):
            # Split-K, and a second kernel for the sum.
            tiles_m, tiles_n = ceil(m / 32), ceil(n / 32)
            parts = min(max(2, power_of_2(k // 16 // (tiles_m * tiles_n))), 32)
            side_m, side_n = (16 if size < 40 else 32 for size in (m, n))
            partial = np.empty((parts, m, n), np.float32)
            self.launch("split-K", partial, (a, ceil(n / side_n)), (b, ceil(m / side_m)))
            self.launch("split-K sum", out, (partial, 1), *added)
        else:
            # steel: tiles of 64 x 32 for x W^T, of 64 x 64 otherwise.
            side_n = 32 if b_transposed and not a_transposed else 64
            self.launch("gemm", out, (a, ceil(n / side_n)), (b, ceil(m / 64)), *added)


def power_of_2(n):
    """The next one at or above n."""
    return 1 << max(n - 1, 0).bit_length()


def new(shape, dtype):
    return np.empty(shape, np.uint16 if dtype in (mx.float16, mx.bfloat16) else np.uint32)


def distinct(arrays):
    """Bytes of the buffers behind these arrays, each of which is used as a whole."""
    buffers = {id(base): base for base in (a if a.base is None else a.base for a in arrays)}
    return sum(base.nbytes for base in buffers.values())
