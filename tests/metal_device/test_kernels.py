"""Every instantiation of every kernel, compiled by the device and run, against float64."""

import mlx.core as mx
import pytest
from launches import DTYPES, instantiations, launched

import projections
from test_backward import check as check_backward
from test_forward import biases, check

# On both sides of what each kernel takes, as (batch, seq).
ROWS = [(1, m) for m in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)]
ROWS += [(3, 1), (2, 4), (3, 3), (2, 33), (3, 65)]
# Every group size and head_dim of interest, and depths with and without tails, as (heads, hidden).
PROBLEMS = [((2, 2, 32), 64), ((2, 1, 64), 61), ((3, 1, 80), 128), ((4, 1, 96), 129), ((4, 2, 128), 60)]
PROBLEMS += [((5, 1, 33), 127), ((6, 1, 7), 260), ((7, 1, 1), 3), ((8, 1, 16), 17), ((1, 1, 256), 1)]
CASES = [
    (kernel, operation, batch, seq)
    for dtype in DTYPES
    for operation in ("qkv", "output", "qkv_grad", "qkv_lora", "qkv_lora_grad")
    for batch, seq in ROWS
    for kernel in launched(operation, dtype, batch, seq, 64, (2, 2, 32))
]


def test_every_instantiation_is_here():
    assert {kernel for kernel, *_ in CASES} == set(instantiations())


@biases
@pytest.mark.parametrize("kernel, operation, batch, seq", CASES)
def test_kernel(rng, kernel, operation, batch, seq, bias):
    name = kernel.rpartition("_")[2]
    dtype = getattr(mx, name)
    for heads, hidden in PROBLEMS:
        few_features = (hidden if operation == "output" else heads[1] * heads[2]) < 4  # left to tiles
        assert few_features or kernel in launched(operation, name, batch, seq, hidden, heads)
        if operation == "output":
            check(projections.output(rng, batch, seq, hidden, heads[0] * heads[2], dtype=dtype, bias=bias))
            continue
        if "lora" in operation:
            check_lora(rng, operation, dtype, bias, batch, seq, hidden, heads)
            continue
        for packed in (False, True):
            call = projections.qkv(rng, batch, seq, hidden, heads, dtype=dtype, bias=bias, packed=packed)
            if operation == "qkv":
                check(call)
            else:
                check_backward(rng, call)


def check_lora(rng, operation, dtype, bias, batch, seq, hidden, heads):
    call = projections.qkv(rng, batch, seq, hidden, heads, bias=bias, dtype=dtype, ranks=(33, None, 3))
    if operation == "qkv_lora":
        projections.check_forward(call)
    else:
        keys = [key for key in call.leaves if key[0] in ("input", "lora_a", "lora_b")]
        projections.check_gradients(call, projections.cotangents(rng, call), keys)
