"""What the other suites cannot ask: which route a call takes on the device, and whether validation is on."""

import subprocess
import sys

import mlx.core as mx
import pytest

import mlx_fused
import operands
import oracle
from graph import primitives

HEADS = (4, 2, 16)
OUT_OF_BOUNDS = """
import mlx.core as mx
read = mx.fast.metal_kernel("far", ["x"], ["y"], "y[thread_position_in_grid.x] = x[1 << 26];")
mx.eval(read(inputs=[mx.ones(4096)], grid=(1, 1, 1), threadgroup=(1, 1, 1),
             output_shapes=[(1,)], output_dtypes=[mx.float32]))
"""


def calls(rng, rows):
    """The operations that have kernels of ours, as (function, formula, arguments)."""
    forward = *operands.qkv(rng, 1, rows, 48, HEADS), *HEADS
    backward = *operands.qkv_cotangents(rng, 1, rows, HEADS), *forward[:2], True, *HEADS
    output = operands.output(rng, 1, rows, 48, 40)
    yield mlx_fused.fused_qkv_projection, oracle.fused_qkv_projection, forward
    yield mlx_fused.fused_qkv_projection_bwd, oracle.fused_qkv_projection_bwd, backward
    yield mlx_fused.fused_output_projection_residual, oracle.fused_output_projection_residual, output


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("keyword, variable", [(None, ""), ("fused", "composed"), ("composed", "fused")])
def test_each_route_is_taken_and_right(rng, rows, keyword, variable, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", variable)
    for function, formula, args in calls(rng, rows):
        results = function(*args, route=keyword)
        first = results if isinstance(results, mx.array) else results[0]
        if keyword:
            ours = any(node.startswith("Fused") for node in primitives(first))
            assert ours == (keyword == "fused")
        oracle.assert_close(results, formula, *args, roundings=3)  # MLX rounds its products before it adds


def test_the_validation_layer_stops_a_read_out_of_bounds(device):
    """Or else that no test was stopped would say nothing."""
    if device == mx.cpu:
        pytest.skip("a rehearsal has no validation layer")
    run = subprocess.run([sys.executable, "-c", OUT_OF_BOUNDS], capture_output=True, text=True, timeout=300)
    assert run.returncode != 0, run.stderr
