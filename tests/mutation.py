"""Alters the Metal kernels one step at a time; the checker or the numbers must notice every one.

`python tests/mutation.py` judges all mutants and writes docs/mutations.md.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import numpy as np

import operands
import oracle
from metal_plan import KERNELS, Call, output_projection, qkv_projection, qkv_projection_bwd
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
    "only the second of min(features_per_simdgroup,": "the loop over them ends at four anyway",
    "< to <=": "one more block of zeros in a sum, or more of a tile than the guard after it lets through",
    "condition dropped: sums_bias": "sums that are not stored",
    ">= to >": "the path with a test per value gives the same sums",
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


def projection_rows(folder, file="projection_rows.metal"):
    check_forward(folder, file, 2, 2, 261)
    check_forward(folder, file, 1, 3, 130, packed=True, bias=False)
    check_output(folder, file, 2, 2, 20, 35)


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


TESTS = {
    "projection.metal": projection,
    "projection_rows.metal": projection_rows,
    "qkv_input_grad.metal": gradients,
    "qkv_weight_grad.metal": gradients,
    "common.h": all_kernels,
}


def judge_some(file, first, count):
    """The outcomes of some of a file's mutants, in a process of their own."""
    mx.set_default_device(mx.cpu)
    return run(KERNELS, generate(KERNELS / file)[first : first + count], TESTS[file])


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


def document(outcomes):
    """docs/mutations.md."""
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
    everything = [o for found in outcomes.values() for o in found]
    for file, found in [*outcomes.items(), ("all", everything)]:
        killed = [o for o in found if o.killed]
        numbers = sum(o.reason == "numbers" for o in killed)
        harmless = sum(not o.killed and excuse(o) is not None for o in found)
        row = [file, len(found), len(killed), len(killed) - numbers, numbers, harmless]
        lines.append("| " + " | ".join(map(str, [*row, len(found) - len(killed) - harmless])) + " |")
    lines += ["", "The harmless ones change neither a result nor an access:", ""]
    lines += [f"- `{o.mutant.name}`: {excuse(o)}" for o in everything if not o.killed]
    return "\n".join(lines) + "\n"


def main():
    text = document(judge_all())
    DOCUMENT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
