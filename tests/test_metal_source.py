"""The kernels as the source that a Mac without Xcode compiles at run time."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import oracle
import projections
from metal_plan import backward, forward, libraries
from msl_sim import Library

ROOT = Path(__file__).parent.parent
FLATTEN = ROOT / "cmake" / "flatten_metal.py"
SOURCES = sorted(ROOT.glob("metal/*.metal"))
HEADERS = Path(mx.__file__).parent / "include"


def flatten(output, sources, *include_dirs):
    command = [sys.executable, FLATTEN, output, *include_dirs, "--", *sources]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("metal") / "kernels.metal"
    assert flatten(path, SOURCES, HEADERS).returncode == 0
    return path


def test_it_is_ascii_and_includes_nothing_but_metal(source):
    lines = source.read_text(encoding="ascii").splitlines()
    includes = {line.split()[1] for line in lines if line.lstrip().startswith("#include")}
    # The host's alone are behind #ifndef __METAL_VERSION__.
    assert "<metal_stdlib>" in includes
    assert all(name.startswith("<metal") for name in includes - {"<cstddef>", "<cstdint>"})


@pytest.mark.parametrize("form", [None, ("affine", 64, 4), ("nvfp4", 16, 4)], ids=str)
def test_a_device_compiles_one_format_which_computes_the_same(source, rng, form):
    ops = [projections.qkv(rng, 1, rows, 64, (4, 2, 20), form, mx.bfloat16) for rows in (3, 20, 70)]
    given = [projections.cotangents(rng, op) for op in ops]
    keys = ops[0].trainable if form is None else [("input", None)]
    call, _ = forward(ops[0])
    name = call.plan[0]["format"]
    one = source.with_name(f"{name}.metal")  # as library.cpp does
    one.write_text(f"#define MLX_FUSED_FORMAT {name}\n#define MLX_FUSED_FORMAT_{name}\n{source.read_text()}")
    library = Library(one, lints=False)  # which are for our own files
    alone = re.compile("weight_grad|low_rank_product|adapter_grad|activation|.*_transposed|.*_splits")
    others = {k for k in libraries() if form is None and alone.match(k)}
    assert set(library.kernels) == {k for k in libraries() if f"_{name}_" in k} | others
    found = dict.fromkeys(library.kernels, library)
    for op, cotangents in zip(ops, given, strict=True):
        oracle.assert_equal(forward(op, library_of=found)[1], forward(op)[1])
        grads = backward(op, cotangents, keys, library_of=found)[1]
        oracle.assert_equal(grads, backward(op, cotangents, keys)[1])


def test_a_missing_header_is_named(tmp_path):
    run = flatten(tmp_path / "kernels.metal", SOURCES, tmp_path)
    assert run.returncode != 0
    assert "mlx/backend/metal/kernels/bf16.h is in none of" in run.stderr
    assert not (tmp_path / "kernels.metal").exists()
