"""The kernels that MLX's own Metal backend launches for a graph, and the bytes that they read and write."""

from collections import namedtuple
from math import ceil

import mlx.core as mx
import numpy as np

# Stages are launches on the longest chain of those that need another's result. Distinct counts a buffer's
# bytes once however often they are read or written, total every time.
Cost = namedtuple("Cost", "launches stages distinct_read distinct_written total_read total_written")
FORM = ("affine", 64, 4)  # of quantized weights

# What a product is launched as: simdgroups are of one threadgroup, steps those of its loop over K with
# barriers between. Threadgroups that end at once, for the order of tiles, do not count.
Grid = namedtuple("Grid", "threadgroups simdgroups steps")


class Device(namedtuple("Device", "generation size")):
    """What MLX tells GPUs apart by: of applegpu_g16s the 16 and the s."""

    @property
    def has_matmul_units(self):
        return self.generation >= 17


PLAIN = Device(16, "g")  # a plain M4; of a plain M3 the rules are the same


class Kernels:
    """The kernels that MLX's Metal backend launches for a graph, and what they read and write.

    Arrays are NumPy's: what is a view of what is the same for both. The rules are those of MLX 0.32.4, of
    matmul.cpp and quantized.cpp in mlx/backend/metal. Where 0.32.4 differs from the source of 0.32.2, the
    rule was read from the code of its libmlx.dylib.
    """

    def __init__(self, nodes, device=PLAIN):
        self.device = device
        self.arrays = {}
        self.names, self.read, self.written = [], [], []
        self.grids = []  # of the products
        self.stages = {}  # of each buffer, by its id
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
            max(self.stages.values(), default=0),
            distinct(a for a, _ in self.read),
            distinct(self.written),
            total_read,
            total_written,
        )

    def launch(self, name, out, *reads, grid=None):
        """One kernel that writes out once and reads each (array, times)."""
        self.names.append(name)
        self.read += reads
        self.written.append(out)
        self.grids += [grid] if grid else []
        stage = 1 + max((self.stages.get(id(buffer_of(a)), 0) for a, _ in reads), default=0)
        self.stages[id(buffer_of(out))] = max(stage, self.stages.get(id(buffer_of(out)), 0))
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
        out = new(shape, dtype)
        if name == "Concatenate":  # a kernel for each part
            ends = np.cumsum([a.shape[arguments[0]] for a in inputs])[:-1]
            for source, part in zip(inputs, np.split(out, ends, arguments[0]), strict=True):
                self.copy(source, part)
        elif name == "AsType":
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
        a = a.reshape(m, k)
        row_tiles, column_tiles = ceil(m / 32), ceil(n / 32)
        per_group = FORM[1] // 16

        def reads(times, per_group=per_group):
            words, *others = weight
            return [(words, times), *((o, times * per_group) for o in others)]

        if not is_transposed and m < 4:
            raise NotImplementedError("no rule for MLX's qvm")
        if is_transposed and m < qmv_limit(self.device, k, n):
            self.quantized_rows(a, reads, out, m, n)
            return
        # qmm, with K split where tiles are few, on GPUs with matmul units too.
        split = min(max(1, 512 // (row_tiles * column_tiles)), k // FORM[1]) if is_transposed else 1
        while k % (split * FORM[1]):
            split -= 1
        if split > 1:
            partial = np.empty((split, m, n), np.float32)
            grid = Grid(row_tiles * column_tiles * split, 4, k // split // 32)
            self.launch("qmm", partial, (a, column_tiles), *reads(row_tiles), grid=grid)
            self.launch("split-K sum", out, (partial, 1))
        elif self.device.has_matmul_units and (k if is_transposed else n) % 64 == 0:
            row_tiles, column_tiles = ceil(m / (32 if is_transposed and m <= 32 else 64)), ceil(n / 64)
            grid = Grid(row_tiles * column_tiles, 4, ceil(k / 64))
            self.launch("qmm_nax", out, (a, column_tiles), *reads(row_tiles), grid=grid)
        else:
            grid = Grid(row_tiles * column_tiles, 4, ceil(k / 32))
            self.launch("qmm", out, (a, column_tiles), *reads(row_tiles), grid=grid)

    def quantized_rows(self, a, reads, out, m, n):
        """A threadgroup takes 8 columns of x W^T."""
        if m == 1 or self.device.generation < 15:
            # qmv: as gemv, for each row anew.
            self.launch("qmv", out, (a, ceil(n / 4)), *reads(m), grid=Grid(m * ceil(n / 8), 2, 0))
        else:
            # qmv_wide: as gemv_wide, a lane taking a group.
            passes = ceil(m / 5)
            grid = Grid(passes * ceil(n / 8), 2, 0)
            self.launch("qmv_wide", out, (a, n), *reads(passes, 1), grid=grid)

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
        nt = b_transposed and not a_transposed
        is_16_bit = a.dtype == np.uint16
        passes = ceil(m / 5)
        can_widen = passes <= 3 and k % 4 == 0 and nt and is_16_bit
        most_tiles = 1024 if self.device.size == "g" else 2048
        if m == 1:
            # gemv: a simdgroup, or of x W a column of threads, takes 4 columns of the output.
            grid = gemv_grid(k, n) if b_transposed else None
            self.launch("gemv", out, (a, ceil(n / 4)), (b, 1), *added, grid=grid)
        elif can_widen and self.device.generation >= 15:
            # gemv_wide: weights once for at most 5 rows, and the rows for every column.
            grid = Grid(passes * ceil(n / 4), 4 if passes == 1 or n <= 64 else 2, 0)
            self.launch("gemv_wide", out, (a, n), (b, passes), *added, grid=grid)
        elif self.device.has_matmul_units:
            self.matmul_on_units(a, b, added, out, nt)
        elif ceil(m / 16) * ceil(n / 16) <= most_tiles and k // 16 >= 8 and k >= max(m, n):
            # Split-K, and a second kernel for the sum.
            tiles_m, tiles_n = ceil(m / 32), ceil(n / 32)
            parts = min(max(2, power_of_2(k // 16 // (tiles_m * tiles_n))), 32)
            self.split_k(a, b, added, out, parts, *(16 if size < 40 else 32 for size in (m, n)), 16, 4)
        else:
            side_m, side_n, depth, simdgroups = gemm_tile(self.device, m, n, k, nt, is_16_bit)
            self.gemm("gemm", a, b, added, out, side_m, side_n, depth, simdgroups)

    def matmul_on_units(self, a, b, added, out, nt):
        """The M5's, in tiles of 16-bit arrays."""
        if self.device.size == "d" or a.dtype != np.uint16:
            raise NotImplementedError("no rule for matmul units on an Ultra, or in 32 bits")
        (m, k), n, longest = a.shape, b.shape[1], max(a.shape[0], b.shape[1])
        if (nt and m <= 64) or n <= 64:
            # Four simdgroups take a tile's K in turns of 64, with a barrier every four turns.
            if m > 2047:
                raise NotImplementedError("no rule for thin tiles of so many rows")
            self.gemm("gemm_thin_nax", a, b, added, out, 32, 32, 64 * 4 * 4, 4)
        elif k >= 3 * longest or (longest <= 1024 and k > 2 * longest):
            side, depth, part = (64, 256, 2048) if m + n < 1024 or k <= 4096 else (128, 512, 4096)
            part = k // 2 if k <= 1024 else 1024 if k <= 2048 else part
            self.split_k(a, b, added, out, ceil(k / part), side, side, depth, (side // 32) ** 2)
        elif self.device.size == "g":
            self.gemm("gemm_nax", a, b, added, out, 128, 128, 512, 16)
        else:
            depth = 64 if k >= 8192 and k > m + n else 256
            self.gemm("gemm_nax", a, b, added, out, 64, 128, depth, 8)

    def gemm(self, name, a, b, added, out, side_m, side_n, depth, simdgroups):
        """By tiles of side_m x side_n, each stepping through K by its depth."""
        (m, k), n = a.shape, b.shape[1]
        tiles_m, tiles_n = ceil(m / side_m), ceil(n / side_n)
        grid = Grid(tiles_m * tiles_n, simdgroups, ceil(k / depth))
        self.launch(name, out, (a, tiles_n), (b, tiles_m), *added, grid=grid)

    def split_k(self, a, b, added, out, parts, side_m, side_n, depth, simdgroups):
        """A launch for parts of K, and one for their sum."""
        (m, k), n = a.shape, b.shape[1]
        partial = np.empty((parts, m, n), np.float32)
        tiles_m, tiles_n = ceil(m / side_m), ceil(n / side_n)
        grid = Grid(tiles_m * tiles_n * parts, simdgroups, ceil(k // depth / parts))
        self.launch("split-K", partial, (a, tiles_n), (b, tiles_m), grid=grid)
        self.launch("split-K sum", out, (partial, 1), *added)


def gemv_grid(k, n):
    """Of x W^T for one row."""
    if k <= 64:  # 8 lanes take 4 columns, or else a simdgroup does, or 8
        return Grid(ceil(n / 32), 1, 0)
    if k >= 16 * n:
        return Grid(ceil(n / 4), 8, 0)
    simdgroups = 8 if n >= 4096 else 4
    return Grid(ceil(n / (4 * simdgroups)), simdgroups, 0)


def gemm_tile(device, m, n, k, nt, is_16_bit):
    """Rows, columns, depth and simdgroups of a tile; nt is x W^T."""
    narrow, square = (64, 32, 32, 4), (64, 64, 16, 2 if is_16_bit else 4)
    if device.size == "s":
        return (64, 64, 16, 4)
    if device.size == "g":
        return narrow if nt else square
    if m * n >= 1 << 20:
        if not is_16_bit or 2 * max(m, n) > k:
            return square
        return narrow if nt else (32, 64, 16, 2)
    if is_16_bit:
        return narrow if nt else square
    return (32, 64, 16, 2) if nt else narrow


def qmv_limit(device, k, n):
    """The rows from which a quantized x W^T goes by tiles."""
    if device.size == "d":
        limits = (32, 18, 12)
    elif device.generation >= 17:
        limits = (33, 25, 13)
    elif device.generation >= 15:
        limits = (13, 15, 13)
    else:
        limits = (14, 10, 7 if device == (13, "s") else 6)
    return limits[(max(k, n) > 2048) + (max(k, n) > 4096)]


def power_of_2(n):
    """The next one at or above n."""
    return 1 << max(n - 1, 0).bit_length()


def new(shape, dtype):
    return np.empty(shape, np.uint16 if dtype in (mx.float16, mx.bfloat16) else np.uint32)


def buffer_of(array):
    while array.base is not None:
        array = array.base
    return array


def distinct(arrays):
    """Bytes of the buffers behind these arrays, each of which is used as a whole."""
    buffers = {id(base): base for base in map(buffer_of, arrays)}
    return sum(base.nbytes for base in buffers.values())
