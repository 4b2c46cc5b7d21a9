"""Alters the Metal kernels one step at a time; the checker or the numbers must notice every one.

`python tests/mutation.py` judges all mutants and writes docs/mutations.md.
"""

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import numpy as np

import operands
import oracle
import projections
from metal_plan import (
    KERNELS,
    Call,
    Embedded,
    backward,
    forward,
    libraries,
    output_projection,
    qkv_projection,
    qkv_projection_bwd,
)
from mlx_fused._ext import _internals
from msl_sim import Library
from msl_sim.mutate import generate, run

DOCUMENT = Path(__file__).parent.parent / "docs" / "mutations.md"
HEADS = (4, 2, 20)  # a head is neither a multiple of a tile's columns nor of its depth

# Mutants that change no result and no access, by what their names hold, and why.
HARMLESS = {
    "only the second of min(BN,": "the tile bounds every access anyway; the fast path is lost",
    "only the second of min(BM,": "the tile bounds every access anyway; the fast path is lost",
    "only the second of min(tile_depth,": "the block bounds every load anyway; the fast path is lost",
    "only the second of min(quantized_depth,": "the block bounds every load anyway; the fast path is lost",
    "only the second of min(features_per_simdgroup,": "the loop over them ends at four anyway",
    "< to <=": "one more block of zeros in a sum, or more of a tile than the guard after it lets through",
    "condition dropped: sums_bias": "sums that are not stored",
    ">= to >": "the path with a test per value gives the same sums",
    "always first: mlx_fused_has_adapter": "the sum of a rank of 0",
    "always true: mlx_fused_has_adapter": "the sum of a rank of 0",
    "always true: blocks[n].columns > 0": "a block of zeros",
    "> to >=": "a block of zeros",
    "/ 8 dropped": "steps beyond a head, whose every load is masked",
}


def libraries_of(folder, *files):
    found = [Library(folder / file) for file in files]
    return {kernel: library for library in found for kernel in library.kernels}


def check_forward(folder, file, batch, seq, hidden, heads=HEADS, packed=False, bias=True):
    args = operands.qkv(np.random.default_rng(0), batch, seq, hidden, heads, bias=bias, packed=packed)
    call, outputs = qkv_projection(*args, *heads, library_of=libraries_of(folder, file))
    oracle.assert_close(outputs, oracle.fused_qkv_projection, *args, *heads)
    call.assert_written_once()


def check_output(folder, file, batch, seq, hidden, out, bias=True, gap=3):
    args = operands.output(np.random.default_rng(1), batch, seq, hidden, out, bias=bias)
    call, output = output_projection(*args, gap, library_of=libraries_of(folder, file))
    oracle.assert_close(output, oracle.fused_output_projection_residual, *args)
    call.assert_written_once()


def projection(folder, file="projection.metal"):
    check_forward(folder, file, 2, 66, 37, packed=True)
    check_forward(folder, file, 1, 64, 48, (4, 2, 32), bias=False)
    check_output(folder, file, 2, 65, 20, 70)
    check_output(folder, file, 1, 64, 16, 64, bias=False)


RANKS = (33, None, 9)  # more than a simdgroup's lanes, and more than a tile's columns


def lora_calls(batch, seq, hidden, dtype=mx.float32, draw=operands.normal):
    rng = np.random.default_rng(4)
    yield projections.qkv(
        rng, batch, seq, hidden, HEADS, ranks=RANKS, scale=(2.0, 1.0, 3.0), dtype=dtype, draw=draw
    )
    yield projections.output(
        rng, batch, seq, hidden, 70, bias=False, rank=9, alpha=0.75, dtype=dtype, draw=draw
    )


def check_lora(folder, files, *shape, kind=Call):
    found = libraries() | libraries_of(folder, *files)
    for op in lora_calls(*shape):
        call, outputs = forward(op, kind, library_of=found, seconds=2)
        oracle.assert_close(outputs, op.formula, *op.exact_operands, terms=op.forward_terms)
        call.assert_written_once()


def check_lora_gradients(folder, files, names, *shape, kind=Call):
    found = libraries() | libraries_of(folder, *files)
    for op in lora_calls(*shape):
        given = projections.cotangents(np.random.default_rng(5), op)
        keys = [key for key in op.leaves if key[0] in names]
        call, grads = backward(op, given, keys, kind, library_of=found, seconds=2)
        formula, terms = op.gradient_formula(keys), op.gradient_terms
        oracle.assert_close(grads, formula, given, *op.exact_operands, terms=terms)
        call.assert_written_once()


def check_exact(folder, file, *ops):
    """The same bits on integers, wherever it is that they are rounded."""
    found = libraries() | libraries_of(folder, file)
    for op in ops:
        for exact in (True, False):
            _, outputs = forward(op.replace(exact=exact), library_of=found, seconds=2)
            expected = op.formula(*op.exact_operands)
            expected = op.rounded_formula(mx.bfloat16) if exact else expected
            for y, e in zip(outputs, expected, strict=True):
                np.testing.assert_array_equal(oracle.exact(y), oracle.rounded(e, mx.bfloat16))


def projection_rows(folder, file="projection_rows.metal"):
    check_forward(folder, file, 2, 2, 261)
    check_forward(folder, file, 1, 3, 130, packed=True, bias=False)
    check_output(folder, file, 2, 2, 20, 35)
    check_lora(folder, [file], 2, 2, 20)


def check_backward(folder, files, batch, seq, hidden, heads=HEADS, bias=True):
    rng = np.random.default_rng(2)
    x, weight, _ = operands.qkv(rng, batch, seq, hidden, heads)
    args = (*operands.qkv_cotangents(rng, batch, seq, heads), x, weight, bias, *heads)
    call, grads = qkv_projection_bwd(*args, library_of=libraries_of(folder, *files))
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args)
    call.assert_written_once()


def gradients(folder):
    files = ("qkv_input_grad.metal", "qkv_weight_grad.metal")
    check_backward(folder, files, 2, 37, 70)
    check_backward(folder, files, 1, 66, 64, (2, 1, 64), bias=False)
    check_backward(folder, files, 1, 64, 70, (2, 1, 64))
    check_backward(folder, files, 2, 64, 64, (2, 1, 70))


def low_rank_product(folder, file="low_rank_product.metal"):
    check_lora(folder, [file], 2, 11, 150, kind=Embedded)
    check_lora_gradients(folder, [file], ("input", "attn_out"), 2, 11, 20, kind=Embedded)


def adapter_grad(folder, file="adapter_grad.metal"):
    check_lora_gradients(folder, [file], ("lora_a", "lora_b"), 2, 11, 64, kind=Embedded)


def low_rank(folder):
    low_rank_product(folder)
    adapter_grad(folder)


def epilogue(folder):
    options = {"dtype": mx.bfloat16, "draw": operands.large_integers}
    check_exact(folder, "projection_rows.metal", *lora_calls(1, 2, 33, **options))
    quantized_call = quantized_qkv(1, 2, 32, HEADS, ("affine", 32, 4), **options)
    check_exact(folder, "quantized_projection_rows.metal", quantized_call)
    check_lora(folder, ["projection_rows.metal"], 2, 2, 33, kind=Embedded)
    check_lora(folder, ["projection.metal"], 2, 66, 20, kind=Embedded)
    check_lora_gradients(folder, ["qkv_input_grad.metal"], ("input", "attn_out"), 2, 66, 70, kind=Embedded)
    check_output(folder, "projection.metal", 2, 65, 20, 70)


def check_quantized(folder, file, op, kind=Call, keys=()):
    """The outputs, or the gradients of the keys."""
    found = libraries() | libraries_of(folder, file)
    if keys:
        given = projections.cotangents(np.random.default_rng(6), op)
        call, results = backward(op, given, keys, kind, library_of=found, seconds=2)
        formula, operands, terms = op.gradient_formula(keys), (given, *op.exact_operands), op.gradient_terms
    else:
        call, results = forward(op, kind, library_of=found, seconds=2)
        formula, operands, terms = op.formula, op.exact_operands, op.forward_terms
    oracle.assert_close(results, formula, *operands, terms=terms)
    call.assert_written_once()


def quantized_qkv(batch, seq, hidden, heads, form, **options):
    return projections.qkv(np.random.default_rng(7), batch, seq, hidden, heads, form, **options)


def quantized_projection(folder, file="quantized_projection.metal"):
    form = ("nvfp4", 16, 4)  # whose depth may end within a tile's block
    check_quantized(folder, file, quantized_qkv(2, 66, 80, HEADS, form), Embedded)
    for seq, hidden, head_dim in ((66, 32, 64), (64, 32, 50), (64, 48, 64)):  # one ragged edge each
        check_quantized(folder, file, quantized_qkv(1, seq, hidden, (2, 1, head_dim), form))


def quantized_projection_rows(folder, file="quantized_projection_rows.metal"):
    form = ("affine", 32, 4)
    check_quantized(folder, file, quantized_qkv(1, 3, 544, (2, 1, 20), form))  # more than lanes read together
    check_quantized(folder, file, quantized_qkv(2, 2, 64, HEADS, form, ranks=RANKS), Embedded)


def quantized_input_grad(folder, file="quantized_input_grad.metal"):
    form, keys = ("affine", 32, 3), [("input", None)]  # codes across two words
    check_quantized(folder, file, quantized_qkv(2, 66, 96, HEADS, form), Embedded, keys)
    for seq, hidden, head_dim in ((66, 64, 64), (64, 96, 64), (64, 64, 50)):
        check_quantized(folder, file, quantized_qkv(1, seq, hidden, (2, 1, head_dim), form), keys=keys)


def quantized(folder):
    quantized_projection(folder)
    quantized_input_grad(folder)
    quantized_projection_rows(folder)


def check_unequal_segments(folder):
    """q, k and v of three sizes, so that none can be taken for another."""
    rng, libraries = np.random.default_rng(3), libraries_of(folder, "projection.metal")
    x = operands.normal(rng, (1, 9, 20))
    weights = [operands.normal(rng, (n, 20)) for n in (5, 70, 33)]
    call = Call(x.dtype)
    tensors = [call.input(w) for w in weights]
    outputs = [call.output((1, 1, 9, len(w))) for w in weights]
    segments = [(w, None, out) for w, out in zip(tensors, outputs, strict=True)]
    call.run(_internals.plan_projection("float32", call.input(x), segments), libraries)
    for w, out in zip(weights, outputs, strict=True):
        oracle.assert_close(call.value(out)[:, 0], lambda x, w: np.einsum("bsi,oi->bso", x, w), x, w)


def all_kernels(folder):
    check_unequal_segments(folder)
    projection(folder)
    projection_rows(folder)
    gradients(folder)
    check_lora_gradients(folder, ["qkv_input_grad.metal"], ["attn_out"], 2, 9, 20)  # scaled


TESTS = {
    "projection.metal": projection,
    "projection_rows.metal": projection_rows,
    "qkv_input_grad.metal": gradients,
    "qkv_weight_grad.metal": gradients,
    "low_rank_product.metal": low_rank_product,
    "adapter_grad.metal": adapter_grad,
    "low_rank.h": low_rank,
    "epilogue.h": epilogue,
    "common.h": all_kernels,
    "quantized_projection.metal": quantized_projection,
    "quantized_projection_rows.metal": quantized_projection_rows,
    "quantized_input_grad.metal": quantized_input_grad,
    "quantized.h": quantized,
}
# Of the many instantiations, those that the tests above launch; of dense weights, in float32.
LAUNCHED = re.compile(
    r"((?!quantized)\w+|quantized_(projection_64_nvfp4|projection_rows_4_affine_4|input_grad_affine_3))_float32"
)


def judge_some(file, first=0, count=sys.maxsize):
    """The outcomes of some of a file's mutants."""
    mx.set_default_device(mx.cpu)
    return run(KERNELS, generate(KERNELS / file)[first : first + count], TESTS[file], LAUNCHED)


def judge_all(workers=2, count=10):
    """The outcomes of all mutants, by file."""
    outcomes = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            (file, pool.submit(judge_some, file, first, count))
            for file in TESTS
            for first in range(0, len(generate(KERNELS / file)), count)
        ]
        for file, job in jobs:
            outcomes.setdefault(file, []).extend(job.result())
    return outcomes


def excuse(outcome):
    """Why a survivor is harmless, None if it is not known to be."""
    if outcome.reason == "same code":
        return "the compiler makes the same code of it"
    return next((why for text, why in HARMLESS.items() if text in outcome.mutant.name), None)


def table_row(file, found):
    killed = [o for o in found if o.killed]
    numbers = sum(o.reason == "numbers" for o in killed)
    harmless = sum(not o.killed and excuse(o) is not None for o in found)
    row = [file, len(found), len(killed), len(killed) - numbers, numbers, harmless]
    return "| " + " | ".join(map(str, [*row, len(found) - len(killed) - harmless])) + " |"


def described(found):
    return [f"- `{o.mutant.name}`: {excuse(o)}" for o in found if not o.killed]


def document(outcomes):
    """docs/mutations.md."""
    everything = [o for found in outcomes.values() for o in found]
    lines = [
        "# Mutations of the Metal kernels",
        "",
        "Written by `python tests/mutation.py`. Each barrier, guard, mask, bound, index term and epilogue",
        "step of the kernels is deleted or altered, one at a time, by a script; then the library's own plans",
        "run on the simulator. A mutant is killed when the checker finds a wrong access, a race or the like,",
        "or when the numbers leave the bounds derived from float32 and the length of the sums.",
        "",
        "| file | mutants | killed | by the checker | by the numbers | harmless | survived |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [table_row(file, found) for file, found in [*outcomes.items(), ("all", everything)]]
    lines += ["", "The harmless ones change neither a result nor an access:", "", *described(everything)]
    return "\n".join(lines) + "\n"


def main():
    text = document(judge_all())
    DOCUMENT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
