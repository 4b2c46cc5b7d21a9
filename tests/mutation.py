"""Alters the Metal kernels one step at a time; the checker or the numbers must notice every one.

`python tests/mutation.py` judges all mutants and writes docs/design/mutations.md; with names of files, such
as `projection.metal`, those of these files, and leaves what the page says of the others.
"""

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

import operands
import oracle
import projections
from metal_plan import KERNELS, Call, Embedded, InTiles, Transposed, activation, backward, forward, libraries
from msl_sim import Library
from msl_sim.mutate import generate, run
from test_metal_activation import check_slopes_far_out

DOCUMENT = Path(__file__).parent.parent / "docs" / "design" / "mutations.md"
HEADS = (4, 2, 20)  # a head is neither a multiple of a tile's columns nor of its depth

# Mutants that change no result and no access, by what their names hold, and why.
HARMLESS = {
    "only the second of min(BN,": "the tile bounds every access anyway; the fast path is lost",
    "only the second of min(BM,": "the tile bounds every access anyway; the fast path is lost",
    "projection.metal:81 choice always second: ": "the block bounds every load anyway; the fast path is lost",
    "only the second of min(tile_depth,": "the block bounds every load anyway; the fast path is lost",
    "projection_rows.metal:22 ": "how many values of x are read at a time",
    "projection_rows.metal:152 == to !=": "which of two simdgroups takes the gate",
    "condition dropped: !Format::is_quantized": "rows of quantized weights end with whole chunks",
    "condition dropped: column < in_features": "a chunk of zeros",
    "guard always true: mlx_fused_has_rest": "a sum of no values",
    "input_grad.metal:41 ": "which split takes which part of the same sum",
    "low_rank.h:89 ": "who adds which steps of the same sum",
    **dict.fromkeys(
        (
            "activation.h:31 <",
            "activation.h:44 <",
            "activation.h:64 <",
            "activation.h:69 >",
            "activation.h:83 <",
            "activation.h:83 >",
        ),
        "there both are the same",
    ),
    "< to <=": "one more block of zeros in a sum, or more of a tile than the guard after it lets through",
    "condition dropped: sums_bias": "sums that are not stored",
    "always first: mlx_fused_has_adapter": "the sum of a rank of 0",
    "always true: mlx_fused_has_adapter": "the sum of a rank of 0",
}


# Alterations after which there is no program: a pointer that is a number, half of a template's arguments.
NO_PROGRAM = (
    "projection.metal:114 ",
    "projection.metal:129 ",
    "projection_rows.metal:84 += to =",
    "projection_rows.metal:163 ",
    "projection_rows.metal:185 += to =",
    "low_rank_product.metal:66 + 1 dropped",
    "low_rank.h:31 += to =",
    "low_rank.h:40 += to =",
    "weight.h:194 ",
)


def mutants_of(file):
    return [mutant for mutant in generate(KERNELS / file) if not mutant.name.startswith(NO_PROGRAM)]


library = lru_cache(8)(Library)  # of one mutant after the other


def libraries_of(folder, *files):
    found = [library(folder / file) for file in files]
    return libraries() | {kernel: library for library in found for kernel in library.kernels}


def check(folder, files, op, kind=Call, names=None, cores=0):
    """The operation's outputs, or the gradients of those arrays that are named, by a folder's files."""
    options = {"library_of": libraries_of(folder, *files), "seconds": 2, "cores": cores}
    if op.activation:
        check_activation(op, kind, options)
        return
    plain = not op.quantization and "lora_a" not in op.arguments and op.arguments.get("alpha", 1.0) == 1.0
    if names:
        keys, given = [key for key in op.leaves if key[0] in names], cotangents(op)
        call, results = backward(op, given, keys, kind, **options)
        formula, arrays, terms = op.gradient_formula(keys), (given, *op.exact_operands), op.gradient_terms
    else:
        call, results = forward(op, kind, **options)
        formula, arrays, terms = op.formula, op.exact_operands, op.forward_terms
    oracle.assert_close(results, formula, *arrays, terms=None if plain else terms)
    call.assert_written_once()


def check_activation(op, kind, options):
    """The result alone, and with what the activation is of."""
    for keeps in (False, True):
        call, (y, *kept) = forward(op, kind, keeps, **options)
        in_tiles = op.quantization and "projection_rows" not in call.plan[-1]["kernel"]
        held = InTiles(op.operation, op.arguments) if in_tiles and op.x.dtype != mx.float32 else op
        projections.check_outputs(held, (y,))
        for a, e, error in zip(kept, *held.pre(op.x.dtype, 1), strict=True) if keeps else ():
            assert np.all(np.abs(oracle.exact(a) - e) <= error)
        call.assert_written_once()


def check_norm(folder, op):
    """Of rows whose root mean square is a power of two."""
    found = libraries_of(folder, "projection_rows.metal")
    rng = np.random.default_rng(2)
    normed = mx.array(rng.choice([-1.0, 1.0], op.x.shape)).astype(op.x.dtype)
    weight = operands.integers(rng, op.x.shape[-1:], op.x.dtype)
    x = normed * mx.array([[0.5], [2.0], [4.0]])[: op.x.shape[1]]
    for w, eps, ours, scale in (
        (weight, 0.0, x, 1.0),
        (None, 0.0, x, 1.0),
        (None, 3.0, normed, 0.5),  # a mean of 1 and 3
    ):
        before = op.replace(**{op.input_name: scale * (normed if w is None else w * normed)})
        norm = {op.input_name: ours, "norm": (w, eps)}
        call, outputs = forward(op.replace(**norm), library_of=found, seconds=2)
        expected = before.formula(*before.exact_operands)
        for y, e in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(oracle.exact(y), e)
        call.assert_written_once()


def check_memory(folder):
    """Without a norm a threadgroup has memory for the sums of up alone."""
    call, _ = forward(gated(2, 2, 20, 35), library_of=libraries_of(folder, "projection_rows.metal"))
    assert call.results[0].threadgroup_bytes < 128


def elementwise(folder, names=projections.ACTIVATIONS):
    """Activations by themselves and their gradients, in every piece of their formulas."""
    rng, found = np.random.default_rng(4), libraries_of(folder, "activation.metal")
    values = np.concatenate([rng.normal(0, 2, 500), [7.0, -7.0, 0.0, 12.0, -12.0, 30.0, -30.0, -100.0]])
    for name in names:
        for gated in (False, True)[name == "clipped_swiglu" :]:
            of = oracle.Activation(name, gated)
            about = (name, gated, *((of.alpha, of.limit) if of.clipped else (1.0, np.inf)))
            shape = (2, 3, 555)
            pre = [mx.array(rng.choice(values, shape).astype(np.float32)) for _ in range(1 + gated)]
            laid_out = ([3 * 560, 560, 1], lambda a: mx.pad(a, [(0, 0), (0, 0), (0, 5)]))
            exact, g = [oracle.exact(a) for a in pre], operands.normal(rng, shape)
            options = {"strides": laid_out, "library_of": found, "seconds": 2}
            none = [0 * a for a in exact]
            (y,) = activation(about, mx.float32, pre, **options)
            oracle.assert_rounded(y, of(exact), of.errors(exact, none))
            grads = activation(about, mx.float32, pre, g, **options)
            expected = of.gradients(oracle.exact(g), exact)
            errors = of.gradient_errors(oracle.exact(g), exact, none)
            for grad, e, error in zip(grads, expected, errors, strict=True):
                oracle.assert_rounded(grad, e, error)
            if gated:
                check_slopes_far_out(name, library_of=found, seconds=2)


def cotangents(op):
    return projections.cotangents(np.random.default_rng(5), op)


def qkv(batch, seq, hidden, heads=HEADS, form=None, **options):
    return projections.qkv(np.random.default_rng(0), batch, seq, hidden, heads, form, **options)


def output(batch, seq, hidden, out, **options):
    return projections.output(np.random.default_rng(1), batch, seq, hidden, out, **options)


def gated(batch, seq, hidden, features, **options):
    return projections.gated(np.random.default_rng(6), batch, seq, hidden, features, **options)


INPUT, WEIGHT, LORA = ("input", "x"), ("weight", "bias"), ("lora_a", "lora_b")
RANKS = (33, None, 9)  # more than a simdgroup's lanes, and more than a tile's columns


def lora_calls(batch, seq, hidden, **options):
    yield qkv(batch, seq, hidden, ranks=RANKS, scale=(2.0, 1.0, 3.0), **options)
    yield output(batch, seq, hidden, 70, bias=False, rank=9, alpha=0.75, **options)


def projection(folder):
    files = ["projection.metal"]
    ranks = {"ranks": (9, 3), "scale": (2.0, 3.0)}
    # One instance.
    check(folder, files, qkv(2, 66, 37, packed=True))
    check(folder, files, gated(2, 66, 37, 70, **ranks), Embedded)
    check(folder, files, gated(1, 64, 48, 64))
    check(folder, files, qkv(1, 64, 48, (4, 2, 32), bias=False))
    check(folder, files, output(2, 65, 20, 70), Embedded)
    check(folder, files, output(1, 64, 16, 64, bias=False))
    for op in lora_calls(2, 66, 20):
        check(folder, files, op)
    # Those of splits.
    check(folder, files, gated(2, 9, 300, 70, **ranks), Embedded, cores=40)
    for op in lora_calls(2, 9, 300):
        check(folder, files, op, Embedded, cores=40)
    for op in (output(1, 64, 37, 70), gated(1, 64, 37, 70)):
        check(folder, files, op, partial(Transposed, op))
    form = ("nvfp4", 16, 4)  # whose depth may end within a tile's block
    check(folder, files, qkv(2, 66, 80, form=form), Embedded)
    for seq, hidden, head_dim in ((66, 32, 64), (64, 32, 50), (64, 48, 64)):  # one ragged edge each
        check(folder, files, qkv(1, seq, hidden, (2, 1, head_dim), form))


def projection_rows(folder):
    # The instance that has all of the file goes first: for each that is run, one is compiled.
    draw = {"draw": operands.integers}
    check_norm(folder, gated(1, 3, 330, 35, activation="relu", **draw))
    check_norm(folder, qkv(1, 3, 330, **draw))
    check_memory(folder)
    files = ["projection_rows.metal"]
    check(folder, files, qkv(2, 2, 261))
    check(folder, files, qkv(1, 3, 130, packed=True, bias=False))
    check(folder, files, qkv(1, 7, 130))  # in two passes, the second of three rows
    check(folder, files, output(2, 2, 20, 35), Embedded)
    for op in lora_calls(2, 2, 20):
        check(folder, files, op)
    form = ("affine", 32, 4)
    for rows in (1, 3):
        check(folder, files, qkv(1, rows, 261))
        check(folder, files, qkv(1, rows, 544, (2, 1, 20), form))  # more than lanes read together
    check(folder, files, qkv(2, 2, 64, form=form, ranks=RANKS), Embedded)
    check(folder, files, qkv(1, 3, 128, form=("affine", 64, 4)))
    op = qkv(1, 3, 130)
    op.x[0, 1, 5] = np.inf  # which a bias of 0 would make NaN
    check(folder, files, op)
    check(folder, files, gated(2, 2, 20, 35, ranks=(9, 3), scale=(2.0, 3.0)), Embedded)
    check(folder, files, gated(1, 7, 130, 35))


def input_grad(folder):
    files = ["input_grad.metal"]
    for op in (
        qkv(2, 37, 70),
        qkv(1, 66, 64, (2, 1, 64)),
        qkv(1, 64, 70, (2, 1, 64)),
        qkv(2, 64, 64, (2, 1, 70)),
    ):
        check(folder, files, op, names=INPUT)
    form = ("affine", 32, 3)  # codes across two words
    check(folder, files, qkv(2, 66, 96, form=form), Embedded, INPUT)
    for seq, hidden, head_dim in ((66, 64, 64), (64, 96, 64), (64, 64, 50)):
        check(folder, files, qkv(1, seq, hidden, (2, 1, head_dim), form), names=INPUT)
    for op in lora_calls(2, 66, 70):
        check(folder, files, op, Embedded, INPUT)
    op = qkv(2, 9, 70, (4, 2, 90), ranks=RANKS)  # in splits that end within heads
    check(folder, files, op, Embedded, INPUT, cores=40)
    op = qkv(1, 64, 70, (2, 1, 50))
    check(folder, files, op, partial(Transposed, op), INPUT)


def weight_grad(folder):
    files = ["weight_grad.metal"]
    check(folder, files, qkv(2, 37, 70), names=WEIGHT)
    check(folder, files, qkv(1, 66, 64, (2, 1, 64), bias=False), names=WEIGHT)
    for op in (qkv(1, 64, 70, (2, 1, 64)), qkv(2, 64, 64, (2, 1, 70))):
        check(folder, files, op, names=WEIGHT)


def low_rank_product(folder):
    files = ["low_rank_product.metal"]
    for op in lora_calls(2, 11, 150):
        check(folder, files, op, Embedded)
        check(folder, files, op)
    for op in lora_calls(2, 11, 20):
        check(folder, files, op, Embedded, INPUT)
    for op in lora_calls(1, 1030, 20):
        check(folder, files, op)
    check(folder, files, qkv(1, 11, 20, ranks=(9, None, None), scale=(2.0, 1.0, 1.0)))  # none after it
    op = qkv(1, 11, 20, (20, 2, 24), ranks=RANKS, scale=(2.0, 1.0, 3.0))  # shares end within heads
    check(folder, files, op, Embedded, INPUT)


def adapter_grad(folder):
    for op in lora_calls(2, 11, 64):
        check(folder, ["adapter_grad.metal"], op, Embedded, LORA)
    # Shares that end within examples; examples of less than a step, and more of them than simdgroups.
    for batch, rows in ((2, 11), (3, 150), (40, 9), (2, 5), (18, 3)):
        for op in lora_calls(batch, rows, 27):
            check(folder, ["adapter_grad.metal"], op, names=LORA)


def low_rank(folder):
    low_rank_product(folder)
    adapter_grad(folder)


def check_exact(folder, op):
    """The same bits on integers, wherever it is that they are rounded."""
    found = libraries_of(folder, "projection_rows.metal")
    for exact in (True, False):
        _, outputs = forward(op.replace(exact=exact), library_of=found, seconds=2)
        expected = op.rounded_formula(mx.bfloat16) if exact else op.formula(*op.exact_operands)
        for y, e in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(oracle.exact(y), oracle.rounded(e, mx.bfloat16))


def epilogue(folder):
    options = {"dtype": mx.bfloat16, "draw": operands.large_integers}
    for op in (*lora_calls(1, 2, 33, **options), qkv(1, 2, 32, form=("affine", 32, 4), **options)):
        check_exact(folder, op)
    for file, rows, hidden, names in (
        ("projection_rows.metal", 2, 33, None),
        ("projection.metal", 66, 20, None),
        ("input_grad.metal", 66, 70, INPUT),
    ):
        for op in lora_calls(2, rows, hidden):
            check(folder, [file], op, Embedded, names)
    check(folder, ["projection.metal"], output(2, 65, 20, 70), Embedded)
    for op in (
        gated(2, 2, 33, 35),
        projections.linear(np.random.default_rng(7), 2, 2, 33, 35, activation="silu"),
    ):
        check(folder, ["projection_rows.metal"], op, Embedded)


def check_unequal_segments(folder):
    """q, k and v of three sizes, so that none can be taken for another."""
    rng = np.random.default_rng(3)
    x, weights = operands.normal(rng, (1, 9, 20)), [operands.normal(rng, (n, 20)) for n in (5, 70, 33)]
    call = Call(x.dtype)
    inputs = {("weight", i): call.input(w) for i, w in enumerate(weights)} | {("input", 0): call.input(x)}
    outputs = {("output", i): call.output((1, 9, len(w))) for i, w in enumerate(weights)}
    call.run(inputs, outputs, library_of=libraries_of(folder, "projection.metal"))
    for w, out in zip(weights, outputs.values(), strict=True):
        oracle.assert_close(call.value(out), lambda x, w: np.einsum("bsi,oi->bso", x, w), x, w)


def weights(folder):
    projection(folder)
    projection_rows(folder)
    input_grad(folder)


def all_kernels(folder):
    check_unequal_segments(folder)
    weights(folder)
    weight_grad(folder)


TESTS = {
    "projection.metal": projection,
    "projection_rows.metal": projection_rows,
    "input_grad.metal": input_grad,
    "weight_grad.metal": weight_grad,
    "low_rank_product.metal": low_rank_product,
    "adapter_grad.metal": adapter_grad,
    "activation.metal": partial(elementwise, names=["silu", "clipped_swiglu"]),
    "low_rank.h": low_rank,
    "activation.h": elementwise,
    "epilogue.h": epilogue,
    "common.h": all_kernels,
    "weight.h": weights,
}
# Of the many instantiations, those that the tests above launch.
LAUNCHED = re.compile(
    r"((projection|input_grad)_((32|64)_dense|64_transposed|splits)|projection_64_nvfp4|input_grad_64_affine_3"
    r"|projection_rows_([134]_(dense|affine_4)|normed_3_dense)|weight_grad|low_rank_product_(1x[13]|4x3)|adapter_grad_[13]"
    r"|activation(?:_grad)?)_float32"
)


def judge_some(file, first=0, count=sys.maxsize):
    """The outcomes of some of a file's mutants."""
    mx.set_default_device(mx.cpu)
    return run(KERNELS, mutants_of(file)[first : first + count], TESTS[file], LAUNCHED)


def judge_all(files, workers=2, count=10):
    """The outcomes of all mutants of some files, by file."""
    outcomes = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            (file, pool.submit(judge_some, file, first, count))
            for file in files
            for first in range(0, len(mutants_of(file)), count)
        ]
        for file, job in jobs:
            outcomes.setdefault(file, []).extend(job.result())
    return outcomes


def excuse(outcome):
    """Why a survivor is harmless, None if it is not known to be."""
    if outcome.reason == "same code":
        return "the compiler makes the same code of it"
    return next((why for text, why in HARMLESS.items() if text in outcome.mutant.name), None)


def lines_of(file, found):
    """What the page says of a file: its row, and the harmless mutants."""
    killed = [o for o in found if o.killed]
    numbers = sum(o.reason == "numbers" for o in killed)
    harmless = sum(not o.killed and excuse(o) is not None for o in found)
    counts = [len(found), len(killed), len(killed) - numbers, numbers, harmless]
    described = [f"- `{o.mutant.name}`: {excuse(o)}" for o in found if not o.killed]
    return [table_row(file, [*counts, len(found) - len(killed) - harmless]), *described]


def table_row(name, counts):
    return f"| {name} | {' | '.join(map(str, counts))} |"


def read_lines(text):
    """The same of a page, by file."""
    lines = text.splitlines()
    return {file: [a for a in lines if a.startswith((f"| {file} |", f"- `{file}:"))] for file in TESTS}


def document(lines_by_file):
    """docs/design/mutations.md."""
    rows = [row for row, *_ in lines_by_file.values()]
    counts = zip(*(map(int, row.split("|")[2:-1]) for row in rows), strict=True)
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
        *rows,
        table_row("all", map(sum, counts)),
        "",
        "The harmless ones change neither a result nor an access:",
        "",
        *(line for _, *described in lines_by_file.values() for line in described),
    ]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("files", nargs=-1, type=click.Choice(list(TESTS)), metavar="[FILE]...")
def main(files):
    outcomes = judge_all(files or TESTS)
    before = read_lines(DOCUMENT.read_text())
    text = document(before | {file: lines_of(file, found) for file, found in outcomes.items()})
    DOCUMENT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
