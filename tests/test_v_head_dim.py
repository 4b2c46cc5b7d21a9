"""Values whose heads are of another size than those of queries and keys."""

import mlx.core as mx
import pytest

import operands
import oracle
import projections
from test_forward import dtypes, packings
from test_layouts import views
from test_split_heads import tokens

HEADS = [(4, 2, 8, 3), (2, 2, 16, 32), (5, 1, 1, 64)]
FORMS = {"dense": None, "affine": ("affine", 32, 4), "nvfp4": ("nvfp4", 16, 4)}
every_heads = pytest.mark.parametrize("heads", HEADS, ids=str)


@every_heads
@dtypes
@pytest.mark.parametrize("ranks", [None, (4, None, 9)], ids=["plain", "lora"])
@packings
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forward_and_gradients(rng, form, packed, ranks, dtype, heads):
    for seq in (1, 5, 17, 66):
        call = projections.qkv(rng, 2, seq, 64, heads, form, dtype, packed=packed, ranks=ranks)
        q, k, v = projections.check_forward(call)
        assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (heads[2], heads[2], heads[3])
        projections.check_gradients(call, projections.cotangents(rng, call))


@every_heads
@packings
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_routes_and_layouts_agree(rng, form, packed, heads):
    options = {"packed": packed, "ranks": (4, None, 2), "draw": operands.integers}
    call = projections.qkv(rng, 2, 5, 64, heads, form, **options)
    fused = call(route="fused")
    oracle.assert_equal(call(route="composed"), fused)
    oracle.assert_equal(call(split_heads=False), tokens(fused))


@every_heads
@packings
@views
def test_backward_by_hand(rng, view, packed, heads):
    call = projections.qkv(rng, 2, 5, 21, heads, packed=packed)
    projections.check_backward(call, tuple(map(view, projections.cotangents(rng, call))))
    projections.check_forward(call, roundings=2, route="composed")


@every_heads
def test_vmap_and_compile(rng, heads):
    call = projections.qkv(rng, 2, 5, 64, heads, draw=operands.integers)
    x, project = call.x, call.function([("input", None)])
    expected = [mx.stack(pair) for pair in zip(project(x), project(2 * x), strict=True)]
    oracle.assert_equal(mx.vmap(project)(mx.stack([x, 2 * x])), expected)
    oracle.assert_equal(mx.compile(project)(x), project(x))


def test_errors(rng):
    call = projections.qkv(rng, 1, 2, 8, (4, 2, 4, 3), bias=False)
    with pytest.raises(ValueError, match=r"weight\[2\] must have shape \(8, 8\) but got \(6, 8\)"):
        call(v_head_dim=None)
    with pytest.raises(ValueError, match="v_head_dim must be at least 1 but got 0"):
        call(v_head_dim=0)
    with pytest.raises(ValueError, match=r"below 2\^31 but got .* head_dim 4, v_head_dim 2000000000"):
        call(v_head_dim=2_000_000_000)
