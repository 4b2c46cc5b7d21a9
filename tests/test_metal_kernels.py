"""The Metal kernels, launched by the library's own plans on the simulator, which checks every access."""

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
import projections
from metal_plan import NAMES, Call, backward, forward, libraries, row_major
from msl_sim import sparse

dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
packings = pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])

# On both sides of what each kernel takes: 1 to 8 rows, tiles of 32 and of 64.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129]
# On both sides of the depth of a tile's blocks (16) and of what the lanes read together (4 and 128).
DEPTHS = [1, 3, 4, 5, 15, 16, 17, 60, 61, 127, 128, 129, 260]
# Multi-head, grouped-query at every ratio up to 8, multi-query; head_dim from 32 to 256, and odd ones.
HEADS = [(2, 2, 32), (2, 1, 64), (3, 1, 80), (4, 1, 96), (4, 2, 128)]
HEADS += [(5, 1, 33), (6, 1, 7), (7, 1, 1), (8, 1, 16), (1, 1, 256)]
HEADS += [(4, 2, 20, 7), (4, 2, 16, 64), (2, 1, 40, 33)]  # values of another size
HEAD = (4, 2, 20)


def check_outputs(op, kind=Call):
    call, outputs = forward(op, kind)
    assert len(call.plan) == 1
    oracle.assert_close(outputs, op.formula, *op.exact_operands)
    call.assert_written_once()


def check_gradients(rng, op):
    """Of everything: the input's by one launch, the parameters' by another."""
    given, keys = projections.cotangents(rng, op), list(op.leaves)
    call, grads = backward(op, given, keys)
    assert len(call.plan) == 2
    oracle.assert_close(grads, op.gradient_formula(keys), given, *op.exact_operands)
    call.assert_written_once()


def qkv(rng, batch, seq, hidden, heads=HEAD, dtype=mx.float32, bias=True, packed=False, **options):
    return projections.qkv(rng, batch, seq, hidden, heads, None, dtype, bias, packed, **options)


def output(rng, batch, seq, hidden, out, dtype=mx.float32, bias=True, **options):
    return projections.output(rng, batch, seq, hidden, out, None, dtype, bias, **options)


def test_every_instantiation_is_here():
    tiles = ["projection_32", "projection_64", "input_grad_32", "input_grad_64"]
    on_weights = tiles + [f"projection_rows_{n}{rows}" for n in ("", "normed_") for rows in range(1, 5)]
    kernels = [f"{kernel}_dense" for kernel in on_weights] + [f"{kernel}_transposed" for kernel in tiles]
    kernels += ["projection_splits", "input_grad_splits", "weight_grad", "activation", "activation_grad"]
    kernels += [f"low_rank_product_{shape}" for shape in ("1x1", "1x3", "4x1", "4x3")]
    kernels += [f"adapter_grad_{columns}" for columns in (1, 3)]
    formats = ("affine", "mxfp", "nvfp")
    dense = {name for name in libraries() if not any(f"_{format}" in name for format in formats)}
    assert dense == {f"{kernel}_{dtype}" for kernel in kernels for dtype in NAMES.values()}


@dtypes
@packings
@biases
@pytest.mark.parametrize("rows", ROWS)
def test_forward_at_every_number_of_rows(rng, rows, dtype, packed, bias):
    check_outputs(qkv(rng, 1, rows, 37, HEAD, dtype, bias, packed))


@dtypes
@packings
@biases
@pytest.mark.parametrize("rows", ROWS)
def test_backward_at_every_number_of_rows(rng, rows, dtype, packed, bias):
    check_gradients(rng, qkv(rng, 1, rows, 37, HEAD, dtype, bias, packed))


@dtypes
@biases
@pytest.mark.parametrize("rows", ROWS)
def test_output_projection_at_every_number_of_rows(rng, rows, dtype, bias):
    check_outputs(output(rng, 1, rows, 37, 90, dtype, bias))


@dtypes
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_depths(rng, depth, rows, dtype):
    check_outputs(qkv(rng, 1, rows, depth, HEAD, dtype))
    check_outputs(output(rng, 1, rows, depth, 66, dtype))
    check_gradients(rng, qkv(rng, 1, rows, depth, HEAD, dtype))


@dtypes
@packings
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("rows", [2, 19, 65])
def test_heads(rng, heads, rows, dtype, packed):
    op = qkv(rng, 1, rows, 40, heads, dtype, packed=packed)
    check_outputs(op)
    check_gradients(rng, op)


@dtypes
@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (2, 3), (4, 5), (33, 1), (2, 17), (3, 33), (2, 65)])
def test_batches(rng, shape, dtype):
    check_outputs(qkv(rng, *shape, 35, HEAD, dtype, packed=True))
    check_outputs(output(rng, *shape, 35, 70, dtype))
    check_gradients(rng, qkv(rng, *shape, 35, HEAD, dtype))


@pytest.mark.parametrize("features", [1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_output_features(rng, features, rows):
    check_outputs(output(rng, 1, rows, 20, features))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_write_is_nothing_to_launch(rng, shape):
    call, outputs = forward(qkv(rng, *shape, 20))
    assert call.plan == []
    assert [y.shape for y in outputs] == [(shape[0], n, shape[1], HEAD[2]) for n in (4, 2, 2)]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_weight_gradients_of_no_rows_are_zeros(rng, shape):
    op = qkv(rng, *shape, 20)
    call, (_, *grads) = backward(op, projections.cotangents(rng, op), list(op.leaves))
    assert len(call.plan) == 1
    assert all(mx.all(g == 0).item() for g in grads)


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 20, 65])
def test_same_bits_as_the_cpu(rng, rows, dtype):
    """On small integers, whose sums are exact in any order."""
    draw = operands.integers
    for op in (output(rng, 2, rows, 33, 66, dtype, draw=draw), qkv(rng, 2, rows, 33, HEAD, dtype, draw=draw)):
        oracle.assert_equal(forward(op)[1], op())
    keys, given = list(op.leaves), projections.cotangents(rng, op, draw)
    oracle.assert_equal(backward(op, given, keys)[1], projections.gradients(op, keys, given))


@pytest.mark.parametrize("seed", range(1, 6))
def test_any_order_of_threads_gives_the_same(rng, seed):
    for rows in (5, 70):
        op = qkv(rng, 2, rows, 37)
        oracle.assert_equal(forward(op, seed=seed)[1], forward(op)[1])
        keys, given = list(op.leaves), projections.cotangents(rng, op)
        oracle.assert_equal(backward(op, given, keys, seed=seed)[1], backward(op, given, keys)[1])


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_nan_and_inf_stay_where_they_are(rng, rows, value, dtype):
    op = qkv(rng, 1, rows, 37, HEAD, dtype)
    op.x[0, rows - 1, 36] = value
    oracle.assert_close(forward(op)[1], op.formula, *op.exact_operands)
    zeros = tuple(mx.zeros_like(w) for w in op.arguments["weight"])
    for y in forward(op.replace(weight=zeros, bias=None))[1]:  # 0 times any of them is NaN
        assert mx.all(mx.isnan(y[0, :, rows - 1])).item()
        assert mx.all(y[0, :, : rows - 1] == 0).item()


# Operands that lie in memory otherwise than row by row.


class Gaps(Call):
    """Between the batches of its activations there are other rows."""

    def input(self, array):
        if array is None or array.ndim < 3:
            return super().input(array)
        batch, seq, features = array.shape
        base = mx.concatenate([array, mx.full((batch, 3, features), 9.0, array.dtype)], 1)
        return super().input(array, [(seq + 3) * features, features, 1], 0, base)


def strided_forward(call, x, weights, op, tokens=False):
    """The outputs, which lie head by head or token by token."""
    batch, seq, _ = op.x.shape
    outputs = {}
    for i, (n, dims) in enumerate(op.segments):
        strides = [seq * n * dims, dims, n * dims, 1] if tokens else None
        outputs["output", i] = call.output((batch, n, seq, dims), strides)
    call.run({("input", 0): x} | {("weight", i): w for i, w in enumerate(weights)}, outputs)
    values = tuple(map(call.value, outputs.values()))
    oracle.assert_close(values, op.formula, *op.exact_operands)


@dtypes
@pytest.mark.parametrize("out", ["heads", "tokens"])
@pytest.mark.parametrize("layout", ["sliced", "swapped", "broadcast", "reversed"])
@pytest.mark.parametrize("seq", [1, 3, 20, 70])
def test_strided_input(rng, layout, seq, out, dtype):
    batch, hidden = 2, 37
    op, call = qkv(rng, batch, seq, hidden, HEAD, dtype, bias=False), Call(dtype)
    x = op.x
    if layout == "sliced":
        base = mx.concatenate(
            [mx.full((batch, seq, 5), 9.0, dtype), x, mx.full((batch, seq, 6), 9.0, dtype)], 2
        )
        tensor = call.input(x, [seq * 48, 48, 1], 5, base)
    elif layout == "swapped":
        tensor = call.input(x, [hidden, batch * hidden, 1], 0, mx.contiguous(x.swapaxes(0, 1)))
    elif layout == "broadcast":
        x = mx.contiguous(mx.broadcast_to(x[:1], x.shape))
        tensor = call.input(x, [0, hidden, 1], 0, x[:1])
    else:
        tensor = call.input(x, [seq * hidden, -hidden, 1], (seq - 1) * hidden, mx.contiguous(x[:, ::-1]))
    weights = [call.input(w) for w in op.arguments["weight"]]
    strided_forward(call, tensor, weights, op.replace(input=x), out == "tokens")
    call.assert_written_once()


@dtypes
@pytest.mark.parametrize("batch,seq", [(2, 3), (7, 1), (3, 20), (2, 70)])
def test_batches_apart_in_the_output_projection(rng, batch, seq, dtype):
    check_outputs(output(rng, batch, seq, 37, 70, dtype), Gaps)


@dtypes
@pytest.mark.parametrize("seq", [3, 20, 70])
def test_sliced_weights_and_token_major_gradients(rng, seq, dtype):
    op, call = qkv(rng, 2, seq, 37, HEAD, dtype, bias=False), Call(dtype)
    given, keys = projections.cotangents(rng, op), list(op.leaves)
    weights, inputs = [], {("input", 0): call.input(op.x)}
    for i, (w, g) in enumerate(zip(op.arguments["weight"], given, strict=True)):
        base = mx.concatenate([w, mx.full((len(w), 11), 9.0, dtype)], 1)
        weights.append(call.input(w, [48, 1], 0, base))
        heads, dim = g.shape[1], g.shape[3]
        strides = [seq * heads * dim, dim, heads * dim, 1]
        inputs["weight", i] = weights[-1]
        inputs["cotangent", i] = call.input(g, strides, 0, mx.contiguous(g.swapaxes(1, 2)))
    strided_forward(call, inputs["input", 0], weights, op)
    outputs = {(name, i or 0): call.output(op.leaves[name, i].shape) for name, i in keys}
    call.run(inputs, outputs)
    grads = tuple(map(call.value, outputs.values()))
    oracle.assert_close(grads, op.gradient_formula(keys), given, *op.exact_operands)
    call.assert_written_once()


@pytest.mark.parametrize("wanted", [[0], [2], [0, 1], [1, 2]], ids=str)
@pytest.mark.parametrize("with_bias, alpha", [([], 0.5), ([0], 0.5), ([1], 1.0)], ids=str)
def test_only_the_weight_gradients_asked_for(rng, wanted, with_bias, alpha):
    op = qkv(rng, 2, 21, 37).replace(alpha=alpha)
    keys = [("weight", i) for i in wanted]
    keys += [("bias", i) for place, i in enumerate(wanted) if place in with_bias]
    given = projections.cotangents(rng, op)
    call, grads = backward(op, given, keys)
    assert len(call.plan) == 1
    oracle.assert_close(grads, op.gradient_formula(keys), given, *op.exact_operands)
    call.assert_written_once()


# Tiles step through a block of rows in 32 bits; the evaluation copies operands whose rows are further apart.
FAR_ROW = {2: 2**29, 40: 2**25 - 1, 70: 2**25 - 1}


def far_apart(call, parts, distance, *shape):
    """A tensor of which the parts, in a buffer, begin so far from each other."""
    data = sparse(((len(parts) - 1) * distance + parts[0].size,), np.float32)
    for i, part in enumerate(parts):
        data[i * distance : i * distance + part.size] = np.array(part).reshape(-1)
    return call.tensor(shape, data, [distance, *row_major(shape)[1:]])


@pytest.mark.parametrize("rows", FAR_ROW)
def test_offsets_past_two_to_the_31(rng, rows):
    """Batches and weight rows so far apart that 32-bit arithmetic would land elsewhere."""
    far, row, hidden = 2**31 + 64, FAR_ROW[rows], 20
    features = 2**31 // row + 3
    x, w = operands.normal(rng, (2, rows, hidden)), operands.normal(rng, (features, hidden))
    call = Call(mx.float32)
    inputs = {("input", 0): far_apart(call, x, far, *x.shape)}
    inputs["weight", 0] = far_apart(call, w, row, *w.shape)
    out = call.output((2, 1, rows, features))
    call.run(inputs, {("output", 0): out})
    oracle.assert_close(call.value(out)[:, 0], lambda x, w: np.einsum("bsi,oi->bso", x, w), x, w)


@pytest.mark.parametrize("rows", [33, 70])
def test_gradient_offsets_past_two_to_the_31(rng, rows):
    far, row, hidden, features = 2**31 + 64, 2**25 - 1, 20, 67
    x, w = operands.normal(rng, (2, rows, hidden)), operands.normal(rng, (features, hidden))
    g = operands.normal(rng, (2, rows, features))
    call = Call(mx.float32)
    inputs = {("input", 0): call.input(x), ("cotangent", 0): far_apart(call, g, far, *g.shape)}
    inputs["weight", 0] = far_apart(call, w, row, *w.shape)
    dx, dw = call.output(x.shape), far_apart(call, mx.zeros_like(w), row, *w.shape)
    call.run(inputs, {("input", 0): dx})
    oracle.assert_close(call.value(dx), lambda g, w: np.einsum("bso,oi->bsi", g, w), g, w)
    call.run(inputs, {("weight", 0): dw})
    oracle.assert_close(call.value(dw), lambda g, x: np.einsum("bso,bsi->oi", g, x), g, x)
