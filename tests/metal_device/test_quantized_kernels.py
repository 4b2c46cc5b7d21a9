"""Every instantiation for quantized weights, compiled by the device and run, against float64."""

import mlx.core as mx
import pytest

import oracle
import projections
import quantized
from launches import DTYPES, launched, quantized_instantiations

HEADS, HIDDEN = (4, 2, 20), 384  # of groups of 128, and more than a tile's columns
CASES = [
    (kernel, form, operation, seq)
    for form in quantized.FORMATS
    for dtype in DTYPES
    for operation, every_seq in (
        ("qkv", (1, 2, 3, 7, 31, 65)),
        ("qkv_norm", (1, 2, 3, 7)),
        ("qkv_grad", (5, 65)),
    )
    for seq in every_seq
    for kernel in launched(operation, dtype, 1, seq, HIDDEN, HEADS, form)
]


def test_every_instantiation_is_here():
    assert {kernel for kernel, *_ in CASES} == set(quantized_instantiations())


@pytest.mark.parametrize("kernel, form, operation, seq", CASES)
def test_kernel(rng, device, kernel, form, operation, seq):
    call = projections.qkv(rng, 1, seq, HIDDEN, HEADS, form, getattr(mx, kernel.rpartition("_")[2]))
    if operation == "qkv_norm":
        projections.check_norm(rng, call)
        return
    exact = call.exact_operands
    if device == mx.gpu and "projection_rows" not in kernel and call.x.dtype != mx.float32:
        exact = quantized.in_tiles(exact, call.x.dtype)
    if operation == "qkv":
        oracle.assert_close(call(), call.formula, *exact, terms=call.forward_terms)
        return
    given, keys = projections.cotangents(rng, call), [("input", None)]
    grads, formula = projections.gradients(call, keys, given), call.gradient_formula(keys)
    oracle.assert_close(grads, formula, given, *exact, terms=call.gradient_terms)
