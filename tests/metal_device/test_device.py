"""What the other suites cannot ask: which route a call takes on the device, and whether validation is on."""

import subprocess
import sys

import mlx.core as mx
import pytest

import oracle
import projections
from graph import primitives

HEADS = (4, 2, 16)
OUT_OF_BOUNDS = """
import mlx.core as mx
read = mx.fast.metal_kernel("far", ["x"], ["y"], "y[thread_position_in_grid.x] = x[1 << 26];")
mx.eval(read(inputs=[mx.ones(4096)], grid=(1, 1, 1), threadgroup=(1, 1, 1),
             output_shapes=[(1,)], output_dtypes=[mx.float32]))
"""


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("keyword, variable", [(None, ""), ("fused", "composed"), ("composed", "fused")])
def test_each_route_is_taken_and_right(rng, rows, keyword, variable, monkeypatch):
    monkeypatch.setenv("MLX_FUSED_ROUTE", variable)
    qkv, output = projections.qkv(rng, 1, rows, 48, HEADS), projections.output(rng, 1, rows, 48, 40)
    given = projections.cotangents(rng, qkv)
    grads = oracle.leaves(projections.backward(qkv, given, route=keyword))
    results = [(call, call(route=keyword)) for call in (qkv, output)]
    for first, *_ in (grads, *(outputs for _, outputs in results)):
        if keyword:
            ours = any(node.startswith("Fused") for node in primitives(first))
            assert ours == (keyword == "fused")
    # MLX rounds its products before it adds.
    for call, outputs in results:
        projections.check_outputs(call, outputs, roundings=3)
    projections.check_grads(qkv, given, list(qkv.leaves), grads, roundings=3)


def test_the_validation_layer_stops_a_read_out_of_bounds(device):
    """Or else that no test was stopped would say nothing."""
    if device == mx.cpu:
        pytest.skip("a rehearsal has no validation layer")
    run = subprocess.run([sys.executable, "-c", OUT_OF_BOUNDS], capture_output=True, text=True, timeout=300)
    assert run.returncode != 0, run.stderr
