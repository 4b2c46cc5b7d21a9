"""Activations and gated projections on the Metal kernels, by the library's own plans on the simulator."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands
import oracle
import projections
from metal_plan import Call, Embedded, InTiles, Transposed, activation, backward, forward
from oracle import Activation

dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
FORMS = {
    "dense": None,
    "affine_4": ("affine", 64, 4),
    "affine_3": ("affine", 32, 3),
    "nvfp4": ("nvfp4", 16, 4),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
KINDS = projections.ACTIVATIONS
# 1 to 8 rows have kernels of their own; tiles of 32 and of 64.
ROWS = [1, 2, 3, 4, 5, 8, 9, 31, 33, 65]


def as_decoded(op, plan):
    exact = not op.quantization or op.x.dtype == mx.float32 or "projection_rows" in plan[-1]["kernel"]
    return op if exact else InTiles(op.operation, op.arguments)


def check(op, launches=1, kind=Call, cores=0):
    """The result alone, and the same with what the activation is of."""
    done, outputs = forward(op, kind, cores=cores)
    assert len(done.plan) == launches
    done.assert_written_once()
    decoded = as_decoded(op, done.plan)
    projections.check_outputs(decoded, outputs)
    done, kept = forward(op, kind, keeps=True, cores=cores)
    done.assert_written_once()
    oracle.assert_equal(kept[:1], outputs)
    pre, errors = decoded.pre(op.x.dtype, 1)
    for y, expected, error in zip(kept[1:], pre, errors, strict=True):
        assert np.all(np.abs(oracle.exact(y) - expected) <= error)


@dtypes
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("rows", [3, 20])
def test_gated_with_every_activation(rng, rows, activation, dtype):
    check(projections.gated(rng, 1, rows, 37, 70, dtype=dtype, activation=activation))


@dtypes
@pytest.mark.parametrize("activation", KINDS[:-1])
@pytest.mark.parametrize("rows", [3, 20])
def test_linear_with_every_activation(rng, rows, activation, dtype):
    check(projections.linear(rng, 1, rows, 37, 70, dtype=dtype, activation=activation))


@dtypes
@forms
@pytest.mark.parametrize("rows", ROWS)
def test_gated_at_every_number_of_rows(rng, rows, form, dtype):
    for bias in (False, True):
        check(projections.gated(rng, 1, rows, 64, 90, form, dtype, bias))


@pytest.mark.parametrize("features", [4, 5, 6, 7, 8, 31, 32, 33, 63, 64, 65, 97])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_features(rng, features, rows):
    check(projections.gated(rng, 1, rows, 20, features))
    check(projections.linear(rng, 1, rows, 20, features, activation="gelu"))


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 40])
def test_few_features(rng, features, rows):
    """Fewer than a simdgroup of the kernels for few rows takes."""
    check(projections.gated(rng, 1, rows, 20, features))


@dtypes
@pytest.mark.parametrize("packing", ["gate_up"])
@pytest.mark.parametrize("rows", [3, 20])
def test_packed(rng, rows, packing, dtype):
    check(projections.gated(rng, 1, rows, 64, 70, FORMS["affine_4"], dtype, packing=packing))


@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (2, 17), (2, 65)])
@pytest.mark.parametrize("kind", [Call, Embedded])
def test_batches(rng, shape, kind):
    check(projections.gated(rng, *shape, 64, 70, FORMS["affine_4"], mx.bfloat16), kind=kind)
    check(projections.linear(rng, *shape, 35, 70, activation="silu"), kind=kind)


@dtypes
@pytest.mark.parametrize("ranks", [(8, 3), (None, 4), (9, None)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 20, 70])
def test_adapters(rng, rows, ranks, dtype):
    form = FORMS["affine_4"] if dtype == mx.bfloat16 else None
    check(projections.gated(rng, 1, rows, 64, 70, form, dtype, ranks=ranks, scale=(2.0, -0.5)), 2)
    check(projections.linear(rng, 1, rows, 64, 70, form, dtype, rank=4, activation="relu2"), 2)


@dtypes
@forms
@pytest.mark.parametrize("ranks", [None, (8, 3)], ids=str)
def test_tiles_split_their_depth(rng, ranks, form, dtype):
    op = projections.gated(rng, 1, 20, 448, 70, form, dtype, ranks=ranks, scale=(2.0, -0.5))
    check(op, 3 if ranks else 2, cores=40)


@pytest.mark.parametrize("rows", [3, 20, 70])
@pytest.mark.parametrize("features", [33, 64, 97])
def test_weights_column_by_column(rng, rows, features):
    op = projections.gated(rng, 1, rows, 37, features)
    check(op, kind=lambda dtype: Transposed(op, dtype))


@dtypes
@forms
@pytest.mark.parametrize("rows", [3, 20])
def test_exact_rounds_where_it_should(rng, rows, form, dtype):
    """Every sum of small integers is exact."""
    for name in KINDS:
        op = projections.gated(rng, 2, rows, 64, 70, form, dtype, activation=name, draw=operands.integers)
        _, (y,) = forward(op.replace(exact=True))
        least, largest = op.rounded_activation(dtype)
        assert np.all((least <= oracle.exact(y)) & (oracle.exact(y) <= largest))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [3, 20])
def test_nan_and_inf_stay_in_their_row(rng, rows, value):
    op = projections.gated(rng, 1, rows, 37, 70)
    op.x[0, rows - 1, 36] = value
    (y,) = forward(op)[1]
    (composed,) = op(route="composed")
    oracle.assert_equal([mx.isnan(y)], [mx.isnan(composed)])
    oracle.assert_equal([mx.isinf(y)], [mx.isinf(composed)])


@pytest.mark.parametrize("seed", range(1, 4))
def test_any_order_of_threads_gives_the_same(rng, seed):
    for rows in (5, 70):
        op = projections.gated(rng, 2, rows, 64, 70, FORMS["affine_4"])
        oracle.assert_equal(forward(op, seed=seed)[1], forward(op)[1])


@dtypes
@pytest.mark.parametrize("rows", [3, 20])
def test_gradients_of_two_layers(rng, rows, dtype):
    op = projections.gated(rng, 1, rows, 64, 70, None, dtype, ranks=(4, None)).replace(activation=None)
    given = tuple(operands.normal(rng, (1, rows, 70), dtype) for _ in range(2))
    keys = [key for key in op.leaves if key[0] in ("x", "weight", "lora_a", "lora_b")]
    _, grads = backward(op, given, keys)
    formula, terms = op.linear_gradients(keys), op.gradient_terms
    oracle.assert_close(grads, formula, tuple(map(oracle.exact, given)), *op.exact_operands, terms=terms)


# By themselves.


def run(name, dtype, pre, cotangent=None, gated=False, strides=None, alpha=1.0, limit=np.inf):
    return activation((name, gated, alpha, limit), dtype, pre, cotangent, strides)


def clipped(name):
    return {"alpha": 1.702, "limit": 7.0} if name == "clipped_swiglu" else {}


def points(rng, shape, dtype):
    """Around 0, far from it, and where activations bend."""
    values = np.concatenate([rng.normal(0, 2, 400), rng.normal(0, 40, 80), [0.0, -0.0, 7, -7, 1e4, -1e4]])
    # In between a gelu's factor is no normal float, and 0 on a GPU.
    values = values[(np.abs(values) < 9) | (np.abs(values) > 14)]
    return mx.array(rng.choice(values, shape).astype(np.float32)).astype(dtype)


@dtypes
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 700), (1, 2, 512), (1, 1, 513)], ids=str)
def test_by_itself(rng, shape, gated, name, dtype):
    if name == "clipped_swiglu" and not gated:
        return
    pre = [points(rng, shape, dtype) for _ in range(1 + gated)]
    of, exact = Activation(name, gated), [oracle.exact(a) for a in pre]
    none = [0 * a for a in exact]
    (y,) = run(name, dtype, pre, gated=gated, **clipped(name))
    with np.errstate(over="ignore"):
        oracle.assert_rounded(y, of(exact), of.errors(exact, none))
    g = operands.normal(rng, shape, dtype)
    grads = run(name, dtype, pre, g, gated, **clipped(name))
    expected = of.gradients(oracle.exact(g), exact)
    errors = of.gradient_errors(oracle.exact(g), exact, none)
    for grad, e, error in zip(grads, expected, errors, strict=True):
        oracle.assert_rounded(grad, e, error)


@dtypes
@pytest.mark.parametrize("name", KINDS)
def test_by_itself_from_minus_100_to_100(name, dtype):
    x = mx.array(np.linspace(-100, 100, 5001)).astype(dtype)[None, None]
    pre = [x, mx.ones_like(x)]
    of, exact, ones, none = Activation(name, True), [oracle.exact(a) for a in pre], np.ones(x.shape), (0, 0)
    (y,) = run(name, dtype, pre, gated=True, **clipped(name))
    oracle.assert_rounded(y, of(exact), of.errors(exact, none))
    d_x, _ = run(name, dtype, pre, mx.ones_like(x), True, **clipped(name))
    oracle.assert_rounded(d_x, of.gradients(ones, exact)[0], of.gradient_errors(ones, exact, none)[0])


@pytest.mark.parametrize("name", KINDS)
def test_by_itself_at_nan_and_inf(name):
    """As MLX's own operations have it."""
    values = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0], np.float32)
    gate, up = (mx.array(a.reshape(1, -1)) for a in np.meshgrid(values, values))
    (y,) = run(name, mx.float32, [gate[None], up[None]], gated=True, **clipped(name))
    weights, biases = (mx.zeros((gate.size, 1)),) * 2, (gate[0], up[0])
    expected = mlx_fused.fused_gated_projection(
        mx.zeros((1, 1, 1)), weights, biases, activation=name, route="composed"
    )
    for of in (mx.isnan, mx.isposinf, mx.isneginf):
        oracle.assert_equal([of(y)], [of(expected)])


def check_slopes_far_out(name, **options):
    """Where x or up is infinite, or what the factor is of."""
    x, up = mx.array([[[np.inf, -np.inf, 1e30, -1e30, 1.0]]]), mx.array([[[1, 1, 1, 1, np.inf]]])
    far = {"relu2": [np.inf, 0, 2e30, 0], "clipped_swiglu": [0] * 4}.get(name, [1, 0, 1, 0])
    about = (name, True, *((1.702, 7.0) if name == "clipped_swiglu" else (1.0, np.inf)))
    d_x, d_up = activation(about, mx.float32, [x, up], mx.ones_like(x), **options)
    np.testing.assert_array_equal(d_x[0, 0, :4], np.float32(far))
    assert (d_up[0, 0, 4].item() == 0) == (name == "clipped_swiglu")


@pytest.mark.parametrize("name", KINDS)
def test_slopes_far_out(name):
    check_slopes_far_out(name)


@pytest.mark.parametrize("layout", ["sliced", "broadcast", "swapped"])
def test_strided_rows(rng, layout):
    shape = (2, 3, 40)
    pre = [operands.normal(rng, shape) for _ in range(2)]
    if layout == "sliced":
        strides = ([150, 50, 1], lambda a: mx.pad(a, [(0, 0), (0, 0), (0, 10)]))
    elif layout == "broadcast":
        pre = [mx.broadcast_to(a[:1, :1], shape) for a in pre]
        strides = ([0, 0, 1], lambda a: mx.contiguous(a[:1, :1]))
    else:
        strides = ([40, 80, 1], lambda a: mx.contiguous(a.swapaxes(0, 1)))
    of, exact = Activation("silu", True), [oracle.exact(a) for a in pre]
    (y,) = run("silu", mx.float32, pre, gated=True, strides=strides)
    oracle.assert_rounded(y, of(exact), of.errors(exact, [0 * a for a in exact]))
    g = operands.normal(rng, shape)
    grads = run("silu", mx.float32, pre, g, True, strides)
    expected = of.gradients(oracle.exact(g), exact)
    errors = of.gradient_errors(oracle.exact(g), exact, [0 * a for a in exact])
    for grad, e, error in zip(grads, expected, errors, strict=True):
        oracle.assert_rounded(grad, e, error)


def test_nothing_is_nothing_to_launch():
    assert run("silu", mx.float32, [mx.zeros((2, 0, 4))])[0].size == 0
