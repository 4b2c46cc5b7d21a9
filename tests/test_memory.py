"""Peak memory: no weight, activation or cotangent is copied."""

import subprocess
import sys

import mlx.core as mx
import pytest

import mlx_fused
import operands
from test_forward import dtypes

# 512 x 512 and twice 128 x 512: a copy of the smallest is 15% of the sum of the weights.
HEADS, HIDDEN = (8, 2, 64), 512


def peak(function, *args):
    """The most memory MLX held while this ran, all inputs included."""
    mx.eval(args)
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    outputs = function(*args)
    mx.eval(outputs)
    return mx.get_peak_memory() - held + nbytes(args)


def nbytes(tree):
    if isinstance(tree, (tuple, list)):
        return sum(map(nbytes, tree))
    return 0 if tree is None else tree.nbytes


def qkv(x, weight, bias):
    return mlx_fused.fused_qkv_projection(x, weight, bias, *HEADS)


def concatenating(x, weight, bias):
    return mlx_fused.fused_qkv_projection(x, mx.concatenate(weight), mx.concatenate(bias), *HEADS)


@dtypes
@pytest.mark.parametrize("seq", [1, 2, 8, 64])
def test_separate_weights_are_not_copied(rng, dtype, seq):
    args = operands.qkv(rng, 1, seq, HIDDEN, HEADS, dtype)
    needed = nbytes(args) + nbytes(qkv(*args))
    assert peak(qkv, *args) <= 1.02 * needed
    assert peak(concatenating, *args) > 1.02 * needed


@dtypes
@pytest.mark.parametrize("seq", [1, 2, 8, 64])
def test_gradients_copy_neither_weights_nor_cotangents(rng, dtype, seq):
    x, weight, _ = operands.qkv(rng, 1, seq, HIDDEN, HEADS, dtype)
    cotangents = operands.qkv_cotangents(rng, 1, seq, HEADS, dtype)

    def bwd(dq, dk, dv, x, weight):
        return mlx_fused.fused_qkv_projection_bwd(dq, dk, dv, x, weight, True, *HEADS)

    def input_only(dq, dk, dv, x, weight):
        return mx.vjp(lambda x: qkv(x, weight, None), [x], [dq, dk, dv])[1]

    def concatenating_bwd(dq, dk, dv, x, weight):
        return bwd(dq, dk, dv, x, mx.concatenate(weight))

    args = (*cotangents, x, weight)
    needed = nbytes(args) + nbytes(bwd(*args))
    assert peak(bwd, *args) <= 1.02 * needed
    assert peak(concatenating_bwd, *args) > 1.02 * needed
    assert peak(input_only, *args) <= 1.02 * (nbytes(args) + nbytes(input_only(*args)))


@dtypes
@pytest.mark.parametrize("seq", [1, 64])
def test_output_projection_copies_nothing(rng, dtype, seq):
    args = operands.output(rng, 1, seq, HIDDEN, 384, dtype)
    f = mlx_fused.fused_output_projection_residual
    assert peak(f, *args) <= 1.02 * (nbytes(args) + args[3].nbytes)

    def bwd(g, a, w):
        return mlx_fused.fused_output_projection_residual_bwd(g, a, w, True)

    a, w, _, g = args
    # The residual's gradient is the cotangent itself.
    needed = nbytes((g, a, w)) + nbytes(bwd(g, a, w)[:3])
    assert peak(bwd, g, a, w) <= 1.02 * needed


@dtypes
@pytest.mark.parametrize("seq", [4, 64])
def test_strided_operands_are_read_in_place(rng, dtype, seq):
    # Windows of larger arrays, as a slice of a packed checkpoint or of a longer sequence is.
    x, weight, bias = operands.qkv(rng, 2, 2 * seq, HIDDEN + 64, HEADS, dtype)
    mx.eval(x, weight, bias)
    views = (x[:, ::2, :HIDDEN], tuple(w[:, 64:] for w in weight), bias)
    needed = nbytes(views) + nbytes(qkv(*views))
    assert peak(qkv, *views) <= 1.02 * needed


@dtypes
@pytest.mark.parametrize("seq", [4, 64])
def test_transposed_cotangents_are_read_in_place(rng, dtype, seq):
    x, weight, _ = operands.qkv(rng, 2, seq, HIDDEN, HEADS, dtype)
    cotangents = operands.qkv_cotangents(rng, 2, seq, HEADS, dtype)
    views = tuple(mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2) for g in cotangents)
    mx.eval(x, weight)

    def bwd(dq, dk, dv):
        return mlx_fused.fused_qkv_projection_bwd(dq, dk, dv, x, weight, True, *HEADS)

    assert peak(bwd, *views) <= peak(bwd, *cotangents)


# Weights of 64, 32 and 32 MB, and what one call adds to the most memory the process ever held, in MB.
RESIDENT = """
import resource, sys
import mlx.core as mx, mlx_fused

dtype, seq, backward = getattr(mx, sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "backward"
hidden = 4096
rows = 2**25 // hidden // dtype.size
weight = tuple(mx.ones((n * rows, hidden), dtype) for n in (2, 1, 1))
heads, kv_heads = 2 * rows // 64, rows // 64

def forward(x):
    return mlx_fused.fused_qkv_projection(x, weight, None, heads, kv_heads, 64)

def run(seq):
    x = mx.ones((1, seq, hidden), dtype)
    if backward:
        cotangents = [mx.ones((1, n, seq, 64), dtype) for n in (heads, kv_heads, kv_heads)]
        mx.eval(mx.vjp(forward, [x], cotangents)[1])
    else:
        mx.eval(forward(x))

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

mx.eval(weight)
before = held()
run(seq)
print(held() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seq", [1, 8, 64])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_keep_no_copy_of_a_weight_outside_mlx(dtype, seq, direction):
    command = [sys.executable, "-c", RESIDENT, dtype, str(seq), direction]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # The smallest weight is 32 MB.
    assert float(run.stdout) < 24
