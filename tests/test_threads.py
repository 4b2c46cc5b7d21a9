"""Calls from several threads at once, each with arrays of its own."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused
import operands
import oracle

THREADS = 8


def in_threads(work):
    """Runs work(rng) in THREADS threads that start together; raises what any of them raised."""
    barrier = Barrier(THREADS)

    def start(seed):
        barrier.wait()
        with mx.stream(mx.cpu):
            return work(np.random.default_rng(seed))

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(start, seed) for seed in range(THREADS)]:
            future.result()


@pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
def test_forward_and_backward_in_threads(dtype):
    heads = (4, 2, 16)

    def work(rng):
        # Sizes both below and above what one call shares out among cores, of few rows and of many.
        for seq, hidden in ((1, 70), (1, 2100), (3, 70), (3, 700), (40, 70), (200, 70)):
            x, weight, bias = operands.qkv(rng, 1, seq, hidden, heads, dtype)
            outputs = mlx_fused.fused_qkv_projection(x, weight, bias, *heads)
            oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *heads)
            cotangents = operands.qkv_cotangents(rng, 1, seq, heads, dtype)
            args = (*cotangents, x, weight, True, *heads)
            grads = mlx_fused.fused_qkv_projection_bwd(*args)
            oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args)
            args = operands.output(rng, 1, seq, hidden, 130, dtype)
            out = mlx_fused.fused_output_projection_residual(*args)
            oracle.assert_close(out, oracle.fused_output_projection_residual, *args)

    in_threads(work)


def test_grad_and_compile_in_threads():
    def work(rng):
        a, w, b, r = operands.output(rng, 2, 9, 30, 20, draw=operands.integers)

        def loss(a, w, b, r):
            return mlx_fused.fused_output_projection_residual(a, w, b, r).sum()

        ones = mx.ones((2, 9, 20))
        expected = oracle.fused_output_projection_residual_bwd(*oracle.exact((ones, a, w)), True)
        for transform in (lambda f: f, mx.compile):
            grads = transform(mx.grad(loss, argnums=(0, 1, 2, 3)))(a, w, b, r)
            oracle.assert_equal(grads, expected)

    in_threads(work)


def test_several_streams_of_one_thread(rng):
    heads = (4, 2, 16)
    streams = [mx.new_stream(mx.cpu) for _ in range(4)]
    calls = []
    for i in range(24):
        args = operands.qkv(rng, 1, 33, 70, heads)
        outputs = mlx_fused.fused_qkv_projection(*args, *heads, stream=streams[i % 4])
        mx.async_eval(outputs)
        calls.append((args, outputs))
    for args, outputs in calls:
        oracle.assert_close(outputs, oracle.fused_qkv_projection, *args, *heads)


def test_beside_numpy_threads(rng):
    # NumPy brings an OpenBLAS of its own; both work at once and neither disturbs the other.
    args = operands.output(rng, 1, 128, 256, 256)
    a = np.ones((256, 256))

    def numpy_work():
        for _ in range(50):
            assert ((a @ a) == 256).all()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(numpy_work)
        while not future.done():
            out = mlx_fused.fused_output_projection_residual(*args)
            mx.eval(out)
        future.result()
    oracle.assert_close(out, oracle.fused_output_projection_residual, *args)


COMPARE = """
import mlx.core as mx, mlx_fused

def integers(low, high, *shape):
    return mx.random.randint(low, high, shape).astype(mx.float32)

x, w, b = integers(-2, 3, 3, 50, 320), integers(-2, 3, 192, 320), integers(-2, 3, 192)
codes = mx.random.randint(0, 2**32, (192, 40), mx.uint32)
scales, biases = mx.ones((192, 10)), mx.full((192, 10), -8.0)
quantized = mlx_fused.LinearOperands(codes, b, scales, biases, group_size=32, bits=4)
for rows in (1, 2, 50):  # on the caller's thread, of few rows, of many
    for layer in (mlx_fused.LinearOperands(w, b), quantized):
        args = (x[:, :rows], layer, None, 4, 2, 24)
        pairs = zip(*(mlx_fused.fused_qkv_projection(*args, route=route) for route in ("fused", "composed")))
        assert all(mx.array_equal(*pair) for pair in pairs)
"""


@pytest.mark.parametrize(
    "threads", ["0", "-1", "1025", "1073741824", "2147483648", "9" * 30, "two", "2.0", " 2"]
)
def test_numbers_of_threads_that_are_none(threads):
    code = """
import mlx.core as mx, mlx_fused
x = mx.ones((1, 2, 4))
try:
    mlx_fused.fused_output_projection_residual(x, mx.ones((4, 4)), residual=x, stream=mx.cpu)
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"MLX_FUSED_NUM_THREADS": threads}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, text=True, capture_output=True
    )
    assert run.stdout == f"MLX_FUSED_NUM_THREADS must be a number from 1 to 1024 but got '{threads}'.\n"


@pytest.mark.parametrize("threads", ["1", "2", "9", "1024", ""])
def test_any_number_of_threads(threads):
    environment = os.environ | {"MLX_FUSED_NUM_THREADS": threads}
    subprocess.run([sys.executable, "-c", COMPARE], env=environment, check=True)
