"""The kernels as one source, which a Mac without Xcode compiles at run time."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import operands
import oracle
from metal_plan import qkv_projection, qkv_projection_bwd
from msl_sim import Library

ROOT = Path(__file__).parent.parent
FLATTEN = ROOT / "cmake" / "flatten_metal.py"
SOURCES = sorted(ROOT.glob("metal/*.metal"))
HEADERS = Path(mx.__file__).parent / "include"


def flatten(output, *include_dirs):
    command = [sys.executable, FLATTEN, output, *include_dirs, "--", *SOURCES]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("metal") / "kernels.metal"
    assert flatten(path, HEADERS).returncode == 0
    return path


def test_it_is_ascii_and_includes_nothing_but_metal(source):
    lines = source.read_text(encoding="ascii").splitlines()
    includes = {line.split()[1] for line in lines if line.lstrip().startswith("#include")}
    # The host's alone are behind #ifndef __METAL_VERSION__.
    assert "<metal_stdlib>" in includes
    assert all(name.startswith("<metal") for name in includes - {"<cstddef>", "<cstdint>"})


def test_it_has_every_kernel_and_they_compute_the_same(source, rng):
    library = Library(source, lints=False)  # which are for our own files
    separate = [kernel for path in SOURCES for kernel in Library(path).kernels]
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


def test_a_missing_header_is_named(tmp_path):
    run = flatten(tmp_path / "kernels.metal", tmp_path)
    assert run.returncode != 0
    assert "mlx/backend/metal/kernels/bf16.h is in none of" in run.stderr
    assert not (tmp_path / "kernels.metal").exists()
