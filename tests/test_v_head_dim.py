"""Values whose heads are of another size than those of queries and keys."""

import mlx.core as mx
import pytest

import mlx_fused
import operands
import oracle
import projections
from test_layouts import VIEWS

HEADS = [(4, 2, 8, 3), (2, 2, 16, 32), (5, 1, 1, 64)]
FORMS = {"dense": None, "affine": ("affine", 32, 4), "nvfp4": ("nvfp4", 16, 4)}
every_heads = pytest.mark.parametrize("heads", HEADS, ids=str)


@every_heads
@pytest.mark.parametrize("dtype", operands.DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [None, (4, None, 9)], ids=["plain", "lora"])
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forward_and_gradients(rng, form, packed, ranks, dtype, heads):
    for seq in (1, 5, 17, 66):
        call = projections.qkv(rng, 2, seq, 64, heads, form, dtype, packed=packed, ranks=ranks)
        q, k, v = projections.check_forward(call)
        assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (heads[2], heads[2], heads[3])
        projections.check_gradients(call, projections.cotangents(rng, call))


@every_heads
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_routes_and_layouts_agree(rng, form, packed, heads):
    integers = operands.integers
    call = projections.qkv(rng, 2, 5, 64, heads, form, packed=packed, ranks=(4, None, 2), draw=integers)
    fused = call(route="fused")
    oracle.assert_equal(call(route="composed"), fused)
    for by_token, by_head in zip(call(split_heads=False), fused, strict=True):
        oracle.assert_equal(by_token, by_head.transpose(0, 2, 1, 3).flatten(2))


@every_heads
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("view", VIEWS)
def test_backward_by_hand(rng, view, packed, heads):
    x, weight, bias = operands.qkv(rng, 2, 5, 21, heads, packed=packed)
    cotangents = tuple(map(view, operands.qkv_cotangents(rng, 2, 5, heads)))
    *sizes, v_head_dim = heads
    args = (*cotangents, x, weight, True)
    grads = mlx_fused.fused_qkv_projection_bwd(*args, *sizes, v_head_dim=v_head_dim)
    oracle.assert_close(grads, oracle.fused_qkv_projection_bwd, *args, *heads)
    outputs = mlx_fused.composed.fused_qkv_projection(x, weight, bias, *sizes, v_head_dim=v_head_dim)
    oracle.assert_close(outputs, oracle.fused_qkv_projection, x, weight, bias, *heads, roundings=2)


@every_heads
def test_vmap_and_compile(rng, heads):
    call = projections.qkv(rng, 2, 5, 64, heads, draw=operands.integers)
    x = call.arguments["input"]
    project = call.function([("input", None)])
    expected = [mx.stack(pair) for pair in zip(project(x), project(2 * x), strict=True)]
    oracle.assert_equal(mx.vmap(project)(mx.stack([x, 2 * x])), expected)
    oracle.assert_equal(mx.compile(project)(x), project(x))


def test_errors(rng):
    x, weight, _ = operands.qkv(rng, 1, 2, 8, (4, 2, 4, 3))
    with pytest.raises(ValueError, match=r"weight\[2\] must have shape \(8, 8\) but got \(6, 8\)"):
        mlx_fused.fused_qkv_projection(x, weight, None, 4, 2, 4)
    with pytest.raises(ValueError, match="v_head_dim must be at least 1 but got 0"):
        mlx_fused.fused_qkv_projection(x, weight, None, 4, 2, 4, v_head_dim=0)
    with pytest.raises(ValueError, match=r"below 2\^31 but got .* head_dim 4 and v_head_dim 2000000000"):
        mlx_fused.fused_qkv_projection(x, weight, None, 4, 2, 4, v_head_dim=2_000_000_000)
