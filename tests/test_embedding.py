"""Rows of a table."""

import re
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_fused
import oracle
import quantized
import tiny_models
from graph import primitives
from mlx_fused import LinearOperands, fused_embedding
from operands import DTYPES, normal
from test_kinds import named
from test_threads import in_threads, same_with_any_threads

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
formats = pytest.mark.parametrize("form", quantized.FORMATS, ids=named)
INTEGERS = [mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64]
ROWS, COLS = 37, 256


def table(rng, form=("affine", 64, 4), dtype=mx.bfloat16, rows=ROWS, cols=COLS):
    mode, group_size, bits = form
    weight, scales, biases = quantized.quantize(normal(rng, (rows, cols), dtype), group_size, bits, mode)
    return LinearOperands(weight, None, scales, biases, group_size, bits, mode)


def of_mlx(x, of):
    """mlx.nn.QuantizedEmbedding's own, which takes no single row, and not none."""
    if x.size == 0:
        return mx.zeros((*x.shape, of.scales.shape[1] * of.group_size), of_mlx(mx.array([0]), of).dtype)
    if x.ndim == 0:
        return of_mlx(x[None], of)[0]
    rows = [None if a is None else a[x] for a in (of.weight, of.scales, of.biases)]
    return mx.dequantize(*rows, of.group_size, of.bits, of.mode)


def check(x, of):
    y = fused_embedding(x, of)
    assert primitives(y)["FusedEmbedding"] == 1
    assert y.shape == (*x.shape, of.scales.shape[1] * of.group_size)
    oracle.assert_equal(y, of_mlx(x, of))
    return y


@dtypes
@formats
def test_the_bits_are_mlxs(rng, form, dtype):
    of = table(rng, form, dtype)
    for shape in ((), (1,), (5,), (1, 1), (2, 3, 4), (900,), (0,), (2, 0)):
        check(mx.array(rng.integers(-ROWS, ROWS, shape)), of)
    check(mx.arange(3), table(rng, form, dtype, 3, 128))
    check(mx.zeros(7, mx.int32), table(rng, form, dtype, 1, 9 * 128))  # of more columns than are read at once


@dtypes
@formats
def test_values(rng, form, dtype):
    of, x = table(rng, form, dtype), np.arange(0, ROWS, 3)
    y = check(mx.array(x), of)
    assert y.dtype == (dtype if form[0] == "affine" else mx.bfloat16)
    expected = quantized.dequantize(of.weight, of.scales, of.biases, form[1], form[2], form[0])[x]
    unit = oracle.UNIT_ROUNDOFF[y.dtype]
    magnitude = np.abs(expected)
    if of.biases is not None:  # the product is rounded too; it is at most this
        magnitude = magnitude * 2 + np.abs(quantized.exact(of.biases)).repeat(form[1], -1)[x]
    assert np.all(np.abs(quantized.exact(y) - expected) <= unit * (1 + unit) * magnitude)


@pytest.mark.parametrize("integers", INTEGERS, ids=str)
def test_any_integers(rng, integers):
    of, x = table(rng), mx.array([[0, 3], [36, 9]], integers)
    check(x, of)
    if mx.issubdtype(integers, mx.signedinteger):
        check(-1 - x, of)


LAYOUTS = {
    "transposed": lambda x: x.T,
    "a window": lambda x: x[1:, 2:],
    "reversed": lambda x: x[::-1, ::-1],
    "every other": lambda x: x[:, ::2],
    "broadcast": lambda x: mx.broadcast_to(x[:1], x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", [("affine", 32, 4), ("mxfp4", 32, 4)], ids=named)
def test_layouts(rng, form, layout):
    """Of the places, and of the table's arrays."""
    x, of = mx.array(rng.integers(0, 6, (6, 8))), table(rng, form, cols=COLS)
    check(layout(x), of)
    if layout is LAYOUTS["transposed"]:
        arrays = [None if a is None else mx.contiguous(a.T).T for a in (of.weight, of.scales, of.biases)]
    elif layout is LAYOUTS["a window"]:
        arrays = [None if a is None else a[1:, a.shape[1] // 2 :] for a in (of.weight, of.scales, of.biases)]
    elif layout is LAYOUTS["broadcast"]:
        arrays = [None if a is None else layout(a) for a in (of.weight, of.scales, of.biases)]
    else:
        arrays = [None if a is None else a[::-2] for a in (of.weight, of.scales, of.biases)]
    weight, scales, biases = arrays
    check(x, of._replace(weight=weight, scales=scales, biases=biases))


@dtypes
@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf, 1e30, 1e-30, 6e-8, -0.0])
def test_scales_and_biases_of_any_size(rng, value, dtype):
    of = table(rng, dtype=dtype)
    for name in ("scales", "biases"):
        changed = mx.array(of._asdict()[name])
        changed[::2, 1] = value
        check(mx.arange(ROWS), of._replace(**{name: changed}))


@pytest.mark.parametrize("biases", [*DTYPES, mx.float64], ids=str)
@pytest.mark.parametrize("scales", [*DTYPES, mx.float64], ids=str)
def test_scales_and_biases_of_two_dtypes(rng, scales, biases):
    of, x = table(rng, dtype=mx.float32), mx.arange(ROWS)
    with mx.stream(mx.cpu):
        mixed = of._replace(scales=of.scales.astype(scales), biases=of.biases.astype(biases))
        expected = of_mlx(x, mixed)
        oracle.assert_equal(fused_embedding(x, mixed), expected)
        assert fused_embedding(x[:0], mixed).dtype == expected.dtype


@pytest.mark.parametrize("mode,of_scales", quantized.TABLES)
def test_every_byte(mode, of_scales):
    weight, scales, group_size, bits = quantized.every_byte(mode, of_scales)
    check(mx.arange(len(weight)), LinearOperands(weight, None, scales, None, group_size, bits, mode))


@given(
    form=st.sampled_from(quantized.FORMATS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    shape=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shapes(form, dtype, rows, groups, shape, seed):
    rng = np.random.default_rng(seed)
    of = table(rng, form, dtype, rows, groups * max(32, form[1]))
    check(mx.array(rng.integers(-rows, rows, shape)), of)


def test_a_large_table():
    """Of 2^31 elements and more, whose last row has another value."""
    rows, cols = 2**20 + 8, 2048
    codes = mx.zeros((rows, cols // 16), mx.uint32)
    codes[-1] = 0xFFFFFFFF
    scales = mx.ones((rows, cols // 128), mx.float16)
    of = LinearOperands(codes, None, scales, mx.zeros_like(scales), 128, 2)
    y = fused_embedding(mx.array([rows - 1, -1, rows - 2]), of)
    assert mx.all(y[:2] == 3) and mx.all(y[2] == 0)


def loss(embedding):
    def f(x, scales, biases, of):
        return (embedding(x, of._replace(scales=scales, biases=biases)) ** 3 * mx.arange(COLS)).sum()

    return f


def of_all_places(f):
    """Mapped, and their sum."""
    return lambda x, s, b: mx.vmap(f, (0, None, None))(x, s, b).sum()


TRANSFORMS = {
    "compile": lambda f: mx.compile(f),
    "grad": lambda f: mx.grad(f, (1, 2)),
    "compile of grad": lambda f: mx.compile(mx.grad(f, (1, 2))),
    "grad of compile": lambda f: mx.grad(mx.compile(f), (1, 2)),
    "grad of checkpoint": lambda f: (
        lambda x, s, b: mx.grad(mx.checkpoint(lambda s, b: f(x, s, b)), (0, 1))(s, b)
    ),
    "grad of grad": lambda f: mx.grad(lambda *a: sum((g**2).sum() for g in mx.grad(f, (1, 2))(*a)), (1, 2)),
    "jvp": lambda f: lambda x, s, b: mx.jvp(lambda s, b: f(x, s, b), [s, b], [b, s])[1],
    "vmap": lambda f: lambda x, s, b: mx.vmap(f, (1, None, None))(mx.stack([x, x + 1], 1), s, b),
    "vmap of all": lambda f: (
        lambda x, s, b: mx.vmap(f, (0, 1, 1))(mx.stack([x, x + 1]), mx.stack([s, b], 1), mx.stack([b, s], 1))
    ),
    "vmap of places": lambda f: lambda x, s, b: mx.vmap(f, (0, None, None))(x.flatten(), s, b),
    "nested vmap": lambda f: lambda x, s, b: mx.vmap(mx.vmap(f, (0, None, None)), (1, None, None))(x, s, b),
    "vmap of scales": lambda f: lambda x, s, b: mx.vmap(f, (None, 0, None))(x, mx.stack([s, b]), b),
    "grad of vmap": lambda f: mx.grad(of_all_places(f), (1, 2)),
    "compile of grad of vmap": lambda f: mx.compile(mx.grad(of_all_places(f), (1, 2))),
    "jvp of vmap": lambda f: (
        lambda x, s, b: mx.jvp(lambda s, b: of_all_places(f)(x, s, b), [s, b], [b, s])[1]
    ),
    "vmap of grad": lambda f: (
        lambda x, s, b: mx.vmap(mx.grad(f, (1, 2)), (0, None, None))(mx.stack([x, x + 1]), s, b)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_mlxs(rng, transform):
    of, x = table(rng, dtype=mx.float32), mx.array([[3, 0, 3], [9, -1, 20]])
    results = []
    for embedding in (fused_embedding, of_mlx):

        def f(x, scales, biases, embedding=embedding):
            return loss(embedding)(x, scales, biases, of)

        results.append(oracle.leaves(transform(f)(x, of.scales, of.biases)))
    for ours, mlxs in zip(*results, strict=True):
        size = float(mx.abs(mlxs).max())
        assert size > 0 and float(mx.abs(ours - mlxs).max()) < 2.0**-17 * size


def test_transforms_of_no_places(rng):
    of, x = table(rng, dtype=mx.float32), mx.zeros((2, 0), mx.int32)
    grads = mx.grad(lambda s: loss(fused_embedding)(x, s, of.biases, of))(of.scales)
    oracle.assert_equal(grads, mx.zeros_like(of.scales))
    assert mx.vmap(lambda x: fused_embedding(x, of))(x).shape == (2, 0, COLS)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mapped_axis_of_places_is_one_more(rng, axis):
    of, x = table(rng), mx.array(rng.integers(-ROWS, ROWS, (2, 3, 4)))
    y = mx.vmap(lambda x: fused_embedding(x, of), axis)(x)
    assert primitives(y)["FusedEmbedding"] == 1  # which knows that a row is missing
    oracle.assert_equal(y, of_mlx(mx.moveaxis(x, axis, 0), of))


def test_shapes_may_change_after_compiling(rng):
    of = table(rng)
    step = mx.compile(lambda x, *arrays: fused_embedding(x, of._replace(scales=arrays[0])), shapeless=True)
    for shape in ((2, 3), (4, 1), (1, 7)):
        x = mx.array(rng.integers(0, ROWS, shape))
        oracle.assert_equal(step(x, of.scales), of_mlx(x, of))


def test_equal_ones_merge_and_others_do_not(rng):
    of, x = table(rng, ("affine", 64, 8)), mx.arange(5)
    other = of._replace(weight=of.weight[:, ::2], bits=4)

    def rows(x):
        return fused_embedding(x, of) + fused_embedding(x, of) + fused_embedding(x, other)

    compiled = mx.compile(rows)(x)
    assert primitives(compiled)["FusedEmbedding"] == 2
    oracle.assert_equal(compiled, rows(x))


@dtypes
def test_a_table_that_is_not_quantized_is_mlxs(rng, dtype):
    weight, x = normal(rng, (ROWS, 5), dtype), mx.array([[1, -1]], mx.int8)
    for of in (weight, LinearOperands(weight)):
        oracle.assert_equal(fused_embedding(x, of), weight[x])
    oracle.assert_equal(
        mx.grad(lambda w: (fused_embedding(x, w) ** 2).sum())(weight),
        mx.grad(lambda w: (w[x] ** 2).sum())(weight),
    )


@pytest.mark.parametrize("form", quantized.FOREIGN, ids=named)
def test_a_foreign_format_is_mlxs(rng, form):
    of = table(rng, form)
    y = fused_embedding(mx.arange(4), of)
    assert primitives(y)["FusedEmbedding"] == 0
    oracle.assert_equal(y, of_mlx(mx.arange(4), of))


NO_ROW = """
import mlx.core as mx, numpy as np
from mlx_fused import LinearOperands, fused_embedding

codes, scales, biases = mx.quantize(mx.ones((40, 64)))
for place in (-41, 40, 2**40, 2**64 - 1):
    for count in (1, 1000):
        places = np.zeros(count, np.int64 if place < 2**63 else np.uint64)
        places[-1] = place
        x = mx.array(places)
        try:
            mx.eval(fused_embedding(x, LinearOperands(codes, scales=scales, biases=biases)))
        except RuntimeError as error:
            print(error)
print(fused_embedding(mx.array([39]), LinearOperands(codes, scales=scales, biases=biases)).shape)
"""


def test_a_row_that_the_table_does_not_have():
    run = subprocess.run([sys.executable, "-c", NO_ROW], capture_output=True, text=True, check=True)
    *errors, goes_on = run.stdout.splitlines()
    assert goes_on == "(1, 64)"
    places = (place for place in (-41, 40, 2**40, 2**63 - 1) for _ in range(2))  # of larger ones the largest
    for error, place in zip(errors, places, strict=True):
        assert re.search(rf"\[fused_embedding\] x must be from -40 to 39 but got {place}\.", error)


def test_any_number_of_threads_gives_the_same_bits():
    code = """
import hashlib, mlx.core as mx, numpy as np, mlx_fused
w = mx.array(np.random.default_rng(0).standard_normal((900, 320)), dtype=mx.float32)
w, s, b = mx.quantize(w)
y = mlx_fused.fused_embedding(mx.arange(3000) % 900, mlx_fused.LinearOperands(w, scales=s, biases=b))
print(hashlib.sha256(np.array(y).tobytes()).hexdigest())
"""
    assert same_with_any_threads(code).count("\n") == 1


def test_in_threads():
    def work(rng):
        for form in (("affine", 32, 4), ("mxfp8", 32, 8)):
            check(mx.array(rng.integers(0, ROWS, 300)), table(rng, form))

    in_threads(work)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_patched_models(tied, exact):
    model = tiny_models.make("llama", mx.bfloat16, tie_word_embeddings=tied)
    nn.quantize(model, 32, 4)
    x = tiny_models.tokens(2, 3)
    expected = model.model.embed_tokens(x)
    report = mlx_fused.patch(model, exact=exact)
    assert primitives(model(x))["FusedEmbedding"] == 1
    assert [str(m.linear.calls) for m in report.modules if m.linear] == (["2/0"] if tied else ["1/0", "1/0"])
    # By itself it is MLX's, and the same.
    assert primitives(model.model.embed_tokens(x))["FusedEmbedding"] == 0
    seen = []
    model.model.layers[0] = seen_by(seen, model.model.layers[0])
    model(x)
    oracle.assert_equal(seen[0], expected)
    mlx_fused.unpatch(model)
    assert primitives(model(x))["FusedEmbedding"] == 0


def seen_by(seen, layer):
    class Seen(nn.Module):
        use_sliding = False

        def __call__(self, x, *args, **kwargs):
            seen.append(x)
            return layer(x, *args, **kwargs)

    return Seen()


def test_what_a_patched_model_cannot_take_is_mlxs():
    model = tiny_models.make("llama", tie_word_embeddings=False)
    nn.quantize(model, 32, 4)
    model.model.embed_tokens.scales = model.model.embed_tokens.scales.astype(mx.float64)
    report = mlx_fused.patch(model, linear=False)
    assert primitives(model(tiny_models.tokens(1, 2)))["FusedEmbedding"] == 0
    (part,) = [module.linear for module in report.modules if module.name == "model"]
    assert str(part.calls) == "0/1" and part.calls.reason == "linear=False"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": mx.array([1.0])}, ValueError, "x must be integers but got float32"),
        ({"x": mx.array([True])}, ValueError, "x must be integers but got bool"),
        ({"x": 1}, TypeError, "x must be array but got int"),
        ({"weight": mx.ones(3)}, ValueError, r"weight must have 2 dimensions but got 1 with shape \(3,\)"),
        (
            {"weight": mx.ones((3, 4), mx.int32)},
            ValueError,
            "weight must be float32, float16 or bfloat16 but",
        ),
        ({"weight": None}, TypeError, "weight must be an array or LinearOperands but got NoneType"),
        ({"bias": mx.ones(40)}, ValueError, "weight must have neither a bias nor an adapter but got a bias"),
        ({"lora_a": mx.ones((64, 2))}, ValueError, "weight must have neither .* but got an adapter"),
        ({"scales": mx.ones((40, 2))}, ValueError, r"weight must have shape \(40, 16\) but got \(40, 8\)"),
        ({"scales": mx.ones((39, 1))}, ValueError, r"scales must have shape \(40, 1\) but got \(39, 1\)"),
        ({"biases": None}, ValueError, "biases must be given for mode 'affine' but got None"),
        ({"biases": mx.ones((40, 1), mx.int32)}, ValueError, "biases must be float32, float16 or bfloat16"),
        ({"bits": 8}, ValueError, r"weight must have shape \(40, 16\) but got \(40, 8\)"),
        ({"bits": "4"}, TypeError, "bits must be int but got str"),
        ({"stream": "cpu"}, TypeError, "stream must be Stream or Device or DeviceType but got str"),
    ],
)
def test_errors(changes, error, message):
    codes, scales, biases = mx.quantize(mx.ones((40, 64)))
    of = LinearOperands(codes, scales=scales, biases=biases)
    named = {name: changes[name] for name in changes if name in ("x", "weight", "stream")}
    of = of._replace(**{name: changes[name] for name in changes if name not in named})
    with pytest.raises(error, match=rf"\[fused_embedding\] {message}"):
        fused_embedding(**{"x": mx.array([1]), "weight": of} | named)
