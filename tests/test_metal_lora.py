"""Adapters on the Metal kernels, by the library's own plans on the simulator, which checks every access."""

import mlx.core as mx
import numpy as np
import pytest

import operands
import oracle
import projections
from metal_plan import Call, Embedded, backward, forward, row_major, to_numpy
from msl_sim import sparse

dtypes = pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
packings = pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])

HEAD = (4, 2, 20)
RANKS = (8, None, 3)
SCALES = (2.0, -0.5, 3.0)
# On both sides of what each kernel takes, and of the blocks of 8 rows of the low-rank product.
ROWS = [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]
MANY_ROWS = 1024  # from which the low-rank product's tiles are of 4 blocks of 8 rows
DEPTHS = [1, 7, 8, 9, 60, 61, 127, 128, 129, 260]  # 128 is a block of 8 for each of 16 simdgroups
# Blocks of 8 columns, tiles of 1 or 3 blocks; adapters on any of q, k and v.
ALL_RANKS = [1, 3, 8, 9, 16, 24, 25, 33, 64]
SUBSETS = [(4, None, None), (None, 9, None), (None, None, 16), (8, 8, 8), (33, 1, None), (None, 64, 3)]


def trainable(op):
    if op.packed:  # its adapter's gradients are made of those of the segments, by MLX
        return [("input", None)]
    return [key for key in op.leaves if key[0] in ("input", "x", "lora_a", "lora_b")]


def check_forward(op, **options):
    call, outputs = forward(op, **options)
    assert len(call.plan) == 2  # the low-rank products of all segments, and the projection
    oracle.assert_close(outputs, op.formula, *op.exact_operands, terms=op.forward_terms)
    call.assert_written_once()


def check_backward(rng, op, keys=None, launches=5, **options):
    keys = trainable(op) if keys is None else keys
    given = projections.cotangents(rng, op)
    call, grads = backward(op, given, keys, **options)
    assert len(call.plan) == (2 if keys == [("input", None)] else launches)
    formula, terms = op.gradient_formula(keys), op.gradient_terms
    oracle.assert_close(grads, formula, given, *op.exact_operands, terms=terms)
    call.assert_written_once()


def check(rng, op, **options):
    check_forward(op, **options)
    check_backward(rng, op, **options)


def qkv(rng, batch, seq, hidden, ranks=RANKS, heads=HEAD, scale=SCALES, **options):
    return projections.qkv(rng, batch, seq, hidden, heads, ranks=ranks, scale=scale, **options)


@dtypes
@packings
@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows(rng, rows, dtype, packed):
    check(rng, qkv(rng, 1, rows, 37, dtype=dtype, packed=packed, bias=packed))


@dtypes
@pytest.mark.parametrize("rows", ROWS)
def test_output_projection_at_every_number_of_rows(rng, rows, dtype):
    check(rng, projections.output(rng, 1, rows, 37, 90, dtype=dtype, rank=8, alpha=0.75))
    check(rng, projections.output(rng, 1, rows, 37, 66, dtype=dtype, rank=9, bias=False))


@dtypes
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rows", [3, 20])
def test_depths(rng, depth, rows, dtype):
    check(rng, qkv(rng, 1, rows, depth, dtype=dtype))


@dtypes
@pytest.mark.parametrize("ranks", SUBSETS, ids=str)
@pytest.mark.parametrize("rows", [2, 19])
def test_any_of_q_k_and_v(rng, ranks, rows, dtype):
    check(rng, qkv(rng, 1, rows, 40, ranks, dtype=dtype))


@pytest.mark.parametrize("rank", ALL_RANKS)
@pytest.mark.parametrize("rows", [1, 6, 35])
def test_ranks(rng, rank, rows):
    check(rng, qkv(rng, 1, rows, 33, (rank, rank, rank), dtype=mx.bfloat16))
    check(rng, projections.output(rng, 1, rows, 33, 50, rank=rank, dtype=mx.float16))


@pytest.mark.parametrize(
    "heads",
    [(2, 1, 64), (3, 1, 80), (5, 1, 33), (6, 1, 7), (7, 1, 1), (4, 2, 20, 7), (2, 1, 40, 64)],
    ids=str,
)
@pytest.mark.parametrize("rows", [2, 19])
def test_heads(rng, heads, rows):
    check(rng, qkv(rng, 1, rows, 40, heads=heads, dtype=mx.bfloat16))


@dtypes
@pytest.mark.parametrize("shape", [(1, MANY_ROWS - 1), (1, MANY_ROWS), (2, MANY_ROWS + 9), (3, 343)])
def test_many_rows(rng, shape, dtype):
    check(rng, qkv(rng, *shape, 12, heads=(2, 1, 10), dtype=dtype))
    check(rng, projections.output(rng, *shape, 16, 16, rank=3, dtype=dtype))


@dtypes
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (4, 5), (33, 1), (2, 17), (2, 65)])
def test_batches(rng, shape, dtype):
    check(rng, qkv(rng, *shape, 35, dtype=dtype))
    check(rng, projections.output(rng, *shape, 35, 70, dtype=dtype, rank=5))


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("ranks", [*SUBSETS, (256, None, 100), (40, 1, 7)], ids=str)
@pytest.mark.parametrize("rows", [*ROWS, 129])
def test_all_together(rng, rows, ranks, dtype):
    for packed, hidden, heads in ((True, 61, HEAD), (False, 264, (3, 1, 32))):
        check(rng, qkv(rng, 1, rows, hidden, ranks, heads, dtype=dtype, bias=packed, packed=packed))


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 20, 70])
def test_strided_operands(rng, rows, dtype):
    check(rng, qkv(rng, 2, rows, 37, dtype=dtype), kind=Embedded)
    check(rng, projections.output(rng, 2, rows, 37, 70, dtype=dtype, rank=5), kind=Embedded)


GRADIENTS = [(["input"], 2), (["lora_a"], 2), (["lora_b"], 2), (["input", "lora_b"], 4)]


@pytest.mark.parametrize("names, launches", GRADIENTS, ids=str)
def test_only_the_gradients_asked_for(rng, names, launches):
    op = qkv(rng, 1, 21, 37, (8, 3, 40))
    check_backward(rng, op, [key for key in trainable(op) if key[0] in names], launches)


@pytest.mark.parametrize("place", range(3))
def test_one_adapter_of_three_is_trained(rng, place):
    op = qkv(rng, 1, 21, 37, (8, 3, 40))
    check_backward(rng, op, [("lora_a", place), ("lora_b", place)], 4)


def integer_calls(rng, rows, dtype, draw):
    for ranks in (RANKS, (2, 9, 16)):
        for bias in (False, True):
            yield qkv(rng, 2, rows, 33, ranks, bias=bias, dtype=dtype, draw=draw)
    for alpha in (1.0, 0.75):
        yield projections.output(rng, 2, rows, 33, 66, alpha=alpha, rank=8, dtype=dtype, draw=draw)


@dtypes
@pytest.mark.parametrize("rows", [1, 4, 20, 65])
def test_exact_rounds_where_modules_do(rng, rows, dtype):
    """The same bits, on integers."""
    for op in integer_calls(rng, rows, dtype, operands.large_integers):
        expected = op.rounded_formula(dtype)
        _, outputs = forward(op.replace(exact=True))
        for y, e in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(oracle.exact(y), e)
        once = [oracle.rounded(y, dtype) for y in op.formula(*op.exact_operands)]
        _, outputs = forward(op)
        for y, e in zip(outputs, once, strict=True):
            np.testing.assert_array_equal(oracle.exact(y), e)
        if dtype != mx.float32:  # or else the two would not differ
            assert any((a != b).any() for a, b in zip(once, expected, strict=True))


@dtypes
@pytest.mark.parametrize("rows", [1, 20, 65])
def test_gradients_of_integers_are_exact(rng, rows, dtype):
    for op in integer_calls(rng, rows, dtype, operands.integers):
        keys, given = trainable(op), projections.cotangents(rng, op, operands.integers)
        _, grads = backward(op, given, keys)
        expected = op.gradient_formula(keys)(oracle.exact(given), *op.exact_operands)
        for g, e in zip(grads, expected, strict=True):
            np.testing.assert_array_equal(oracle.exact(g), oracle.rounded(e, g.dtype))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows(rng, shape):
    op = qkv(rng, *shape, 20)
    assert forward(op)[0].plan == []
    keys = trainable(op)
    call, grads = backward(op, projections.cotangents(rng, op), keys)
    assert [launch["kernel"] for launch in call.plan] == ["adapter_grad_3_float32", "adapter_grad_1_float32"]
    assert all(mx.all(g == 0).item() for g in grads[1:])


@pytest.mark.parametrize("rows", [3, 20])
def test_no_features_of_the_input(rng, rows):
    op = qkv(rng, 1, rows, 0)
    check_forward(op)
    call, grads = backward(op, projections.cotangents(rng, op), [("lora_b", 0)])
    assert mx.all(grads[0] == 0).item()
    call.assert_written_once()


@pytest.mark.parametrize("seed", range(1, 6))
def test_any_order_of_threads_gives_the_same(rng, seed):
    for rows in (5, 70):
        op = qkv(rng, 2, rows, 37)
        keys, given = trainable(op), projections.cotangents(rng, op)
        oracle.assert_equal(forward(op, seed=seed)[1], forward(op)[1])
        oracle.assert_equal(backward(op, given, keys, seed=seed)[1], backward(op, given, keys)[1])


@dtypes
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_nan_and_inf_stay_where_they_are(rng, rows, value, dtype):
    op = qkv(rng, 1, rows, 37, dtype=dtype)
    op.x[0, rows - 1, 36] = value
    check_forward(op)
    op = qkv(rng, 1, rows, 37, dtype=dtype)
    op.leaves["lora_b", 0][2, 5] = value
    check_forward(op)


class Far(Call):
    """Its batches, and the rows of adapters, are so far apart that 32-bit arithmetic would land elsewhere."""

    def input(self, array):
        if array is None or array.ndim < 2 or (array.ndim == 2 and array.dtype != mx.float32):
            return super().input(array)
        apart = 2**31 // max(len(array) - 1, 1) + 64
        data = sparse((apart * (len(array) - 1) + array[0].size,), to_numpy(array).dtype)
        for i, part in enumerate(to_numpy(array)):
            data[i * apart : i * apart + part.size] = part.reshape(-1)
        strides = [apart, *row_major(array.shape)[1:]]
        return self.tensor(array.shape, data, strides)


@pytest.mark.parametrize("rows", [2, 20])
def test_offsets_past_two_to_the_31(rng, rows):
    check(rng, qkv(rng, 2, rows, 20, (None, 9, None), dtype=mx.bfloat16), kind=Far)
