"""How products are launched: the counts, by hand and on the simulator, and docs/design/launches.md."""

import ctypes
import json
import re
from math import prod

import numpy as np
import pytest

import launches
import ledger
import metal_plan
from mlx_kernels import Device, Grid, Kernels
from mlx_on_simulator import library, mlx_launch
from msl_sim import Library


def test_golden_and_document_are_up_to_date():
    rows = launches.count()
    assert launches.to_json(rows) == launches.GOLDEN.read_text(), "python tests/launches.py writes it anew"
    document = launches.DOCUMENT.read_text()
    assert launches.page(document, json.loads(launches.GOLDEN.read_text())) == document


# By hand, from MLX's source: x W^T of Llama-3.2-1B's K and V.
ROWS_512 = [
    (1, "g13g", ["gemv"], Grid(32, 4, 0)),
    (2, "g13g", ["split-K", "split-K sum"], Grid(16 * 8, 4, 16)),
    (2, "g15g", ["gemv_wide"], Grid(128, 4, 0)),
    (9, "g15d", ["gemv_wide"], Grid(2 * 128, 2, 0)),
    (16, "g17s", ["gemm_thin_nax"], Grid(16, 4, 2)),
    (128, "g17s", ["split-K", "split-K sum"], Grid(2 * 8 * 2, 4, 4)),
    (512, "g13g", ["split-K", "split-K sum"], Grid(16 * 16 * 2, 4, 64)),
    (1024, "g13g", ["gemm"], Grid(16 * 16, 4, 64)),
    (1024, "g13s", ["split-K", "split-K sum"], Grid(32 * 16 * 2, 4, 64)),
    (2048, "g13s", ["gemm"], Grid(32 * 8, 4, 128)),
    (2048, "g13d", ["gemm"], Grid(32 * 8, 2, 128)),
    (2048, "g17g", ["gemm_nax"], Grid(16 * 4, 16, 4)),
    (2048, "g17s", ["gemm_nax"], Grid(32 * 4, 8, 8)),
]
# And of its Q with 4 bits, and of others.
QUANTIZED = [
    (1, 2048, 2048, "g15g", ["qmv"], Grid(256, 2, 0)),
    (9, 2048, 2048, "g13g", ["qmv"], Grid(9 * 256, 2, 0)),
    (9, 2048, 2048, "g15g", ["qmv_wide"], Grid(2 * 256, 2, 0)),
    (13, 2048, 2048, "g15g", ["qmm", "split-K sum"], Grid(64 * 8, 4, 8)),
    (32, 2048, 2048, "g17s", ["qmv_wide"], Grid(7 * 256, 2, 0)),
    (31, 2048, 2048, "g13d", ["qmv"], Grid(31 * 256, 2, 0)),
    (6, 6144, 1024, "g13s", ["qmv"], Grid(6 * 768, 2, 0)),
    (6, 6144, 1024, "g13g", ["qmm", "split-K sum"], Grid(192 * 2, 4, 16)),
    (512, 2048, 2048, "g13g", ["qmm"], Grid(16 * 64, 4, 64)),
    (512, 2048, 2048, "g17g", ["qmm_nax"], Grid(8 * 32, 4, 32)),
]


@pytest.mark.parametrize(("m", "name", "names", "grid"), ROWS_512)
def test_dense_products_of_mlx(m, name, names, grid):
    kernels = Kernels([], launches.CLASSES[name])
    x, w, out = (np.empty(shape, np.uint16) for shape in ((m, 2048), (512, 2048), (m, 512)))
    kernels.matmul(x, w.T, out=out)
    assert (kernels.names, kernels.grids) == (names, [grid])


@pytest.mark.parametrize(("m", "n", "k", "name", "names", "grid"), QUANTIZED)
def test_quantized_products_of_mlx(m, n, k, name, names, grid):
    kernels = Kernels([], launches.CLASSES[name])
    weight = np.empty((n, k // 8), np.uint32), *(np.empty((n, k // 64), np.uint16) for _ in range(2))
    x, out = (np.empty((m, size), np.uint16) for size in (k, n))
    kernels.quantized_matmul(x, *weight, is_transposed=True, out=out)
    assert (kernels.names, kernels.grids) == (names, [grid])


def llama(rows, operation="qkv"):
    return ledger.Case(operation, rows, 2048, ledger.LLAMA_1B, False, False)


@pytest.mark.parametrize(
    ("rows", "name", "groups"),
    [
        (1, "g13g", 192),
        (9, "g13g", 3 * 128),
        (9, "g15g", 1536),
        (32, "g13g", 256 + 2 * 256),
        (128, "g13g", 512 + 2 * 128),
        (512, "g13g", 3 * 512),
        (512, "g13s", 256 + 2 * 512),
    ],
)
def test_side_by_side_products_are_added_up(rows, name, groups):
    assert launches.mlx(llama(rows))[name].threadgroups == groups


def test_products_of_gradients():
    assert launches.mlx(llama(512, "dx"))["g13g"] == Grid(3 * 8 * 32, 3 * 8 * 32 * 2, 128)
    assert launches.mlx(llama(512, "dx"))["g17s"] == Grid(3 * 8 * 16, 3 * 8 * 16 * 8, 8)
    assert launches.mlx(llama(512, "quantized_qkv_grad"))["g13s"] == Grid(3 * 16 * 64, 3 * 16 * 64 * 4, 64)
    assert launches.mlx(llama(512, "quantized_qkv_grad"))["g17s"] == Grid(3 * 8 * 32, 3 * 8 * 32 * 4, 32)


def test_ours_by_hand():
    assert launches.ours(llama(8)) == Grid(2 * 3072 // 8, 2 * 2 * 3072 // 8, 0)
    assert launches.ours(llama(65)) == Grid(2 * 48, 2 * 48 * 4, 128)
    assert launches.ours(llama(65, "quantized_output")) == Grid(2 * 32, 2 * 32 * 4, 64)
    assert launches.ours(llama(65, "dx")) == Grid(2 * 32, 2 * 32 * 4, 3072 // 16)


def test_a_class_launches_the_same_in_its_two_generations():
    for call in launches.CALLS:
        for hidden, heads in launches.MODELS.values():
            for rows in call.rows:
                nodes = ledger.graph(ledger.Case(call.operation, rows, hidden, heads, False, False), "mlx-lm")
                for device in (d for d in launches.CLASSES.values() if d.generation < 17):
                    later = Device(device.generation + 1, device.size)
                    assert Kernels(nodes, device).grids == Kernels(nodes, later).grids


@pytest.mark.parametrize(
    ("ours", "theirs", "name", "missed"),
    [(79, 80, "g13g", True), (80, 81, "g13g", False), (79, 79, "g13g", False), (319, 999, "g17s", True)],
)
def test_misses(ours, theirs, name, missed):
    assert launches.is_missed(ours, theirs, name) == missed


# A counter of the barriers that threads come to. What counts is not instrumented.
COUNTER = """extern "C" { __attribute__((visibility("default"))) unsigned barriers; }
__attribute__((no_sanitize("thread", "undefined"), noinline)) static void count_barrier() { ++barriers; }
"""


def count_barriers(library):
    """Makes the library's kernels count, before they are compiled."""
    cpp = library.source.cpp

    def counting(kernel):
        text, number = re.subn(
            r"\bthreadgroup_barrier\(mem_flags", "count_barrier(), threadgroup_barrier(mem_flags", cpp(kernel)
        )
        assert number
        return COUNTER + text

    library.source.cpp = counting
    return library


def barriers(library, launch, buffers):
    """That each of the launch's threads comes to."""
    counter = ctypes.c_uint.in_dll(library.compile(launch["kernel"]).lib, "barriers")
    before = counter.value
    library.run([launch], buffers)
    threads = prod(launch["grid"]) * prod(launch["threadgroup"])
    each, rest = divmod(counter.value - before, threads)
    assert not rest
    return each


@pytest.mark.parametrize("operation", ["qkv", "quantized_qkv", "dx", "quantized_qkv_grad"])
@pytest.mark.parametrize("hidden", [192, 256])
def test_our_steps_are_between_barriers(operation, hidden):
    case = ledger.Case(operation, 33, hidden, ledger.GQA_4_2, False, False)
    call = ledger.run_plan(case, library_of=ledger.NotRun())
    (launch,) = call.plan
    name, _, _ = launch["kernel"].partition("_64")
    counting = count_barriers(Library(metal_plan.KERNELS / f"{name}.metal"))
    assert barriers(counting, launch, call.buffers) == 2 * launches.steps(launch, case) > 0


@pytest.mark.parametrize(
    ("kernel", "m", "n", "k", "around"), [("gemm", 128, 512, 256, 2), ("split-K", 33, 64, 128, 1)]
)
def test_steps_of_mlx_are_between_barriers(kernel, m, n, k, around):
    """Two a step, and those around the loop."""
    rules = Kernels([])
    x, w, out = (np.zeros(shape, np.uint16) for shape in ((m, k), (n, k), (m, n)))
    rules.matmul(x, w.T, out=out)
    assert rules.names[0] == kernel
    buffers = {"x": x, "w": w, "c": out, "out": out.copy(), "partial": np.zeros((2, m, n), np.float32)}
    launch = mlx_launch(kernel, m, n, k)
    assert prod(launch["threadgroup"]) == 32 * rules.grids[0].simdgroups
    assert barriers(count_barriers(library()), launch, buffers) == 2 * rules.grids[0].steps + around
