"""The kernels as the two sources that a Mac without Xcode compiles at run time."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import operands
import oracle
import projections
from metal_plan import backward, forward, qkv_projection, qkv_projection_bwd
from msl_sim import Library

ROOT = Path(__file__).parent.parent
FLATTEN = ROOT / "cmake" / "flatten_metal.py"
QUANTIZED = sorted(ROOT.glob("metal/quantized_*.metal"))
DENSE = sorted(set(ROOT.glob("metal/*.metal")) - set(QUANTIZED))
HEADERS = Path(mx.__file__).parent / "include"


def flatten(output, sources, *include_dirs):
    command = [sys.executable, FLATTEN, output, *include_dirs, "--", *sources]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("metal") / "kernels.metal"
    assert flatten(path, DENSE, HEADERS).returncode == 0
    return path


@pytest.fixture(scope="module")
def quantized_source(tmp_path_factory):
    path = tmp_path_factory.mktemp("metal") / "quantized_kernels.metal"
    assert flatten(path, QUANTIZED, HEADERS).returncode == 0
    return path


@pytest.mark.parametrize("name", ["source", "quantized_source"])
def test_it_is_ascii_and_includes_nothing_but_metal(name, request):
    lines = request.getfixturevalue(name).read_text(encoding="ascii").splitlines()
    includes = {line.split()[1] for line in lines if line.lstrip().startswith("#include")}
    # The host's alone are behind #ifndef __METAL_VERSION__.
    assert "<metal_stdlib>" in includes
    assert all(name.startswith("<metal") for name in includes - {"<cstddef>", "<cstdint>"})


def test_it_has_every_kernel_and_they_compute_the_same(source, rng):
    library = Library(source, lints=False)  # which are for our own files
    separate = [kernel for path in DENSE for kernel in Library(path).kernels]
    assert sorted(library.kernels) == sorted(separate)
    libraries = dict.fromkeys(library.kernels, library)
    heads = (4, 2, 20)
    for rows in (3, 20, 70):
        x, weight, bias = operands.qkv(rng, 1, rows, 37, heads, mx.bfloat16)
        _, outputs = qkv_projection(x, weight, bias, *heads, library_of=libraries)
        oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *heads)
        args = (*operands.qkv_cotangents(rng, 1, rows, heads, mx.bfloat16), x, weight, True, *heads)
        _, grads = qkv_projection_bwd(*args, library_of=libraries)
        oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args)


@pytest.mark.parametrize("form", [("affine", 64, 4), ("nvfp4", 16, 4)], ids=str)
def test_a_device_compiles_one_format(quantized_source, rng, form):
    op = projections.qkv(rng, 1, 3, 64, (4, 2, 20), form, mx.bfloat16)
    given = projections.cotangents(rng, op)
    (call, outputs), (_, grads) = forward(op), backward(op, given, [("input", None)])
    name = call.plan[0]["format"]
    one = quantized_source.with_name(f"{name}.metal")
    one.write_text(f"#define MLX_FUSED_FORMAT {name}\n{quantized_source.read_text()}")  # as library.cpp does
    library = Library(one, lints=False)
    separate = [kernel for path in QUANTIZED for kernel in Library(path).kernels if f"_{name}_" in kernel]
    assert sorted(library.kernels) == sorted(separate)
    libraries = dict.fromkeys(library.kernels, library)
    oracle.assert_equal(forward(op, library_of=libraries)[1], outputs)
    oracle.assert_equal(backward(op, given, [("input", None)], library_of=libraries)[1], grads)


def test_a_missing_header_is_named(tmp_path):
    run = flatten(tmp_path / "kernels.metal", DENSE, tmp_path)
    assert run.returncode != 0
    assert "mlx/backend/metal/kernels/bf16.h is in none of" in run.stderr
    assert not (tmp_path / "kernels.metal").exists()
