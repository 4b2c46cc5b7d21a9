"""Every instantiation of every kernel, compiled by the device and run, against float64."""

import mlx.core as mx
import pytest

import projections
from launches import DTYPES, instantiations, launched
from operands import integers
from test_backward import check as check_backward
from test_forward import biases, check

# On both sides of what each kernel takes, as (batch, seq).
ROWS = [(1, m) for m in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)]
ROWS += [(3, 1), (2, 4), (3, 3), (2, 33), (3, 65)]
LORA_ROWS = [*ROWS, (1, 1025)]
# Every group size and head_dim of interest, and depths with and without tails, as (heads, hidden).
PROBLEMS = [((2, 2, 32), 64), ((2, 1, 64), 61), ((3, 1, 80), 128), ((4, 1, 96), 129), ((4, 2, 128), 60)]
PROBLEMS += [((5, 1, 33), 127), ((6, 1, 7), 260), ((7, 1, 1), 3), ((8, 1, 16), 17), ((1, 1, 256), 1)]
RANKS = {"lora": (33, None, 3), "small_lora": (3, None, 2)}
OPERATIONS = ["output", "qkv", "qkv_norm", "qkv_grad"]
OPERATIONS += [operation for name in RANKS for operation in (f"qkv_{name}", f"qkv_{name}_grad")]


def ranks_of(operation):
    return RANKS.get(operation.removeprefix("qkv_").removesuffix("_grad"))


def rows_of(operation):
    if operation == "qkv_norm":  # of more rows MLX norms
        return [(batch, seq) for batch, seq in ROWS if batch * seq <= 8]
    return LORA_ROWS if ranks_of(operation) else ROWS


def kernels(problem, operation, dtype, batch, seq):
    heads, hidden = problem
    return launched(operation, dtype, batch, seq, hidden, heads, ranks=ranks_of(operation))


CASES = [
    (kernel, operation, batch, seq)
    for dtype in DTYPES
    for operation in OPERATIONS
    for batch, seq in rows_of(operation)
    for kernel in sorted({k for problem in PROBLEMS for k in kernels(problem, operation, dtype, batch, seq)})
]


# What adds up the splits of tiles that are too few, on any device, and reads weights column by column.
OTHERS = [
    (kernel, operation, seq, transposed)
    for dtype in DTYPES
    for operation in ("qkv", "qkv_grad")
    for seq in (20, 70)
    for transposed in (False, True)
    for kernel in launched(operation, dtype, 1, seq, 600, (2, 1, 150), cores=6, transposed=transposed)
    if "_splits_" in kernel or "_transposed_" in kernel
]


# The projections' kernels have the same activations in themselves, by function constants.
ACTIVATIONS = [kernel for kernel in instantiations() if kernel.startswith("activation")]


def test_every_instantiation_is_here():
    assert {*ACTIVATIONS, *(kernel for kernel, *_ in CASES + OTHERS)} == set(instantiations())


@pytest.mark.parametrize("name", projections.ACTIVATIONS)
@pytest.mark.parametrize("seq", [1, 3, 33, 130])
@pytest.mark.parametrize("kernel", ACTIVATIONS)
def test_activations(rng, kernel, seq, name):
    dtype = getattr(mx, kernel.rpartition("_")[2])
    projections.check(rng, projections.gated(rng, 2, seq, 65, 37, dtype=dtype, activation=name))
    if name != "clipped_swiglu":
        projections.check(rng, projections.linear(rng, 2, seq, 65, 37, dtype=dtype, activation=name))


@pytest.mark.parametrize("kernel, operation, seq, transposed", OTHERS)
def test_splits_and_transposed_weights(rng, kernel, operation, seq, transposed):
    dtype = getattr(mx, kernel.rpartition("_")[2])
    call = projections.qkv(rng, 1, seq, 600, (2, 1, 150), dtype=dtype)
    if transposed:
        call = call.replace(weight=tuple(mx.contiguous(w.T).T for w in call.arguments["weight"]))
    if operation == "qkv":
        check(call)
    else:
        check_backward(rng, call)


@biases
@pytest.mark.parametrize("kernel, operation, batch, seq", CASES)
def test_kernel(rng, kernel, operation, batch, seq, bias):
    dtype = kernel.rpartition("_")[2]
    for problem in PROBLEMS:
        if kernel in kernels(problem, operation, dtype, batch, seq):
            check_call(rng, operation, getattr(mx, dtype), bias, batch, seq, *problem)


def check_call(rng, operation, dtype, bias, batch, seq, heads, hidden):
    if operation == "output":
        check(projections.output(rng, batch, seq, hidden, heads[0] * heads[2], dtype=dtype, bias=bias))
    elif operation == "qkv_norm":
        call = projections.qkv(rng, batch, seq, hidden, heads, dtype=dtype, bias=bias, draw=integers)
        projections.check_norm(rng, call)
    elif ranks := ranks_of(operation):
        call = projections.qkv(rng, batch, seq, hidden, heads, bias=bias, dtype=dtype, ranks=ranks)
        if operation.endswith("grad"):
            keys = [key for key in call.leaves if key[0] in ("input", "lora_a", "lora_b")]
            projections.check_gradients(call, projections.cotangents(rng, call), keys)
        else:
            projections.check_forward(call)
    else:
        for packed in (False, True):
            call = projections.qkv(rng, batch, seq, hidden, heads, dtype=dtype, bias=bias, packed=packed)
            if operation == "qkv":
                check(call)
            else:
                check_backward(rng, call)
