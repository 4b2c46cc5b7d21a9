"""The kernels that are measured, and which of MLX's each of ours would replace."""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

HERE = Path(__file__).resolve().parent
METAL = HERE.parents[1] / "metal"
# Bits and values to a group of every format, the group size being the usual one.
FORMATS = {
    "dense": (16, 0),
    **{f"affine_{bits}": (bits, 64) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": (4, 32),
    "mxfp8": (8, 32),
    "nvfp4": (4, 16),
}
TILE_FORMATS = ("dense", "affine_4", "mxfp4")
LOW_RANK = {  # blocks of their tiles
    "low_rank_product": {"1x1": 1, "1x3": 3, "4x1": 4, "4x3": 12},
    "adapter_grad": {"1": 4, "3": 12},
}
ROWS = range(1, 9)
# What a kernel is measured without: bias, residual, adapter. MLX's are told that shapes are whole tiles.
CONSTANTS = ("align_M", "align_N", "align_K")
MOST_ROWS = 4  # that ours take at a time
MOST_VECTORS = 5  # that MLX's kernels for few rows take at a time


@dataclass(frozen=True)
class Kernel:
    """One to measure. `work`, in C++, is how many multiply-adds a lane does in a step of the loop over K."""

    name: str
    source: Path
    threads: int
    work: str
    function: str = ""  # as C++ names it; of ours the name says it
    rows: int = 1  # of x that a weight is used for
    has_matrices: bool = False
    has_norm: bool = False  # before that loop
    constants: tuple[str, ...] = CONSTANTS  # those that are true
    edits: tuple[tuple[str, str], ...] = ()  # texts of its source, and what is measured in their place


@dataclass(frozen=True)
class Cell:
    """A kernel of ours in a case, and the one that MLX would launch; how often each goes over the weights."""

    name: str
    ours: str
    mlx: str
    our_passes: int = 1
    mlx_passes: int = 1


def rows_kernel(form, rows):
    work = f"{rows} * features_per_simdgroup * Chunk<half, {form}>::size"
    name = f"projection_rows_{rows}_{form}"
    constants = _group_constants(form)
    return Kernel(name, METAL / "projection_rows.metal", 64, work, rows=rows, constants=constants)


def gated(kernel):
    by_silu = ("mlx_fused_is_gated", "mlx_fused_activation_low")
    return replace(kernel, name=f"{kernel.name}, gated", constants=kernel.constants + by_silu)


def normed(kernel):
    name = kernel.name.replace("_rows_", "_rows_normed_")
    constants = (*kernel.constants, "mlx_fused_has_norm_weight")
    return replace(kernel, name=name, threads=256, has_norm=True, constants=constants)


VARIANTS = {"gated": gated, "normed": normed}  # of the kernels for few rows


def _tile_kernel(source, name, work, threads=128, constants=()):
    return Kernel(name, METAL / f"{source}.metal", threads, work, has_matrices=True, constants=constants)


def _group_constants(form):
    bits = {16: (), 32: ("mlx_fused_group_low",), 64: ("mlx_fused_group_high",)}
    return bits.get(FORMATS[form][1], ())


def _ours():
    for form in FORMATS:
        for rows in range(1, MOST_ROWS + 1):
            yield rows_kernel(form, rows)
            yield from (make(rows_kernel(form, rows)) for make in VARIANTS.values() if form in TILE_FORMATS)
    for form in TILE_FORMATS:
        constants = _group_constants(form)
        per_thread = "tile_cols * tile_depth / tile_threads"
        for rows in (32, 64):
            work = f"{rows} * {per_thread}"
            tile = _tile_kernel("projection", f"projection_{rows}_{form}", work, constants=constants)
            yield from (tile, gated(tile))
        for rows in (32, 64) if form == "dense" else (64,):
            work = f"{rows} * {per_thread}"
            yield _tile_kernel("input_grad", f"input_grad_{rows}_{form}", work, constants=constants)
    yield _tile_kernel("weight_grad", "weight_grad", "weight_grad_rows * tile_cols * 16 / tile_threads")
    yield replace(
        _tile_kernel(
            "projection", "projection_32_dense, ragged rows", "32 * tile_cols * tile_depth / tile_threads"
        ),
        edits=(("min(BM, params.rows - first_row)", "BM - 1"),),
    )
    for source, shapes in LOW_RANK.items():
        for shape, blocks in shapes.items():
            # Of each product of 8 by 8 by 8 a lane's share is 16.
            yield _tile_kernel(source, f"{source}_{shape}", f"16 * {blocks}", 512)


def _mlx_source(form):
    family = "dense" if form == "dense" else "affine" if form.startswith("affine") else "fp"
    return HERE / f"mlx_{family}.metal", {"dense": "", "affine": "affine_", "fp": "fp_"}[family]


def mlx_vectors(form, vectors):
    """That for so many rows at a time, on an M3 and later."""
    bits, group = FORMATS[form]
    source, prefix = _mlx_source(form)
    if form == "dense":
        function = f"gemv_wide<half, {vectors}, 32>" if vectors > 1 else "gemv<half, 8, 1, 1, 32, 4, 4, 0, 0>"
        threads, work = (128, f"{vectors} * 32") if vectors > 1 else (256, "16")
    elif vectors > 1:
        function = (
            f"{prefix}qmv_wide<half, {group}, {bits}, {vectors}, {8 if prefix == 'affine_' else 16}, false>"
        )
        threads, work = 64, f"{vectors} * {group}"
    else:
        function = f"{prefix}qmv_fast<half, {group}, {bits}, false>"
        factor = f"get_pack_factor<{bits}, 32>()" if prefix == "affine_" else f"get_pack_factor<32, {bits}>()"
        threads, work = 64, f"4 * {1 if bits <= 2 else 2} * {factor}"
    name = f"{function.split('<')[0]}_{form}_{vectors}"
    return Kernel(name, source, threads, work, function, vectors)


def _gemm(name, dtype, rows, cols, depth, simdgroups, transposed):
    function = f"gemm<{dtype}, {rows}, {cols}, {depth}, {simdgroups}, 2, {transposed}, float>"
    threads = simdgroups * 2 * 32
    work = f"{rows} * {cols} * {depth} / {threads}"
    return Kernel(name, _mlx_source("dense")[0], threads, work, function, has_matrices=True)


def _mlx():
    for form in FORMATS:
        for vectors in range(1, MOST_VECTORS + 1):
            yield mlx_vectors(form, vectors)
    yield _gemm("gemm_nt", "half", 64, 32, 32, 2, "false, true")
    yield _gemm("gemm_nn", "half", 64, 64, 16, 1, "false, false")
    yield _gemm("gemm_tn", "half", 64, 64, 16, 1, "true, false")
    yield _gemm("gemm_nn_float", "float", 64, 64, 16, 2, "false, false")
    yield _gemm("gemm_tn_float", "float", 64, 64, 16, 2, "true, false")
    # For fewer than 40 rows its tiles are of 16 by 32; rows of the last may be missing.
    for name, aligned, edits in (
        ("gemm_splitk_nt", "true", ()),
        ("gemm_splitk_nt, ragged rows", "false", (("min(BM, params->M - c_row)", "BM - 1"),)),
    ):
        function = f"gemm_splitk<half, float, 16, 32, 16, 2, 2, false, true, {aligned}, true>"
        source, work = _mlx_source("dense")[0], "16 * 32 * 16 / 128"
        yield Kernel(name, source, 128, work, function, has_matrices=True, edits=edits)
    for form in TILE_FORMATS[1:]:
        bits, group = FORMATS[form]
        source, prefix = _mlx_source(form)
        for kind, arguments in (("qmm_t", "true, false"), ("qmm_n", "false")):
            function = f"{prefix}{kind}<half, {group}, {bits}, {arguments}>"
            yield Kernel(f"{kind}_{form}", source, 128, "32 * 32 * 32 / 128", function, has_matrices=True)


def _cells():
    for form in FORMATS:
        for rows in ROWS:
            passes = ceil(rows / MOST_ROWS), ceil(rows / MOST_VECTORS)
            ours = rows_kernel(form, ceil(rows / passes[0]))
            mlx = mlx_vectors(form, ceil(rows / passes[1]))
            yield Cell(f"{form}, rows {rows}", ours.name, mlx.name, *passes)
            if form in TILE_FORMATS:  # against MLX's kernel for each of gate and up, and after its norm
                for name, make in VARIANTS.items():
                    yield Cell(f"{form}, {name}, rows {rows}", make(ours).name, mlx.name, *passes)
    for form in TILE_FORMATS:
        for rows in (32, 64):
            dense = "gemm_splitk_nt" if rows == 32 else "gemm_nt"
            for kernel in (f"projection_{rows}_{form}", f"projection_{rows}_{form}, gated"):
                yield _tile_cell(kernel, dense if form == "dense" else f"qmm_t_{form}")
        for rows in (32, 64) if form == "dense" else (64,):
            yield _tile_cell(f"input_grad_{rows}_{form}", "gemm_nn" if form == "dense" else f"qmm_n_{form}")
    yield _tile_cell("projection_32_dense, ragged rows", "gemm_splitk_nt, ragged rows")
    yield _tile_cell("weight_grad", "gemm_tn")
    for source, mlx in (("low_rank_product", "gemm_nn_float"), ("adapter_grad", "gemm_tn_float")):
        for shape in LOW_RANK[source]:
            ours = f"{source}_{shape}"
            # MLX splits K for fewer than 40 columns, of which its tile has 16; rank 8 fills half of them.
            yield Cell(f"{ours}, rank 8", ours, "gemm_splitk_nt", mlx_passes=2)
            if shape.endswith("3"):
                yield Cell(f"{ours}, rank 32", ours, "gemm_splitk_nt")
                yield Cell(f"{ours}, rank 64", ours, mlx)


def _tile_cell(ours, mlx):
    return Cell(ours, ours, mlx)


KERNELS = {k.name: k for k in [*_ours(), *_mlx()]}
CELLS = {c.name: c for c in _cells()}
