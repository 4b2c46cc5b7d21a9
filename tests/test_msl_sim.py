"""The simulator itself: that it computes what Metal does, and finds what it must."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from msl_sim import CheckerError, Library, sparse
from msl_sim.mutate import Mutant, generate, run, score

KERNELS = Path(__file__).parent / "msl_sim" / "kernels"
RULES = (KERNELS / "rules.metal").read_text().split("\n")


def launch(kernel, buffers, grid=(1, 1, 1), threads=(32, 1, 1), constants=None, parameters=()):
    """Buffers are bound to 0, 1, ...; parameters to the indices after them."""
    return {
        "kernel": kernel,
        "constants": constants or {},
        "buffers": [(i, name, 0) for i, name in enumerate(buffers)],
        "bytes": [(len(buffers) + i, p) for i, p in enumerate(parameters)],
        "grid": grid,
        "threadgroup": threads,
    }


@pytest.fixture(scope="module")
def rules():
    return Library(KERNELS / "rules.metal")


@pytest.fixture(scope="module")
def functions():
    return Library(KERNELS / "functions.metal")


@pytest.fixture(scope="module")
def mlx_kernels():
    return Library(KERNELS / "mlx.metal")


def expected(kernel):
    """The (file:line, kind) that a kernel's lines are marked with."""
    begin = next(i for i, line in enumerate(RULES) if re.search(rf"\b{kernel}[()]", line))
    end = next(i for i in range(begin, len(RULES)) if RULES[i].startswith("}"))
    found = set()
    for i in range(begin, end):
        for kind in RULES[i].partition("// expect: ")[2].split(", "):
            found |= {(f"rules.metal:{i + 1}", kind)} if kind else set()
    return found


RULE_NAMES = re.findall(r"\bbad_(\w+)[()]", "\n".join(RULES))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_rule(rules, rule, seed):
    """A kernel that breaks a rule is found at the line; its right twin is not."""
    for kernel in (f"bad_{rule}", f"good_{rule}"):
        buffers = {"x": np.ones(100, np.float32), "y": np.zeros(100, np.float32)}
        step = launch(kernel, buffers, (2, 1, 1), (64, 1, 1), {1: 3}, [struct.pack("I", 100)])
        found = rules.run([step], buffers, check=False, seed=seed, seconds=1).findings
        if seed == 0:
            assert {(f.where, f.kind) for f in found} == expected(kernel), [str(f) for f in found]
        else:  # which of two threads comes second, and so is blamed, depends on the order
            assert {f.kind for f in found} <= {kind for _, kind in expected(kernel)}
            assert bool(found) == kernel.startswith("bad")


def test_findings_are_raised(rules):
    buffers = {"x": np.ones(100, np.float32), "y": np.zeros(100, np.float32)}
    step = launch("bad_read", buffers, (2, 1, 1), (64, 1, 1), {}, [struct.pack("I", 100)])
    with pytest.raises(
        CheckerError, match=r"rules.metal:\d+: out of bounds: read of 4 bytes at byte 400 of x"
    ):
        rules.run([step], buffers)


@pytest.mark.parametrize("offset, kinds", [(2, {"misaligned"}), (4, set())])
def test_a_buffer_is_bound_at_a_multiple_of_its_types_alignment(rules, offset, kinds):
    """As Metal's validation asks, of what a kernel does not read too."""
    buffers = {"x": np.ones(100, np.float32), "y": np.zeros(100, np.float32)}
    step = launch("good_write", buffers, (2, 1, 1), (64, 1, 1), {}, [struct.pack("I", 64)])
    step["buffers"][0] = (0, "x", offset)
    assert {f.kind for f in rules.run([step], buffers, check=False).findings} == kinds


def test_what_is_read_only_is_not_written(rules):
    buffers = {"x": np.ones(100, np.float32), "y": np.zeros(100, np.float32)}
    buffers["y"].flags.writeable = False
    step = launch("good_write", buffers, (2, 1, 1), (64, 1, 1), {}, [struct.pack("I", 100)])
    with pytest.raises(CheckerError, match="write to constant"):
        rules.run([step], buffers)


PLAIN = """#include <metal_stdlib>
using namespace metal;
{outside}
[[kernel]] void k(
    device float* y [[buffer(0)]], device bfloat* b [[buffer(1)]], constant int& n [[buffer(2)]]) {{
  half h = 1.0h;
  {inside}
  y[0] = float(h);
}}
"""


NO_SPACE = "METAL_FUNC float f(float* p) { return p[0]; }"
ELSEWHERE = "METAL_FUNC void f() { threadgroup float t[4]; t[0] = 0.0f; }"


@pytest.mark.parametrize(
    "kind, wrong, right",
    [
        ("lint", NO_SPACE, "METAL_FUNC float f(device float* p) { return p[0]; }"),
        ("lint", "METAL_FUNC int f(const int& p) { return p; }", "METAL_FUNC int f(int p) { return p; }"),
        ("lint", "struct S { float* p; };", "struct S { device float* p; };"),
        ("lint", "struct S { int f() { return 1; } };", "struct S { int f() thread { return 1; } };"),
        (
            "lint",
            "struct S { static constexpr int n = 1; };",
            "struct S { static constant constexpr int n = 1; };",
        ),
        ("lint", "struct S {}; struct D : S {};", "struct S {};"),
        ("lint", ELSEWHERE, ""),
        ("lint", "float* p = y;", "device float* p = y;"),
        ("lint", "auto& p = y[0];", "device auto& p = y[0];"),
        ("lint", "if (n > 0) { threadgroup float t[4]; }", "threadgroup float t[4];"),
        ("lint", "threadgroup float s[4], t[4];", "threadgroup float s[4]; threadgroup float t[4];"),
        ("lint", "threadgroup float s[1] = {};", "threadgroup float s[1];"),
        ("lint", "double d = 1;", "float d = 1;"),
        ("lint", "float d = 1.0;", "float d = 1.0f;"),
        ("lint", "float d = 1e-5;", "float d = 1e-5f;"),
        ("lint", "std::size_t d = 1;", "size_t d = 1;"),
        ("compile", "b[0] = 1.0f;", "b[0] = bfloat(1.0f);"),
        ("compile", "b[0] = h;", "b[0] = static_cast<bfloat>(h);"),
        ("compile", "h = b[0];", "h = static_cast<half>(b[0]);"),
        ("compile", "b[0] = b[0] * 2.0f;", "b[0] = b[0] * bfloat(2.0f);"),
        ("compile", "n = 1;", "y[0] = n;"),
        ("compile", "uint u = 1; y[0] = min(u, n);", "int u = 1; y[0] = min(u, n);"),
        ("compile", "uint2 v = float2(1.0f);", "uint2 v = uint2(float2(1.0f));"),
    ],
)
def test_refused(tmp_path, kind, wrong, right):
    """What Apple's compiler refuses is refused here, at its line; the right form is not."""
    path = tmp_path / "k.metal"
    place = "outside" if wrong.startswith(("METAL_FUNC", "struct")) else "inside"
    text = PLAIN.format(**{"outside": "", "inside": "", place: wrong})
    path.write_text(text)
    with pytest.raises(CheckerError) as error:
        Library(path).compile("k")
    line = text.split("\n").index(wrong if place == "outside" else f"  {wrong}") + 1
    assert {(f.kind, f.where) for f in error.value.findings} == {(kind, f"k.metal:{line}")}
    path.write_text(PLAIN.format(**{"outside": "", "inside": "", place: right}))
    Library(path).compile("k")


def test_positions(functions):
    grid, threads = (2, 3, 2), (4, 5, 3)
    count = np.prod(threads)
    out = np.zeros((np.prod(grid), count, 8), np.uint32)
    functions.run([launch("positions", {"out": out}, grid, threads)], {"out": out})
    i = np.broadcast_to(np.arange(count), out.shape[:2])
    g = np.arange(np.prod(grid))[:, None] * np.ones_like(i)
    np.testing.assert_array_equal(out[..., 0], i)
    np.testing.assert_array_equal(out[..., 1], i // 32)
    np.testing.assert_array_equal(out[..., 2], i % 32)
    np.testing.assert_array_equal(out[..., 3], g % 2 * 4 + i % 4)
    np.testing.assert_array_equal(out[..., 4], g // 2 % 3 * 5 + i // 4 % 5)
    np.testing.assert_array_equal(out[..., 5], g // 6 * 3 + i // 20)
    np.testing.assert_array_equal(out[..., 6], g)
    np.testing.assert_array_equal(out[..., 7], i)


def test_simdgroup_functions(functions):
    x, lane = np.arange(32, dtype=np.float32) ** 2, np.arange(32)
    y = np.zeros((9, 32), np.float32)
    functions.run([launch("simdgroup_functions", ["x", "y"])], {"x": x, "y": y})
    want = [
        np.full(32, x.sum()),
        np.full(32, x.max()),
        x[np.where(lane + 3 < 32, lane + 3, lane)],
        x[np.where(lane >= 3, lane - 3, lane)],
        x[lane ^ 5],
        x[::-1],
        np.full(32, x[7]),
        np.cumsum(x),
        np.full(32, x[0]),
    ]
    np.testing.assert_array_equal(y, want)


def to_bfloat16(x):
    """Rounds to nearest, ties to even; as bits."""
    u = np.asarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def test_conversions(functions, rng):
    x = rng.standard_normal(256).astype(np.float32) * np.float32(2.0) ** rng.integers(-20, 15, 256)
    x[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, np.inf]  # ties of bfloat16 and float16
    x = x.astype(np.float32)
    halves, bfloats, back = np.zeros(256, np.float16), np.zeros(256, np.uint16), np.zeros(256, np.float32)
    buffers = {"x": x, "halves": halves, "bfloats": bfloats, "back": back}
    functions.run([launch("conversions", buffers, (8, 1, 1))], buffers)
    np.testing.assert_array_equal(halves, x.astype(np.float16))
    np.testing.assert_array_equal(bfloats, to_bfloat16(x))
    np.testing.assert_array_equal(back, from_bfloat16(bfloats))


def test_offsets_past_32_bits(functions):
    """A sparse buffer costs only the pages touched, and a 32-bit index that overflows is found."""
    x = sparse(9 << 30, np.float16)
    at = (9 << 30) - 32
    functions.run([launch("far", ["x"], parameters=[struct.pack("q", at)])], {"x": x})
    np.testing.assert_array_equal(x[at:], np.arange(1, 33))
    with pytest.raises(CheckerError, match="undefined behaviour: signed overflow"):
        functions.run([launch("far_32", ["x"], parameters=[struct.pack("i", 1 << 29)])], {"x": x})
    with pytest.raises(CheckerError, match=f"write of 2 bytes at byte {18 << 30} of x"):
        functions.run([launch("far", ["x"], parameters=[struct.pack("q", at + 1)])], {"x": x})


def test_seed_changes_the_order(functions):
    last = set()
    for seed in range(6):
        y = np.zeros(1, np.float32)
        found = functions.run(
            [launch("last_wins", ["y"], (4, 1, 1))], {"y": y}, check=False, seed=seed
        ).findings
        assert {f.kind for f in found} == {"race"}
        last.add(float(y[0]))
    assert len(last) > 1


def test_traffic(functions):
    x, y = np.ones(64, np.float32), np.zeros(64, np.float32)
    result = functions.run([launch("reads_twice", ["x", "y"], (2, 1, 1))] * 3, {"x": x, "y": y})
    assert result.launches == 3
    read, written = result.traffic["x"], result.traffic["y"]
    assert (read.distinct_read, read.total_read, read.read_multiplicity) == (256, 6 * 256, 6)
    assert (read.distinct_written, read.total_written, read.most_writes) == (0, 0, 0)
    assert (written.distinct_written, written.total_written, written.most_writes) == (256, 3 * 256, 3)


DTYPES = {
    "float32": (lambda x: x, lambda x: x, 2.0**-24),
    "float16": (lambda x: x.astype(np.float16), lambda x: x, 2.0**-11),
    "bfloat16": (to_bfloat16, from_bfloat16, 2.0**-8),
}


def check_product(got, a, b, eps):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    exact, size = a @ b, np.abs(a) @ np.abs(b)
    bound = (a.shape[-1] + 1) * 2.0**-24 * size + eps * np.abs(exact) * (1 + a.shape[-1] * 2.0**-24)
    assert (np.abs(got.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("shape", [(64, 192, 128), (33, 45, 61), (1, 7, 3), (65, 31, 48)])
@pytest.mark.parametrize("kind", ["nn", "nt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_gemm(mlx_kernels, rng, dtype, kind, shape):
    """MLX's own GEMM kernel: right results, no findings, every output byte written once."""
    narrow, widen, eps = DTYPES[dtype]
    m, n, k = shape
    bm, bn, bk = (32, 32, 16) if kind == "nn" else (64, 32, 32)
    a = narrow(rng.standard_normal((m, k)).astype(np.float32))
    b = narrow(rng.standard_normal((k, n) if kind == "nn" else (n, k)).astype(np.float32))
    d = np.zeros((m, n), a.dtype)
    tiles_n, tiles_m = -(-n // bn), -(-m // bm)
    ldb = n if kind == "nn" else k
    parameters = struct.pack("8i3q3i4x", m, n, k, k, ldb, n, tiles_n, tiles_m, 0, 0, 0, 0, k // bk, 0)
    constants = {10: 0, 100: 0, 110: 0, 200: m % bm == 0, 201: n % bn == 0, 202: k % bk == 0}
    step = {
        "kernel": f"gemm_{kind}_{dtype}",
        "constants": constants,
        "buffers": [(0, "a", 0), (1, "b", 0), (3, "d", 0)],
        "bytes": [(4, parameters), (5, bytes(24))],
        "grid": (tiles_n, tiles_m, 1),
        "threadgroup": (32, 2, 2),
    }
    result = mlx_kernels.run([step], {"a": a, "b": b, "d": d})
    check_product(widen(d), widen(a), widen(b) if kind == "nn" else widen(b).T, eps)
    assert result.traffic["d"].distinct_written == d.nbytes
    assert result.traffic["d"].most_writes == 1
    if all(constants[i] for i in (200, 201, 202)):
        assert result.traffic["a"].total_read == a.nbytes * tiles_n
        assert result.traffic["b"].total_read == b.nbytes * tiles_m


def gemv(kernel, mat, vec, out, grid, threads):
    """Buffers and parameters of MLX's gemv kernels, batch of one."""
    rows = mat.shape
    sizes = (rows[1], rows[0]) if kernel != "gemv_t" else rows
    numbers = [struct.pack("i", v) for v in (*sizes, mat.shape[1])] + [
        struct.pack("f", v) for v in (1.0, 0.0)
    ]
    numbers += [struct.pack("i", 1)] * 2 + [struct.pack("q", 0)] * 3 + [struct.pack("i", 1)]
    return {
        "kernel": kernel,
        "buffers": [(0, "mat", 0), (1, "vec", 0), (3, "out", 0)],
        "bytes": [(4 + i, v) for i, v in enumerate(numbers)],
        "grid": grid,
        "threadgroup": threads,
    }, {"mat": mat, "vec": vec, "out": out}


@pytest.mark.parametrize("shape", [(64, 256), (37, 131)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_gemv(mlx_kernels, rng, dtype, shape):
    narrow, widen, eps = DTYPES[dtype]
    mat = narrow(rng.standard_normal(shape).astype(np.float32))
    vec = narrow(rng.standard_normal(shape[1]).astype(np.float32))
    out = np.zeros(shape[0], mat.dtype)
    step, buffers = gemv(f"gemv_{dtype}", mat, vec, out, (-(-shape[0] // 16), 1, 1), (32, 1, 4))
    # Its last rows are computed by two threadgroups where the number of rows is odd to their size.
    found = mlx_kernels.run([step], buffers, check=False).findings
    assert {f.kind for f in found} <= ({"race"} if shape[0] % 4 else set()), [str(f) for f in found]
    check_product(widen(out), widen(mat), widen(vec), eps)


def test_mlx_gemv_diverges(mlx_kernels, rng):
    """MLX's gemv and gemv_t, where several simdgroups share a row, have a barrier that few threads reach."""
    mat, vec = rng.standard_normal((8, 4096), np.float32), rng.standard_normal(4096, np.float32)
    across = gemv("gemv_across_simdgroups", mat, vec, np.zeros(8, np.float32), (2, 1, 1), (32, 8, 1))
    mat, vec = rng.standard_normal((64, 20), np.float32), rng.standard_normal(64, np.float32)
    transposed = gemv("gemv_t", mat, vec, np.zeros(20, np.float32), (1, 1, 1), (32, 2, 1))
    for step, buffers in (across, transposed):
        found = mlx_kernels.run([step], buffers, check=False).findings
        assert found[0].kind == "divergent barrier"
        assert "gemv.h" in found[0].where


MUTATED = """#include "guard.h"
using namespace metal;
[[kernel]] void k(
    const device float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant uint& n [[buffer(2)]],
    uint g [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[32];
  const uint i = g * 32 + t;
  tile[t] = i < n ? x[i] : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = tile[31 - t];
  sum += 1.0f;
  if (inside(i, n)) {
    y[i] = sum;
  }
}
"""
GUARD = """#include <metal_stdlib>
METAL_FUNC bool inside(uint i, uint n) {
  return i < n;
}
"""


def test_mutants(tmp_path):
    (tmp_path / "k.metal").write_text(MUTATED)
    (tmp_path / "guard.h").write_text(GUARD)
    mutants = [m for name in ("guard.h", "k.metal") for m in generate(tmp_path / name)]
    names = [m.name for m in mutants]
    assert len(names) == len(set(names))
    assert {
        "guard.h:3 < to <=",
        "k.metal:12 barrier deleted",
        "k.metal:12 barrier orders no memory",
        "k.metal:15 guard always true: inside(i, n)",
        "k.metal:10 + t dropped",
        "k.metal:11 choice always first: i < n",
        "k.metal:14 sum += 1.0f; dropped",
        "k.metal:14 += to =",
    } <= set(names)
    mutants.append(Mutant.replacing("same", tmp_path / "k.metal", "31 - t", "30 + 1 - t"))

    def test(folder):
        x, y = np.arange(1, 51, dtype=np.float32), np.zeros(50, np.float32)
        step = launch("k", ["x", "y"], (2, 1, 1), parameters=[struct.pack("I", 50)])
        Library(folder / "k.metal").run([step], {"x": x, "y": y})
        padded = np.concatenate([x, np.zeros(14, np.float32)]).reshape(2, 32)
        np.testing.assert_array_equal(y, padded[:, ::-1].ravel()[:50] + 1)

    outcomes = {o.mutant.name: o for o in run(tmp_path, mutants, test)}
    survived = [o.mutant.name for o in outcomes.values() if o.reason == "survived"]
    assert not survived
    assert outcomes["k.metal:12 barrier deleted"].reason in ("race", "uninitialised threadgroup memory")
    assert outcomes["guard.h:3 < to <="].reason == "out of bounds"
    assert outcomes["k.metal:14 sum += 1.0f; dropped"].reason == "numbers"
    assert outcomes["same"].reason == "same code"
    assert score(outcomes.values()) == (len(mutants) - 1, 0, 1)
    assert "i < n" in (tmp_path / "guard.h").read_text()
