"""The Metal kernels, launched by the library's own plans on the simulator, which checks every access."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands
import oracle
from metal_plan import NAMES, Call, libraries, output_projection, qkv_projection, qkv_projection_bwd
from mlx_fused._ext import _internals
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


def check_forward(rng, batch, seq, hidden, heads, dtype, bias, packed):
    args = operands.qkv(rng, batch, seq, hidden, heads, dtype, bias, packed)
    call, outputs = qkv_projection(*args, *heads)
    assert len(call.plan) == 1
    oracle.assert_close(outputs, oracle.fused_qkv_projection, *args, *heads)
    call.assert_written_once()


def check_output(rng, batch, seq, hidden, out, dtype, bias):
    args = operands.output(rng, batch, seq, hidden, out, dtype, bias)
    call, output = output_projection(*args)
    assert len(call.plan) == 1
    oracle.assert_close(output, oracle.fused_output_projection_residual, *args)
    call.assert_written_once()


def check_backward(rng, batch, seq, hidden, heads, dtype, bias, packed):
    x, weight, _ = operands.qkv(rng, batch, seq, hidden, heads, dtype, bias, packed)
    args = (*operands.qkv_cotangents(rng, batch, seq, heads, dtype), x, weight, bias, *heads)
    call, grads = qkv_projection_bwd(*args)
    assert len(call.plan) == 2
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args)
    call.assert_written_once()


def test_every_instantiation_is_here():
    types = NAMES.values()
    tiles = ["projection_32", "projection_64", "qkv_input_grad_32", "qkv_input_grad_64", "qkv_weight_grad"]
    rows = [f"projection_rows_{slots}" for slots in (1, 2, 4, 8)]
    low_rank = ["low_rank_product", "adapter_grad"]
    kernels = tiles + rows + low_rank
    dense = {name for name in libraries() if not name.startswith("quantized")}
    assert dense == {f"{kernel}_{dtype}" for kernel in kernels for dtype in types}


@dtypes
@packings
@biases
@pytest.mark.parametrize("rows", ROWS)
def test_forward_at_every_number_of_rows(rng, rows, dtype, packed, bias):
    check_forward(rng, 1, rows, 37, HEAD, dtype, bias, packed)


@dtypes
@packings
@biases
@pytest.mark.parametrize("rows", ROWS)
def test_backward_at_every_number_of_rows(rng, rows, dtype, packed, bias):
    check_backward(rng, 1, rows, 37, HEAD, dtype, bias, packed)


@dtypes
@biases
@pytest.mark.parametrize("rows", ROWS)
def test_output_projection_at_every_number_of_rows(rng, rows, dtype, bias):
    check_output(rng, 1, rows, 37, 90, dtype, bias)


@dtypes
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_depths(rng, depth, rows, dtype):
    check_forward(rng, 1, rows, depth, HEAD, dtype, True, False)
    check_output(rng, 1, rows, depth, 66, dtype, True)
    check_backward(rng, 1, rows, depth, HEAD, dtype, True, False)


@dtypes
@packings
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("rows", [2, 19, 65])
def test_heads(rng, heads, rows, dtype, packed):
    check_forward(rng, 1, rows, 40, heads, dtype, True, packed)
    check_backward(rng, 1, rows, 40, heads, dtype, True, packed)


@dtypes
@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (2, 3), (4, 5), (33, 1), (2, 17), (3, 33), (2, 65)])
def test_batches(rng, shape, dtype):
    check_forward(rng, *shape, 35, HEAD, dtype, True, True)
    check_output(rng, *shape, 35, 70, dtype, True)
    check_backward(rng, *shape, 35, HEAD, dtype, True, False)


@pytest.mark.parametrize("features", [1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_output_features(rng, features, rows):
    check_output(rng, 1, rows, 20, features, mx.float32, True)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_write_is_nothing_to_launch(rng, shape):
    x, weight, bias = operands.qkv(rng, *shape, 20, HEAD)
    call, outputs = qkv_projection(x, weight, bias, *HEAD)
    assert call.plan == []
    assert [y.shape for y in outputs] == [(shape[0], n, shape[1], HEAD[2]) for n in (4, 2, 2)]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_weight_gradients_of_no_rows_are_zeros(rng, shape):
    x, weight, _ = operands.qkv(rng, *shape, 20, HEAD)
    call, (_, d_weight, d_bias) = qkv_projection_bwd(
        *operands.qkv_cotangents(rng, *shape, HEAD), x, weight, True, *HEAD
    )
    assert len(call.plan) == 1
    assert all(mx.all(g == 0).item() for g in d_weight + d_bias)


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 20, 65])
def test_same_bits_as_the_cpu(rng, rows, dtype):
    """On small integers, whose sums are exact in any order."""
    x, weight, bias = operands.qkv(rng, 2, rows, 33, HEAD, dtype, draw=operands.integers)
    expected = mlx_fused.fused_qkv_projection(x, weight, bias, *HEAD)
    oracle.assert_equal(qkv_projection(x, weight, bias, *HEAD)[1], expected)
    args = (
        *operands.qkv_cotangents(rng, 2, rows, HEAD, dtype, draw=operands.integers),
        x,
        weight,
        True,
        *HEAD,
    )
    oracle.assert_equal(qkv_projection_bwd(*args)[1], mlx_fused.fused_qkv_projection_bwd(*args))
    args = operands.output(rng, 2, rows, 33, 66, dtype, draw=operands.integers)
    oracle.assert_equal(output_projection(*args)[1], mlx_fused.fused_output_projection_residual(*args))


@pytest.mark.parametrize("seed", range(1, 6))
def test_any_order_of_threads_gives_the_same(rng, seed):
    for rows in (5, 70):
        x, weight, bias = operands.qkv(rng, 2, rows, 37, HEAD)
        in_order = qkv_projection(x, weight, bias, *HEAD)[1]
        oracle.assert_equal(qkv_projection(x, weight, bias, *HEAD, seed=seed)[1], in_order)
        args = (*operands.qkv_cotangents(rng, 2, rows, HEAD), x, weight, True, *HEAD)
        in_order = qkv_projection_bwd(*args)[1]
        oracle.assert_equal(qkv_projection_bwd(*args, seed=seed)[1], in_order)


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_nan_and_inf_stay_where_they_are(rng, rows, value, dtype):
    x, weight, bias = operands.qkv(rng, 1, rows, 37, HEAD, dtype)
    x[0, rows - 1, 36] = value
    outputs = qkv_projection(x, weight, bias, *HEAD)[1]
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *HEAD)
    weight = tuple(mx.zeros_like(w) for w in weight)
    for y in qkv_projection(x, weight, None, *HEAD)[1]:  # 0 times any of them is NaN
        assert mx.all(mx.isnan(y[0, :, rows - 1])).item()
        assert mx.all(y[0, :, : rows - 1] == 0).item()


# Operands that lie in memory otherwise than row by row.


def strided_forward(call, x_tensor, weights, batch, seq, heads, out_strides=None):
    num_heads, num_kv_heads, head_dim = heads
    outputs = []
    for n in (num_heads, num_kv_heads, num_kv_heads):
        shape = (batch, n, seq, head_dim)
        token_major = [seq * n * head_dim, head_dim, n * head_dim, 1]
        outputs.append(call.output(shape, token_major if out_strides == "tokens" else None))
    segments = [(w, None, out) for w, out in zip(weights, outputs, strict=True)]
    call.run(_internals.plan_projection(NAMES[call.dtype], x_tensor, segments))
    return tuple(call.value(out) for out in outputs)


@dtypes
@pytest.mark.parametrize("out", ["heads", "tokens"])
@pytest.mark.parametrize("layout", ["sliced", "swapped", "broadcast", "reversed"])
@pytest.mark.parametrize("seq", [1, 3, 20, 70])
def test_strided_input(rng, layout, seq, out, dtype):
    batch, hidden = 2, 37
    x, weight, _ = operands.qkv(rng, batch, seq, hidden, HEAD, dtype)
    call = Call(dtype)
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
    weights = [call.input(w) for w in weight]
    outputs = strided_forward(call, tensor, weights, batch, seq, HEAD, out)
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, None, *HEAD)
    call.assert_written_once()


@dtypes
@pytest.mark.parametrize("batch,seq", [(2, 3), (7, 1), (3, 20), (2, 70)])
def test_batches_apart_in_the_output_projection(rng, batch, seq, dtype):
    args = operands.output(rng, batch, seq, 37, 70, dtype)
    call, output = output_projection(*args, gap=3)
    oracle.assert_close(output, oracle.fused_output_projection_residual, *args)
    call.assert_written_once()


@dtypes
@pytest.mark.parametrize("seq", [3, 20, 70])
def test_sliced_weights_and_token_major_gradients(rng, seq, dtype):
    batch, hidden = 2, 37
    x, weight, _ = operands.qkv(rng, batch, seq, hidden, HEAD, dtype)
    grads = operands.qkv_cotangents(rng, batch, seq, HEAD, dtype)
    call = Call(dtype)
    weights, tensors = [], []
    for w, g in zip(weight, grads, strict=True):
        base = mx.concatenate([w, mx.full((len(w), 11), 9.0, dtype)], 1)
        weights.append(call.input(w, [48, 1], 0, base))
        heads, dim = g.shape[1], g.shape[3]
        strides = [seq * heads * dim, dim, heads * dim, 1]
        tensors.append(call.input(g, strides, 0, mx.contiguous(g.swapaxes(1, 2))))
    outputs = strided_forward(call, call.input(x), weights, batch, seq, HEAD)
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, None, *HEAD)
    dx = call.output(x.shape)
    call.run(_internals.plan_gradients(NAMES[dtype], list(zip(tensors, weights, strict=True)), dx))
    dw = [call.output(w.shape) for w in weight]
    segments = [(g, w, None) for g, w in zip(tensors, dw, strict=True)]
    call.run(_internals.plan_weight_grad(NAMES[dtype], call.input(x), segments))
    actual = (call.value(dx), tuple(map(call.value, dw)), None)
    oracle.assert_close(actual, oracle.fused_qkv_projection_bwd, *grads, x, weight, False, *HEAD)
    call.assert_written_once()


@pytest.mark.parametrize("wanted", [[0], [2], [0, 1], [1, 2]], ids=str)
@pytest.mark.parametrize("with_bias, alpha", [([], 0.5), ([0], 0.5), ([1], 1.0)], ids=str)
def test_only_the_weight_gradients_asked_for(rng, wanted, with_bias, alpha):
    x, _, _ = operands.qkv(rng, 2, 21, 37, HEAD)
    grads = operands.qkv_cotangents(rng, 2, 21, HEAD)
    call = Call(mx.float32)
    segments = []
    for place, i in enumerate(wanted):
        features = grads[i].shape[1] * HEAD[2]
        bias = call.output((features,)) if place in with_bias else None
        segments.append((call.input(grads[i]), call.output((features, 37)), bias))
    call.run(_internals.plan_weight_grad("float32", call.input(x), segments, alpha))
    for i, (_, dw, db) in zip(wanted, segments, strict=True):
        # Half of a sum is exact.
        formula = lambda g, x: np.einsum("bhsd,bsi->hdi", g, x).reshape(-1, x.shape[2])  # noqa: E731
        oracle.assert_close(call.value(dw) / alpha, formula, grads[i], x)
        if db:
            oracle.assert_close(call.value(db) / alpha, lambda g: g.sum((0, 2)).reshape(-1), grads[i])
    call.assert_written_once()


# Tiles step through a block of rows in 32 bits; the evaluation copies operands whose rows are further apart.
FAR_ROW = {2: 2**29, 40: 2**25 - 1, 70: 2**25 - 1}


@pytest.mark.parametrize("rows", FAR_ROW)
def test_offsets_past_two_to_the_31(rng, rows):
    """Batches and weight rows so far apart that 32-bit arithmetic would land elsewhere."""
    far, row, hidden = 2**31 + 64, FAR_ROW[rows], 20
    features = 2**31 // row + 3
    x, w = operands.normal(rng, (2, rows, hidden)), operands.normal(rng, (features, hidden))
    call = Call(mx.float32)
    call.buffers["a0"] = sparse((far + rows * hidden,), np.float32)
    for b in range(2):
        call.buffers["a0"][b * far : b * far + rows * hidden] = np.array(x[b]).reshape(-1)
    call.buffers["a1"] = sparse(((features - 1) * row + hidden,), np.float32)
    for n in range(features):
        call.buffers["a1"][n * row : n * row + hidden] = np.array(w[n])
    out = call.output((2, 1, rows, features))
    segment = ((1, list(w.shape), [row, 1], 0), None, out)
    call.run(_internals.plan_projection("float32", (0, list(x.shape), [far, hidden, 1], 0), [segment]))
    oracle.assert_close(call.value(out)[:, 0], lambda x, w: np.einsum("bsi,oi->bso", x, w), x, w)


@pytest.mark.parametrize("rows", [33, 70])
def test_gradient_offsets_past_two_to_the_31(rng, rows):
    far, row, hidden, features = 2**31 + 64, 2**25 - 1, 20, 67
    x, w = operands.normal(rng, (2, rows, hidden)), operands.normal(rng, (features, hidden))
    g = operands.normal(rng, (2, 1, rows, features))
    call = Call(mx.float32)
    call.buffers["a0"] = sparse((far + rows * features,), np.float32)
    for b in range(2):
        call.buffers["a0"][b * far : b * far + rows * features] = np.array(g[b, 0]).reshape(-1)
    grad = (0, list(g.shape), [far, rows * features, features, 1], 0)
    call.buffers["a1"] = sparse(((features - 1) * row + hidden,), np.float32)
    for n in range(features):
        call.buffers["a1"][n * row : n * row + hidden] = np.array(w[n])
    dx = call.output(x.shape)
    call.run(_internals.plan_gradients("float32", [(grad, (1, list(w.shape), [row, 1], 0))], dx))
    oracle.assert_close(call.value(dx), lambda g, w: np.einsum("bhso,oi->bsi", g, w), g, w)
    call.buffers["a3"] = sparse(((features - 1) * row + hidden,), np.float32)
    dw = (3, list(w.shape), [row, 1], 0)
    call.run(_internals.plan_weight_grad("float32", call.input(x), [(grad, dw, None)]))
    far_rows = np.stack([call.buffers["a3"][n * row : n * row + hidden] for n in range(features)])
    oracle.assert_close(mx.array(far_rows), lambda g, x: np.einsum("bhso,bsi->oi", g, x), g, x)
