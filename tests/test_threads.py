"""Calls from several threads at once, each with arrays of its own."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlx.core as mx
import numpy as np
import pytest

import oracle
import projections
from operands import integers
from projections import check, check_backward, check_forward, check_outputs, cotangents
from test_forward import dtypes

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


@dtypes
def test_forward_and_backward_in_threads(dtype):
    def work(rng):
        # Sizes both below and above what one call shares out among cores, of few rows and of many.
        for seq, hidden in ((1, 70), (1, 2100), (3, 70), (3, 700), (40, 70), (200, 70)):
            call = projections.qkv(rng, 1, seq, hidden, (4, 2, 16), dtype=dtype)
            check_forward(call)
            check_backward(call, cotangents(rng, call))
            check_forward(projections.output(rng, 1, seq, hidden, 130, dtype=dtype))

    in_threads(work)


@dtypes
def test_quantized_weights_and_adapters_in_threads(dtype):
    def work(rng):
        for seq in (1, 3, 40, 200):
            check(
                rng, projections.qkv(rng, 1, seq, 64, (4, 2, 16), ("affine", 32, 4), dtype, ranks=(8, 8, 8))
            )
            check(rng, projections.output(rng, 1, seq, 64, 90, ("affine", 64, 4), dtype))
            check(rng, projections.linear(rng, 1, seq, 64, 90, dtype=dtype, activation="gelu"))
            check(rng, projections.gated(rng, 1, seq, 64, 700, ("affine", 64, 4), dtype, ranks=(8, 8)))

    in_threads(work)


def test_grad_and_compile_in_threads():
    def work(rng):
        call = projections.output(rng, 2, 9, 30, 20, draw=integers)
        keys, ones = list(call.leaves), [mx.ones((2, 9, 20))]
        expected = call.gradient_formula(keys)(oracle.exact(ones), *call.exact_operands)
        loss = lambda *values: call.function(keys)(*values)[0].sum()  # noqa: E731
        for transform in (lambda f: f, mx.compile):
            grads = transform(mx.grad(loss, argnums=(0, 1, 2, 3)))(*call.leaves.values())
            oracle.assert_equal(grads, expected)

    in_threads(work)


def test_several_streams_of_one_thread(rng):
    streams = [mx.new_stream(mx.cpu) for _ in range(4)]
    calls = []
    for i in range(24):
        call = projections.qkv(rng, 1, 33, 70, (4, 2, 16))
        outputs = call(stream=streams[i % 4])
        mx.async_eval(outputs)
        calls.append((call, outputs))
    for call, outputs in calls:
        check_outputs(call, outputs)


def test_beside_numpy_threads(rng):
    # NumPy brings an OpenBLAS of its own; both work at once and neither disturbs the other.
    call = projections.output(rng, 1, 128, 256, 256)
    a = np.ones((256, 256))

    def numpy_work():
        for _ in range(50):
            assert ((a @ a) == 256).all()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(numpy_work)
        while not future.done():
            outputs = call()
            mx.eval(outputs)
        future.result()
    check_outputs(call, outputs)


COMPARE = """
import mlx.core as mx, numpy as np
import oracle, projections
from operands import integers

rng = np.random.default_rng(0)
mx.set_default_device(mx.cpu)
for form in (None, ("affine", 32, 4)):
    call = projections.qkv(rng, 3, 50, 320, (4, 2, 24), form, packed=True, draw=integers)
    for rows in (1, 2, 50):  # on the caller's thread, of few rows, of many
        few = call.replace(input=call.x[:, :rows])
        oracle.assert_equal(few(route="fused"), few(route="composed"))
"""


def same_with_any_threads(code):
    """What ``code`` prints in a process of its own, which is the same with 1, 2 and 7 threads."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"MLX_FUSED_NUM_THREADS": threads},
            check=True,
            text=True,
            capture_output=True,
        ).stdout
        for threads in ("1", "2", "7")
    ]
    assert len(set(runs)) == 1
    return runs[0]


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
    environment = os.environ | {"MLX_FUSED_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", COMPARE], env=environment, check=True)
